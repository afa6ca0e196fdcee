"""A slow network: what each way to send less is predicted to cost, and what it costs.

    torchrun --nnodes 4 --nproc-per-node 1 ... -m fusedfog.examples.recipes.low_bandwidth     on your own machines
    python bench/low_bandwidth.py                                                             on links shaped on this machine

First the links are measured, as by `fusedfog calibrate`. Then every way trains the same network on the same batches, in turns, so
that a slow minute hits all alike, and beside the time of its step stands what `fusedfog plan` predicts of these links. Bytes and
time are not all: the accuracy of the averaged model, after as many steps, is the third price.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fusedfog
from fusedfog.cli.calibrate import calibrate
from fusedfog.cost.links import network_of
from fusedfog.examples.recipes.resnet import accuracy, digits, network
from fusedfog.plan import Method, Network, Workload, predict

EVERY, OUTER = 4, 16
"""Steps between exchanges of the third way, and of the outer optimizer."""

GRAPH = "one_peer_exponential"
LR, MOMENTUM = 0.05, 0.9

WAYS: dict[str, tuple[dict[str, Any], Method | None]] = {
    "no communication": ({"algorithm": "local"}, None),
    "DistributedDataParallel": ({}, Method("ddp")),
    "awc": ({"topology": GRAPH}, Method("awc", GRAPH)),
    f"awc, communicate_every={EVERY}": (
        {"topology": GRAPH, "communicate_every": EVERY},
        Method("awc", GRAPH, communicate_every=EVERY),
    ),
    "awc, int8": ({"topology": GRAPH, "wire_dtype": "int8"}, Method("awc", GRAPH, wire="int8")),
    f"outer optimizer every {OUTER} (DiLoCo)": (
        {
            "algorithm": "local",
            "topology": "fully_connected",
            "outer": fusedfog.Outer(every=OUTER, momentum=0.9, nesterov=True),
        },
        None,
    ),
}
"""The keywords of `fusedfog.SGD`, and the way's name in the predictor."""


@dataclass
class Row:
    """A line of the table: seconds and bytes of a step, the mean over ranks; accuracy of the average."""

    way: str
    predicted_s: float | None
    measured_s: float
    lowest_s: float
    highest_s: float
    bytes_per_step: float
    accuracy: float


class Trainer:
    """One way, with a model, an optimizer and a place in the data of its own."""

    def __init__(self, way: str, device: torch.device, width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = network(width).to(device)
        self.device, self.batch = device, batch
        self.gossip: fusedfog.SGD | None = None
        self.called: nn.Module = self.model
        if way == "DistributedDataParallel":
            self.called = DistributedDataParallel(self.model)
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        else:
            keywords = WAYS[way][0]
            self.optimizer = self.gossip = fusedfog.SGD(
                self.model.parameters(), lr=LR, momentum=MOMENTUM, model=self.model, **keywords
            )
        self.seconds: list[float] = []
        self.steps, self.epoch = 0, 0
        self.batches = self._batches()

    def _batches(self) -> Any:
        data, _, _ = digits()
        while True:
            sampler: DistributedSampler[Any] = DistributedSampler(
                data, fusedfog.world_size(), fusedfog.rank(), drop_last=True
            )
            sampler.set_epoch(self.epoch)
            self.epoch += 1
            yield from DataLoader(data, batch_size=self.batch, sampler=sampler, drop_last=True)

    def step(self) -> None:
        """One training step."""
        images, labels = next(self.batches)
        cross_entropy(self.called(images.to(self.device)), labels.to(self.device)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def turn(self, steps: int) -> None:
        """So many steps, timed. Collective: ranks begin together, and the network is quiet before and after."""
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.seconds.append(fusedfog.mean((time.perf_counter() - begin) / steps))
        if self.gossip is not None:
            self.gossip.drain()

    def row(self, way: str, predicted_s: float | None) -> Row:
        """What was measured. Collective."""
        _, images, labels = digits()
        if self.gossip is not None:
            sent = self.gossip.stats()["bytes_sent"] / self.steps
        else:
            size = fusedfog.world_size()
            sent = 2 * (size - 1) / size * sum(p.nbytes for p in self.model.parameters())
        with self.gossip.averaged(self.model) if self.gossip is not None else nullcontext():
            right = accuracy(self.model, images.to(self.device), labels.to(self.device))
        times = self.seconds
        return Row(way, predicted_s, statistics.median(times), min(times), max(times), fusedfog.mean(sent), right)


def predictor(size: int, step_s: float, links: Network) -> Callable[[str], float | None]:
    """The predicted seconds of a way's step, for a model of `size` bytes whose step alone takes `step_s`; None for that one."""
    workload = Workload.even(size / 4, step_s)

    def seconds(way: str) -> float | None:
        keywords, method = WAYS[way]
        if method is not None:
            return predict(workload, links, method).step_s
        if "outer" not in keywords:
            return None
        # `fusedfog plan` has no outer optimizers: all ranks send all others their model, and wait for it, every OUTER steps.
        exchange = links.across.latency_s + (links.ranks - 1) * size / links.across.bandwidth
        return step_s + exchange / OUTER

    return seconds


def measure(device: torch.device, width: int, batch: int, rounds: int) -> tuple[Network, list[Row]]:
    """The links, and a row for each way. Collective."""
    links, _ = calibrate(device)
    ranks = fusedfog.world_size()
    one_kind = links.across is None and links.inside is not None
    found = Network(ranks, links.inside) if one_kind and links.inside else network_of(links, ranks, links.local)
    trainers = {way: Trainer(way, device, width, batch) for way in WAYS}
    for trainer in trainers.values():
        trainer.step()  # buffers and connections are made
    for _ in range(rounds):
        for trainer in trainers.values():
            trainer.turn(OUTER)
    alone = next(iter(trainers.values()))
    size = sum(p.nbytes for p in alone.model.parameters())
    predicted = predictor(size, statistics.median(alone.seconds), found)
    return found, [trainer.row(way, predicted(way)) for way, trainer in trainers.items()]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'':<40}{'predicted':>11}{'measured':>11}{'range over rounds':>20}{'sent a step':>14}{'accuracy':>10}"]
    for row in rows:
        predicted = "" if row.predicted_s is None else f"{1e3 * row.predicted_s:.0f} ms"
        spread = f"{1e3 * row.lowest_s:.0f} .. {1e3 * row.highest_s:.0f}"
        lines.append(
            f"{row.way:<40}{predicted:>11}{1e3 * row.measured_s:>8.0f} ms{spread:>20}{row.bytes_per_step / 1e3:>11,.0f} kB"
            f"{row.accuracy:>10.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--width", type=int, default=32, help="of the network; 32 makes 1.2 MB of parameters (default 32)"
    )
    parser.add_argument("--batch", type=int, default=32, help="images of a rank (default 32)")
    parser.add_argument("--rounds", type=int, default=4, help=f"turns of {OUTER} steps that each way makes (default 4)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there, as JSON")
    options = parser.parse_args(arguments)
    device = fusedfog.init()
    if fusedfog.world_size() < 2:
        raise SystemExit("links are between ranks: start at least two, by torchrun")
    links, rows = measure(device, options.width, options.batch, options.rounds)
    if fusedfog.is_main():
        card = links.across
        print(
            f"{links.ranks} ranks; a message takes {1e3 * card.latency_s:.2f} ms + size / {card.bandwidth / 1e6:.2f} MB/s"
        )
        print(table(rows), flush=True)
        if options.out:
            options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
