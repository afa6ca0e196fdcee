"""What `fusedfog.monitor` costs a training step:

    torchrun --standalone --nproc-per-node 2 bench/monitor.py [--turns 20] [--save]

Two gloo ranks train a small model and one of 25 million parameters, without a monitor, with one, and with one beside
`measure=True`. Each has a model and an optimizer of its own, and they take turns of so many steps, so that a slow
minute hits all alike. The ratio to the turn without a monitor is taken within each round; the table has its median and
quartiles over rounds: for wall time, for the CPU time of the thread that trains, and for that of the whole process, with the
monitor's thread in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import save, table
from torch import nn

import fusedfog

MODELS = {"small": (64, 256, 2, 60), "25M": (2048, 2048, 6, 10)}
"""Width of input and output, of hidden layers, layers, and steps of a turn."""

WAYS = ("without", "monitor", "monitor, measure=True")


def build(model: str) -> nn.Sequential:
    width, hidden, layers, _ = MODELS[model]
    torch.manual_seed(0)
    sizes = [width, *[hidden] * (layers - 1), width]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


class Trainer:
    """One way to train a model; a turn is measured, and the thread has nothing left to do when it ends."""

    def __init__(self, name: str, way: str, folder: Path, stack: ExitStack) -> None:
        self.model, self.steps = build(name), MODELS[name][3]
        self.batch = torch.randn(8, MODELS[name][0], generator=torch.Generator().manual_seed(fusedfog.rank()))
        self.optimizer = fusedfog.AdamW(self.model.parameters(), lr=1e-5, measure="measure" in way)
        self.run: fusedfog.Monitor | None = None
        if way != "without":
            file = folder / f"{name}-{WAYS.index(way)}.jsonl"
            self.run = stack.enter_context(fusedfog.monitor(self.optimizer, file))

    def turn(self) -> tuple[float, ...]:
        """Seconds of a step, of CPU of the training thread, and of the whole process: means over ranks."""
        dist.barrier()
        clocks = (time.perf_counter, time.thread_time, time.process_time)
        begins = [clock() for clock in clocks]
        for _ in range(self.steps):
            loss = self.model(self.batch).square().mean()
            loss.backward()
            if self.run is not None:
                self.run.log(loss=loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        ends = [clock() for clock in clocks[:2]]
        time.sleep(0.3)  # for what the monitor's thread does later
        ends.append(time.process_time())
        self.optimizer.drain()
        return tuple(fusedfog.mean((end - begin) / self.steps) for begin, end in zip(begins, ends, strict=True))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def measure(name: str, turns: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each way. Collective."""
    with ExitStack() as stack:
        trainers = [Trainer(name, way, folder, stack) for way in WAYS]
        for trainer in trainers:
            trainer.turn()
        found: list[list[tuple[float, ...]]] = [[] for _ in WAYS]
        for turn in range(turns):
            for i in range(len(WAYS)):
                number = (turn + i) % len(WAYS)
                found[number].append(trainers[number].turn())
    for way, measured in zip(WAYS, found, strict=True):
        row: dict[str, Any] = {"model": name, "way": way}
        for k, what in enumerate(("a step", "CPU of its thread", "CPU of the process")):
            row[f"{what}, ms"] = 1e3 * statistics.median(one[k] for one in measured)
            ratios = [one[k] / base[k] for one, base in zip(measured, found[0], strict=True)]
            row[f"{what}, ratio"] = spread(ratios)
        yield row


def main() -> None:
    """Measure, and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write results/monitor.json")
    options = parser.parse_args()
    fusedfog.init()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            rows += measure(name, options.turns, Path(folder))
    if fusedfog.is_main():
        if options.save:
            save("monitor", rows, turns=options.turns)
        else:
            print(table(rows))


if __name__ == "__main__":
    main()
