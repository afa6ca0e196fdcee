"""The one interface every graph and every sequence of graphs has."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np
import numpy.typing as npt

from fusedfog.topology.analysis import Figures
from fusedfog.topology.plot import draw
from fusedfog.topology.resizing import is_connected, rounds_left
from fusedfog.topology.round import SUM_TOLERANCE, Matrix, Round, checked_step, whole

LARGEST_DENSE = 16384


class Topology(Figures, ABC):
    """A sequence of mixing matrices W(0), W(1), ...; a static graph is a sequence of period 1.

    ``W[i, j]`` is the weight that rank i gives to what it receives from rank j, so a round is ``X+ = W X``.

    Attributes:
        size: number of ranks.
        definition: the call that makes this topology again, as text.
        name: the function that made it.
    """

    def __init__(self, definition: str, size: int, period: int | None) -> None:
        self.definition = definition
        self.size = size
        self._period = period

    @property
    def name(self) -> str:
        """Name of the function that makes this topology, for instance ``"ring"``."""
        return self.definition.partition("(")[0]

    @property
    def period(self) -> int | None:
        """Number of rounds after which the sequence repeats; None when it never does."""
        return self._period

    @property
    def is_static(self) -> bool:
        """Whether every round uses the same matrix."""
        return self.period == 1

    def round(self, rank: int, step: int = 0) -> Round:
        """Weights and neighbours of ``rank`` in round ``step``, in O(degree).

        Raises:
            ValueError: if ``rank`` is not in ``0..size-1`` or ``step`` is negative.
        """
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in {self!r}: its ranks are 0..{self.size - 1}")
        return self._round(rank, checked_step(step))

    def matrix(self, step: int = 0) -> Matrix:
        """The mixing matrix of round ``step`` as a dense float64 array of shape [size, size].

        Raises:
            ValueError: if ``step`` is negative, or ``size`` is too large for a dense matrix.
        """
        step = checked_step(step)
        if self.size > LARGEST_DENSE:
            raise ValueError(
                f"a dense matrix of {self.size} ranks takes {8 * self.size**2 / 2**30:.0f} GiB; "
                "use round(rank, step), which needs no matrix"
            )
        return self._matrix(step)

    @abstractmethod
    def _round(self, rank: int, step: int) -> Round: ...

    def _matrix(self, step: int) -> Matrix:
        weights = np.zeros((self.size, self.size))
        for rank in range(self.size):
            one = self._round(rank, step)
            weights[rank, rank] = one.self_weight
            weights[rank, list(one.recv)] = list(one.recv.values())
        return weights

    def _fourier(self, step: int) -> npt.NDArray[np.complex128] | None:
        """Eigenvalues in the Fourier basis, if the matrix of this round is circulant."""
        return None

    @property
    def _exact_after(self) -> int | None:
        """Rounds from step 0 to the exact average, where the construction guarantees it at any size."""
        return None

    def is_row_stochastic(self) -> bool:
        """Whether every row of every round sums to 1. False where an endless sequence promises nothing."""
        return self._holds_every_round(lambda one: abs(one.self_weight + sum(one.recv.values()) - 1) <= SUM_TOLERANCE)

    def is_column_stochastic(self) -> bool:
        """Whether every column of every round sums to 1. False where an endless sequence promises nothing."""
        return self._holds_every_round(lambda one: abs(one.self_weight + sum(one.send.values()) - 1) <= SUM_TOLERANCE)

    def is_doubly_stochastic(self) -> bool:
        """Whether rows and columns of every round sum to 1, so that averaging keeps the mean.

        Over the whole period; an endless sequence answers what it promises, and False if it promises nothing.
        """
        return self.is_row_stochastic() and self.is_column_stochastic()

    def is_symmetric(self) -> bool:
        """Whether the matrix of every round is symmetric (same answer rules as `is_doubly_stochastic`)."""
        return self._holds_every_round(
            lambda one: (
                one.recv.keys() == one.send.keys()
                and all(abs(weight - one.send[peer]) <= SUM_TOLERANCE for peer, weight in one.recv.items())
            )
        )

    @property
    def max_degree(self) -> int:
        """The most messages that any rank sends, or receives, in any one round.

        Raises:
            ValueError: for an endless sequence that promises no bound.
        """
        return max(
            max(len(one.recv), len(one.send))
            for step in range(self.finite_period("max_degree"))
            for one in (self._round(rank, step) for rank in range(self.size))
        )

    def finite_period(self, wanted_for: str) -> int:
        """The period, where it is needed for ``wanted_for``.

        Raises:
            ValueError: if the sequence is endless.
        """
        if self.period is None:
            raise ValueError(
                f"{self!r} never repeats, so {wanted_for} has no value; consensus_factor(steps) looks at a stretch"
            )
        return self.period

    def _holds_every_round(self, condition: Callable[[Round], bool]) -> bool:
        return self.period is not None and all(
            condition(self._round(rank, step)) for step in range(self.period) for rank in range(self.size)
        )

    def lazy(self) -> Topology:
        """The same edges with weights ``(I + W) / 2``: eigenvalues of a symmetric graph move into [0, 1]."""
        return Lazy(self)

    def then(self, other: Topology) -> Topology:
        """Alternate: even steps use this topology's rounds, odd steps those of ``other``; see `sequence`.

        Raises:
            ValueError: if the sizes differ.
        """
        return sequence([self, other])

    def resized(self, n: int, kept: Sequence[int] | None = None) -> Topology:
        """This topology for ``n`` ranks, of which rank i is this one's rank ``kept[i]``: what is left when ranks leave.

        A topology that a function defines for any number of ranks is made anew: ``ring(8).resized(7)`` is ``ring(7)``,
        and one of whole machines is made of the machines that are left. Where the function has nothing for ``n``,
        and for `from_matrix`, `from_networkx`, `from_rounds`, and sequences of those, edges among the kept ranks stay:
        with Metropolis weights in a symmetric round, and else by the stochastic complement (see `resizing`). Sums of
        rows and columns, symmetry and being static are kept, and so is connectedness: edges that lead through ranks
        that left replace theirs where those that stay alone would fall apart.

        ``kept`` is in ascending order, ``0..n-1`` by default. A topology is a function of who is in: resize the one
        that was given, not what an earlier change has left, and a rank that comes back finds its neighbours again.

        Raises:
            ValueError: ``n`` less than 1, ``kept`` not n ranks of this topology in ascending order; no topology of
                this kind for ``n``; and for a graph that nothing can be sound for: an endless `from_rounds`, one that
                is not connected, directed rounds with negative weights. Up to ``size - 1`` ranks this depends on the
                topology alone, never on who is kept, so that ``resized(1)`` tells before a run begins.
        """
        n = whole(n, "n")
        ranks = tuple(range(n)) if kept is None and n <= self.size else kept if kept is None else tuple(kept)
        if ranks is not None and (len(ranks) != n or list(ranks) != sorted(set(ranks) & set(range(self.size)))):
            raise ValueError(
                f"kept must be {n} of the ranks 0..{self.size - 1} of {self!r} in ascending order, got {kept!r}"
            )
        return self if n == self.size else self._resized(n, ranks)

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        """For another number of ranks; ``kept`` is None where ranks join that this topology has not got."""
        if kept is None:
            raise ValueError(f"{self!r} has {self.size} ranks, and nothing says who the neighbours of {n} would be")
        return Resized(self, kept)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw each round (at most 8) as a circle of ranks, into a file whose suffix names the format.

        Raises:
            ImportError: if matplotlib is missing.
        """
        draw(self, path)

    def fingerprint(self) -> str:
        """A digest that is equal in every process for equal topologies, and costs no matrix."""
        return hashlib.sha256(self._identity()).hexdigest()

    def _identity(self) -> bytes:
        return self.definition.encode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return self is other or self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return self.definition


