"""Kill -9 at random moments, and see who is told what, and when: python bench/faults.py

Ranks on one machine train over gloo, with a process group's timeout of ten minutes, which nobody must wait for. One rank is
killed at a random moment of a phase: while it builds the optimizer, in forward and backward, in step(), averaged(),
consensus_distance() or save_checkpoint(). The others are to raise, all of them, within two seconds, an error whose `origin` is
the rank that was killed. They catch it and stay, so that nobody learns of it by the end of their processes. The store lives in
another process, as torchrun's does. (results/faults.json and .md)

Run number k is drawn from the seed and k alone: number of ranks, model, way of training, phase, victim and moment. What has
been run is in the file of runs, and only what is missing there is run, so that a campaign can be interrupted and enlarged.

    --kills 200          in all
    --models 0.1 20 200  megabytes of parameters
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fusedfog

PHASES = ("construction", "forward", "step", "averaged", "consensus_distance", "save")
TIMEOUT = timedelta(minutes=10)
LIMIT = 60.0
"""Seconds after the kill in which a rank that has not raised counts as hanging."""

SOON = 2.0
"""Seconds in which all are to have raised."""

_CELL = struct.Struct("iddd")  # phase, when it began, seconds that it took the last time, seconds of construction


Way = Callable[[nn.Module, DeviceMesh | None], Any]
"""An optimizer for a model, on the mesh that ways called "mesh" are given."""


def _sgd(**keywords: Any) -> Way:
    return lambda model, mesh: fusedfog.SGD(model.parameters(), lr=1e-3, **keywords)


def _adamw(**keywords: Any) -> Way:
    return lambda model, mesh: fusedfog.AdamW(model.parameters(), lr=1e-3, **keywords)


def _mesh(**keywords: Any) -> Way:
    return lambda model, mesh: fusedfog.AdamW(model.parameters(), lr=1e-3, mesh=mesh, **keywords)


def _around(**keywords: Any) -> Way:
    return lambda model, mesh: fusedfog.Decentralized(torch.optim.SGD(model.parameters(), lr=1e-3), **keywords)


WAYS: dict[str, Way] = {
    "awc": _sgd(topology="ring"),
    "atc": _sgd(topology="ring", algorithm="atc", momentum=0.9),
    "push_sum": _sgd(algorithm="push_sum"),
    "allreduce": _sgd(algorithm="allreduce"),
    "decentlam": _sgd(topology="ring", algorithm="decentlam", momentum=0.9),
    "quasi_global": _sgd(topology="ring", algorithm="quasi_global", momentum=0.9),
    "exact_diffusion": _sgd(topology="ring", algorithm="exact_diffusion"),
    "extra": _sgd(topology="ring", algorithm="extra"),
    "gradient_tracking": _sgd(topology="ring", algorithm="gradient_tracking"),
    "momentum_tracking": _sgd(topology="ring", algorithm="momentum_tracking", momentum=0.9),
    "dag": _adamw(algorithm="dag"),
    "AdamW awc, exponential": _adamw(topology="exponential"),
    "AdamW, fused backward": _adamw(topology="ring", fused_backward=True),
    "int8": _adamw(topology="ring", wire_dtype="int8"),
    "every third step": _sgd(topology="ring", communicate_every=3),
    "data-parallel steps": _adamw(topology="ring", data_parallel_steps=10**6),
    "outer": _sgd(algorithm="local", outer=fusedfog.Outer(every=2)),
    "mesh": _mesh(),
    "mesh, parameters": _mesh(inside="parameters"),
    "Decentralized": _around(topology="ring"),
}


@dataclass(frozen=True)
class Plan:
    """One run: what is killed, and where."""

    number: int
    ranks: int
    megabytes: float
    way: str
    phase: str
    victim: int

    @classmethod
    def draw(cls, number: int, seed: int, models: Sequence[float], phases: Sequence[str]) -> Plan:
        """The run of this number. Phases and models go round, so that each pair is as frequent."""
        random_ = random.Random(f"{seed} {number}")
        ranks = random_.choice((4, 6))
        phase, megabytes = phases[number % len(phases)], models[number // len(phases) % len(models)]
        return cls(number, ranks, megabytes, random_.choice(list(WAYS)), phase, random_.randrange(ranks))

    def gigabytes(self) -> float:
        """Memory that all ranks take together, at most."""
        return self.ranks * (0.3 + 8 * self.megabytes / 1e3)


class Board:
    """Where each rank says, in memory that processes share, which phase it is in."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, ranks * _CELL.size)
        for rank in range(ranks):
            _CELL.pack_into(self._memory, rank * _CELL.size, -1, 0.0, 0.0, 0.0)
        self.lengths = dict.fromkeys(PHASES, 0.0)

    def read(self, rank: int) -> tuple[int, float, float, float]:
        """The place of its phase in `PHASES`, -1 between phases; since when; seconds of the last such one; of construction."""
        return _CELL.unpack_from(self._memory, rank * _CELL.size)

    @contextlib.contextmanager
    def phase(self, rank: int, name: str) -> Iterator[None]:
        """Say that `rank` is in this phase."""
        begin = time.monotonic()
        self._write(rank, PHASES.index(name), begin, self.lengths[name])
        yield
        self.lengths[name] = time.monotonic() - begin
        self._write(rank, -1, 0.0, 0.0)

    def _write(self, rank: int, place: int, begin: float, length: float) -> None:
        cell = (place, begin, length, self.lengths["construction"])
        _CELL.pack_into(self._memory, rank * _CELL.size, *cell)


