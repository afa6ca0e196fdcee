"""One step of n virtual ranks, the rows of stacked tensors: the scheduler's passes, mixed for all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fusedfog.algorithm import Algorithm, Stage
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.mix_strength import rate_of
from fusedfog.engine.rank_weights import RankWeights, part_of_node
from fusedfog.gossip.push_sum import idle, push
from fusedfog.kernels.reference import RULES, Result, Tensors
from fusedfog.kernels.region import align
from fusedfog.simulate.problems import Problem
from fusedfog.topology import Round, Topology

Mix: TypeAlias = Callable[[Tensor], Tensor]

_Slot: TypeAlias = tuple[Tensor | None, Tensor, Tensor]
"""The k-th neighbours: receivers [R] (None for all ranks) take weights [R, 1], float64, of what senders [R] sent."""


@dataclass(frozen=True)
class _Mixing:
    """One exchange of all ranks; rows that have no k-th neighbour are not touched by slot k."""

    slots: tuple[_Slot, ...] = ()
    row_sum: Tensor | float | None = None
    strength: float = 1.0

    def __call__(self, base: Tensor) -> Tensor:
        """`kernels.reference.mix_messages` of every rank: the same operations in the same order, row by row."""
        mixed = base if self.row_sum is None else base * self.row_sum
        for receivers, senders, exact in self.slots if self.strength else ():
            # Rounded once, as a pass does.
            weights = (exact * self.strength).to(base.dtype)
            if receivers is None:
                mixed = contained(base[senders] - base).mul_(weights).add_(mixed)
            else:
                part = contained(base[senders] - base[receivers]).mul_(weights).add_(mixed[receivers])
                mixed = mixed.index_copy(0, receivers, part)
        return mixed


def contained(differences: Tensor) -> Tensor:
    """In place, as `nonfinite="contain"` has it: differences that are not finite are 0."""
    return differences if math.isfinite(differences.sum()) else differences.masked_fill_(~differences.isfinite(), 0.0)


def _everyone(base: Tensor, strength: float) -> Tensor:
    """A full average as an exchange with weight one."""
    return contained(_mean(base) - base).mul_(strength).add_(base) if strength else base


def _mean(rows: Tensor, parts: Sequence[float] | None = None) -> Tensor:
    """Row by row: torch's own sum picks its order by shape. Rows that are not finite are left out, as in buckets of one model.

    Of a weighted mean, `parts` are what each row is multiplied by.
    """
    parts = parts if parts is not None else [1.0] * len(rows)
    total, fine = torch.zeros_like(rows[0]), rows.isfinite().all(1).tolist()
    for row, part, whole in zip(rows, parts, fine, strict=True):
        if whole:
            total += row * (part / len(rows))
    present = math.fsum(part for part, whole in zip(parts, fine, strict=True) if whole)
    return total if all(fine) else total.mul_(len(rows) / (present or 1.0))


def _slots(received: Sequence[Mapping[int, float]]) -> tuple[_Slot, ...]:
    """From each rank's {neighbour: weight}, ascending, to slots; neighbours of weight zero are skipped."""
    lists = [[(peer, weight) for peer, weight in weights.items() if weight] for weights in received]
    slots = []
    for k in range(max(map(len, lists), default=0)):
        rows = [rank for rank, peers in enumerate(lists) if len(peers) > k]
        senders = torch.tensor([lists[rank][k][0] for rank in rows])
        weights = torch.tensor([[lists[rank][k][1]] for rank in rows], dtype=torch.float64)
        slots.append((None if len(rows) == len(lists) else torch.tensor(rows), senders, weights))
    return tuple(slots)


