"""How fast virtual ranks are: when each step of each rank ends, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeAlias

import numpy as np

Speeds: TypeAlias = Sequence[float] | Callable[[int, int], float]
"""Of each rank, in steps a unit of virtual time: numbers, or a function of the rank and its step (both from 0)."""


def lognormal(sigma: float, seed: int = 0, speeds: Sequence[float] | None = None) -> Callable[[int, int], float]:
    """Speeds whose logarithm is normal: speeds[rank] * exp(sigma z), z ~ N(0, 1) anew for every step of every rank.

    Args:
        sigma: 0 for no spread; with 0.5 every sixth step takes 1.65 times as long as the median, or longer.
        seed: z is a function of (seed, rank, step) alone.
        speeds: the medians; None is 1 for all ranks.

    Raises:
        ValueError: sigma is negative or not finite; when called, there is no median for a rank.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"lognormal: sigma must be finite and not negative, got {sigma!r}")

    def speed(rank: int, step: int) -> float:
        if speeds is not None and rank >= len(speeds):
            raise ValueError(f"lognormal: speeds has {len(speeds)} medians, and none for rank {rank}")
        median = 1.0 if speeds is None else speeds[rank]
        return median * math.exp(sigma * np.random.default_rng((seed, rank, step)).standard_normal())

    return speed


class Ends:
    """When steps end.

    Raises:
        ValueError: not one speed for each of `n` ranks, or one that is not positive and finite.
        TypeError: one is no number.
    """

    def __init__(self, speeds: Speeds, n: int) -> None:
        self._changing = speeds if callable(speeds) else None
        self._constant = () if callable(speeds) else tuple(_checked(one, rank, None) for rank, one in enumerate(speeds))
        if not callable(speeds) and len(speeds) != n:
            raise ValueError(f"speeds must be one number for each of {n} ranks, got {len(speeds)}")

    def of(self, rank: int, step: int, begin: float) -> float:
        """When a rank's step ends that began at `begin`."""
        if self._changing is None:
            # Not a sum of step times, whose rounding would part ranks of 1 and 10 steps a unit.
            return (step + 1) / self._constant[rank]
        return begin + 1 / _checked(self._changing(rank, step), rank, step)


def _checked(speed: object, rank: int, step: int | None) -> float:
    where = f"rank {rank}" if step is None else f"rank {rank} in step {step}"
    if isinstance(speed, bool) or not isinstance(speed, Real):
        raise TypeError(f"speeds are numbers, steps a unit of virtual time, got {speed!r} for {where}")
    number = float(speed)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"speeds must be positive and finite, got {speed!r} for {where}")
    return number
