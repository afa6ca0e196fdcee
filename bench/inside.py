"""What ranks of one machine cost each other on CPUs, through shared memory and by messages: python bench/inside.py [--quick]

    sum    one all-reduce of a flat tensor: gloo's, and that of `fusedfog.comm.shared_reduce`
    step   AdamW with `mesh=` on one machine, backward and step: gradients averaged, or parameters (`inside=`), and shards
           handed round; beside it the same with algorithm="local", which exchanges nothing

The ways take turns in the same processes, and each round gives one ratio. CPU time is user and system time of all ranks, with
the threads that carry messages: it is what the exchange takes from those who compute. Kernel work that a loopback interface does
in interrupts is counted where the interrupt happens to fall. Times by the clock mean little with fewer cores than ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import ratio, save, table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.comm.shared_reduce import SharedTransfer, add_up

RANKS = (2, 4)
MEGABYTES = (9.0, 100.0)
MESSAGES, MEMORY, NOTHING = "messages", "shared memory", "no exchange"


Run = tuple[Callable[[], Any], Callable[[], Any]]
"""What is repeated, and what ends it: an exchange that is under way must not be counted as the next way's."""


def sums(megabytes: float) -> dict[str, Run]:
    """One all-reduce in either way."""
    communicator = communicator_for(find_group(), torch.device("cpu"))
    shared, numel = communicator.shared_buffers(), int(megabytes * 2**18)
    assert shared is not None, "these ranks cannot share memory"
    buffer, flat = shared.buffer(), torch.zeros(numel)
    buffer.room(numel, flat.dtype)
    return {
        MESSAGES: (lambda: dist.all_reduce(flat, group=communicator.group), lambda: None),
        MEMORY: (lambda: SharedTransfer(communicator, "sum", add_up(buffer, numel, flat.dtype)).wait(), lambda: None),
    }


def steps(megabytes: float, inside: Any) -> dict[str, Run]:
    """A backward and a step in either way, and without exchange."""
    mesh, size = init_device_mesh("cpu", (1, dist.get_world_size())), int(megabytes * 2**15)
    factors = [torch.randn(size) for _ in range(8)]

    def stepper(**keywords: Any) -> Run:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size)) for _ in factors]
        optimizer = fusedfog.AdamW(params, lr=1e-3, **keywords)

        def step() -> None:
            loss: Tensor = torch.stack([(p * g).sum() for p, g in zip(params, factors, strict=True)]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, optimizer.drain

    with patch.object(Communicator, "shared_buffers", return_value=None):
        by_messages = stepper(mesh=mesh, inside=inside)
    return {
        MESSAGES: by_messages,
        MEMORY: stepper(mesh=mesh, inside=inside),
        NOTHING: stepper(algorithm="local"),
    }


def measured(runs: Mapping[str, Run], rounds: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU ms of all ranks, ms by the clock of the slowest) of one run, by round; two rounds warm up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, (run, end) in runs.items():
            dist.barrier()
            before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            for _ in range(repeats):
                run()
            end()
            clock, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            totals = torch.tensor([cpu, clock], dtype=torch.float64).mul_(1e3 / repeats)
            dist.all_reduce(totals[:1])
            dist.all_reduce(totals[1:], dist.ReduceOp.MAX)
            if turn >= 2:
                found[name].append((totals[0].item(), totals[1].item()))
    return found


def row(what: str, megabytes: float, found: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """One line of the table; ratios are medians over rounds, with their range."""
    line: dict[str, Any] = {"what": what, "ranks": dist.get_world_size(), "MB": megabytes}
    for name in (MESSAGES, MEMORY, NOTHING):
        line[f"CPU ms, {name}"] = statistics.median(cpu for cpu, _ in found[name]) if name in found else None
    for place, unit in enumerate(("CPU", "clock")):
        times = {name: [pair[place] for pair in pairs] for name, pairs in found.items()}
        line[f"{unit}, memory / messages"] = ratio(times, MEMORY, MESSAGES)
    return line


def rank(quick: bool) -> None:
    """What one rank does; rank 0 prints its lines as JSON."""
    torch.set_num_threads(1)
    fusedfog.init("gloo")
    for megabytes in MEGABYTES[:1] if quick else MEGABYTES:
        repeats, rounds = max(1, int(60 / megabytes)), 3 if quick else 5
        cases: dict[str, Callable[[], dict[str, Run]]] = {
            "sum": lambda m=megabytes: sums(m),  # type: ignore[misc]
            "step, gradients": lambda m=megabytes: steps(m, "gradients"),  # type: ignore[misc]
            "step, parameters": lambda m=megabytes: steps(m, "parameters"),  # type: ignore[misc]
        }
        for what, runs in cases.items():
            line = row(what, megabytes, measured(runs(), rounds, repeats))
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)


def on(count: int, quick: bool) -> list[dict[str, Any]]:
    """The lines of so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--rank", *(["--quick"] if quick else [])]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"RANK": str(place), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in range(count)
    ]
    texts = [one.communicate()[0] for one in ranks]
    if any(one.returncode for one in ranks):
        raise SystemExit(f"ranks ended with {[one.returncode for one in ranks]}")
    return [json.loads(line) for line in texts[0].splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="9 MB alone, three rounds, nothing saved")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.quick)
        return
    lines = [line for count in RANKS for line in on(count, options.quick)]
    if options.quick:
        print(table(lines))
    else:
        save("inside", lines)


if __name__ == "__main__":
    main()
