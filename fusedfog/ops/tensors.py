"""Tensors on their way in and out of an operation: flat and real inside, the caller's shape and dtype outside."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedfog.environment import check_dtypes, check_kernel
from fusedfog.kernels import BLOCK, Pass, Region, device, reference, run_pass
from fusedfog.layout import align

ROUNDING = 1e-12
"""A row sum this close to 1 is 1: what is left of float64 weights that sum to 1. Weights once rounded to float32 are not."""

_MIXED_BY_KERNEL = (torch.float32, torch.bfloat16, torch.float16)
_MIXABLE = (*_MIXED_BY_KERNEL, torch.float64, torch.complex64, torch.complex128, torch.complex32)


def check_dense(x: Tensor, operation: str) -> Tensor:
    """x without its autograd history.

    Raises:
        TypeError: if it is not a dense tensor on a CPU or CUDA device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{operation} takes a torch.Tensor, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_quantized or x.device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{operation} takes dense tensors on cpu or cuda, not a {x.dtype} tensor with layout {x.layout} on {x.device}"
        )
    return x.detach()


def check_mixable(x: Tensor, out: Tensor | None) -> None:
    """What averaging asks of its input and `out`.

    Raises:
        TypeError: for a dtype that has no averages.
        ValueError: if `out` is not like x.
    """
    if x.dtype not in _MIXABLE:
        raise TypeError(
            f"a {x.dtype} tensor cannot be averaged: convert it to a floating-point dtype (x.float()); neighbor_allgather "
            f"takes every dtype"
        )
    if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out is {describe(out)} on {out.device}, but must be {describe(x)} on {x.device} like the input"
        )


def describe(x: Tensor, shape: str | None = None) -> str:
    """Dtype and shape, in a reader's words."""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {shape or tuple(x.shape)}"


def flat_view(x: Tensor) -> Tensor:
    """All elements of x in row-major order, complex ones as (real, imaginary); a view of x if it lies so in memory."""
    # A conjugated view is contiguous but its memory is not conjugated, and memory is what travels.
    flat = x.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def room_for(count: int, like: Tensor) -> Tensor:
    """Uninitialized space for `count` elements; on a GPU with the padding that the kernel wants behind them."""
    return like.new_empty(align(count) if device.on_gpu(like) else count)[:count]


def deliver(flat: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """The result in x's dtype and shape, in `out` if given."""
    if x.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    result = flat.view(x.shape)
    return result if out is None else out.copy_(result)


def mix(own: Tensor, inbox: Sequence[Tensor], self_weight: float, weights: Sequence[float], place: int) -> None:
    """`own <- self_weight * own + sum_k weights[k] * inbox[k]`, in place and with float32 (float64) arithmetic.

    Averages, whose weights sum to 1, are taken in difference form: equal tensors stay exactly what they are. Other sums
    are taken term by term in rank order, `own` at `place`. A tensor of weight 0 is not looked at.

    Args:
        own: [N], from `room_for`; so are the K tensors of inbox.
        place: how many of the inbox come from lower ranks.
    """
    if self_weight and abs(self_weight + math.fsum(weights) - 1) <= ROUNDING:
        if inbox:
            _apply(own, (), inbox, weights)
        return
    terms, factors = list(inbox), list(weights)
    terms.insert(place, own)
    factors.insert(place, self_weight)
    _apply(own, (room_for(len(own), own).zero_(),), terms, factors)


def _apply(own: Tensor, base: Sequence[Tensor], inbox: Sequence[Tensor], weights: Sequence[float]) -> None:
    count = len(own)
    on_gpu = device.on_gpu(own)
    if on_gpu and not _kernel_takes(own):
        own.copy_(reference.mix_messages(base[0] if base else own, inbox, weights))
    elif count:
        region = Region(0, ((0, count),), _blocks(count, own.device, _stream_of(own)) if on_gpu else None)
        run_pass(Pass("mix", own, (), (), region, sent=base, inbox=(tuple(inbox),), weights=tuple(weights)))


def _kernel_takes(own: Tensor) -> bool:
    """Whether the GPU pass can mix this tensor, and not torch's own kernels one after another."""
    try:
        check_kernel(own.device)
        check_dtypes(own.device, {"tensors": own.dtype})
    except ValueError:
        return False
    return own.dtype in _MIXED_BY_KERNEL


def _stream_of(own: Tensor) -> int:
    return torch.cuda.current_stream(own.device).cuda_stream


@functools.lru_cache(maxsize=32)
def _blocks(count: int, place: torch.device, stream: int) -> Tensor:
    """The block table of one tensor, made on the device: no host copy, and one for each stream, which it is ready on."""
    offsets = torch.arange(0, count, BLOCK, device=place)
    return torch.stack([torch.zeros_like(offsets), offsets, (count - offsets).clamp(max=BLOCK), offsets], 1)
