"""The main rules on the CPU as one loop each, compiled by torch's Inductor: every tensor is read and written once.

A compiled function takes all numbers in one tensor, so that a schedule recompiles nothing. They are lowered first:
powers of betas, which the compiler would leave in the loop, are taken on the host, and options such as nesterov or the
first step of momentum become factors. One function serves a rule with any options; the number of neighbours, of states
and the dtypes make others.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .hyper import Adam, Sgd

# A call costs 40 us or so, which a smaller parameter does not earn back.
SMALLEST = 1 << 15


def _mixed(x: Tensor, inbox: Sequence[Tensor], weights: Tensor) -> Tensor:
    mixed = x
    for k, received in enumerate(inbox):
        mixed = mixed + weights[k] * (received.to(x.dtype) - x)
    return mixed


def _descent(gradient: Tensor, x: Tensor, scale: Tensor, decay: Tensor) -> Tensor:
    # Without decay, an x that is not finite stays out of it, and out of the moments.
    return scale * gradient.to(x.dtype) + torch.where(decay != 0, decay * x, 0.0)


def _mix(param: Tensor, inbox: Sequence[Tensor], numbers: Tensor) -> None:
    param.copy_(_mixed(param.to(numbers.dtype), inbox, numbers))


def _sgd(param: Tensor, gradient: Tensor, states: Sequence[Tensor], inbox: Sequence[Tensor], numbers: Tensor) -> None:
    x = param.to(numbers.dtype)
    lr, carried, undamped, direct, through, scale, decay = numbers[:7].unbind()
    d = _descent(gradient, x, scale, decay)
    step = d
    if states:
        buf = carried * states[0] + undamped * d
        step = direct * d + through * buf
        states[0].copy_(buf)
    param.copy_(_mixed(x, inbox, numbers[7:]) - lr * step)


def _adam(param: Tensor, gradient: Tensor, states: Sequence[Tensor], inbox: Sequence[Tensor], numbers: Tensor) -> None:
    x = param.to(numbers.dtype)
    size, rescale, eps, drawn, beta1, undecayed1, beta2, undecayed2, scale, decay = numbers[:10].unbind()
    d = _descent(gradient, x, scale, decay)
    m = beta1 * states[0] + undecayed1 * d  # with the difference, a large m drowns a small d where beta1 is 0
    v = beta2 * states[1] + undecayed2 * (d * d)
    top = torch.maximum(states[2], v) if len(states) == 3 else v
    param.copy_(_mixed(x, inbox, numbers[10:]) - size * (m / (top.sqrt() * rescale + eps)) - drawn * x)
    for state, new in zip(states, (m, v, top), strict=False):
        state.copy_(new)


def _sgd_numbers(step: float, numbers: Sequence[float], scale: float) -> list[float]:
    hyper = Sgd(*numbers)
    carried, undamped = (0.0, 1.0) if step == 1 else (hyper.momentum, hyper.undamped)
    direct, through = (1.0, hyper.momentum) if hyper.nesterov else (0.0, 1.0)
    return [hyper.lr, carried, undamped, direct, through, hyper.sign * scale, hyper.decay]


def _adam_numbers(step: float, numbers: Sequence[float], scale: float) -> list[float]:
    hyper = Adam(*numbers)
    size, rescale = hyper.lr / (1.0 - hyper.beta1**step), (1.0 - hyper.beta2**step) ** -0.5
    moments = [hyper.beta1, hyper.undecayed1, hyper.beta2, hyper.undecayed2]
    return [size, rescale, hyper.eps, hyper.lr * hyper.decoupled, *moments, hyper.sign * scale, hyper.coupled]


_LOWERED: dict[str, tuple[Callable[..., None], Callable[[float, Sequence[float], float], list[float]]]] = {
    "sgd": (_sgd, _sgd_numbers),
    "adam": (_adam, _adam_numbers),
}

RULES = ("mix", *_LOWERED)
"""The rules that can be compiled."""


def update(
    rule: str,
    x: Tensor,
    gradient: Tensor | None,
    states: Sequence[Tensor],
    inbox: Sequence[Tensor],
    weights: Sequence[float],
    step: float,
    hyper: Sequence[float],
    scale: float,
) -> None:
    """One parameter's part of a pass with `rule` ("sgd" or "adam"), in place; without a gradient it is only mixed.

    Args:
        x: [N], of any dtype; gradient, states and the K tensors of inbox are [N] too.
        weights: K floats, none of them zero.
        step: the step being taken, from 1; hyper: as for `reference.RULES`; scale: multiplies the gradient.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if gradient is None:
        if inbox:
            _function("mix", x.dtype, 0, len(inbox), torch.get_num_threads())(
                x, inbox, torch.tensor(weights, dtype=dtype)
            )
        return
    numbers = torch.tensor([*_LOWERED[rule][1](step, hyper, scale), *weights], dtype=dtype)
    _function(rule, x.dtype, len(states), len(inbox), torch.get_num_threads())(x, gradient, states, inbox, numbers)


@functools.cache
def _function(rule: str, dtype: torch.dtype, states: int, neighbours: int, threads: int) -> Callable[..., None]:
    # Dynamo counts recompilations by code object and gives up at eight: each variant gets a code object of its own.
    plain = _mix if rule == "mix" else _LOWERED[rule][0]
    name = f"{rule}_{str(dtype).removeprefix('torch.')}_{states}_{neighbours}_{threads}"
    own = types.FunctionType(plain.__code__.replace(co_name=name), plain.__globals__, name)
    # Inductor writes the number of threads into the code, and leaves loops serial that are short when it sees them first,
    # as in `compile_now`.
    options: dict[str, Any] = {"cpp.threads": threads, "cpp.min_chunk_size": 1}
    compiled: Callable[..., None] = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    return compiled


@torch.no_grad()
def compile_now(rule: str, dtype: torch.dtype, states: int, neighbours: int) -> None:
    """Compile what passes with `rule` will call, in ten seconds or so; later processes find it in Inductor's cache.

    Args:
        rule: one of `RULES`.
        dtype: of the parameters.
        states, neighbours: how many there are of each.

    Raises:
        Exception: whatever torch.compile raises where it cannot compile, for instance without a C++ compiler.
    """
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, gradient, *inbox = (torch.zeros(96, dtype=dtype) for _ in range(2 + neighbours))
    kept = [torch.zeros(96, dtype=state_dtype) for _ in range(states)]
    weights = [0.5] * neighbours
    if rule != "mix":
        hyper = {"sgd": (0.0,) * 6, "adam": (0.0, 0.9, 0.1, 0.9, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0)}[rule]
        update(rule, x, gradient, kept, inbox, weights, 1.0, hyper, 1.0)
    update(rule, x, None, (), inbox, weights, 1.0, (), 1.0)
