"""Graphs that look the same from every rank: rank i sends to i + hop (mod n) for the same hops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Topology
from fusedfog.topology.round import Matrix, Round, ascending, whole

Hops = dict[int, float]


class Circulant(Topology):
    """A repeating sequence of circulant matrices, each given as its self weight and ``{hop: weight}``.

    Circulant matrices are doubly stochastic and normal, and they commute, so convergence figures come from one FFT.
    """

    def __init__(self, definition: str, size: int, rounds: list[Hops], maker: Callable[[int], Topology]) -> None:
        super().__init__(definition, size, len(rounds))
        self._rounds = rounds
        self._maker = maker

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        made = self._maker(n)
        # exponential(4, base=3) is symmetric, and exponential(3, base=3) is not.
        return made if made.is_symmetric() or not self.is_symmetric() else super()._resized(n, kept)

    def hops(self, step: int) -> Hops:
        """``{hop: weight}`` of round ``step``: rank i sends to i + hop and receives from i - hop (mod size)."""
        return self._rounds[step % len(self._rounds)]

    def self_weight(self, step: int) -> float:
        """What every rank keeps of its own in round ``step``."""
        hops = self.hops(step)
        return 1 / (len(hops) + 1)

    def _round(self, rank: int, step: int) -> Round:
        n = self.size
        hops = self.hops(step)
        return Round(
            self.self_weight(step),
            ascending({(rank - hop) % n: weight for hop, weight in hops.items()}),
            ascending({(rank + hop) % n: weight for hop, weight in hops.items()}),
        )

    def _first_column(self, step: int) -> npt.NDArray[np.float64]:
        column = np.zeros(self.size)
        column[0] = self.self_weight(step)
        hops = self.hops(step)
        column[list(hops)] = list(hops.values())
        return column

    def _matrix(self, step: int) -> Matrix:
        ranks = np.arange(self.size)
        weights: Matrix = self._first_column(step)[(ranks[:, None] - ranks[None, :]) % self.size]
        return weights

    def _fourier(self, step: int) -> npt.NDArray[np.complex128]:
        return np.fft.fft(self._first_column(step))

    def is_row_stochastic(self) -> bool:
        """True: every row holds the same weights, which sum to 1."""
        return True

    def is_column_stochastic(self) -> bool:
        """True: every column holds the same weights, which sum to 1."""
        return True

    def is_symmetric(self) -> bool:
        """Whether every hop comes with its opposite in the same round."""
        return all(hops.get(self.size - hop) == weight for hops in self._rounds for hop, weight in hops.items())

    @property
    def max_degree(self) -> int:
        """The most hops in one round."""
        return max(len(hops) for hops in self._rounds)


def ring(n: int, direction: str = "both") -> Topology:
    """Neighbours on a circle; weights 1/3, 1/3, 1/3, or 1/2, 1/2 in one direction.

    ``"right"``: rank i sends to i+1; ``"left"``: to i-1. Second largest eigenvalue 1/3 + 2/3 cos(2 pi/n), or in
    modulus cos(pi/n) in one direction (Ying et al. 2021, arXiv 2110.13363).

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``direction`` is unknown.
    """
    n = whole(n, "n")
    steps = {"both": (1, -1), "right": (1,), "left": (-1,)}
    if direction not in steps:
        raise ValueError(f'direction must be "both", "left" or "right", got {direction!r}')
    rounds = [_uniform(n, steps[direction])]
    return Circulant(f"ring({n}, direction={direction!r})", n, rounds, partial(ring, direction=direction))


def fully_connected(n: int) -> Topology:
    """Everyone sends to everyone, W = J = 11'/n: the exact average in one round.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1.
    """
    n = whole(n, "n")
    return Circulant(f"fully_connected({n})", n, [_uniform(n, range(1, n))], fully_connected)


def exponential(n: int, base: int = 2) -> Topology:
    """Rank i sends to i + base^k (mod n) for every base^k < n, uniform weights (Ying et al. 2021, arXiv 2110.13363).

    With base 2 the spectral gap is 2 / (1 + ceil(log2 n)) for even n, and larger for odd n.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``base`` of at least 2.
    """
    n, base = whole(n, "n"), whole(base, "base", 2)
    rounds = [_uniform(n, _powers(base, n - 1))]
    return Circulant(f"exponential({n}, base={base})", n, rounds, partial(exponential, base=base))


def symmetric_exponential(n: int, base: int = 4) -> Topology:
    """Edges between ranks whose distance on the circle is a power of ``base``, uniform weights (BlueFog).

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``base`` of at least 2.
    """
    n, base = whole(n, "n"), whole(base, "base", 2)
    distances = _powers(base, n // 2)
    rounds = [_uniform(n, [*distances, *(-hop for hop in distances)])]
    return Circulant(f"symmetric_exponential({n}, base={base})", n, rounds, partial(symmetric_exponential, base=base))


def one_peer_exponential(n: int) -> Topology:
    """Step t sends to i + 2^(t mod tau), tau = ceil(log2 n), weights 1/2 and 1/2 (Ying et al. 2021, arXiv 2110.13363).

    Any tau consecutive steps average exactly if n is a power of two, and never otherwise (use `base_graph`).

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1.
    """
    n = whole(n, "n")
    rounds = [_uniform(n, [hop]) for hop in _powers(2, n - 1)] or [{}]
    return Circulant(f"one_peer_exponential({n})", n, rounds, one_peer_exponential)


class EquiDynamic(Circulant):
    """See `equi_dynamic`."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(f"equi_dynamic({size}, seed={seed})", size, [{}], partial(equi_dynamic, seed=seed))
        self.seed = seed

    @property
    def period(self) -> int | None:
        """None: a new hop is drawn at every step; 1 for one rank, or two, where there is nothing to draw."""
        return None if self.size > 2 else 1

    def hops(self, step: int) -> Hops:
        """The hop that the common seed draws for round ``step``."""
        if self.size == 1:
            return {}
        hop = 1 + int.from_bytes(common_draw(self.seed, step)) % (self.size - 1)
        return {hop: (self.size - 1) / (2 * self.size)}

    def self_weight(self, step: int) -> float:
        """(1 - eta) + eta / n with eta = 1/2."""
        return 0.5 + 0.5 / self.size

    def is_symmetric(self) -> bool:
        """True up to two ranks; a hop seldom equals its opposite."""
        return self.size <= 2

    @property
    def max_degree(self) -> int:
        """One message per rank and round (none for one rank)."""
        return min(1, self.size - 1)

    def spectral_gap(self) -> float:
        """``1 - sqrt(1/2 - 1/(2n))``, from the expected squared distance."""
        return 1.0 - float(np.sqrt(0.5 - 0.5 / self.size))


def equi_dynamic(n: int, seed: int = 0) -> Topology:
    """OD-EquiDyn (Song et al. 2022): ``W = I/2 + A(a)/2``, a random hop a in 1..n-1 per step from a common seed.

    ``A(a)`` keeps 1/n and takes (n-1)/n from the rank a before. The expected squared distance from the mean shrinks by
    1/2 - 1/(2n) per step, whatever n; with eta = 1 instead of 1/2 it would be 1 - 2/n.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``seed`` of at least 0.
    """
    return EquiDynamic(whole(n, "n"), whole(seed, "seed", 0))


def common_draw(seed: int, step: int) -> bytes:
    """32 random bytes that every rank computes alike, whatever its numpy version."""
    return hashlib.sha256(f"{seed}:{step}".encode()).digest()


def _uniform(n: int, hops: range | list[int] | tuple[int, ...]) -> Hops:
    distinct = {hop % n for hop in hops} - {0}
    return dict.fromkeys(sorted(distinct), 1 / (len(distinct) + 1))


def _powers(base: int, largest: int) -> list[int]:
    powers = []
    power = 1
    while power <= largest:
        powers.append(power)
        power *= base
    return powers
