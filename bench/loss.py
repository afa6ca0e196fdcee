"""The loss of decentralized training beside data-parallel training's: python bench/loss.py [--tasks MLP,GPT] [--minutes 60]

Every method trains the same model on the same batches, seed by seed, with the product's rules on n stacked ranks in one
process (`fusedfog.simulate`): AdamW (0.9, 0.95), decay 0.1 on matrices, clipping at 1 of each rank's own gradient (of the mean,
for data-parallel training), warm-up, then a cosine to zero. What is shown is the validation loss of the averaged model
relative to data-parallel training at *its* best rate: mean and standard error over paired seeds.

A *data-parallel start* of p % averages gradients over all ranks in the first p % of the steps, at the best rate of
data-parallel training; then the method takes over (`loss_training.Training`), at a rate of its own: the product's
`data_parallel_steps` and `lr_scale`.

Every method gets its own best rate, data-parallel training too, by the same search on the same grid of factors of 2. The search
begins at a rate that earlier searches have found, trains two seeds, goes one factor up, and on while their mean loss
improves; if the first step up does not improve, it goes down in the same way. The other seeds run at the best rate found.
Data-parallel training, with which all are compared, runs all seeds at the best two rates, and the better one counts.
For methods with a start, the rate that is searched is the one after it.

Runs are kept one by one in results/loss-runs.json, so that a bench that is stopped goes on where it was. Cases and methods run in
the order of `loss_methods.PLAN`, and after each method results/loss.json, loss.md and loss.png are written anew.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from common import RESULTS
from loss_methods import DATA_PARALLEL, PLAN, Case, Method, first_rate
from loss_report import write
from loss_rows import Curve, Row
from loss_training import Run, train

SEARCH_SEEDS = 2


class OutOfTime(Exception):
    """No run begins any more."""


class Bench:
    """Runs that are known, and how unknown ones become known. Infinite losses, of runs that diverged, are null in the file."""

    def __init__(self, kept: Path, pool: ProcessPoolExecutor, workers: int, end: float) -> None:
        self.kept, self.pool, self.workers, self.end = kept, pool, workers, end
        known = json.loads(kept.read_text()) if kept.exists() else {}
        self.known: dict[str, Curve] = {
            key: [math.inf if loss is None else loss for loss in curve] for key, curve in known.items()
        }

    def losses(self, runs: Sequence[Run]) -> list[Curve]:
        """Of each run, known or made now."""
        missing = [run for run in runs if run.key not in self.known]
        for first in range(0, len(missing), self.workers):
            if time.monotonic() > self.end:
                raise OutOfTime
            some = missing[first : first + self.workers]
            for run, curve in zip(some, self.pool.map(train, some), strict=True):
                self.known[run.key] = curve
                print(f"{time.strftime('%H:%M:%S')} {run.key}: {curve[-1]}", flush=True)
            self._keep()
        return [self.known[run.key] for run in runs]

    def _keep(self) -> None:
        lines = [
            f"{json.dumps(key)}: {json.dumps([loss if math.isfinite(loss) else None for loss in curve])}"
            for key, curve in self.known.items()
        ]
        self.kept.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def row(self, case: Case, method: Method, seeds: int, start_rate: float | None) -> Row:
        """A method at its best rate."""

        def curves(rate: float, seeds: int) -> list[Curve]:
            return self.losses([Run(case, method, rate, seed, start_rate) for seed in range(seeds)])

        def mean(rate: float, seeds: int = SEARCH_SEEDS) -> float:
            return statistics.mean(curve[-1] for curve in curves(rate, seeds))

        first, second = search(mean, first_rate(case, method))
        if method == DATA_PARALLEL:
            first = min(first, second, key=lambda rate: mean(rate, seeds))
        return Row(case, method, first, start_rate, curves(first, seeds))


def search(mean: Callable[[float], float], first: float) -> tuple[float, float]:
    """The best and the second best rate on the grid of factors of 2: up while the mean loss improves, else down."""
    losses = {first: mean(first)}
    for factor in (2.0, 0.5):
        rate = first
        while losses[rate] == min(losses.values()) and (factor < 1 or math.isfinite(losses[rate])):
            rate *= factor
            losses[rate] = mean(rate)
        if min(losses, key=losses.__getitem__) != first:
            break
    best, second = sorted(losses, key=losses.__getitem__)[:2]
    return best, second


def rows(bench: Bench, tasks: Sequence[str], sizes: Sequence[int]) -> Iterator[Row]:
    """Rows as they become complete, in the plan's order; when the time is over, those that need no more runs."""
    rates: dict[Case, float] = {}
    for case, seeds, methods in PLAN:
        if case.task not in tasks or case.ranks not in sizes:
            continue
        for method in methods:
            if method.start and case not in rates:
                continue
            try:
                row = bench.row(case, method, seeds, rates[case] if method.start else None)
            except OutOfTime:
                continue
            if method == DATA_PARALLEL:
                rates[case] = row.rate
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="GPT,MLP,digits")
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many; 0: report known runs")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    # spawn: a forked child of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        bench = Bench(RESULTS / "loss-runs.json", pool, given.workers, end)
        done: dict[tuple[Case, Method], Row] = {}
        for row in rows(bench, given.tasks.split(","), [int(n) for n in given.ranks.split(",")]):
            done[row.case, row.method] = row
            write(list(done.values()))


if __name__ == "__main__":
    main()