class Ranks:
    """n ranks on their way through steps: the scheduler's clock and order of passes, on stacked tensors.

    Attributes:
        flat: [n, N] tensors by the table's names: "param", states, "message". scalars: push-sum's, float64 [n].
        parts: n p of each rank, if they have different weights.
    """

    def __init__(
        self,
        row: Algorithm,
        topology: Topology | None,
        schedule: StepSchedule,
        group: dict[str, Any],
        x: Tensor,
        sizes: Any,
        weights: RankWeights | None = None,
    ) -> None:
        self.row, self.topology, self.schedule, self.group = row, topology, schedule, group
        self.state_names = row.state_names(group)
        self.flat = {"param": x} | {name: torch.zeros_like(x) for name in self.state_names}
        if row.outer:
            self.flat["outer_param"].copy_(x)
        self.scalars = np.ones(len(x))
        self.parts = weights and [part_of_node(weights, [rank], len(x)) for rank in range(len(x))]
        self.clock, self.updates = Clock(), 0
        self._sizes = tuple(sizes)
        self._rounds: dict[int, list[Round]] = {}
        self._mixings: dict[int, _Mixing] = {}

    mass_under_way = 0.0
    """Push-sum's deposits arrive in the step in which they are sent."""

    @property
    def rank_steps(self) -> list[int]:
        """How many steps each rank has made."""
        return [self.clock.steps] * len(self.scalars)

    @property
    def masses(self) -> list[float]:
        """Push-sum's scalars; none with other algorithms."""
        scalars: list[float] = self.scalars.tolist() if self.row.weighs else []
        return scalars

    def run_until(self, end: int, problem: Problem, lr: Callable[[int], float]) -> None:
        """Make steps until there are `end`, with the learning rates that `lr` says."""
        while self.clock.steps < end:
            self.group["lr"] = lr(self.clock.steps)
            self.step(problem.grad(self.clock.steps, self.flat["param"]))

    @torch.no_grad()
    def step(self, gradients: Tensor) -> None:
        """One step of every rank, with their gradients [n, N]."""
        row, x, step = self.row, self.flat["param"], self.clock.steps
        if gradients.shape != x.shape:
            raise ValueError(f"grad must return {list(x.shape)}, got {list(gradients.shape)}")
        gradients = gradients.to(x.dtype)
        exchanging = self.topology is not None and self.schedule.exchanges(step)
        if row.exchanges == "gradients":
            gradients = _mean(gradients, self.parts).expand_as(x)
        before, mixing = self._mixing(step, exchanging)
        if row.before is None:
            self._pass(row.after, gradients, mixing)
        else:
            self._pass(row.before, gradients, before)
            if row.passes_after_exchange(exchanging):
                self._pass(row.after, None, mixing)
        self.clock.tick(self.schedule, exchanging, [self.group["lr"]])

    def _pass(self, stage: Stage, gradients: Tensor | None, mixing: Mix) -> None:
        row, group, x = self.row, self.group, self.flat["param"]
        first_half = stage is row.before
        if stage.differences and isinstance(mixing, _Mixing):
            mixing = replace(mixing, row_sum=0.0)
        mixed = tuple(mixing(self.flat[name]) for name in (("param",) if first_half else row.messages))
        names, g = stage.states(group), torch.zeros_like(x) if gradients is None else gradients
        states = tuple(self.flat[name] for name in names)
        weighed = self.parts is not None and gradients is not None and row.exchanges != "gradients"
        if weighed and not stage.scaleless:
            g = g * self._column(self.parts or ())
        x, states, made = self._rule(stage, x, mixed, g, states, by_lr=weighed and stage.scaleless)
        self.flat.update({"param": x}, **dict(zip(names, states, strict=True)))
        if first_half and "message" in row.messages:
            self.flat["message"] = made[0]
        if gradients is not None and row.counts_updates(group):
            self.updates += 1

    def _rule(self, stage: Stage, x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, *, by_lr: bool) -> Result:
        """The rule on all ranks at once, or where each one's lr has a weight on one after the other."""
        group, previous = self.group, self.clock.previous_lr.get(0, self.group["lr"] or 1.0)
        norms: Tensors = ()
        if stage is self.row.before and self.row.normalized:
            norms = (self._inverse_norms(self.flat[self.row.normalized]),)
        rule, step = RULES[stage.rule], self.updates + 1.0
        if not by_lr:
            return rule(x, mixed, g, states, step, (*stage.hyper(group, previous), *norms))
        results = []
        for rank, part in enumerate(self.parts or ()):
            own = slice(rank, rank + 1)
            hyper = stage.hyper({**group, "lr": group["lr"] * part}, previous)
            given = [tuple(one[own] for one in several) for several in (mixed, states, norms)]
            results.append(rule(x[own], given[0], g[own], given[1], step, (*hyper, *given[2])))
        rows, kept, made = zip(*results, strict=True)
        stacked = [tuple(torch.cat(one) for one in zip(*several, strict=True)) for several in (kept, made)]
        return torch.cat(rows), stacked[0], stacked[1]

    def _mixing(self, step: int, exchanging: bool) -> tuple[Mix, Mix]:
        """How the pass before the exchange and the one after it mix."""
        if self.row.weighs:
            return self._push(exchanging)
        if not exchanging:
            return _Mixing(), _Mixing()
        strength = self._strength(step)
        if self.schedule.is_global_average_step(step):
            return _Mixing(), partial(_everyone, strength=strength)
        number = self._round_number()
        if number not in self._mixings:
            self._mixings[number] = _Mixing(_slots([round_.recv for round_ in self._turns(number)]))
        return _Mixing(), replace(self._mixings[number], strength=strength)

    def _strength(self, step: int) -> float:
        """s of this step, for all ranks alike."""
        return self.schedule.mix_strength.at(0, step, rate_of(self.group["lr"], self.clock.largest_lr))

    def _push(self, exchanging: bool) -> tuple[_Mixing, _Mixing]:
        """Push-sum's scale before and weights after, of all ranks; moves the scalars."""
        made = push(self._turns(self._round_number()), self.scalars) if exchanging else idle(self.scalars)
        self.scalars = made.after
        shares = [made.shares(rank) for rank in range(len(self.scalars))]
        return _Mixing(row_sum=self._column([one.scale for one in shares])), _Mixing(
            _slots([one.recv for one in shares]),
            self._column([one.row_sum for one in shares]),
        )

    def _round_number(self) -> int:
        assert self.topology is not None
        period = self.topology.period
        return self.clock.exchanges if period is None else self.clock.exchanges % period

    def _turns(self, number: int) -> list[Round]:
        """Every rank's neighbours in a round; remembered, until an endless sequence moves on."""
        assert self.topology is not None
        if number not in self._rounds:
            if self.topology.period is None:
                self._rounds.clear()
                self._mixings.clear()
            self._rounds[number] = [self.topology.round(rank, number) for rank in range(len(self.scalars))]
        return self._rounds[number]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.flat["param"].dtype)[:, None]

    def _inverse_norms(self, state: Tensor) -> Tensor:
        """1 / (||row|| + 1e-8) of each rank, 0 for a zero row: [n, 1].

        The order in which torch adds up a norm depends on where elements lie, so each row is laid out as
        `layout.build_layout` lays out the parameters of a real rank.
        """
        pieces = [
            nn.functional.pad(piece, (0, align(piece.shape[1]) - piece.shape[1]))
            for piece in state.split(self._sizes, dim=1)
        ]
        norms = torch.stack([torch.linalg.vector_norm(row).double() for row in torch.cat(pieces, dim=1)])
        return torch.where(norms > 0, 1.0 / (norms + 1e-8), 0.0).to(state.dtype)[:, None]
