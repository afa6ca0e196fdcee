"""The pass in plain torch: the specification of the GPU kernel, and the path of CPU tensors that `cpu_pass` leaves to it.

A parameter is gone over in chunks that stay in cache; the rules are those of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .passes import Pass
from .reference import RULES, Tensors, mix_messages
from .region import Gradients, Region
from .rounding import keep, noise, restored
from .wire import cut, give, scales_of, take

# Elements per chunk and thread. A chunk's temporaries stay in a core's caches, and torch gives each thread one piece of
# a chunk. AdamW with one neighbour on 4M elements, one core with 1 MB of L2: 21 ms at 16,384, 15 at 32,768, 12 at
# 65,536, 36 at 1M.
CHUNK = 65536


@torch.no_grad()
def run_pass(work: Pass) -> None:
    """`fusedfog.kernels.run_pass` on CPU tensors, parameter by parameter, in chunks that stay in cache.

    Raises:
        ValueError: if a gradient has not its parameter's number of elements, or states or messages (unless empty) are
            not as many as the rule makes.
    """
    work = work.with_numbers_at_hand()
    hyper = (*work.hyper,) if work.extra is None else (*work.hyper, work.extra.item())
    gradient = work.gradient
    skip = gradient.found_inf is not None and gradient.found_inf.item() != 0
    scale = 1.0 if gradient.grad_scale is None else gradient.grad_scale.item()
    width = CHUNK * torch.get_num_threads()
    if work.norm_sums is not None:
        work.norm_sums.zero_()
    found = in_memory_order(work.region, None if skip else gradient.grads)
    for position, ((start, numel), whole) in enumerate(zip(work.region.spans, found, strict=True)):
        steps = gradient.steps
        step = 1.0 if steps is None else steps[work.region.first + position].item() + 1.0
        sums = None if work.norm_sums is None else work.norm_sums[position]
        for low in range(0, numel, width):
            high = min(low + width, numel)
            piece = None if whole is None else whole[low:high]
            _run_chunk(work, start + low, start + high, piece, scale, step, hyper, sums)
    advance_steps(work)


def _run_chunk(
    work: Pass,
    start: int,
    stop: int,
    gradient: Tensor | None,
    scale: float,
    step: float,
    hyper: Sequence[Any],
    sums: Tensor | None,
) -> None:
    """A pass over elements [start, stop) of one parameter; `sums` is the parameter's row of norm sums."""
    here = slice(start, stop)
    remainder = None if work.precision.remainder is None else work.precision.remainder[here]
    x = restored(work.param[here], remainder)
    bases, mixed = _mixed(work, x, start, stop)
    kept = tuple(state[here] for state in work.states)
    if sums is not None:
        sums[0] += square_sum(mixed[0] - work.mixing.row_sum * bases[0])
    if work.gradient.missing == "skip" and work.gradient.grads is not None and gradient is None:
        x_new, states_new = mixed[0], None
        count = max(len(work.messages), len(work.compression.given))
        made = tuple(mixed[m] if m < len(mixed) else mixed[0] for m in range(count))
    else:
        if gradient is None:
            g = torch.zeros_like(x)  # Not scaled: the scale of gradients that overflowed may be NaN.
        else:
            g = gradient.to(x.dtype)
            g = g if scale == 1 else g * scale
            if sums is not None:
                sums[1] += square_sum(g)
        x_new, states_new, made = RULES[work.rule](x, mixed, g, tuple(map(_wide, kept)), step, hyper)
    # `x_new is x` says that a rule leaves the parameters alone.
    _store(work, start, stop, None if x_new is x else x_new, states_new, made)


