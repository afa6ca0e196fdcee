"""The loss of decentralized training beside data-parallel training's: python bench/loss.py [--tasks MLP,GPT] [--ranks 4,16]

Every method trains the same model on the same batches, seed by seed, with the product's rules on n stacked ranks in one
process (`fusedfog.simulate`): AdamW (0.9, 0.95), decay 0.1 on matrices, clipping at 1, warm-up and a cosine to zero. Rates
lie on a grid of factors of 2 and every method takes its own best, by mean loss over the seeds. What is shown is the loss of
the averaged model relative to data-parallel training at *its* best rate, mean and standard error over paired seeds, and the
steps, as a part of all, after which a method is where data-parallel training ends.

A *data-parallel start* of p % averages gradients over all ranks in the first p % of the steps; then the method takes over,
and second moments are multiplied by the ratio of squared norms, own gradient to mean gradient, parameter by parameter.

Runs are kept one by one in results/loss-runs.json, so that a bench that is stopped goes on where it was. Writes results/loss.json
and results/loss.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from common import RESULTS, machine
from loss_tasks import TASKS, Task
from torch import Tensor, nn
from tqdm import tqdm

from fusedfog import optim
from fusedfog.algorithms import algorithm_for
from fusedfog.engine.clock import StepSchedule
from fusedfog.kernels.wire import decode, encode, wire_format
from fusedfog.simulate.ranks import Ranks
from fusedfog.topology import Topology, named

CLIP, DECAY, BETAS = 1.0, 0.1, (0.9, 0.95)
LAST = 100
"""Gradient norms are compared over so many steps at the end of a data-parallel start."""


@dataclass(frozen=True)
class Method:
    """A row: an algorithm on a graph, what comes before it, and how messages travel."""

    algorithm: str = "awc"
    graph: str = "one_peer_exponential"
    start: float = 0.0
    wire: str | None = None
    average: bool = False
    """All ranks' parameters are averaged in every step, instead of gossip."""
    machine: int = 1
    """Ranks of a machine, over which gradients are averaged: one node of the graph with so many times the batch."""

    @property
    def name(self) -> str:
        if self.algorithm == "allreduce":
            return "data-parallel"
        words = ["local, all averaged every step" if self.average else f"{self.algorithm.upper()}, {self.graph}"]
        words += [f"{self.wire} differences"] * bool(self.wire) + [f"machines of {self.machine}"] * (self.machine > 1)
        return ", ".join(words) + (f", {self.start:.0%} data-parallel start" if self.start else "")


DATA_PARALLEL = Method("allreduce", "none")
METHODS = (
    DATA_PARALLEL,
    Method(average=True),
    Method("atc"),
    Method(),
    Method(graph="exponential"),
    Method(graph="exponential", wire="int8"),
    Method(start=0.05),
    Method(start=0.1),
    Method(start=0.2),
    Method("atc", start=0.1),
    Method("atc", start=0.2),
    Method(graph="exponential", start=0.1),
    Method(graph="exponential", start=0.2),
    Method(graph="exponential", start=0.2, wire="int8"),
)
MACHINES = (Method(machine=4), Method("atc", machine=4), Method(machine=4, start=0.1))
"""Where there are 16 ranks, as 4 machines."""

GRIDS = {
    "GPT": (0.008, 0.016, 0.032, 0.064, 0.128),
    "MLP": (0.032, 0.064, 0.128, 0.256, 0.512),
    "digits": (0.004, 0.008, 0.016, 0.032, 0.064),
}
SEEDS = {"GPT": 8, "MLP": 8, "digits": 16}
CHECKS = 25
"""How often a run looks at the loss."""


class CompressedRanks(Ranks):
    """Ranks on a static graph whose messages are coded differences from replicas; see `fusedfog.kernels.wire`."""

    codes = torch.int8

    def _pass(self, stage: Any, gradients: Tensor | None, mixing: Any) -> None:
        x = self.flat["param"]
        replica = self.flat.setdefault("replica", torch.zeros_like(x))
        replica += torch.stack([decode(*encode(row, self.codes), row.dtype) for row in x - replica])
        super()._pass(stage, gradients, lambda base: base + (mixing(replica) - replica))


