"""Every algorithm on real data split by label: python bench/digits_table.py (writes results/digits_table.json and .md)

scikit-learn's digits (1,797 images; 360 kept for testing) are dealt to 8 and to 16 virtual ranks with Dirichlet(0.1) label
skew: a rank sees mostly one to three of the ten digits. Each rank trains its own copy of a small network (64-32-10, tanh)
through `fusedfog.simulate`, with the rules that real ranks run. A cell is the test accuracy of the average of all ranks'
models, in percent: mean and spread (sample standard deviation) over 3 seeds, which draw the split, the network and the
batches. "refused" is a topology outside the algorithm's theory, which raises a ValueError. allreduce is data-parallel
training with the same batches, local is training without communication and one average at the end.

Methods differ in the learning rates that suit them, so each cell chooses its own from a grid: the one with which
a fourth seed has the least training loss, without a look at test images. Rows with momentum use lr * (1 - 0.9). Learning
rates fall to zero along a cosine.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fusedfog.simulate import ModuleProblem, simulate

GRAPHS = ("ring", "exponential", "one_peer_exponential", "base_graph")
SIZES = (8, 16)
SEEDS = (0, 1, 2)
STEPS, BATCH, ALPHA = 250, 16, 0.1
TUNING_SEED = 3
SGD_GRID, ADAM_GRID = (0.125, 0.25, 0.5, 1.0), (0.005, 0.015, 0.05, 0.15)


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    optimizer: str
    algorithm: str
    grid: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        extra = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.optimizer} {self.algorithm}" + (f" ({extra})" if extra else "")

    @property
    def graphs(self) -> tuple[str | None, ...]:
        return (None,) if self.algorithm in ("allreduce", "local") else GRAPHS


def _sgd(algorithm: str, momentum: float = 0.9) -> Method:
    options = {"momentum": momentum} if momentum else {}
    return Method("SGD", algorithm, tuple(round(lr * (1 - momentum), 9) for lr in SGD_GRID), options)


METHODS = (
    _sgd("allreduce"),
    _sgd("local"),
    _sgd("awc"),
    _sgd("atc"),
    _sgd("decentlam"),
    _sgd("quasi_global"),
    _sgd("exact_diffusion", 0.0),
    _sgd("extra", 0.0),
    _sgd("gradient_tracking", 0.0),
    _sgd("momentum_tracking"),
    _sgd("push_sum"),
    *(
        Method("Adam", name, ADAM_GRID)
        for name in ("allreduce", "local", "awc", "atc", "dag", "quasi_global", "gradient_tracking", "push_sum")
    ),
    Method("AccumAdamW", "awc", ADAM_GRID, {"accum_steps": 4}),
    Method("AccumAdamW", "atc", ADAM_GRID, {"accum_steps": 4}),
)


@cache
def images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1437, 64] in 0..1 and labels, test images [360, 64] and labels."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=360, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def deal(labels: Tensor, n: int, alpha: float, seed: int) -> list[Tensor]:
    """Indices per rank: each class is shared out in proportions drawn from Dirichlet(alpha), until all have a batch."""
    rng = np.random.default_rng(seed)
    while True:
        hands: list[list[np.ndarray]] = [[] for _ in range(n)]
        for label in range(10):
            members = rng.permutation(np.flatnonzero(labels.numpy() == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(n, alpha)))[:-1] * len(members)).astype(int)
            for hand, piece in zip(hands, np.split(members, cuts), strict=True):
                hand.append(piece)
        dealt = [torch.from_numpy(np.concatenate(hand)) for hand in hands]
        if min(map(len, dealt)) >= BATCH:
            return dealt


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def problem(n: int, seed: int) -> ModuleProblem:
    x, y, _, _ = images(seed)
    shards = [(x[hand], y[hand]) for hand in deal(y, n, ALPHA, seed)]
    return ModuleProblem(network(seed), cross_entropy, shards, batch=BATCH, seed=seed)


def cosine(lr: float, step: int) -> float:
    return lr * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def accuracy(model: ModuleProblem, row: Tensor, seed: int) -> float:
    """Test accuracy, in percent, of flat parameters [N]."""
    _, _, x, y = images(seed)
    with torch.no_grad():
        return 100 * float((model.predict(row, x).argmax(1) == y).double().mean())


Cell = tuple[Method, str | None, int]


def refused(method: Method, graph: str | None, n: int) -> bool:
    """Whether the optimizer refuses the topology."""
    try:
        train(method, graph, n, 0, 0.0, steps=0)
    except ValueError as error:
        if "topology" not in str(error):
            raise
        return True
    return False


def train(method: Method, graph: str | None, n: int, seed: int, lr: float, steps: int = STEPS) -> tuple[float, float]:
    """Test accuracy in percent, and training loss on all ranks' images, of the averaged model."""
    torch.set_num_threads(1)
    task = problem(n, seed)
    path = simulate(
        task,
        n,
        graph,
        method.algorithm,
        optimizer=method.optimizer,  # type: ignore[arg-type]
        steps=steps,
        lr=lambda step: cosine(lr, step),
        record_every=STEPS,
        dtype=torch.float32,
        **method.options,
    )
    return accuracy(task, path.X.mean(0), seed), path.losses[-1]


def fill(method: Method, graph: str | None, n: int) -> tuple[float | None, list[float]]:
    """A cell's learning rate and its test accuracies; None and [] if refused."""
    if refused(method, graph, n):
        return None, []
    losses = {lr: train(method, graph, n, TUNING_SEED, lr)[1] for lr in method.grid}
    best = min(losses, key=lambda lr: losses[lr] if math.isfinite(losses[lr]) else math.inf)
    return best, [train(method, graph, n, seed, best)[0] for seed in SEEDS]


Results = dict[Cell, tuple[float | None, list[float]]]


def show(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if values else "refused"


def table(n: int, results: Results) -> str:
    lines = [f"| {n} ranks | " + " | ".join(GRAPHS) + " |", "|---|" + "---|" * len(GRAPHS)]
    for method in METHODS:
        cells = [show(results[method, graph, n][1]) for graph in method.graphs]
        if len(cells) == 1:
            cells = [f"{cells[0]} (no graph)", *[""] * (len(GRAPHS) - 1)]
        lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    begin = time.perf_counter()
    cells = [(method, graph, n) for n in SIZES for method in METHODS for graph in method.graphs]
    # spawn: a forked child of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results: Results = dict(zip(cells, pool.map(fill, *zip(*cells, strict=True)), strict=True))
    report = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - begin),
        "settings": {"steps": STEPS, "batch": BATCH, "alpha": ALPHA, "seeds": SEEDS, "tuning_seed": TUNING_SEED},
        "cells": [
            {"method": method.name, "topology": graph, "ranks": n, "lr": lr, "accuracy": accuracies}
            for (method, graph, n), (lr, accuracies) in results.items()
        ],
    }
    text = "\n\n".join(table(n, results) for n in SIZES)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "digits_table.json").write_text(json.dumps(report, indent=1) + "\n")
    words = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    note = (
        f"Test accuracy (%) of the averaged model: digits, Dirichlet({ALPHA}) label skew, {STEPS} steps of batch {BATCH} a "
        f"rank, mean ± sample standard deviation of {len(SEEDS)} seeds; see bench/digits_table.py. {words}"
    )
    (RESULTS / "digits_table.md").write_text(f"{note}\n\n{text}\n")
    print(f"{note}\n\n{text}\n\n{report['seconds']} s")


if __name__ == "__main__":
    main()
