"""Virtual ranks that do not wait for one another: each makes its step when it is over, from what has arrived by then.

    time = 0                    every rank sends its start
    a step of rank i ends       g = gradient at x_i, which only this rank changes
                                x_i = mix(x_i, what has arrived) + (inner(x_i) - x_i), the pass of awc
                                sends x_i, which arrives `delay` later

    awc         mix = x_i + sum_j W_ij (newest_j - x_i), a neighbour's newest value being used until a newer one comes. Where
                it ends depends on neither speeds nor delays: with quadratics, where (I - W + a H) x = a c.
    push_sum    a rank holds (z, w) and sends part of its mass w: deposits (z_k, m_k), of which two that wait on one edge
                become their weighted mean. w+ = w + sum_k m_k ; z+ = z + sum_k (m_k / w+)(z_k - z) - (a / v_i) u, v being the
                Perron vector of the shares P, with mean 1. Then it keeps P_ii w+ and deposits (z+, P_ki w+). Nothing is lost:
                the masses that ranks hold and that are under way add up to n, and without u all z tend to the mean of the
                starts. A slow rank collects more mass for each of its steps, so that all losses count alike.

Of events at one moment, arrivals come first; then all ranks whose step ends read; and then all of them write, and send. So with
equal speeds, and a delay of at most one step, ranks make synchronous steps: awc's are `Ranks`', and push_sum's are those of
z+ = diag(1/w+) P diag(w) z - (a / v) u, w+ = P w, which unlike synchronous push-sum updates after mixing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fusedfog.algorithm import Algorithm
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.mix_strength import rate_of
from fusedfog.engine.rank_weights import RankWeights, part_of_node
from fusedfog.gossip.push_sum import push
from fusedfog.kernels.reference import RULES
from fusedfog.simulate.problems import Problem
from fusedfog.simulate.ranks import contained
from fusedfog.simulate.speeds import Ends
from fusedfog.topology import Round, Topology

Message: TypeAlias = tuple[int, int, Tensor, float]
"""Sender, receiver, its values [N], their mass."""

_MOMENT = 1e-9
"""Times that are no further apart are one moment: they differ by rounding."""


class Newest:
    """Of awc: each neighbour's newest values.

    Attributes:
        rates: what each rank's learning rate is multiplied by.
    """

    def __init__(self, rounds: Sequence[Round]) -> None:
        self.rates = [1.0] * len(rounds)
        self._rounds = rounds
        self._newest: list[dict[int, Tensor]] = [{} for _ in rounds]

    def arrive(self, message: Message) -> None:
        """A message is there for its receiver's next step."""
        sender, receiver, values, _ = message
        self._newest[receiver][sender] = values

    def mix(self, rank: int, x: Tensor, strength: float) -> Tensor:
        """What a rank makes of its values and of what is there; who has not been heard of yet counts as this rank itself."""
        mixed, newest = x, self._newest[rank]
        for sender, weight in self._rounds[rank].recv.items():
            if weight and strength and sender in newest:
                mixed = contained(newest[sender] - x).mul_(weight * strength).add_(mixed)
        return mixed

    def send(self, rank: int, x: Tensor) -> list[Message]:
        """What a rank sends when these are its values."""
        return [(rank, receiver, x, 1.0) for receiver in self._rounds[rank].send]


