"""Push-sum's scalars: they follow from the topology alone, so every rank computes them and nothing extra travels.

With p[i, j] = 1/(outdegree_j + 1), the share that rank j gives to itself and to each out-neighbour, the scalars evolve as
w+ = P w from w = 1, and rank i holds z_i = x_i / w_i (Assran et al. 2019, SGP). An ATC step in terms of z is

    half = w_i z_i - a u(g(z_i)) ; z_i+ = (1 / w_i+) sum_j p[i, j] half_j

that is, the ordinary passes with row sums that are not one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusedfog.topology import Topology


@dataclass(frozen=True)
class Shares:
    """One exchange as rank i sees it: the scale of its own z before, and the weights of what it receives after."""

    scale: float
    row_sum: float
    recv: dict[int, float]


class PushSum:
    """The scalars of all ranks, float64, brought forward one exchange at a time."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology, self.rank = topology, rank
        self.scalars = np.ones(topology.size)
        self.exchanges = 0

    def idle(self) -> Shares:
        """A step without exchange: z+ = z - (a / w) u."""
        own = float(self.scalars[self.rank])
        return Shares(own, 1.0 / own, {})

    def exchange(self, number: int) -> Shares:
        """Exchange `number`; moves the scalars forward when it is the next one."""
        if number != self.exchanges:
            raise RuntimeError(f"push-sum is at exchange {self.exchanges}, not {number}: ranks are out of phase")
        before = self.scalars
        after = np.zeros_like(before)
        own: dict[int, float] = {}
        for sender in range(self.topology.size):
            targets = [*self.topology.round(sender, number).send, sender]
            share = 1.0 / len(targets)
            for target in targets:
                after[target] += share * before[sender]
            if self.rank in targets:
                own[sender] = share
        self.scalars, self.exchanges = after, number + 1
        new = float(after[self.rank])
        recv = {sender: share / new for sender, share in own.items() if sender != self.rank}
        return Shares(float(before[self.rank]), sum(own.values()) / new, recv)
