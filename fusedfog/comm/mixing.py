"""Weighted sums of plain tensors, with the pass' arithmetic: on a GPU by its kernel, on the CPU by its reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedfog.environment import check_dtypes, check_kernel
from fusedfog.kernels import BLOCK, Mixing, Pass, Region, device, reference, run_pass
from fusedfog.kernels.region import align

ROUNDING = 1e-12
"""A row sum this close to 1 is 1: what is left of float64 weights that sum to 1. Weights once rounded to float32 are not."""

_MIXED_BY_KERNEL = (torch.float32, torch.bfloat16, torch.float16)


def room_for(count: int, like: Tensor) -> Tensor:
    """Uninitialized space for `count` elements; on a GPU with the padding that the kernel wants behind them."""
    return like.new_empty(align(count) if device.on_gpu(like) else count)[:count]


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
        run_pass(Pass("mix", own, (), (), region, mixing=Mixing(base, (tuple(inbox),), tuple(weights))))


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
