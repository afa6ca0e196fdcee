"""Weaker mixing as the learning rate falls (DSGD-AC), on digits: python bench/mix_strength.py

Wang and Johansson ("Decentralized SGD with controlled disagreement finds flatter minima", arXiv 2602.02899) mix with
W_t = I + s_t (W - I), s_t falling with the learning rate, so that ranks stay apart until the end. They report flatter minima and
higher test accuracy of the averaged model than with s = 1, and than with data-parallel training.

Here 8 ranks, simulated, train the network of digits_table.py (64-32-10, tanh) by AWC SGD with momentum 0.9 on the one-peer
exponential graph, for 89 passes over the data. The learning rate falls to zero along a cosine, rate = lr / largest lr. The
1,437 training images are dealt evenly, or with Dirichlet(0.1) label skew. Seeds draw test images, deal, network and batches,
and all methods have the same ones, so that differences are between pairs. Every figure is of the averaged model; "rise" is
the mean rise of the training loss under normal noise of 0.05 on every weight, a measure of how sharp the minimum is, and
"apart" the root mean square distance of ranks from their mean, relative to its norm. Five minutes of one core.
(results/mix_strength.json and .md)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table
from digits_table import BATCH, deal, images, network
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusedfog.simulate import ModuleProblem, simulate

RANKS, SEEDS, STEPS = 8, 16, 1000
RATES = (0.05, 0.2)
DEALS: dict[str, float | None] = {"even": None, "Dirichlet(0.1)": 0.1}
NOISE, DRAWS = 0.05, 32
METHODS: dict[str, float | None] = {
    "data-parallel": None,
    "s = 1": 0.0,
    "s = rate^0.5": 0.5,
    "s = rate": 1.0,
    "s = rate^2": 2.0,
}
"""Name -> the power of the rate that s is; None reduces gradients over all ranks."""

FIGURES = {"accuracy": "test accuracy, %", "test_loss": "test loss", "train_loss": "training loss", "rise": "rise"}


@dataclass(frozen=True)
class Run:
    """One training; `key` says what of, `seed` which pair it belongs to."""

    dealt: str
    lr: float
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, float, str]:
        return self.dealt, self.lr, self.method


def strength(power: float) -> Callable[[int, float], float]:
    return lambda step, rate: rate**power


def evenly(labels: Tensor, seed: int) -> list[Tensor]:
    """Indices per rank, shuffled and dealt like cards."""
    return list(torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tensor_split(RANKS))


def problem(dealt: str, seed: int) -> ModuleProblem:
    x, y, _, _ = images(seed)
    alpha = DEALS[dealt]
    hands = evenly(y, seed) if alpha is None else deal(y, RANKS, alpha, seed)
    return ModuleProblem(network(seed), cross_entropy, [(x[hand], y[hand]) for hand in hands], batch=BATCH, seed=seed)


@torch.no_grad()
def rise(task: ModuleProblem, row: Tensor, seed: int) -> float:
    """How much the training loss rises on average when every weight is moved by normal noise."""
    source = torch.Generator().manual_seed(seed)
    here = float(task.loss(row[None]))
    moved = [float(task.loss((row + NOISE * torch.randn(len(row), generator=source))[None])) for _ in range(DRAWS)]
    return statistics.mean(moved) - here


def train(run: Run) -> dict[str, float]:
    torch.set_num_threads(1)
    task, power = problem(run.dealt, run.seed), METHODS[run.method]
    how: dict[str, Any] = {"algorithm": "allreduce"}
    if power is not None:
        how = {"topology": "one_peer_exponential", "mix_strength": strength(power) if power else 1.0}
    path = simulate(
        task,
        RANKS,
        steps=STEPS,
        lr=lambda step: run.lr * 0.5 * (1 + math.cos(math.pi * step / STEPS)),
        momentum=0.9,
        record_every=STEPS,
        dtype=torch.float32,
        **how,
    )
    mean = path.X.mean(0)
    _, _, x, y = images(run.seed)
    with torch.no_grad():
        told = task.predict(mean, x)
    return {
        "accuracy": 100 * float((told.argmax(1) == y).double().mean()),
        "test_loss": float(cross_entropy(told, y)),
        "train_loss": path.losses[-1],
        "rise": rise(task, mean, run.seed),
        "apart": path.consensus[-1] / float(mean.norm()),
    }


Found = Mapping[tuple[str, float, str], Sequence[Mapping[str, float]]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def show(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def rows_of(found: Found, dealt: str) -> list[dict[str, Any]]:
    """Figures of every method, and paired differences from s = 1 and from data-parallel training."""
    rows = []
    for lr in RATES:
        for method in METHODS:
            runs = found[dealt, lr, method]
            row: dict[str, Any] = {"lr": f"{lr:g}", "method": method}
            row |= {words: show([one[name] for one in runs], _digits(name)) for name, words in FIGURES.items()}
            row["apart, %"] = show([100 * one["apart"] for one in runs], 2)
            for other in ("s = 1", "data-parallel"):
                pairs = zip(runs, found[dealt, lr, other], strict=True)
                differences = [one["accuracy"] - theirs["accuracy"] for one, theirs in pairs]
                row[f"accuracy less that of {other}"] = "" if method == other else show(differences, 2, "+")
            rows.append(row)
    return rows


def _digits(name: str) -> int:
    return 2 if name == "accuracy" else 4


def pooled(found: Found, name: str, method: str, other: str, dealt: str) -> tuple[float, float]:
    """The mean paired difference over all learning rates and its standard error; a seed counts once."""
    by_seed = zip(
        *(
            [
                one[name] - theirs[name]
                for one, theirs in zip(found[dealt, lr, method], found[dealt, lr, other], strict=True)
            ]
            for lr in RATES
        ),
        strict=True,
    )
    return mean_and_error([statistics.mean(values) for values in by_seed])


def summary(found: Found) -> list[dict[str, Any]]:
    rows = []
    for dealt in DEALS:
        for other in ("s = 1", "data-parallel"):
            for method in METHODS:
                if method not in ("s = 1", "data-parallel") or (method == "s = 1" and other == "data-parallel"):
                    row: dict[str, Any] = {"deal": dealt, "method": method, "less": other}
                    for name, words in FIGURES.items():
                        mean, error = pooled(found, name, method, other, dealt)
                        row[words] = f"{mean:+.{_digits(name)}f} ± {error:.{_digits(name)}f}"
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default {SEEDS})")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time")
    given = parser.parse_args()
    begin = time.perf_counter()
    runs = [
        Run(dealt, lr, method, seed)
        for seed in range(given.seeds)
        for dealt in DEALS
        for lr in RATES
        for method in METHODS
    ]
    # spawn: a forked child of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        figures = list(pool.map(train, runs, chunksize=len(DEALS) * len(RATES) * len(METHODS)))
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for run, one in zip(runs, figures, strict=True):
        found.setdefault(run.key, []).append(one)
    report = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - begin),
        "settings": {"ranks": RANKS, "steps": STEPS, "batch": BATCH, "seeds": given.seeds, "noise": NOISE},
        "cells": [
            {"deal": dealt, "lr": lr, "method": method, "runs": one} for (dealt, lr, method), one in found.items()
        ],
    }
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    note = (
        f"Digits, {RANKS} ranks, {STEPS} steps of batch {BATCH} a rank, mean ± standard error of {given.seeds} seeds; see "
        f"bench/mix_strength.py. {words}"
    )
    text = [note, "Paired differences, over all learning rates:", table(summary(found))]
    for dealt in DEALS:
        text += [f"Deal: {dealt}", table(rows_of(found, dealt))]
    given.folder.mkdir(exist_ok=True)
    (given.folder / "mix_strength.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.folder / "mix_strength.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text), f"\n\n{report['seconds']} s")


if __name__ == "__main__":
    main()