class Deposits:
    """Of push-sum: masses, and deposits that nobody has collected yet.

    Attributes:
        rates: as of `Newest`.
        masses: what each rank holds [n].
        waiting: of each rank, {sender: (values, mass)}.

    Raises:
        ValueError: there is a rank that others cannot reach along the graph's edges.
    """

    def __init__(self, rounds: Sequence[Round]) -> None:
        n = len(rounds)
        self.masses = [1.0] * n
        self.waiting: list[dict[int, tuple[Tensor, float]]] = [{} for _ in rounds]
        self._rounds = rounds
        perron = _perron(rounds)
        if min(perron) < 1e-9:
            raise ValueError(
                f"push_sum with speeds= needs a strongly connected topology, but what rank {int(np.argmin(perron))} sends "
                f"never comes back to it"
            )
        self.rates = [1.0 / entry for entry in perron]

    def arrive(self, message: Message) -> None:
        """See `Newest`."""
        sender, receiver, values, mass = message
        if sender in self.waiting[receiver]:
            earlier, before = self.waiting[receiver][sender]
            values, mass = earlier + (mass / (before + mass)) * (values - earlier), before + mass
        self.waiting[receiver][sender] = (values, mass)

    def mix(self, rank: int, x: Tensor, strength: float) -> Tensor:
        """See `Newest`; collects what is there."""
        taken = sorted(self.waiting[rank].items())
        self.waiting[rank] = {}
        self.masses[rank] = total = math.fsum([self.masses[rank], *(mass for _, (_, mass) in taken)])
        mixed = x
        for _, (values, mass) in taken:
            mixed = contained(values - x).mul_(mass / total).add_(mixed)
        return mixed

    def send(self, rank: int, x: Tensor) -> list[Message]:
        """See `Newest`; the rank keeps a share of its mass."""
        receivers = self._rounds[rank].send
        self.masses[rank] = part = self.masses[rank] / (len(receivers) + 1)
        return [(rank, receiver, x, part) for receiver in receivers]


def _perron(rounds: Sequence[Round]) -> list[float]:
    """v = P v with mean 1, of the shares P that push-sum's senders give."""
    n = len(rounds)
    shares = np.zeros((n, n))
    for receiver, parts in enumerate(push(rounds, np.ones(n)).parts):
        for sender, part in parts.items():
            shares[receiver, sender] = part
    system = np.vstack([shares - np.eye(n), np.ones(n)])
    found: list[float] = np.linalg.lstsq(system, np.append(np.zeros(n), float(n)), rcond=None)[0].tolist()
    return found


