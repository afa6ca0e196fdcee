"""Push-sum's scalars: they follow from the topology alone, so every rank computes them and nothing extra travels.

With p[i, j] = 1/(outdegree_j + 1), the share that rank j gives to itself and to each out-neighbour, the scalars evolve as
w+ = P w from w = 1, and rank i holds z_i = x_i / w_i (Assran et al. 2019, SGP). An ATC step in terms of z is

    half = w_i z_i - a u(g(z_i)) ; z_i+ = (1 / w_i+) sum_j p[i, j] half_j

that is, the ordinary passes with row sums that are not one.

Where members come and go, each epoch begins with w = 1 and the z that there are. A newcomer's z is a copy of another rank's: it
holds no mass, keeps nothing of its own in the exchange that admits it, and what the others hold then counts n / (n - newcomers)
times as much, so that the scalars sum to n again and sum_i w_i z_i / n is the mean of those that had values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fusedfog.topology import Round, Topology
from fusedfog.topology.admission import Admission


@dataclass(frozen=True)
class Shares:
    """One exchange as rank i sees it: the scale of its own z before, and the weights of what it receives after."""

    scale: float
    row_sum: float
    recv: dict[int, float]

    @property
    def alone(self) -> float:
        """The row sum if the exchange fails: this rank keeps all that it holds, as in `idle`."""
        return 1.0 / self.scale


@dataclass(frozen=True)
class Push:
    """One exchange of all ranks.

    Attributes:
        before, after: every rank's scalar, float64 [n].
        parts: for each rank, {sender: the part of what that sender held}, its own included, in ascending order.
    """

    before: np.ndarray
    after: np.ndarray
    parts: Sequence[dict[int, float]]

    def shares(self, rank: int) -> Shares:
        """What one rank needs of it."""
        new, parts = float(self.after[rank]), self.parts[rank]
        recv = {sender: part / new for sender, part in parts.items() if sender != rank}
        return Shares(float(self.before[rank]), sum(parts.values()) / new, recv)


def idle(scalars: np.ndarray) -> Push:
    """A step without exchange, in which every rank keeps all that it holds: z+ = z - (a / w) u."""
    return Push(scalars, scalars, [{rank: 1.0} for rank in range(len(scalars))])


def push(rounds: Sequence[Round], scalars: np.ndarray) -> Push:
    """One exchange along every rank's round: each rank splits what it holds evenly between its out-neighbours and itself."""
    held: list[float] = scalars.tolist()
    after = [0.0] * len(held)
    parts: list[dict[int, float]] = [{} for _ in held]
    for sender, round_ in enumerate(rounds):
        targets = [*round_.send, sender]
        part = 1.0 / len(targets)
        for target in targets:
            after[target] += part * held[sender]
            parts[target][sender] = part
    return Push(scalars, np.array(after), parts)


def admit(rounds: Sequence[Round], scalars: np.ndarray, fresh: Collection[int]) -> Push:
    """The same, in which `fresh` ranks, who send to nobody, hold nothing: what they have afterwards they have received."""
    held = scalars.copy()
    held[list(fresh)] = 0.0
    made = push(rounds, held)
    parts = [{sender: part for sender, part in one.items() if sender not in fresh} for one in made.parts]
    # The scale of a z that nobody uses; should the exchange fail, the newcomer makes a step of its own by it.
    return Push(scalars, made.after, parts)


class PushSum:
    """The scalars of all ranks, float64, brought forward one exchange at a time, and rank `rank`'s shares."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology, self.rank = topology, rank
        self.scalars = np.ones(topology.size)
        self.exchanges = 0

    def idle(self) -> Shares:
        """A step without exchange."""
        return idle(self.scalars).shares(self.rank)

    def exchange(self, number: int) -> Shares:
        """Exchange `number`, which must be the next one; moves the scalars forward."""
        if number != self.exchanges:
            raise RuntimeError(f"push-sum is at exchange {self.exchanges}, not {number}: ranks are out of phase")
        rounds = [self.topology.round(sender, number) for sender in range(self.topology.size)]
        fresh = self.topology.fresh_in(number) if isinstance(self.topology, Admission) else frozenset()
        made = admit(rounds, self.scalars, fresh) if fresh else push(rounds, self.scalars)
        known = len(rounds) - len(fresh)
        self.scalars, self.exchanges = made.after * (len(rounds) / known), number + 1
        return made.shares(self.rank)
