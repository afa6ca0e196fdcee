"""Static graphs whose ranks differ: star, grid, hypercube."""

from __future__ import annotations

import math

import numpy as np

from fusedfog.topology.base import Topology
from fusedfog.topology.round import Matrix, Round, ascending, whole


class SymmetricStatic(Topology):
    """A static, symmetric, doubly stochastic graph given by each rank's neighbours and their weights."""

    def __init__(self, definition: str, size: int) -> None:
        super().__init__(definition, size, 1)

    def neighbor_weights(self, rank: int) -> dict[int, float]:
        """``{neighbour: weight}``, the same for sending and receiving."""
        raise NotImplementedError

    def _round(self, rank: int, step: int) -> Round:
        weights = ascending(self.neighbor_weights(rank))
        return Round(1 - math.fsum(weights.values()), weights, dict(weights))

    def is_row_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_column_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_symmetric(self) -> bool:
        """True by construction."""
        return True


class Star(SymmetricStatic):
    """See `star`."""

    def __init__(self, size: int, center: int) -> None:
        super().__init__(f"star({size}, center={center})", size)
        self.center = center

    def neighbor_weights(self, rank: int) -> dict[int, float]:
        """The centre for a leaf, every leaf for the centre."""
        if rank != self.center:
            return {self.center: 1 / self.size}
        return {leaf: 1 / self.size for leaf in range(self.size) if leaf != self.center}

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        if kept is None:
            return star(n, self.center)
        return star(n, kept.index(self.center) if self.center in kept else 0)

    def _matrix(self, step: int) -> Matrix:
        weights = np.diag(np.full(self.size, 1 - 1 / self.size))
        weights[self.center, :] = weights[:, self.center] = 1 / self.size
        return weights

    @property
    def max_degree(self) -> int:
        """The centre's: every other rank."""
        return self.size - 1

    def spectral_gap(self) -> float:
        """1/n, and 1 for two ranks (and one)."""
        return 1 / self.size if self.size > 2 else 1.0


def star(n: int, center: int = 0) -> Topology:
    """Everyone talks to ``center``: leaves keep 1 - 1/n, every other non-zero weight is 1/n; spectral gap 1/n.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``center`` is not one of the ranks.
    """
    n, center = whole(n, "n"), whole(center, "center", 0)
    if center >= n:
        raise ValueError(f"center {center} is not one of the ranks 0..{n - 1}")
    return Star(n, center)


class Grid(SymmetricStatic):
    """See `grid`."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(f"grid({rows * columns}, shape=({rows}, {columns}))", rows * columns)
        self.shape = (rows, columns)

    def _neighbors(self, rank: int) -> list[int]:
        rows, columns = self.shape
        row, column = divmod(rank, columns)
        near = ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column))
        return [r * columns + c for r, c in near if 0 <= r < rows and 0 <= c < columns]

    def neighbor_weights(self, rank: int) -> dict[int, float]:
        """Metropolis-Hastings weights of the two to four ranks around."""
        near = self._neighbors(rank)
        return {peer: 1 / (1 + max(len(near), len(self._neighbors(peer)))) for peer in near}

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return grid(n)

    @property
    def max_degree(self) -> int:
        """Four inside, fewer on narrow grids."""
        return sum(min(2, side - 1) for side in self.shape)


def grid(n: int, shape: tuple[int, int] | None = None) -> Topology:
    """A rectangle of ranks, row by row, each talking to the ranks beside, above and below.

    Metropolis-Hastings weights ``1 / max(d_i, d_j)``, degrees counting self. Without ``shape`` the rectangle is the
    squarest that n allows, so a line for a prime n.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``shape`` does not hold n ranks.
    """
    n = whole(n, "n")
    if shape is None:
        rows = next(side for side in range(math.isqrt(n), 0, -1) if n % side == 0)
        return Grid(rows, n // rows)
    if len(shape) != 2:
        raise ValueError(f"shape must be (rows, columns), got {shape!r}")
    rows, columns = whole(shape[0], "rows"), whole(shape[1], "columns")
    if rows * columns != n:
        raise ValueError(f"shape {rows} x {columns} holds {rows * columns} ranks, not {n}")
    return Grid(rows, columns)


class Hypercube(SymmetricStatic):
    """See `hypercube`."""

    def __init__(self, size: int) -> None:
        super().__init__(f"hypercube({size})", size)
        self.dimensions = size.bit_length() - 1

    def neighbor_weights(self, rank: int) -> dict[int, float]:
        """The ranks that differ in one bit."""
        return {rank ^ (1 << bit): 1 / (self.dimensions + 1) for bit in range(self.dimensions)}

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return hypercube(n) if kept is None or not n & (n - 1) else super()._resized(n, kept)

    def _matrix(self, step: int) -> Matrix:
        edges: Matrix = np.zeros((1, 1))
        flip: Matrix = np.array([[0.0, 1.0], [1.0, 0.0]])
        for _ in range(self.dimensions):
            edges = np.kron(np.eye(2), edges) + np.kron(flip, np.eye(len(edges)))
        return (np.eye(self.size) + edges) / (self.dimensions + 1)

    @property
    def max_degree(self) -> int:
        """log2 n."""
        return self.dimensions

    def spectral_gap(self) -> float:
        """2 / (log2 n + 1), and 1 for one rank."""
        return 2 / (self.dimensions + 1) if self.dimensions else 1.0

    def smallest_eigenvalue(self) -> float:
        """(1 - log2 n) / (1 + log2 n)."""
        return (1 - self.dimensions) / (1 + self.dimensions)


def hypercube(n: int) -> Topology:
    """Neighbours are the ranks that differ in one bit; every weight is 1 / (log2 n + 1); spectral gap twice that.

    Raises:
        ValueError: if ``n`` is not a power of two.
    """
    return Hypercube(power_of_two(n, "hypercube"))


def power_of_two(n: int, name: str) -> int:
    """``n``, if it is a power of two.

    Raises:
        ValueError: if not, naming graphs that exist for every n.
    """
    n = whole(n, "n")
    if n & (n - 1):
        raise ValueError(f"{name} needs a power of two, got n={n}; exponential({n}) and base_graph({n}) exist for it")
    return n