def _store(work: Pass, start: int, stop: int, x_new: Tensor | None, states: Tensors | None, messages: Tensors) -> None:
    """Write a pass's results to elements [start, stop); None for parameters or states that stay."""
    here, seed = slice(start, stop), work.precision.seed
    kept, out = tuple(state[here] for state in work.states), tuple(message[here] for message in work.messages)
    given = tuple(cut(wire, start, stop) for wire in work.compression.given)

    def bits(stream: int, target: Tensor) -> Tensor | None:
        narrow = target.dtype in (torch.bfloat16, torch.float16)
        return None if seed is None or not narrow else noise(seed, stream, start, stop - start)

    if states is not None:
        _check_number(work.rule, "states", kept, states)
        for s, (state, value) in enumerate(zip(kept, states, strict=True)):
            keep(value, state, None, bits(1 + s, state))
    for targets in (out, given):
        _check_number(work.rule, "messages", targets, messages if targets else ())
    for message, value in zip(out, messages, strict=False):
        message.copy_(value)
    for wire, value in zip(given, messages, strict=False):
        give(wire, value, work.compression.spoilt)
    # Last: x, mixed or a message may be a view of param.
    if x_new is not None:
        home, remainder = work.param[here], work.precision.remainder
        if remainder is None:
            keep(x_new, home, None, bits(0, home))
        else:
            keep(x_new, home, remainder[here], None)


def _mixed(work: Pass, x: Tensor, start: int, stop: int) -> tuple[Tensors, Tensors]:
    """What each message is compared with, and each message mixed."""
    here, mixing, remainder = slice(start, stop), work.mixing, work.precision.remainder
    taken, scales = work.compression.taken, work.compression.scales
    sent = mixing.sent or (work.param,)
    inbox, scales = tuple(mixing.inbox) or ((),) * len(sent), tuple(scales) or ((),) * len(sent)
    bases, mixed = [], []
    for m, (tensor, received) in enumerate(zip(sent, inbox, strict=True)):
        base = x if tensor is work.param else tensor[here].to(x.dtype)
        arrived = [flat[here] for flat in received]
        if taken:
            exponents = [scales_of(found, start, stop) for found in scales[m]]
            neighbor_delta = take(cut(taken[m], start, stop), arrived, exponents, mixing.weights)
            strength = work.compression.strength
            pull = neighbor_delta if strength == 1 else neighbor_delta * strength
            result = pull + (base if mixing.row_sum == 1 else base * mixing.row_sum)
        else:
            own = work.param[here].to(x.dtype) if tensor is work.param and remainder is not None else base
            result = mix_messages(base, arrived, mixing.weights, mixing.row_sum, own, mixing.alarm)
        bases.append(base)
        # Not x itself, where nothing was mixed in: x as a result means that a rule leaves param and remainder alone.
        mixed.append(result.view_as(result) if result is x and remainder is not None else result)
    return tuple(bases), tuple(mixed)


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares of a flat tensor, in its dtype."""
    return torch.dot(values, values)


@torch.no_grad()
def advance_steps(work: Pass) -> None:
    """Count the update that a pass on CPU tensors has made, where it counts and was made."""
    region, gradient = work.region, work.gradient
    if gradient.steps is None or not gradient.advance:
        return
    here = slice(region.first, region.first + len(region.spans))
    if gradient.missing == "zero" or gradient.grads is None:
        gradient.steps[here] += 1.0
    elif gradient.found_inf is None or gradient.found_inf.item() == 0:
        present = [one is not None for one in gradient.grads.tensors[here]]
        gradient.steps[here] += torch.tensor(present, dtype=gradient.steps.dtype)


def in_memory_order(region: Region, grads: Gradients | None) -> list[Tensor | None]:
    """Each parameter's gradient as it lies in memory, which is the flat buffer's order whatever its strides.

    Raises:
        ValueError: if a gradient has not its parameter's number of elements.
    """
    found: list[Tensor | None] = []
    for index, (_, numel) in enumerate(region.spans, region.first):
        gradient = None if grads is None else grads.tensors[index]
        if gradient is not None and gradient.numel() != numel:
            raise ValueError(
                f"the gradient of parameter {index} has {gradient.numel()} elements, its parameter {numel}"
            )
        found.append(gradient if gradient is None or gradient.ndim == 1 else gradient.as_strided((numel,), (1,)))
    return found


def _wide(state: Tensor) -> Tensor:
    return state.float() if state.dtype in (torch.bfloat16, torch.float16) else state


def _check_number(rule: str, what: str, targets: Sequence[object], values: Sequence[object]) -> None:
    if len(targets) != len(values):
        raise ValueError(f"rule {rule!r} makes {len(values)} {what}, but {len(targets)} were given")
