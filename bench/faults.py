"""Kill -9 at random moments, and see who is told what, and when: python bench/faults.py

Four ranks on one machine train over gloo, on a ring, with a process group's timeout of ten minutes, which nobody must wait
for. One rank is killed at a random moment of a phase: while it builds the optimizer, in forward and backward, in step(),
averaged(), consensus_distance() or save_checkpoint(). The others are to raise, all of them, within two seconds, an error whose
`origin` is the rank that was killed. They catch it and stay, so that nobody learns of it by the end of their processes. The
store is a file, which outlives them, as torchrun's store does. (results/faults.json and .md)

    --kills 20           per phase and model
    --models 0.1 20 84   megabytes
    --phases step save   only these
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from torch import nn

import fusedfog

RANKS = 4
PHASES = ("construction", "forward", "step", "averaged", "consensus_distance", "save")
TIMEOUT = timedelta(minutes=10)
LIMIT = 15.0
"""Seconds after the kill in which a rank that has not raised counts as hanging."""

_CELL = struct.Struct("idd")  # phase, when it began, seconds that it took the last time


class Board:
    """Where each rank says, in memory that processes share, which phase it is in."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, RANKS * _CELL.size)
        for rank in range(RANKS):
            _CELL.pack_into(self._memory, rank * _CELL.size, -1, 0.0, 0.0)
        self.lengths = dict.fromkeys(PHASES, 0.0)

    def read(self, rank: int) -> tuple[int, float, float]:
        """The place of its phase in `PHASES`, -1 between phases; since when; how long it took the last time."""
        return _CELL.unpack_from(self._memory, rank * _CELL.size)

    @contextlib.contextmanager
    def phase(self, rank: int, name: str) -> Iterator[None]:
        """Say that `rank` is in this phase."""
        begin = time.monotonic()
        _CELL.pack_into(self._memory, rank * _CELL.size, PHASES.index(name), begin, self.lengths[name])
        yield
        self.lengths[name] = time.monotonic() - begin
        _CELL.pack_into(self._memory, rank * _CELL.size, -1, 0.0, 0.0)


@dataclass
class Told:
    """What a rank that was not killed has raised."""

    rank: int
    at: float
    kind: str
    origin: int | None
    text: str


def model_of(megabytes: float) -> nn.Module:
    """Square layers that hold so many megabytes of fp32."""
    layers = 4
    side = max(8, int((megabytes * 1e6 / 4 / layers) ** 0.5))
    return nn.Sequential(*[nn.Linear(side, side) for _ in range(layers)])


def train(rank: int, board: Board, phase: str, megabytes: float, folder: str) -> None:
    """Train until an error ends it."""
    torch.manual_seed(0)
    model = model_of(megabytes)
    with board.phase(rank, "construction"):
        opt = fusedfog.SGD(model.parameters(), lr=1e-3, topology="ring")
    x = torch.ones(2, next(model.parameters()).shape[1])
    while True:
        with board.phase(rank, "forward"):
            opt.zero_grad()
            model(x).square().mean().backward()
        with board.phase(rank, "step"):
            opt.step()
        if phase == "averaged":
            with board.phase(rank, phase), opt.averaged():
                pass
        if phase == "consensus_distance":
            with board.phase(rank, phase):
                opt.consensus_distance()
        if phase == "save":
            with board.phase(rank, phase):
                fusedfog.save_checkpoint(f"{folder}/checkpoint", model, opt)