@dataclass
class Told:
    """What a rank that was not killed has raised, when, and since when it had been in that call."""

    rank: int
    at: float
    since: float
    kind: str
    origin: int | None
    text: str


def model_of(megabytes: float) -> nn.Module:
    """Square layers that hold so many megabytes of fp32."""
    layers = 4
    side = max(8, int((megabytes * 1e6 / 4 / layers) ** 0.5))
    return nn.Sequential(*[nn.Linear(side, side) for _ in range(layers)])


def train(rank: int, board: Board, plan: Plan, folder: str) -> None:
    """Train until an error ends it."""
    torch.manual_seed(0)
    model, mesh = model_of(plan.megabytes), None
    if plan.way.startswith("mesh"):
        mesh = init_device_mesh("cpu", (2, plan.ranks // 2))  # By torch, which waits for a dead rank until the timeout.
    with board.phase(rank, "construction"):
        opt = WAYS[plan.way](model, mesh)
    x = torch.ones(2, next(model.parameters()).shape[1])
    while True:
        with board.phase(rank, "forward"):
            opt.zero_grad()
            model(x).square().mean().backward()
        with board.phase(rank, "step"):
            opt.step()
        if plan.phase == "averaged":
            with board.phase(rank, plan.phase), opt.averaged():
                pass
        if plan.phase == "consensus_distance":
            with board.phase(rank, plan.phase):
                opt.consensus_distance()
        if plan.phase == "save":
            with board.phase(rank, plan.phase):
                fusedfog.save_checkpoint(f"{folder}/checkpoint", model, opt, keep=1)


def be_rank(rank: int, board: Board, pipe: int, port: int, plan: Plan, folder: str) -> None:
    """A rank's process: never returns."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.ranks, timeout=TIMEOUT)
        fusedfog.init("gloo")
        dist.barrier()
        train(rank, board, plan, folder)
    except Exception as error:
        told = Told(
            rank,
            time.monotonic(),
            board.read(rank)[1],
            type(error).__name__,
            getattr(error, "origin", None),
            str(error)[:600],
        )
        os.write(pipe, json.dumps(asdict(told)).encode())
        time.sleep(60)  # Caught: a process that lingers must not keep its neighbours waiting.
    os._exit(0)


def open_store() -> tuple[int, int]:
    """A process that hosts the store, and its port; here, its threads would not survive the forks of ranks."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writes, str(store.port).encode())
        signal.pause()
        os._exit(0)
    os.close(writes)
    port = int(os.read(reads, 16))
    os.close(reads)
    return pid, port


def kill_once(plan: Plan, seed: int, constructions: dict[float, float]) -> dict[str, Any]:
    """One run and its kill; what the others were told.

    Args:
        constructions: how long the construction of a model of so many megabytes took the last time; the run's is noted.
    """
    board, random_ = Board(plan.ranks), random.Random(f"{seed} {plan.number} moment")
    folder = tempfile.mkdtemp(prefix="fusedfog-faults-")
    host, port = open_store()
    pids, pipes = [], []
    for rank in range(plan.ranks):
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            be_rank(rank, board, writes, port, plan, folder)
        os.close(writes)
        pids.append(pid)
        pipes.append(reads)
    others = [rank for rank in range(plan.ranks) if rank != plan.victim]
    try:
        usual = constructions.get(plan.megabytes, 0.15)
        when = wait_for(board, plan, random_, pipes, usual)
        os.kill(pids[plan.victim], signal.SIGKILL)
        killed, (place, *_, length) = time.monotonic(), board.read(plan.victim)
        told = {rank: read_told(pipes[rank], killed + LIMIT) for rank in others}
        gone = [rank for rank in others if told[rank] is None and os.waitpid(pids[rank], os.WNOHANG)[0]]
    finally:
        for pid in (*pids, host):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for pipe in pipes:
            os.close(pipe)
        shutil.rmtree(folder, ignore_errors=True)
    constructions[plan.megabytes] = length or usual
    found = [one for one in told.values() if one is not None]
    return asdict(plan) | {
        "killed in": PHASES[place] if place >= 0 else "between phases",
        "ms into the phase": round(1e3 * when, 1),
        "hang": len(others) - len(found) - len(gone),
        "gone": len(gone),
        "seconds": max((one.at - killed for one in found), default=None),
        "waited": max((one.at - max(killed, one.since) for one in found), default=None),
        "told": [asdict(one) | {"at": one.at - killed, "since": one.since - killed} for one in found],
    }


def wait_for(board: Board, plan: Plan, random_: random.Random, pipes: Sequence[int], construction: float) -> float:
    """Return at a random moment of a phase of the victim's; how many seconds after it began."""
    large = plan.megabytes > 100
    at_least, seen, last, deadline = 2 if large else random_.randint(2, 4), 0, 0.0, time.monotonic() + 180
    while time.monotonic() < deadline:
        place, since, length, _ = board.read(plan.victim)
        if place == PHASES.index(plan.phase) and since != last:
            seen, last = seen + 1, since
            if seen >= at_least or plan.phase == "construction":
                time.sleep(random_.uniform(0.0, length or construction))
                return time.monotonic() - since
        time.sleep(1e-4)
    told = [read_told(pipe, time.monotonic() + 0.1) for pipe in pipes]
    raise TimeoutError(f"{plan}: the victim has not come there: {[one for one in told if one is not None]}")


def read_told(pipe: int, deadline: float) -> Told | None:
    """What a rank says before the deadline; None if it hangs, or has ended without a word."""
    os.set_blocking(pipe, False)
    while True:
        with contextlib.suppress(BlockingIOError):
            text = os.read(pipe, 65536)
            return Told(**json.loads(text)) if text else None
        if time.monotonic() > deadline:
            return None
        time.sleep(2e-3)


def row_of(runs: Sequence[dict[str, Any]], **first: object) -> dict[str, Any]:
    """One line of a table."""
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    told = [(one, run["victim"]) for run in runs for one in run["told"]]
    waits = [run["waited"] for run in runs if run.get("waited") is not None]
    return first | {
        "kills": len(runs),
        "ranks that hang": sum(run["hang"] for run in runs),
        "ranks that ended": sum(run["gone"] for run in runs),
        "s until all have raised, median": statistics.median(seconds) if seconds else None,
        "largest": max(seconds, default=None),
        "s in a call, largest": max(waits, default=None),
        f"within {SOON:g} s": f"{sum(second <= SOON for second in seconds)} of {len(runs)}",
        "name the origin": f"{sum(one['origin'] == victim for one, victim in told)} of "
        f"{sum(run['ranks'] - 1 for run in runs)}",
        "raised": ", ".join(sorted({one["kind"] for one, _ in told})),
    }


def tables_of(runs: Sequence[dict[str, Any]]) -> str:
    """By phase and model, by way of training, and of all."""
    pairs = sorted({(PHASES.index(run["phase"]), run["megabytes"]) for run in runs})
    by_phase = [
        row_of(
            [run for run in runs if (run["phase"], run["megabytes"]) == (PHASES[place], megabytes)],
            **{"phase": PHASES[place], "model, MB": megabytes},
        )
        for place, megabytes in pairs
    ]
    by_way = [
        row_of([run for run in runs if run["way"] == way], way=way) for way in sorted({run["way"] for run in runs})
    ]
    return "\n".join([table([*by_phase, row_of(runs, **{"phase": "all", "model, MB": ""})]), "", table(by_way)])


def free_gigabytes() -> float:
    """Memory that nobody uses; as much as is needed where that cannot be told."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    return float("inf")


def show(run: dict[str, Any]) -> None:
    """One line of a run, and what is not as it should be."""
    seconds = "-" if run["seconds"] is None else f"{run['seconds']:.2f}"
    about = f"{run['phase']}, {run['megabytes']:g} MB, {run['way']}, rank {run['victim']} of {run['ranks']}"
    print(f"{run['number']}: {about}: {seconds} s, hang {run['hang']}, ended {run['gone']}", flush=True)
    for one in run["told"]:
        if one["origin"] != run["victim"]:
            print("   ", one, flush=True)


def main() -> None:
    """Run what is missing of the campaign, write and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--models", type=float, nargs="+", default=[0.1, 20.0, 200.0])
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="faults", help="of the files in results/")
    given = parser.parse_args()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    torch.set_num_threads(1)
    # The first one imports for seconds, which each rank would do by itself.
    torch.optim.SGD(nn.Linear(1, 1).parameters())
    path, constructions = Path(RESULTS, f"{given.name}.json"), dict[float, float]()
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    known, deadline = {run["number"] for run in runs}, time.monotonic() + 60 * given.minutes
    plans = [Plan.draw(number, given.seed, given.models, given.phases) for number in range(given.kills)]
    for plan in sorted(plans, key=lambda plan: plan.megabytes):  # Those of which more can be made in the same time.
        if plan.number in known or time.monotonic() > deadline or plan.gigabytes() > free_gigabytes() - 2:
            continue
        load = os.getloadavg()[0]
        run = kill_once(plan, given.seed, constructions) | {"load": load}
        show(run)
        for one in run["told"]:
            one["at"], one["since"] = round(one["at"], 4), round(one["since"], 4)
            if one["origin"] == run["victim"]:
                del one["text"]
        runs.append(run)
        about = machine() | {"load": f"{min(r['load'] for r in runs):.0f} to {max(r['load'] for r in runs):.0f}"}
        runs.sort(key=lambda run: run["number"])
        path.write_text(json.dumps({"machine": about, "seed": given.seed, "runs": runs}, indent=1) + "\n")
        words = ", ".join(f"{key} {value}" for key, value in about.items())
        path.with_suffix(".md").write_text(f"{words}\n\n{tables_of(runs)}\n")
    print(tables_of(runs))


if __name__ == "__main__":
    main()
