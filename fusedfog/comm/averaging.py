"""Averages of plain tensors over all ranks of a communicator, and how far ranks are from them. Collective."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def _mean(chunk: Tensor, communicator: Communicator, *, finite: bool) -> Tensor:
    """The mean over the ranks, in the accumulator's dtype; with `finite` element by element over those that are finite there.

    Behind the values travels the number of ranks that have nothing but finite ones. Only if some have not, which all ranks
    see alike, elements are counted one by one. NaN where no rank's is finite.
    """
    size, count = communicator.view.size, chunk.numel()
    own = _accumulator(chunk)
    if not finite:
        dist.all_reduce(own, group=communicator.group)
        return own.div_(size)
    fine = own.isfinite()
    total = own.new_zeros(count + 1)
    if fine.all():
        total[:count].copy_(own)
        total[count] = 1.0
    dist.all_reduce(total, group=communicator.group)
    if round(total[count].item()) == size:
        return total[:count].div_(size)
    both = torch.stack([own.masked_fill_(~fine, 0.0), fine.to(own.dtype)])
    dist.all_reduce(both, group=communicator.group)
    return both[0] / both[1]


def average_in_place(flats: Sequence[Tensor], communicator: Communicator | None, *, finite: bool = False) -> None:
    """Replace each floating-point tensor by its mean over the ranks (fp32 sums for 16-bit tensors).

    With `finite` a rank's elements that are not finite are left out of it.
    """
    if communicator is None:
        return
    with communicator.waiting("averaging with all ranks"):
        for flat in flats:
            for chunk in _chunks(flat):
                chunk.copy_(_mean(chunk, communicator, finite=finite))


def broadcast(flats: Sequence[Tensor], communicator: Communicator | None, src: int = 0) -> None:
    """Replace each tensor by group rank `src`'s."""
    if communicator is None:
        return
    with communicator.waiting(f"taking rank {src}'s values, with all ranks"):
        for flat in flats:
            if flat.numel():
                dist.broadcast(flat, group=communicator.group, group_src=src)


def consensus_distance(flats: Sequence[Tensor], communicator: Communicator | None, *, finite: bool = False) -> float:
    """sqrt( (1/n) sum_i ||x_i - mean||^2 ) over these tensors, measured now; with `finite` without elements that are not."""
    if communicator is None or not flats:
        return 0.0
    square = torch.zeros(1, dtype=torch.float64, device=flats[0].device)
    with communicator.waiting("averaging with all ranks"):
        for flat in flats:
            for chunk in _chunks(flat):
                difference = _mean(chunk, communicator, finite=finite).sub_(chunk)
                if finite:
                    difference.masked_fill_(~difference.isfinite(), 0.0)
                square += difference.pow_(2).sum(dtype=torch.float64)
        dist.all_reduce(square, group=communicator.group)
    return math.sqrt(square.item() / communicator.view.size)
