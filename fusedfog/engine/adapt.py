"""`adapt=N`: rounds over slow edges less often, as ranks agree every N exchanges by how long each waited.

Beside `same_numbers`, which compares through the store too; `scheduler` asks it at the end of every step. A rank notes when each
exchange was over, and how long the host was blocked by it. Every N exchanges it writes that into the store, and N exchanges
later it reads what all ranks wrote then. As every rank needs all others' messages some rounds earlier, they are there by then:
nobody waits, unless N is shorter than a pass through the graph. All ranks compute the same plan from the same numbers.

A rank that waits may do so for one that was late itself. So a step with round r is counted from when both ends had begun:

    s(t) = max( c, max_i [ e_i(t) - max_{j in peers(i), i} e_j(t-1) ] )    over ranks i that were blocked
    s_r  = median of s(t) over the exchanges t of round r
    q_r  = s_r / min s

e_i(t) is when rank i was through with exchange t, c the median time of a step outside of waits. Where an end of a slow edge has
also waited for a third rank, a part of the edge is hidden: s is never too large, and sometimes too small. Clocks of different
machines are compared here: they must agree to a small part of a step, as NTP keeps them.

Round r is used in every k-th period, k the power of two that is nearest to q_r: its edges carry traffic in inverse proportion to
their cost. Every round remains, and with it a connected graph of doubly stochastic matrices. k only changes when q_r is clearly
nearer to another power: further than `HYSTERESIS` beyond the middle.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fusedfog.comm.agreement import absent
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.engine.clock import Clock
from fusedfog.errors import PeerTimeout
from fusedfog.gossip.delivery import ExchangeStats
from fusedfog.log import log
from fusedfog.topology import Topology
from fusedfog.topology.reordered import Reordered

HYSTERESIS = 1.15
"""How far beyond the middle of two powers of two, as a factor, a cost must be for an interval to change."""

RAREST = 8
"""The largest interval: a round is never given up, since its edges may recover and nobody else would see it."""

_SLOTS = 4
"""Keys of a rank, overwritten in turns: whoever writes number k + 4 has read k + 2, which others write after they have read k."""

_EVERY = {1: "every", 2: "every 2nd", 4: "every 4th", 8: "every 8th"}


class Adaptation:
    """The rounds of one optimizer's topology, and how often each is used.

    Args:
        prefix: of keys in the store, the same on all ranks, and of no other adaptation.
        every: N, exchanges from one plan to the next.
        base: the topology whose rounds they are.
    """

    def __init__(
        self, communicator: Communicator, prefix: str, clock: Clock, stats: ExchangeStats, every: int, base: Topology
    ) -> None:
        self._communicator, self._clock, self._stats, self.every, self.base = communicator, clock, stats, every, base
        self.period, self._prefix = base.finite_period("adapt"), prefix
        self._rows: list[tuple[float, float]] = []
        self._written = -1
        self._restart()

    def topology(self) -> Topology:
        """What to exchange along, as far as plans were made."""
        pieces = [(first, tuple(intervals)) for first, intervals in self._clock.intervals or ()]
        fits = all(len(intervals) == self.period for _, intervals in pieces)
        if not fits:
            self._clock.intervals = None
        return Reordered(self.base, pieces) if fits and pieces else self.base

    @property
    def intervals(self) -> tuple[int, ...]:
        """For each round, in every how many periods it is used."""
        return tuple(self._clock.intervals[-1][1]) if self._clock.intervals else (1,) * self.period

    def _restart(self) -> None:
        self._blocked = self._stats.blocked_s

    def end_exchange(self) -> Topology | None:
        """After each exchange: note what it took, and if it is time, plan; the topology that follows, if it is another one."""
        self._rows.append(self.measured())
        made = self._clock.exchanges
        if made % self.every:
            return None
        turn, rows, self._rows = made // self.every, self._rows, []
        store = own_store()
        store.set(self._key(self._communicator.view.rank, turn), json.dumps([turn, rows]))
        before, self._written = self._written, turn
        # After a resume nobody has written before.
        return self._plan(self._read(store, before), made) if before == turn - 1 else None

    def measured(self) -> tuple[float, float]:
        """The time of day, and the seconds since the last call in which the host was blocked by messages."""
        before = self._blocked
        self._restart()
        return time.time(), self._blocked - before

    def _key(self, rank: int, turn: int) -> str:
        return f"{self._prefix}/{rank}/{turn % _SLOTS}"

    def _read(self, store: Any, turn: int) -> list[list[tuple[float, float]]] | None:
        """What all ranks wrote in a turn; None if one of them has no whole one of it.

        Raises:
            PeerTimeout: a rank did not write; names it.
        """
        view, keys = self._communicator.view, [self._key(rank, turn) for rank in range(self._communicator.view.size)]
        missing = absent(store, keys, self._communicator.timeout, view, "adapt")
        if missing:
            raise PeerTimeout(
                f"rank {view.rank}: adapt: {name_ranks(missing)} did not say within {self._communicator.timeout} how long "
                f"exchanges took"
            )
        said = [
            json.loads(text) for text in (store.multi_get(keys) if store.has_extended_api() else map(store.get, keys))
        ]
        whole = all(number == turn and len(rows) == self.every for number, rows in said)
        return [rows for _, rows in said] if whole else None

    def _plan(self, rows: list[list[tuple[float, float]]] | None, made: int) -> Topology | None:
        if rows is None:
            return None
        before, begin = self.topology(), made - 2 * self.every
        numbers = [
            before.number(t) if isinstance(before, Reordered) else t % self.period
            for t in range(begin, made - self.every)
        ]
        costs = relative_costs(rows, numbers, [self._peers(number) for number in range(self.period)])
        old = self.intervals
        new = tuple(interval(costs.get(number), old[number]) for number in range(self.period))
        if new == old:
            return None
        # The next exchange is under way already, along the old order.
        pieces = [*(self._clock.intervals or [[0, list(old)]]), [made + 1, list(new)]]
        self._clock.intervals = pieces[-2:]
        if self._communicator.view.rank == 0:
            changed = [
                f"round {number} in {_EVERY[new[number]]} period (its steps take {costs[number]:.1f} times those of the fastest)"
                for number in range(self.period)
                if new[number] != old[number]
            ]
            log.info("adapt: %s from exchange %d on: %s", self.base.name, made + 1, ", ".join(changed))
        return self.topology()

    def _peers(self, number: int) -> list[set[int]]:
        rounds = [self.base.round(rank, number) for rank in range(self.base.size)]
        return [{rank, *one.recv, *one.send} for rank, one in enumerate(rounds)]


def relative_costs(
    rows: Sequence[Sequence[tuple[float, float]]], numbers: Sequence[int], peers: Sequence[Sequence[set[int]]]
) -> Mapping[int, float]:
    """q_r of each round r that was used behind the first exchange: how many times as long its steps take as the cheapest's.

    Args:
        rows: of each rank, of each exchange: when it was over, and how many seconds it blocked the host.
        numbers: the round of each exchange.
        peers: of each round, of each rank: itself and whom it exchanges with.
    """
    ranks, steps = range(len(rows)), range(1, len(numbers))
    compute = statistics.median(rows[i][t][0] - rows[i][t - 1][0] - rows[i][t][1] for i in ranks for t in steps)
    took: dict[int, list[float]] = {}
    for t in steps:
        begun = [max(rows[j][t - 1][0] for j in peers[numbers[t]][i]) for i in ranks]
        waited = [rows[i][t][0] - begun[i] for i in ranks if rows[i][t][1] > 0]
        took.setdefault(numbers[t], []).append(max([compute, *waited]))
    found = {number: statistics.median(longest) for number, longest in took.items()}
    least = min(found.values())
    return {number: step / least if least > 0 else 1.0 for number, step in found.items()}


def interval(cost: float | None, old: int) -> int:
    """In every how many periods a round of this relative cost is used, a power of two; `old` so far, and if nothing is known."""
    if cost is None:
        return old
    middle = math.sqrt(2) * HYSTERESIS
    while old < RAREST and cost > old * middle:
        old *= 2
    while old > 1 and cost < old / middle:
        old //= 2
    return old