def be_rank(rank: int, board: Board, pipe: int, phase: str, megabytes: float, folder: str) -> None:
    """A rank's process: never returns."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        store = dist.FileStore(f"{folder}/store", RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
        fusedfog.init("gloo")
        dist.barrier()
        train(rank, board, phase, megabytes, folder)
    except Exception as error:
        told = Told(rank, time.monotonic(), type(error).__name__, getattr(error, "origin", None), str(error)[:600])
        os.write(pipe, json.dumps(asdict(told)).encode())
        time.sleep(60)  # Caught: a process that lingers must not keep its neighbours waiting.
    os._exit(0)


def kill_once(phase: str, megabytes: float, random_: random.Random) -> dict[str, Any]:
    """One run and its kill; what the others were told."""
    board, victim = Board(), random_.randrange(RANKS)
    folder = tempfile.mkdtemp(prefix="fusedfog-faults-")
    pids, pipes = [], []
    for rank in range(RANKS):
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            be_rank(rank, board, writes, phase, megabytes, folder)
        os.close(writes)
        pids.append(pid)
        pipes.append(reads)
    try:
        when = wait_for(board, victim, phase, random_, pipes)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        told = [read_told(pipes[rank], killed + LIMIT) for rank in range(RANKS) if rank != victim]
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for pipe in pipes:
            os.close(pipe)
        shutil.rmtree(folder, ignore_errors=True)
    found = [one for one in told if one is not None]
    return {
        "phase": phase,
        "megabytes": megabytes,
        "victim": victim,
        "ms into the phase": 1e3 * when,
        "hang": len(told) - len(found),
        "seconds": max((one.at - killed for one in found), default=None),
        "told": [asdict(one) | {"at": one.at - killed} for one in found],
    }


def wait_for(board: Board, victim: int, phase: str, random_: random.Random, pipes: Sequence[int]) -> float:
    """Return at a random moment of a phase of the victim's; how many seconds after it began."""
    at_least, seen, last, deadline = random_.randint(2, 4), 0, 0.0, time.monotonic() + 60
    while time.monotonic() < deadline:
        place, since, length = board.read(victim)
        if place == PHASES.index(phase) and since != last:
            seen, last = seen + 1, since
            if seen >= at_least or phase == "construction":
                # A construction is the first one, and no other has shown how long they take.
                time.sleep(random_.uniform(0.0, length or 0.15))
                return time.monotonic() - since
        time.sleep(1e-4)
    told = [read_told(pipe, time.monotonic() + 0.1) for pipe in pipes]
    raise TimeoutError(f"rank {victim} has not come to {phase}: {[one for one in told if one is not None]}")


def read_told(pipe: int, deadline: float) -> Told | None:
    """What a rank says before the deadline; None if it hangs."""
    os.set_blocking(pipe, False)
    while True:
        with contextlib.suppress(BlockingIOError):
            text = os.read(pipe, 65536)
            return Told(**json.loads(text)) if text else None
        if time.monotonic() > deadline:
            return None
        time.sleep(2e-3)


def row_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: runs of one phase and model."""
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    told = [(one, run["victim"]) for run in runs for one in run["told"]]
    kinds = sorted({one["kind"] for one, _ in told})
    return {
        "phase": runs[0]["phase"],
        "model, MB": runs[0]["megabytes"],
        "kills": len(runs),
        "ranks that hang": sum(run["hang"] for run in runs),
        "s until all have raised, median": statistics.median(seconds) if seconds else None,
        "largest": max(seconds, default=None),
        "names the origin": f"{sum(one['origin'] == victim for one, victim in told)} of {(RANKS - 1) * len(runs)}",
        "raised": ", ".join(kinds),
    }


def main() -> None:
    """Run the campaign, write and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--models", type=float, nargs="+", default=[0.1, 20.0, 84.0])
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="faults", help="of the files in results/")
    given = parser.parse_args()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    torch.set_num_threads(1)
    # The first one imports for seconds, which each rank would do by itself.
    torch.optim.SGD(nn.Linear(1, 1).parameters())
    random_, runs = random.Random(given.seed), []
    for megabytes in given.models:
        for phase in given.phases:
            some = [kill_once(phase, megabytes, random_) for _ in range(given.kills)]
            runs += some
            print(json.dumps(row_of(some)), flush=True)
            for run in some:
                for one in run["told"]:
                    if one["origin"] != run["victim"]:
                        print("   ", run["victim"], one, flush=True)
                if run["hang"]:
                    print("   ", run, flush=True)
    rows = [
        row_of([run for run in runs if (run["phase"], run["megabytes"]) == (phase, megabytes)])
        for megabytes in given.models
        for phase in given.phases
    ]
    about = machine()
    for run in runs:
        for one in run["told"]:
            del one["text"]
    path = Path(RESULTS, f"{given.name}.json")
    path.write_text(json.dumps({"machine": about, "ranks": RANKS, "rows": rows, "runs": runs}, indent=1) + "\n")
    words = ", ".join(f"{key} {value}" for key, value in about.items())
    path.with_suffix(".md").write_text(f"{words}\n\n{table(rows)}\n")
    print(words, table(rows), sep="\n")


if __name__ == "__main__":
    main()
