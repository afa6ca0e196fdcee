"""``fusedfog calibrate``: what the links between these ranks can do, measured in less than a minute.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m fusedfog calibrate --out links.json

Two ranks exchange messages of several sizes, both ways at once as gossip does, while all others are quiet. A straight line
``alpha + size / beta`` is fitted by least squares of the relative error, once for pairs inside a machine and once for pairs
across machines (told apart by `comm.machines`). Then all ranks of a machine exchange with the next machine together, as they
share its network card: the larger of the two rates is the card's. All-reduces are measured beside the prediction of a ring,
and a copy in memory gives the cost of passes. `fusedfog plan --links` reads the file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.calls import Call, enter_world
from fusedfog.comm.group import find_group, group_timeout
from fusedfog.comm.join import init
from fusedfog.comm.machines import by_machine, this_machine
from fusedfog.cost.links import Links
from fusedfog.cost.network import Link, Network, allreduce_seconds
from fusedfog.cost.units import show_bytes, show_rate, show_time

SIZES = tuple(4 << 10 << (2 * k) for k in range(7))
"""Bytes: 4 KiB to 16 MiB."""

REPEATS = 7
PAIRS = 2
"""Pairs measured of each kind of link."""

LONG_ENOUGH = 0.25
"""Seconds of a message after which no larger one is tried: a slow link needs no more to show its rate."""

BURST = 0.8
"""A largest message of less than this part of the highest rate seen is below the line: smaller ones passed in a burst."""

COPIED = 64 << 20


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("calibrate", help="measure links between ranks, under torchrun, for `fusedfog plan`")
    parser.add_argument("--out", default="links.json", metavar="FILE.json", help="default links.json")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl on GPUs, else gloo")
    parser.add_argument(
        "--step-ms",
        type=float,
        metavar="MS",
        help="a training step of one rank alone, noted in the file: what messages are weighed against",
    )
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> int:
    """Measure; rank 0 prints and writes the file. Returns the exit status.

    Raises:
        ValueError: fewer than two ranks, machines with different numbers of ranks, or --step-ms that is not positive.
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    step_s = None if options.step_ms is None else options.step_ms / 1e3
    Links(1, None, None, 0.0, step_s)  # Raises before anything is measured.
    device = init(options.backend)
    world = find_group()
    if world.group is not None:
        enter_world(group_timeout(world, device).total_seconds())
    with Call("fusedfog calibrate"):
        links, samples = calibrate(device)
    if find_group().rank == 0:
        report(links, samples)
        links = replace(links, step_s=step_s)
        links.write(options.out, backend=dist.get_backend(), measured=[asdict(sample) for sample in samples])
        print(
            f"\nwritten to {options.out}; now: fusedfog plan --links {options.out} --params ... --step-ms ... --ranks ..."
        )
    return 0


@dataclass(frozen=True)
class Sample:
    """Seconds that something took, the median over repeats and the mean over what was measured alike."""

    what: str
    size: int
    seconds: float


def calibrate(device: torch.device) -> tuple[Links, list[Sample]]:
    """Measure all links; collective, the same result on every rank.

    Raises:
        ValueError: fewer than two ranks, or machines with different numbers of ranks.
    """
    world = find_group()
    if world.size < 2:
        raise ValueError(
            "links are between ranks: run `torchrun --nproc-per-node 2 -m fusedfog calibrate` or more ranks"
        )
    machines = _machines(world.size)
    place = next(ranks for ranks in machines if world.rank in ranks)
    if len({len(ranks) for ranks in machines}) != 1:
        raise ValueError(f"machines have {sorted(map(len, machines))} ranks: calibrate with as many on each")
    inside = [(ranks[0], ranks[-1 - k]) for ranks in machines for k in range(len(ranks) - 1)][:PAIRS]
    across = [(a[0], b[0]) for a, b in pairwise(machines)][:PAIRS]
    samples, found = [], {}
    for kind, pairs in (("inside", inside), ("across", across)):
        lists = [_exchanges(kind, pair, device) for pair in pairs]
        averaged = [
            Sample(f"exchange {kind}", same[0].size, statistics.mean(one.seconds for one in same))
            for same in zip(*lists, strict=False)
        ]
        samples += averaged
        found[kind] = fit(averaged) if averaged else None
    card = found["across"]
    if card is not None and len(place) > 1:
        together = _together(machines, samples[-1].size, device)
        samples.append(together)
        # At most ten times what was seen, as in `fit`: less than the latency would be noise.
        rate = len(place) * together.size / max(together.seconds - card.latency_s, 0.1 * together.seconds)
        found["across"] = Link(card.latency_s, max(rate, card.bandwidth))
    samples += _allreduces(device)
    links = Links(len(place), found["inside"], found["across"], _copy_rate(device))
    return links, samples