class Training:
    """n ranks' parameters, matrices and vectors apart as decay is for matrices alone, under one method."""

    def __init__(self, task: Task, method: Method, nodes: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.method, self.nodes = task, method, nodes
        self.starts_at = int(method.start * task.steps)
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
        self.norms = torch.zeros(2, nodes, len(task.shapes), dtype=torch.float64)

    def _ranks(self, algorithm: str, part: Sequence[int], x: Tensor) -> Ranks:
        decay = DECAY if self.task.shapes[part[0]].decays else 0.0
        face = optim.AdamW([nn.Parameter(torch.zeros(1))], betas=BETAS, weight_decay=decay, algorithm="local")
        row, graph = algorithm_for(algorithm, "Adam"), None
        if row.exchanges == "parameters":
            graph = self._graph()
        kind: type[Ranks] = CompressedRanks if self.method.wire and graph is not None else Ranks
        if self.method.wire:
            assert wire_format(self.method.wire) == CompressedRanks.codes
        schedule = StepSchedule(global_average_every=1 if self.method.average else None)
        return kind(row, graph, schedule, face.param_groups[0], x, [self.task.shapes[i].numel for i in part])

    def _graph(self) -> Topology:
        return named(self.method.graph, self.nodes)

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
                sizes = [s.numel for s in self.task.shapes]
                for kind, of in enumerate((flat, mean.expand_as(flat))):
                    self.norms[kind] += torch.stack([p.double().square().sum(1) for p in of.split(sizes, 1)], 1)
            flat = mean.expand_as(flat)
        flat = flat * (CLIP / (flat.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        pieces = flat.split([s.numel for s in self.task.shapes], 1)
        for part, ranks in zip(self.parts, self.ranks, strict=True):
            ranks.group["lr"] = rate
            ranks.step(torch.cat([pieces[i] for i in part], 1))

    def _hand_over(self) -> None:
        ratios = (self.norms[0] / self.norms[1].clamp(min=1e-30)).float()
        for place, (part, before) in enumerate(zip(self.parts, self.ranks, strict=True)):
            after = self._ranks(self.method.algorithm, part, before.flat["param"])
            after.flat |= {name: before.flat[name] for name in before.state_names if name in after.state_names}
            factors = [ratios[:, i : i + 1].expand(-1, self.task.shapes[i].numel) for i in part]
            after.flat["exp_avg_sq"] = after.flat["exp_avg_sq"] * torch.cat(factors, 1)
            after.updates = before.updates
            self.ranks[place] = after


def rate_at(task: Task, lr: float, step: int) -> float:
    """Warm-up, then a cosine to zero."""
    return lr * min(1.0, (step + 1) / task.warm_up) * 0.5 * (1 + math.cos(math.pi * step / task.steps))


Run = tuple[str, Method, int, float, int]


def train(run: Run) -> list[float]:
    """Validation losses of the averaged model at equal distances, the last one at the end; infinite if it diverged."""
    name, method, n, lr, seed = run
    torch.set_num_threads(1)
    task = TASKS[name](n // method.machine, seed, method.machine)
    training = Training(task, method, n // method.machine, seed)
    losses = []
    for step in range(task.steps):
        training.step(step, rate_at(task, lr, step))
        if (step + 1) % (task.steps // CHECKS) == 0:
            with torch.no_grad():
                loss = task.validation(training.params(mean=True))
            losses.append(loss if math.isfinite(loss) else math.inf)
    return losses


def key_of(run: Run) -> str:
    """A run as the results know it."""
    name, method, n, lr, seed = run
    return f"{name} | {method.name} | n={n} | lr={lr:g} | seed={seed}"


def methods_for(n: int) -> tuple[Method, ...]:
    return (*METHODS, *(MACHINES if n == 16 else ()))


def runs_of(tasks: Sequence[str], sizes: Sequence[int], seeds: int | None) -> Iterator[Run]:
    for name, n in itertools.product(tasks, sizes):
        for seed in range(seeds or SEEDS[name]):
            for method, lr in itertools.product(methods_for(n), GRIDS[name]):
                yield name, method, n, lr, seed


def row(
    name: str, method: Method, n: int, known: Mapping[str, list[float]], baseline: Mapping[int, list[float]]
) -> Any:
    """A method at its best rate beside data-parallel training: None until every seed that it has is there."""
    best: tuple[float, float, dict[int, list[float]]] | None = None
    for lr in GRIDS[name]:
        found = {s: known[k] for s in range(SEEDS[name]) if (k := key_of((name, method, n, lr, s))) in known}
        if found and set(found) <= set(baseline):
            mean = statistics.mean(curve[-1] for curve in found.values())
            if best is None or (len(found), -mean) > (len(best[2]), -best[1]):
                best = lr, mean, found
    if best is None:
        return None
    lr, _, found = best
    gaps = [100 * (found[seed][-1] / baseline[seed][-1] - 1) for seed in found]
    reached = [
        next((i + 1 for i, loss in enumerate(curve) if loss <= baseline[seed][-1]), None)
        for seed, curve in found.items()
    ]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    parts = [one / CHECKS for one in reached if one is not None]
    return {
        "task": name,
        "ranks": n,
        "method": method.name,
        "rate": lr,
        "seeds": len(gaps),
        "loss relative to data-parallel, %": f"{statistics.mean(gaps):+.1f} ± {error:.1f}",
        "its loss reached": f"{len(parts)} of {len(gaps)} seeds, after {statistics.mean(parts):.0%}"
        if parts
        else "never",
    }


def report(known: Mapping[str, list[float]], tasks: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for name, n in itertools.product(tasks, sizes):
        curves = {
            lr: {s: known[k] for s in range(SEEDS[name]) if (k := key_of((name, DATA_PARALLEL, n, lr, s))) in known}
            for lr in GRIDS[name]
        }
        full = {lr: found for lr, found in curves.items() if found and len(found) == max(map(len, curves.values()))}
        if not full:
            continue
        baseline = min(full.values(), key=lambda found: statistics.mean(curve[-1] for curve in found.values()))
        rows += [one for method in methods_for(n) if (one := row(name, method, n, known, baseline)) is not None]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="MLP,digits,GPT")
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--seeds", type=int, help="how many, instead of the table's own numbers")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    tasks, sizes = given.tasks.split(","), [int(n) for n in given.ranks.split(",")]
    kept = RESULTS / "loss-runs.json"
    known: dict[str, list[float]] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [run for run in runs_of(tasks, sizes, given.seeds) if key_of(run) not in known]
    end = time.monotonic() + 60 * given.minutes
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool, tqdm(total=len(missing)) as bar:
        for first in range(0, len(missing), given.workers):
            if time.monotonic() > end:
                break
            some = missing[first : first + given.workers]
            known |= dict(zip(map(key_of, some), pool.map(train, some), strict=True))
            kept.write_text(json.dumps(known) + "\n")
            bar.update(len(some))
    rows = report(known, tasks, sizes)
    words = machine()
    (RESULTS / "loss.json").write_text(json.dumps({"machine": words, "rows": rows}, indent=1) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in words.items()), ""]
    if rows:
        names = list(rows[0])
        lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(str(one[name]) for name in names) + " |" for one in rows]
    text = "\n".join(lines)
    (RESULTS / "loss.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
