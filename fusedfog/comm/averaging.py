"""Averages of plain tensors over all ranks of a communicator, and how far ranks are from them. Collective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator

_CHUNK = 1 << 22
"""Elements averaged at a time, so that the temporaries stay small beside the model."""


def _chunks(flat: Tensor) -> Sequence[Tensor]:
    return flat.split(_CHUNK) if flat.numel() else ()


def _accumulator(chunk: Tensor) -> Tensor:
    # Sums of bf16 over many ranks would lose the digits that the average is taken for.
    return chunk.to(torch.float64 if chunk.dtype == torch.float64 else torch.float32, copy=True)


def _sum(values: Tensor, communicator: Communicator) -> None:
    """Replace values by their sums over the ranks."""
    communicator.collect(partial(dist.all_reduce, values, async_op=True), "averaging with all ranks")


def _mean(chunk: Tensor, communicator: Communicator, *, finite: bool) -> Tensor:
    """The mean over the ranks, in the accumulator's dtype; with `finite` element by element over those that are finite there.

    Behind the values travels the number of ranks that have nothing but finite ones. Only if some have not, which all ranks
    see alike, elements are counted one by one. NaN where no rank's is finite.
    """
    size, count = communicator.view.size, chunk.numel()
    own = _accumulator(chunk)
    if not finite:
        _sum(own, communicator)
        return own.div_(size)
    fine = own.isfinite()
    total = own.new_zeros(count + 1)
    if fine.all():
        total[:count].copy_(own)
        total[count] = 1.0
    _sum(total, communicator)
    if round(total[count].item()) == size:
        return total[:count].div_(size)
    both = torch.stack([own.masked_fill_(~fine, 0.0), fine.to(own.dtype)])
    _sum(both, communicator)
    return both[0] / both[1]


def average_in_place(flats: Sequence[Tensor], communicator: Communicator | None, *, finite: bool = False) -> None:
    """Replace each floating-point tensor by its mean over the ranks (fp32 sums for 16-bit tensors).

    With `finite` a rank's elements that are not finite are left out of it.
    """
    if communicator is None:
        return
    for flat in flats:
        for chunk in _chunks(flat):
            chunk.copy_(_mean(chunk, communicator, finite=finite))


def broadcast(flats: Sequence[Tensor], communicator: Communicator | None, src: int = 0) -> None:
    """Replace each tensor by group rank `src`'s."""
    if communicator is None:
        return
    for flat in flats:
        if flat.numel():
            what = f"taking rank {src}'s values, with all ranks"
            communicator.collect(partial(dist.broadcast, flat, group_src=src, async_op=True), what)


def consensus_distance(flats: Sequence[Tensor], communicator: Communicator | None, *, finite: bool = False) -> float:
    """sqrt( (1/n) sum_i ||x_i - mean||^2 ) over these tensors, measured now; with `finite` without elements that are not."""
    if communicator is None or not flats:
        return 0.0
    square = torch.zeros(1, dtype=torch.float64, device=flats[0].device)
    for flat in flats:
        for chunk in _chunks(flat):
            difference = _mean(chunk, communicator, finite=finite).sub_(chunk)
            if finite:
                difference.masked_fill_(~difference.isfinite(), 0.0)
            square += difference.pow_(2).sum(dtype=torch.float64)
    _sum(square, communicator)
    return math.sqrt(square.item() / communicator.view.size)