def fit(samples: Sequence[Sample]) -> Link:
    """alpha and beta of ``seconds = alpha + size / beta``, least squares of the relative error.

    A rate is never read from noise: alpha is at least 0, and beta at most ten times the largest rate seen. On such a line large
    messages have the highest rates. Where they do not, as behind a shaper that lets bursts pass, alpha is the time of the
    smallest message and beta the rate of the largest, which lasts.
    """
    sizes = np.array([sample.size for sample in samples], dtype=np.float64)
    seconds = np.array([sample.seconds for sample in samples])
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    (alpha, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(sizes), rcond=None)
    rates, largest = sizes / seconds, sizes.argmax()
    if alpha < 0 or rates[largest] < BURST * rates.max():
        alpha = min(seconds[sizes.argmin()], 0.5 * seconds[largest])
        per_byte = (seconds[largest] - alpha) / sizes[largest]
    return Link(float(alpha), 1 / max(float(per_byte), 0.1 * float((seconds / sizes).min())))


def _machines(size: int) -> tuple[tuple[int, ...], ...]:
    """Ranks of each machine, in the order of their first ranks."""
    names = [""] * size
    dist.all_gather_object(names, this_machine())
    return by_machine(names)


def _exchanges(kind: str, pair: tuple[int, int], device: torch.device) -> list[Sample]:
    """The two ranks of a pair exchange, sizes growing; all others wait."""
    samples = []
    for size in SIZES:
        seconds = _exchange(dict([pair, pair[::-1]]), size, device)
        samples.append(Sample(f"exchange {kind}", size, seconds))
        if seconds > LONG_ENOUGH:
            break
    return samples


def _together(machines: Sequence[Sequence[int]], size: int, device: torch.device) -> Sample:
    """Every rank of the first two machines exchanges with its counterpart at once."""
    one, other = machines[:2]
    peers = dict(zip(one, other, strict=True)) | dict(zip(other, one, strict=True))
    return Sample("exchange across, all ranks of a machine at once", size, _exchange(peers, size, device))


def _exchange(peers: dict[int, int], size: int, device: torch.device) -> float:
    rank = find_group().rank
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> None:
        ops = [dist.P2POp(dist.irecv, received, peers[rank]), dist.P2POp(dist.isend, sent, peers[rank])]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return _slowest(_median(run, device) if rank in peers else 0.0, device)


def _allreduces(device: torch.device) -> list[Sample]:
    samples = []
    for size in SIZES[2::2]:
        values = torch.zeros(size // 4, device=device)
        seconds = _slowest(_median(partial(dist.all_reduce, values), device), device)
        samples.append(Sample("all-reduce", size, seconds))
        if seconds > LONG_ENOUGH:
            break
    return samples


def _copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy, read and written, the slowest rank's while all copy."""
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED / _slowest(_median(lambda: target.copy_(source), device), device)


def _median(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        _synchronize(device)
        begin = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: float, device: torch.device) -> float:
    """The largest value of any rank, on all of them; also a barrier between measurements."""
    value: Tensor = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def report(links: Links, samples: Sequence[Sample]) -> None:
    """Print what was measured."""
    world = find_group()
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(f"{world.size} ranks, {links.local} per machine, {dist.get_backend()}, OMP_NUM_THREADS {threads}\n")
    print(f"{'':<50}{'size':>10}{'time':>12}{'rate':>28}")
    for sample in samples:
        rate = show_rate(sample.size / sample.seconds)
        print(f"{sample.what:<50}{show_bytes(sample.size):>10}{show_time(sample.seconds):>12}{rate:>28}")
    print()
    for name, link in (("inside a machine", links.inside), ("across machines (network card)", links.across)):
        if link is not None:
            print(f"{name:<34}{show_time(link.latency_s):>12} + size / {show_rate(link.bandwidth)}")
    print(f"{'memory (copy, read + write)':<34}{'':>12}   {show_bytes(links.memory_bandwidth)}/s")
    network = Network(
        world.size, links.across or links.inside or Link(0, 1), links.local, links.inside if links.local > 1 else None
    )
    for sample in (sample for sample in samples if sample.what == "all-reduce"):
        ring = allreduce_seconds(network, sample.size)
        print(f"all-reduce of {show_bytes(sample.size)}: {show_time(sample.seconds)}, as a ring {show_time(ring)}")
