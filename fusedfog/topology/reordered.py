"""The rounds of a periodic sequence in another order, some more often than others: what `adapt=` makes of a graph in mid-run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Around, Topology
from fusedfog.topology.round import Matrix, Round

Piece = tuple[int, tuple[int, ...]]
"""A step, and k for each round: from that step on, the round is used in every k-th period."""


def order_of(intervals: Sequence[int]) -> tuple[int, ...]:
    """The rounds of max(intervals) periods, where round r is used in every `intervals[r]`-th of them, and others in its place.

    Those that take its place are the rounds of interval 1, in turns, so that each period has as many rounds as before; every
    round is used in the last one.

    Raises:
        ValueError: an interval is below 1, or none is 1.
    """
    if min(intervals) != 1:
        raise ValueError(f"intervals are 1 or more, and one of them is 1, got {list(intervals)}")
    always = [number for number, interval in enumerate(intervals) if interval == 1]
    order, turn = [], 0
    for period in range(1, max(intervals) + 1):
        for number, interval in enumerate(intervals):
            if period % interval == 0 or period == max(intervals):
                order.append(number)
            else:
                order.append(always[turn % len(always)])
                turn += 1
    return tuple(order)


class Reordered(Around):
    """Rounds of `inner` in the order of the last piece that has begun. Every round is one of `inner`'s, so all sums stay."""

    def __init__(self, inner: Topology, pieces: Sequence[Piece]) -> None:
        inner.finite_period("another order of its rounds")
        super().__init__(inner, f"reordered({inner!r}, {list(pieces)})", None)
        self._pieces = [(first, order_of(intervals)) for first, intervals in pieces]

    @property
    def name(self) -> str:
        """The inner topology's."""
        return self.inner.name

    def number(self, step: int) -> int:
        """Which of the inner topology's rounds is used in this step; before the first piece, they follow each other."""
        begun = [piece for piece in self._pieces if piece[0] <= step]
        if not begun:
            return step % self.inner.finite_period("rounds")
        first, order = begun[-1]
        return order[(step - first) % len(order)]

    def _round(self, rank: int, step: int) -> Round:
        return self.inner.round(rank, self.number(step))

    def _matrix(self, step: int) -> Matrix:
        return self.inner.matrix(self.number(step))

    def _fourier(self, step: int) -> npt.NDArray[np.complex128] | None:
        return self.inner._fourier(self.number(step))

    def _identity(self) -> bytes:
        return f"reordered:{self.inner.fingerprint()}:{self._pieces}".encode()
