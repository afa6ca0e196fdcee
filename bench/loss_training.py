"""How `loss.py` trains n stacked ranks in one process, with the product's rules (`fusedfog.simulate.ranks`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loss_methods import Case, Method
from loss_tasks import TASKS, Task
from torch import Tensor, nn

from fusedfog import optim, topology
from fusedfog.algorithms import algorithm_for
from fusedfog.engine.clock import StepSchedule
from fusedfog.kernels.wire import decode, encode, wire_format
from fusedfog.simulate.ranks import Ranks

CLIP, DECAY, BETAS, MOMENTUM = 1.0, 0.1, (0.9, 0.95), 0.9
LAST = 100
"""Gradient norms are compared over so many steps at the end of a data-parallel start, or over all of a shorter one."""

CHECKS = tuple(part / 20 for part in range(10, 21))
"""After which parts of all steps a run looks at the validation loss."""

GOSSIP, AVERAGE = StepSchedule(), StepSchedule(global_average_every=1)


def graph_of(method: Method, nodes: int) -> topology.Topology:
    """Who talks to whom."""
    if method.graph == "exponential base 4":
        return topology.exponential(nodes, base=4)
    return topology.named(method.graph, nodes)


class CompressedRanks(Ranks):
    """Ranks on a static graph whose messages are coded differences from replicas; see `fusedfog.kernels.wire`."""

    codes = torch.int8

    def _pass(self, stage: Any, gradients: Tensor | None, mixing: Any) -> None:
        if stage is self.row.before:  # Nothing is exchanged before it.
            super()._pass(stage, gradients, mixing)
            return
        x = self.flat["param"]
        replica = self.flat.setdefault("replica", torch.zeros_like(x))
        replica += torch.stack([decode(*encode(row, self.codes), row.dtype) for row in x - replica])
        super()._pass(stage, gradients, lambda base: base + (mixing(replica) - replica))


class Training:
    """n ranks' parameters, matrices and vectors apart as decay is for matrices alone, under one method."""

    def __init__(self, task: Task, method: Method, nodes: int, seed: int, optimizer: str = "AdamW") -> None:
        torch.manual_seed(seed)
        self.task, self.method, self.nodes, self.optimizer = task, method, nodes, optimizer
        self.starts_at = round(method.start * task.steps)
        one = [torch.ones(s.shape) if s.std is None else torch.randn(s.shape) * s.std for s in task.shapes]
        self.parts = [[i for i, s in enumerate(task.shapes) if s.decays == decays] for decays in (True, False)]
        self.ranks = [
            self._ranks(
                "allreduce" if self.starts_at else method.algorithm,
                part,
                torch.cat([one[i].flatten() for i in part]).expand(nodes, -1).clone(),
            )
            for part in self.parts
        ]
        self.norms = torch.zeros(2, len(task.shapes), dtype=torch.float64)

    def _ranks(self, algorithm: str, part: Sequence[int], x: Tensor) -> Ranks:
        decay = DECAY if self.task.shapes[part[0]].decays else 0.0
        one = [nn.Parameter(torch.zeros(1))]
        if self.optimizer == "SGD":
            row = algorithm_for(algorithm, "SGD")
            group = optim.SGD(one, momentum=MOMENTUM, algorithm="local").param_groups[0]
        else:
            row = algorithm_for(algorithm, "Adam")
            group = optim.AdamW(one, betas=BETAS, weight_decay=decay, algorithm="local").param_groups[0]
        graph = graph_of(self.method, self.nodes) if row.exchanges == "parameters" else None
        sizes = [self.task.shapes[i].numel for i in part]
        if graph is None or (codes := wire_format(self.method.wire)) is None:
            return Ranks(row, graph, GOSSIP, group, x, sizes)
        ranks = CompressedRanks(row, graph, GOSSIP, group, x, sizes)
        ranks.codes = codes
        return ranks

    def params(self, mean: bool = False) -> list[Tensor]:
        """[n, ...] of each parameter, or [1, ...] of the averaged model."""
        found: dict[int, Tensor] = {}
        for part, ranks in zip(self.parts, self.ranks, strict=True):
            x = ranks.flat["param"].mean(0, keepdim=True) if mean else ranks.flat["param"]
            shapes = [self.task.shapes[i] for i in part]
            pieces = x.split([s.numel for s in shapes], dim=1)
            found |= {i: p.unflatten(1, s.shape) for i, s, p in zip(part, shapes, pieces, strict=True)}
        return [found[i] for i in range(len(found))]

    def step(self, step: int, rate: float) -> None:
        """One step of every rank."""
        if step == self.starts_at and step:
            self._hand_over()
        leaves = [p.detach().requires_grad_() for p in self.params()]
        grads = torch.autograd.grad(self.task.losses(leaves, step).sum(), leaves)
        flat = torch.cat([g.flatten(1) for g in grads], 1)
        if step < self.starts_at or self.method.algorithm == "allreduce":
            mean = flat.mean(0, keepdim=True)
            if self.starts_at - LAST <= step < self.starts_at:
                self._compare(flat, mean)
            flat = mean.expand_as(flat)
        flat = flat * (CLIP / (flat.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        pieces = flat.split([s.numel for s in self.task.shapes], 1)
        averages = not self.method.average_until <= step / self.task.steps < self.method.average_from
        for part, ranks in zip(self.parts, self.ranks, strict=True):
            ranks.group["lr"] = rate
            ranks.schedule = AVERAGE if averages else GOSSIP
            ranks.step(torch.cat([pieces[i] for i in part], 1))

    def _compare(self, own: Tensor, mean: Tensor) -> None:
        """Add up squared norms of each parameter's gradients: the mean over ranks of their own, and the mean gradient's."""
        sizes = [s.numel for s in self.task.shapes]
        for total, of in zip(self.norms, (own, mean), strict=True):
            total += torch.stack([p.double().square().sum(1).mean() for p in of.split(sizes, 1)])

    def _hand_over(self) -> None:
        """From data-parallel training to gossip, as the product's `data_parallel_steps` has it.

        exp_avg_sq is multiplied, parameter by parameter, by how much larger the ranks' own squared gradients are than
        the mean gradient's: between 1 and n, and n where gradients are noise alone.
        """
        ratios = (self.norms[0] / self.norms[1].clamp(min=1e-30)).clamp(1, self.nodes).float()
        for place, (part, before) in enumerate(zip(self.parts, self.ranks, strict=True)):
            after = self._ranks(self.method.algorithm, part, before.flat["param"])
            after.flat |= {name: before.flat[name] for name in before.state_names if name in after.state_names}
            factors = torch.cat([ratios[i].expand(self.task.shapes[i].numel) for i in part])
            after.flat["exp_avg_sq"] = after.flat["exp_avg_sq"] * factors
            after.updates = before.updates
            self.ranks[place] = after


@dataclass(frozen=True)
class Run:
    """One training: in a data-parallel start, `start_rate` is the rate; after it, and without one, `rate`."""

    case: Case
    method: Method
    rate: float
    seed: int
    start_rate: float | None = None

    @property
    def key(self) -> str:
        """How the results know it."""
        start = "" if self.start_rate is None else f" after {self.start_rate:g}"
        return f"{self.case.name} | {self.method.name} | {self.rate:g}{start} | {self.seed}"


def rate_at(task: Task, lr: float, step: int) -> float:
    """Warm-up, then a cosine to zero."""
    return lr * min(1.0, (step + 1) / task.warm_up) * 0.5 * (1 + math.cos(math.pi * step / task.steps))


def train(run: Run) -> list[float]:
    """Validation losses of the averaged model at `CHECKS`; infinite where it diverged."""
    torch.set_num_threads(1)
    case, method = run.case, run.method
    nodes = case.ranks // method.machine
    task = TASKS[case.task](nodes, run.seed, case.batch * method.machine)
    training = Training(task, method, nodes, run.seed, case.optimizer)
    checks, losses = {round(part * task.steps) for part in CHECKS}, []
    for step in range(task.steps):
        in_start = run.start_rate is not None and step < training.starts_at
        training.step(step, rate_at(task, run.start_rate if in_start else run.rate, step))  # type: ignore[arg-type]
        if step + 1 in checks:
            with torch.no_grad():
                loss = task.validation(training.params(mean=True))
            losses.append(round(loss, 5) if math.isfinite(loss) else math.inf)
    return losses
