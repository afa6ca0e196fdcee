"""The one exchange in which newcomers take their neighbours' mean, and nobody takes anything of theirs."""

from __future__ import annotations

from collections.abc import Collection

from fusedfog.topology.base import Topology
from fusedfog.topology.round import Round, ascending


class Admission(Topology):
    """A topology of which one exchange is another one, in which some ranks are fresh.

    In that exchange a fresh rank weighs itself by zero and the ranks that it receives from, but for fresh ones, by what they had,
    made to sum to one. If it receives from no such rank, it takes the value of one, which is another for each fresh rank as far
    as there are enough. The others give the weight of fresh ranks to themselves. All other exchanges are the inner topology's.

    Args:
        inner: the topology before and afterwards.
        fresh: ranks of it, not all.
        at: the number of the exchange.
    """

    def __init__(self, inner: Topology, fresh: Collection[int], at: int) -> None:
        super().__init__(f"{inner!r} admitting {sorted(fresh)}", inner.size, None)
        self.inner, self.fresh, self.at = inner, frozenset(fresh), at
        self._known = [rank for rank in range(inner.size) if rank not in self.fresh]

    def _round(self, rank: int, step: int) -> Round:
        if step != self.at:
            return self.inner.round(rank, step)
        recv = self._received(rank, step)
        send = {peer: weight for peer in range(self.size) if (weight := self._received(peer, step).get(rank))}
        return Round(1.0 - sum(recv.values()) if rank not in self.fresh else 0.0, ascending(recv), ascending(send))

    def _received(self, rank: int, step: int) -> dict[int, float]:
        """What a rank weighs others by in the exchange of the admission."""
        known = {peer: weight for peer, weight in self.inner.round(rank, step).recv.items() if peer not in self.fresh}
        if rank not in self.fresh:
            return known
        total = sum(known.values())
        if total > 0:
            return {peer: weight / total for peer, weight in known.items()}
        return {self._known[sorted(self.fresh).index(rank) % len(self._known)]: 1.0}

    def fresh_in(self, exchange: int) -> frozenset[int]:
        """The ranks that are admitted in this exchange; none in others."""
        return self.fresh if exchange == self.at else frozenset()

    @property
    def max_degree(self) -> int:
        """As many messages as a rank may have in one exchange."""
        return self.size - 1
