"""One pass over flat buffers: mix the neighbours' messages, apply an update rule, write back.

CUDA tensors take the Triton kernel of `fused_pass`, CPU tensors torch's own kernels in the batches of `cpu_pass`, or the
plain torch of `reference`. A new rule is one function in `rules.py` and its twin in `reference.py`. What a method does
before and after its exchange are two rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from . import cpu_pass, reference
from .compiled import RULES as COMPILED_RULES
from .compiled import compile_now
from .hyper import adam_hyper, sgd_hyper
from .region import BLOCK, Gradients, Region

__all__ = [
    "BLOCK",
    "COMPILED_RULES",
    "RULES",
    "Gradients",
    "Region",
    "adam_hyper",
    "advance_steps",
    "compile_now",
    "run_pass",
    "sgd_hyper",
]

RULES: tuple[str, ...] = tuple(reference.RULES)
"""Names of the update rules; `reference` describes each."""


def run_pass(
    rule: str,
    param: torch.Tensor,
    states: Sequence[torch.Tensor],
    hyper: Sequence[float],
    *,
    region: Region,
    grads: Gradients | None = None,
    steps: torch.Tensor | None = None,
    sent: Sequence[torch.Tensor] = (),
    inbox: Sequence[Sequence[torch.Tensor]] = (),
    weights: Sequence[float] = (),
    row_sum: float = 1.0,
    messages: Sequence[torch.Tensor] = (),
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    missing: Literal["skip", "zero"] = "skip",
    extra: torch.Tensor | None = None,
    figures: torch.Tensor | None = None,
) -> None:
    """Mix, update and write back the parameters of a region, in place.

        mixed_m = row_sum*sent_m + sum_k weights[k]*(inbox[m][k] - sent_m)
        param, states, messages = RULE(param, mixed, gradient*grad_scale, states, steps[p] + 1, (*hyper, extra))

    Arithmetic is fp32 (fp64 for fp64 parameters, CPU only) whatever the storage. A neighbour of weight 0 is skipped,
    NaNs and all. Padding is left as it is.

    A gradient is missing where there is none, and everywhere if `found_inf` is not zero; its values are not read. The
    parameter is then mixed but not updated: it becomes mixed[0], its states stay, and message m is mixed[m]. Methods
    that correct the network's mean, as tracking does, need `missing="zero"`, which applies the rule with g = 0.

    Args:
        rule: one of `RULES`.
        param: flat parameters [N], fp32, bf16 or fp16, or fp64 on the CPU.
        states: flat states [N] of the rule, fp32 (fp64 with fp64 parameters).
        hyper: the rule's floats, in the order that its function in `reference` documents.
        region: the parameters to go over.
        grads: this step's gradients. None means that the pass has none: the rule is applied everywhere, with g = 0.
        steps: fp32 [P], per parameter of the segment, how many updates were made before this one; None counts as 0.
        sent: M flat tensors [N], what the neighbours got from us, of any dtype that `param` may have; () means (param,).
            They may be `param` and states themselves.
        inbox: M tuples of K flat tensors [N], neighbours in ascending rank; () means no neighbours. A rule that leaves
            the parameters alone, as some that come before an exchange do, takes none.
        weights: K floats.
        row_sum: sum of the mixing matrix's row; 1 is exact.
        messages: flat tensors [N] that the rule's messages are written to, in their own dtype; () writes none.
        grad_scale: fp32 scalar tensor on the device that multiplies gradients; None means 1.
        found_inf: fp32 scalar tensor on the device; not zero means that all gradients are missing.
        missing: what a missing gradient means: "skip" that the parameter is only mixed, "zero" that g = 0.
        extra: fp32 scalar tensor on the device (fp64 with fp64 parameters), a number that the host need not know, which
            is appended to `hyper`.
        figures: [rows, 2] (fp32 on CUDA, fp64 on the CPU) that is overwritten with sums which the pass takes on its way:
            of (mixed[0] - row_sum*sent[0])^2, how much neighbours disagree with this rank, and of (gradient*grad_scale)^2,
            which is not finite if a gradient is not. One row per row of `region.blocks` on CUDA, per parameter of the
            region on the CPU.

    Raises:
        ValueError: for an unknown rule or `missing`, lengths of sent, inbox and weights or of states and messages that
            disagree with each other or with the rule, and on CUDA for fp64 or a missing table.
    """
    _check(rule, sent, inbox, weights, missing)
    if param.is_cuda:
        from .fused_pass import launch as run
    else:
        run = cpu_pass.run_pass
    run(
        rule,
        param,
        states,
        hyper,
        region,
        grads,
        steps,
        sent,
        inbox,
        weights,
        row_sum,
        messages,
        grad_scale,
        found_inf,
        missing,
        extra,
        figures,
    )


def advance_steps(
    steps: torch.Tensor,
    grads: Gradients,
    found_inf: torch.Tensor | None = None,
    missing: Literal["skip", "zero"] = "skip",
) -> None:
    """`steps[p] += 1` for every parameter that a pass with these arguments has updated.

    Args:
        steps: fp32 [P], changed in place.
        grads: the gradients of the P parameters of the segment.
        found_inf: fp32 scalar tensor on the device, or None.
        missing: "skip" advances parameters that have a gradient, and none if `found_inf` is not zero; "zero" all.

    Raises:
        ValueError: if `grads` has no address table on CUDA.
    """
    if missing == "zero":
        steps += 1.0
        return
    if steps.is_cuda:
        from .fused_pass import launch_advance as advance
    else:
        advance = reference.advance_steps
    advance(steps, grads, found_inf)


def _check(
    rule: str,
    sent: Sequence[torch.Tensor],
    inbox: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    missing: str,
) -> None:
    if rule not in reference.RULES:
        raise ValueError(f"unknown update rule {rule!r}; there are {', '.join(RULES)}")
    if missing not in ("skip", "zero"):
        raise ValueError(f'missing is "skip" or "zero", not {missing!r}')
    if inbox and len(inbox) != max(len(sent), 1):
        raise ValueError(f"{len(inbox)} inboxes for {max(len(sent), 1)} messages sent")
    if any(len(received) != len(weights) for received in inbox or ((),)):
        raise ValueError(f"{len(weights)} weights for inboxes of {[len(received) for received in inbox]} neighbours")
