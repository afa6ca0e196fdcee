"""Topologies made of other topologies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Matrix, Round, Topology


class Lazy(Topology):
    """``(I + W) / 2`` of another topology."""

    def __init__(self, inner: Topology) -> None:
        super().__init__(f"{inner!r}.lazy()", inner.size, inner.period)
        self.inner = inner

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
