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


def average_in_place(flats: Sequence[Tensor], communicator: Communicator | None) -> None:
    """Replace each floating-point tensor by its mean over the ranks (fp32 sums for 16-bit tensors)."""
    if communicator is None:
        return
    with communicator.waiting("averaging with all ranks"):
        for flat in flats:
            for chunk in _chunks(flat):
                total = _accumulator(chunk)
                dist.all_reduce(total, group=communicator.group)
                chunk.copy_(total.div_(communicator.view.size))


def broadcast(flats: Sequence[Tensor], communicator: Communicator | None, src: int = 0) -> None:
    """Replace each tensor by group rank `src`'s."""
    if communicator is None:
        return
    with communicator.waiting(f"taking rank {src}'s values, with all ranks"):
        for flat in flats:
            if flat.numel():
                dist.broadcast(flat, group=communicator.group, group_src=src)


def consensus_distance(flats: Sequence[Tensor], communicator: Communicator | None) -> float:
    """sqrt( (1/n) sum_i ||x_i - mean||^2 ) over these tensors, measured now."""
    if communicator is None or not flats:
        return 0.0
    square = torch.zeros(1, dtype=torch.float64, device=flats[0].device)
    with communicator.waiting("averaging with all ranks"):
        for flat in flats:
            for chunk in _chunks(flat):
                mean = _accumulator(chunk)
                dist.all_reduce(mean, group=communicator.group)
                square += mean.div_(communicator.view.size).sub_(chunk).pow_(2).sum(dtype=torch.float64)
        dist.all_reduce(square, group=communicator.group)
    return math.sqrt(square.item() / communicator.view.size)