class VirtualRanks:
    """n ranks on their way through virtual time, each with a clock of its own.

    Args:
        ends: when steps end.
        delay: from the end of a step until its messages are there.

    Attributes:
        flat: [n, N] tensors by the table's names, as of `Ranks`.
        clocks: one for each rank.
    """

    def __init__(
        self,
        row: Algorithm,
        topology: Topology | None,
        schedule: StepSchedule,
        group: dict[str, Any],
        x: Tensor,
        ends: Ends,
        delay: float,
        weights: RankWeights | None = None,
    ) -> None:
        self.row, self.schedule, self.group = row, schedule, group
        # The inner optimizer's own: push-sum's is the same on both sides of an exchange.
        self._stage = row.before or row.after
        self.state_names = self._stage.states(group)
        self.flat = {"param": x} | {name: torch.zeros_like(x) for name in self.state_names}
        n = len(x)
        self.clocks, self._updates = [Clock() for _ in range(n)], [0] * n
        self.parts = None if weights is None else [part_of_node(weights, [rank], n) for rank in range(n)]
        rounds = [topology.round(rank) for rank in range(n)] if topology is not None else []
        self.exchange: Newest | Deposits | None = None
        if rounds:
            self.exchange = Deposits(rounds) if row.weighs else Newest(rounds)
        self._ends, self._delay = ends, delay
        self._ahead = [(ends.of(rank, 0, 0.0), rank) for rank in range(n)]
        heapq.heapify(self._ahead)
        self._under_way: deque[tuple[float, Message]] = deque()
        self._send(range(n), 0.0)

    @property
    def rank_steps(self) -> list[int]:
        """How many steps each rank has made."""
        return [clock.steps for clock in self.clocks]

    @property
    def masses(self) -> list[float]:
        """Push-sum's, of each rank; none with other algorithms."""
        return self.exchange.masses if isinstance(self.exchange, Deposits) else []

    @property
    def mass_under_way(self) -> float:
        """What push-sum's ranks have sent and nobody has collected."""
        if not isinstance(self.exchange, Deposits):
            return 0.0
        waiting = [mass for deposits in self.exchange.waiting for _, mass in deposits.values()]
        return math.fsum([*waiting, *(message[3] for _, message in self._under_way)])

    @torch.no_grad()
    def run_until(self, end: float, problem: Problem, lr: Callable[[int], float]) -> None:
        """Make all steps that end at `end` or before, with the learning rate that `lr` says for a rank's own step.

        Raises:
            ValueError: gradients of another shape; a learning rate, a speed or a strength that is none.
        """
        while self._ahead and self._ahead[0][0] <= end + _MOMENT:
            now, ranks = self._ahead[0][0], []
            while self._ahead and self._ahead[0][0] <= now + _MOMENT:
                ranks.append(heapq.heappop(self._ahead)[1])
            while self.exchange is not None and self._under_way and self._under_way[0][0] <= now + _MOMENT:
                self.exchange.arrive(self._under_way.popleft()[1])
            self._step(ranks, problem, lr)
            self._send(ranks, now)
            for rank in ranks:  # Whose steps begin now.
                heapq.heappush(self._ahead, (self._ends.of(rank, self.clocks[rank].steps, now), rank))

    def _step(self, ranks: Sequence[int], problem: Problem, lr: Callable[[int], float]) -> None:
        """The step of these ranks: all read before any writes."""
        gradients = self._gradients(ranks, problem)
        made = [self._pass(rank, gradients[rank], lr(self.clocks[rank].steps)) for rank in ranks]
        for rank, (x, states) in zip(ranks, made, strict=True):
            self.flat["param"][rank] = x
            for name, state in zip(self.state_names, states, strict=True):
                self.flat[name][rank] = state

    def _gradients(self, ranks: Sequence[int], problem: Problem) -> dict[int, Tensor]:
        """Each rank's at its own step; ranks at the same step are asked for together."""
        x, found = self.flat["param"], dict[int, Tensor]()
        by_step: dict[int, list[int]] = {}
        for rank in ranks:
            by_step.setdefault(self.clocks[rank].steps, []).append(rank)
        for step, together in by_step.items():
            some = getattr(problem, "grad_of", None) if len(together) < len(x) else None
            rows = problem.grad(step, x) if some is None else some(step, together, x[together])
            if rows.shape != ((len(together), x.shape[1]) if some else x.shape):
                raise ValueError(f"grad must return {list(x.shape)}, got {list(rows.shape)}")
            found |= {rank: rows[place if some else rank] for place, rank in enumerate(together)}
        return {rank: rows.to(x.dtype) for rank, rows in found.items()}

    def _pass(self, rank: int, gradient: Tensor, lr: float) -> tuple[Tensor, Sequence[Tensor]]:
        """A rank's new values and states."""
        x, clock, stage = self.flat["param"][rank], self.clocks[rank], self._stage
        part = self.parts[rank] if self.parts is not None else 1.0
        exchanging = self.exchange is not None and self.schedule.exchanges(clock.steps)
        mixed, factor = x, part if stage.scaleless else 1.0
        if self.exchange is not None:
            factor *= self.exchange.rates[rank]
            if exchanging:
                rate = rate_of(lr, clock.largest_lr)
                mixed = self.exchange.mix(rank, x, self.schedule.mix_strength.at(rank, clock.steps, rate))
        if part != 1 and not stage.scaleless:
            gradient = gradient * part
        states = tuple(self.flat[name][rank] for name in self.state_names)
        hyper = stage.hyper({**self.group, "lr": lr * factor}, lr or 1.0)
        x_new, states, _ = RULES[stage.rule](x, (mixed,), gradient, states, self._updates[rank] + 1.0, hyper)
        self._updates[rank] += self.row.counts_updates(self.group)
        clock.tick(self.schedule, exchanging, [lr])
        return x_new, states

    def _send(self, ranks: Sequence[int], now: float) -> None:
        """Send what these ranks' next steps, if they exchange, shall have their neighbours mix with."""
        if self.exchange is None:
            return
        for rank in ranks:
            if self.schedule.exchanges(self.clocks[rank].steps):
                messages = self.exchange.send(rank, self.flat["param"][rank].clone())
                self._under_way.extend((now + self._delay, message) for message in messages)
