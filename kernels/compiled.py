"""The main rules on the CPU as one loop, in C++ (`compiled.cpp`, `formats.hpp`): every tensor is read and written once.

For what torch has no call that does it in one sweep: neighbours mixed in by the way, values that are not finite left out,
compressed messages decoded and made. One function serves all rules, dtypes and numbers of neighbours, and takes all numbers
as arguments, so that it is compiled once, by torch's own way of compiling for the CPU. Numbers are lowered first: powers of
betas are taken here, and options such as nesterov or the first step of momentum become factors.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .hyper import Adam, Sgd
from .wire import CompressedChannel

SMALLEST = 1 << 14
"""Elements below which parameters are better off in batches: a call costs 8 us, and torch's take many at a time."""

_FLAGS = (
    *("-O3", "-ftree-loop-vectorize", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=off", "-fno-finite-math-only"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_NOT_FINITE, _LEFT_OUT = 1, 2
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.float8_e4m3fn: 5,
}


class _Flat(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class _Call(ctypes.Structure):
    """As `Call` in compiled.cpp."""

    _fields_ = (
        ("rule", ctypes.c_int64),
        ("numel", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("neighbours", ctypes.c_int64),
        ("contain", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("codes", ctypes.c_int64),
        ("param", _Flat),
        ("gradient", _Flat),
        ("state", _Flat * 3),
        ("inbox", ctypes.c_void_p),
        ("inbox_scales", ctypes.c_void_p),
        ("taken", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("taken_scales", ctypes.c_void_p),
        ("given_scales", ctypes.c_void_p),
        ("neighbor_delta", ctypes.c_void_p),
        ("replica", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("strength", ctypes.c_double),
    )


def _mix_numbers(step: float, numbers: Sequence[float], scale: float) -> list[float]:
    return []


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


_LOWERED: dict[str, tuple[int, Callable[[float, Sequence[float], float], list[float]]]] = {
    "mix": (0, _mix_numbers),
    "sgd": (1, _sgd_numbers),
    "adam": (2, _adam_numbers),
}

RULES = tuple(_LOWERED)
"""The rules that can be compiled."""


@dataclass(frozen=True)
class Update:
    """One rule with its numbers: `step` is the step being taken, from 1; `scale` multiplies the gradient."""

    rule: str
    hyper: Sequence[float] = ()
    step: float = 1.0
    scale: float = 1.0


MIX = Update("mix")
"""No update: the parameter is only mixed."""


@dataclass(frozen=True)
class Received:
    """What neighbours sent of a parameter, each tensor [N]; as in `Mixing` and `Compression`.

    Attributes:
        inbox: K tensors, of codes if `taken`; weights: K floats, none of them zero.
        scales: of the codes, K tensors or None for formats without.
        contain: leave out differences that are not finite.
        taken: this rank's end of the exchange, cut likewise, if messages are compressed.
    """

    inbox: Sequence[Tensor] = ()
    weights: Sequence[float] = ()
    scales: Sequence[Tensor | None] = ()
    contain: bool = False
    taken: CompressedChannel | None = None
    strength: float = 1.0


NOTHING = Received()


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the loop knows the dtypes of these tensors."""
    return all(tensor.dtype in _DTYPES for tensor in tensors)


def update(
    how: Update,
    x: Tensor,
    gradient: Tensor | None,
    states: Sequence[Tensor],
    received: Received = NOTHING,
    given: CompressedChannel | None = None,
) -> tuple[bool, bool]:
    """One parameter's part of a pass, in place.

    Args:
        x: [N]; gradient (none for the rule "mix") and states are [N] too, all contiguous.
        given: where the codes of the new x are written, cut likewise.

    Returns:
        Whether a difference was not finite and left out, and whether codes leave out values that are not finite.
    """
    number, lower = _LOWERED[how.rule]
    codes = given or received.taken
    inbox = (_Flat * len(received.inbox))(*map(_flat, received.inbox))
    scales = (ctypes.c_void_p * len(received.scales))(*map(_address, received.scales))
    numbers = lower(how.step, how.hyper, how.scale)
    found = _library()(
        ctypes.byref(
            _Call(
                number,
                x.numel(),
                torch.get_num_threads(),
                len(received.inbox),
                received.contain,
                len(states),
                -1 if codes is None else _DTYPES[codes.codes.dtype],
                _flat(x),
                _Flat() if gradient is None else _flat(gradient),
                (_Flat * 3)(*map(_flat, states)),
                ctypes.addressof(inbox),
                ctypes.addressof(scales),
                None if received.taken is None else received.taken.codes.data_ptr(),
                None if given is None else given.codes.data_ptr(),
                None if received.taken is None else _address(received.taken.scales),
                None if given is None else _address(given.scales),
                None if received.taken is None else received.taken.neighbor_delta.data_ptr(),
                None if given is None else given.replica.data_ptr(),
                ctypes.addressof(weights := (ctypes.c_double * len(received.weights))(*received.weights)),
                ctypes.addressof(lowered := (ctypes.c_double * len(numbers))(*numbers)),
                received.strength,
            )
        )
    )
    del weights, lowered  # They have lived through the call.
    return bool(found & _NOT_FINITE), bool(found & _LEFT_OUT)


def _flat(tensor: Tensor) -> _Flat:
    return _Flat(tensor.data_ptr(), _DTYPES[tensor.dtype])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _library() -> Callable[[object], int]:
    from torch._inductor.codecache import CppCodeCache  # Slow to import, and needed here alone.

    # One text: torch's cache knows a library by it, and would not see that an included file has changed.
    source = "".join(Path(__file__).with_name(name).read_text() for name in ("formats.hpp", "compiled.cpp"))
    function = CppCodeCache.load(source, extra_flags=_FLAGS).fusedfog_pass
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    found: Callable[[object], int] = function
    return found


def compile_now() -> None:
    """Compile the loop, in a few seconds; later processes find it in torch's cache.

    Raises:
        Exception: whatever torch raises where it cannot compile, for instance without a C++ compiler.
    """
    _library()
    update(MIX, torch.zeros(1), None, ())
