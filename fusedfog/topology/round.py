"""One round of a topology, and what those who only look at rounds need to know of one."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

SUM_TOLERANCE = 1e-6
"""How far a row or column sum may be from 1: wide enough for weights that were once float32."""

LONGEST_PERIOD = 4096
"""Rounds that are looked at one by one, where all of a period are."""


@dataclass(frozen=True)
class Round:
    """What one rank does in one round: ``x+ = self_weight * x + sum_j recv[j] * x_j``.

    ``recv[j] = W[rank, j]`` and ``send[k] = W[k, rank]``, both in ascending rank order. The weights in ``send`` are
    information: it is the receiver that applies them, never the sender as well.
    """

    self_weight: float
    recv: dict[int, float]
    send: dict[int, float]


class RoundSequence(Protocol):
    """A topology as those see it who take figures of it or draw it; see `base.Topology`."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def name(self) -> str:
        """The function that made it."""
        ...

    @property
    def period(self) -> int | None:
        """Rounds after which it repeats; None for an endless sequence."""
        ...

    @property
    def is_static(self) -> bool:
        """Whether every round is the same."""
        ...

    @property
    def _exact_after(self) -> int | None:
        """Rounds to the exact average, where that is known."""
        ...

    def is_symmetric(self) -> bool:
        """Whether every round's matrix is symmetric."""
        ...

    def finite_period(self, wanted_for: str) -> int:
        """The period; ValueError for an endless sequence."""
        ...

    def round(self, rank: int, step: int = 0) -> Round:
        """What one rank does in one round."""
        ...

    def matrix(self, step: int = 0) -> Matrix:
        """A round's mixing matrix."""
        ...

    def _fourier(self, step: int) -> npt.NDArray[np.complex128] | None:
        """The eigenvalues of a circulant round."""
        ...


def whole(value: SupportsIndex, what: str, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        ValueError: if it is not a whole number of at least ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {value!r}") from None
    if number < least:
        raise ValueError(f"{what} must be at least {least}, got {number}")
    return number


def checked_step(step: int) -> int:
    """``step``, the number of a round.

    Raises:
        ValueError: if it is negative.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    return step


def ascending(weights: dict[int, float]) -> dict[int, float]:
    """The same weights in ascending rank order, the order in which every rank must sum."""
    return dict(sorted(weights.items()))