class Resized(Topology):
    """The rounds of another topology, as `resizing.rounds_left` leaves them to the ``kept`` ranks."""

    def __init__(self, inner: Topology, kept: tuple[int, ...]) -> None:
        self._listed = rounds_left(inner, kept)
        super().__init__(f"{inner!r}.resized({len(kept)}, kept={list(kept)})", len(kept), len(self._listed))
        self.inner = inner
        self.kept = kept

    @property
    def name(self) -> str:
        """``resized`` after the inner topology's name."""
        return f"{self.inner.name}.resized"

    def _round(self, rank: int, step: int) -> Round:
        one = self._listed[step % len(self._listed)][rank]
        return Round(one.self_weight, dict(one.recv), dict(one.send))

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return super()._resized(n, kept) if kept is None else self.inner.resized(n, [self.kept[rank] for rank in kept])

    def _identity(self) -> bytes:
        return f"resized:{self.inner.fingerprint()}:{self.kept}".encode()


class Around(Topology):
    """What is made of the rounds of another topology, `inner`, without a change to sums, symmetry or degrees."""

    def __init__(self, inner: Topology, described: str, period: int | None) -> None:
        super().__init__(described, inner.size, period)
        self.inner = inner

    def is_row_stochastic(self) -> bool:
        """As the inner topology."""
        return self.inner.is_row_stochastic()

    def is_column_stochastic(self) -> bool:
        """As the inner topology."""
        return self.inner.is_column_stochastic()

    def is_symmetric(self) -> bool:
        """As the inner topology."""
        return self.inner.is_symmetric()

    @property
    def max_degree(self) -> int:
        """As the inner topology."""
        return self.inner.max_degree


