"""Values that are not finite, among ranks' plain tensors: found, and replaced by what other ranks have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedfog.kernels import device


def all_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor on the CPU is; a sum tells it in one look, and one that overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def take_part(own: Tensor, flag: Tensor, kept: Tensor | None = None) -> None:
    """Before a sum over ranks: leave `own` in it if it is finite, and `kept` is, or else zeros; `flag`, 0-d, says which.

    On a GPU the host waits for nothing.
    """
    if not device.on_gpu(own):
        flag.fill_(float(all_finite(own) and (kept is None or all_finite(kept))))
        if not flag:
            own.zero_()
        return
    fine = own.isfinite().all()
    fine = fine if kept is None else fine & kept.isfinite().all()
    flag.copy_(fine)
    own.copy_(torch.where(fine, own, 0.0))


def make_mean(total: Tensor, flags: Tensor, nobody: float, parts: Tensor | None = None) -> list[int]:
    """After the sum: a sum of n-th parts, where `flags` [n] says who took part in it, becomes the mean of those, in place.

    Args:
        nobody: what the zeros are multiplied by if nobody did.
        parts: of a weighted mean, float64 [n], what each rank's n-th part was multiplied by, n in sum; None for 1.

    Returns:
        The ranks that did not; on a GPU, which is not looked at, none.
    """
    size = len(flags)
    if device.on_gpu(total):
        # A product with 1 for all but the sick. (Parts add up to n within float64's rounding, which total's dtype does not see.)
        count = flags.sum() if parts is None else (parts * (flags != 0)).sum()
        total.mul_(torch.where(count > 0, size / count, nobody).to(total.dtype))
        return []
    fine = flags.tolist()
    if min(fine) == 0:
        present = (
            sum(fine)
            if parts is None
            else math.fsum(part for part, one in zip(parts.tolist(), fine, strict=True) if one)
        )
        total.mul_(size / present if present else nobody)
    return [rank for rank, one in enumerate(fine) if not one]


def restore(own: Tensor, received: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Replace elements that are not finite by the weighted mean of those received that are; those that nobody has stay NaN."""
    total = torch.zeros_like(own, dtype=torch.float64 if own.dtype == torch.float64 else torch.float32)
    mass = torch.zeros_like(total)
    for one, weight in zip(received, weights, strict=True):
        if weight:
            finite = one.isfinite()
            total += torch.where(finite, one, 0.0).to(total.dtype) * weight
            mass += finite * weight
    mean = torch.where(mass != 0, total / mass, torch.nan).to(own.dtype)
    own.copy_(torch.where(own.isfinite(), own, mean))


def settle(own: Tensor, received: Sequence[Tensor], weights: Sequence[float]) -> list[int]:
    """Before tensors on the CPU are mixed: own elements that are not finite become the others' mean, others' become the own.

    Returns:
        Which of those received, of weights that are not 0, were not finite; -1 for the own.
    """
    bad = [k for k, (one, weight) in enumerate(zip(received, weights, strict=True)) if weight and not all_finite(one)]
    if not all_finite(own):
        restore(own, received, weights)
        bad.insert(0, -1)
    for k in bad:
        if k >= 0:
            received[k].copy_(torch.where(received[k].isfinite(), received[k], own))
    return bad
