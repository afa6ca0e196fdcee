"""One pass over flat buffers: mix the neighbours' messages, apply an update rule, write back.

CUDA tensors take the Triton kernel of `fused_pass`, CPU tensors torch's own kernels in the batches of `cpu_pass`, or the
plain torch of `reference`. A new rule is one function in `rules.py` and its twin in `reference.py`. What a method does
before and after its exchange are two rules.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import cpu_pass, reference
from .compiled import RULES as COMPILED_RULES
from .compiled import compile_now
from .hyper import adam_hyper, sgd_hyper
from .passes import Pass
from .region import BLOCK, Gradients, Region
from .wire import Wire

__all__ = [
    "BLOCK",
    "COMPILED_RULES",
    "RULES",
    "Gradients",
    "Pass",
    "Region",
    "Wire",
    "adam_hyper",
    "advance_steps",
    "compile_now",
    "run_pass",
    "sgd_hyper",
]

RULES: tuple[str, ...] = tuple(reference.RULES)
"""Names of the update rules; `reference` describes each."""


def run_pass(work: Pass) -> None:
    """Make a pass; see `Pass` for what it does.

    Raises:
        ValueError: for an unknown rule or `missing`, lengths of sent, inbox and weights or of states and messages that
            disagree with each other or with the rule, and on CUDA for fp64 or a missing table.
    """
    work.check(tuple(reference.RULES))
    if work.param.is_cuda:
        from .fused_pass import launch as run
    else:
        run = cpu_pass.run_pass
    run(work)


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