class Lazy(Around):
    """``(I + W) / 2`` of another topology."""

    def __init__(self, inner: Topology) -> None:
        super().__init__(inner, f"{inner!r}.lazy()", inner.period)

    @property
    def name(self) -> str:
        """``lazy`` after the inner topology's name."""
        return f"{self.inner.name}.lazy"

    def _round(self, rank: int, step: int) -> Round:
        one = self.inner.round(rank, step)
        return Round(
            (1 + one.self_weight) / 2,
            {peer: weight / 2 for peer, weight in one.recv.items()},
            {peer: weight / 2 for peer, weight in one.send.items()},
        )

    def _matrix(self, step: int) -> Matrix:
        return (np.eye(self.size) + self.inner.matrix(step)) / 2

    def _fourier(self, step: int) -> npt.NDArray[np.complex128] | None:
        fourier = self.inner._fourier(step)
        return None if fourier is None else (1 + fourier) / 2

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return self.inner.resized(n, kept).lazy()

    def _identity(self) -> bytes:
        return f"lazy:{self.inner.fingerprint()}".encode()


class Alternating(Topology):
    """See `sequence`."""

    def __init__(self, members: tuple[Topology, ...]) -> None:
        periods = [member.period for member in members]
        finite = [period for period in periods if period is not None]
        period = len(members) * math.lcm(*finite) if len(finite) == len(periods) else None
        super().__init__(f"sequence([{', '.join(map(repr, members))}])", members[0].size, period)
        self.members = members

    def _at(self, step: int) -> tuple[Topology, int]:
        return self.members[step % len(self.members)], step // len(self.members)

    def _round(self, rank: int, step: int) -> Round:
        member, own_step = self._at(step)
        return member.round(rank, own_step)

    def _matrix(self, step: int) -> Matrix:
        member, own_step = self._at(step)
        return member.matrix(own_step)

    def _fourier(self, step: int) -> npt.NDArray[np.complex128] | None:
        member, own_step = self._at(step)
        return member._fourier(own_step)

    def is_row_stochastic(self) -> bool:
        """Whether all members are."""
        return all(member.is_row_stochastic() for member in self.members)

    def is_column_stochastic(self) -> bool:
        """Whether all members are."""
        return all(member.is_column_stochastic() for member in self.members)

    def is_symmetric(self) -> bool:
        """Whether all members are."""
        return all(member.is_symmetric() for member in self.members)

    @property
    def max_degree(self) -> int:
        """The largest of the members'."""
        return max(member.max_degree for member in self.members)

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        if kept is not None and self.period is not None and not all(map(is_connected, self.members)):
            return Resized(self, kept)  # matchings, say, which only together are a connected graph
        return sequence([member.resized(n, kept) for member in self.members])

    def _identity(self) -> bytes:
        return ":".join(["sequence", *(member.fingerprint() for member in self.members)]).encode()


def sequence(topologies: Sequence[Topology]) -> Topology:
    """Take turns: step t uses ``topologies[t % m]`` in its own round ``t // m``, m the number of topologies.

    Static members so give the sequence W0, W1, ..., W0, ...; the period is m times the least common multiple of the
    members' periods, and None if one of them is endless.

    Raises:
        ValueError: if the list is empty, holds something else, or the sizes differ.
    """
    members = tuple(topologies)
    if not members:
        raise ValueError("a sequence needs at least one topology")
    for position, member in enumerate(members):
        if not isinstance(member, Topology):
            raise ValueError(f"topologies[{position}] is {member!r}, not a Topology (a matrix: use from_matrix)")
        if member.size != members[0].size:
            raise ValueError(
                f"all topologies must have the same size: topologies[0] has {members[0].size} ranks, "
                f"topologies[{position}] has {member.size}"
            )
    return Alternating(members)
