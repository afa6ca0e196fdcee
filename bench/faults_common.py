"""What campaigns of kills share: ways of training, where each process says what it is in, and the loop over runs."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

import fusedfog

MODELS = (0.1, 20.0, 200.0)
"""Megabytes of parameters."""

LARGE = 100.0
"""Megabytes from which on a step takes seconds."""

_CELL = struct.Struct("iddd")  # phase, when it began, seconds that it took the last time, seconds of construction

Run = dict[str, Any]
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


def _half(**keywords: Any) -> Way:
    return lambda model, mesh: fusedfog.AdamW(model.bfloat16().parameters(), lr=1e-3, **keywords)


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
"""Those of runs whose ranks stay."""

_NOT_ELASTIC = ("push_sum", "allreduce", "AdamW, fused backward", "int8", "data-parallel steps", "outer", "mesh")
ELASTIC_WAYS: dict[str, Way] = {
    **{name: way for name, way in WAYS.items() if not name.startswith(_NOT_ELASTIC)},
    "AdamW atc": _adamw(topology="ring", algorithm="atc"),
    "AdamW quasi_global": _adamw(topology="ring", algorithm="quasi_global"),
    "AdamW gradient_tracking": _adamw(topology="ring", algorithm="gradient_tracking"),
    "bf16, clipped": _half(topology="ring", low_precision="master", max_grad_norm=1.0),
    "averages, one-peer": _sgd(topology="one_peer_exponential", global_average_every=4, momentum=0.9),
}
"""Those of elastic runs, of which run numbers below `LATER_FROM` draw."""

LATER_FROM = 300
LATER_WAYS: dict[str, Way] = {name: WAYS[name] for name in ("push_sum", "int8")}
"""Those of later numbers: elastic runs took these after some of the first 300 had been drawn, which are to stay as drawn."""


def model_of(megabytes: float) -> nn.Module:
    """Square layers that hold so many megabytes of fp32."""
    layers = 4
    side = max(8, int((megabytes * 1e6 / 4 / layers) ** 0.5))
    return nn.Sequential(*[nn.Linear(side, side) for _ in range(layers)])


class Board:
    """Where each rank says, in memory that processes share, which phase it is in.

    Args:
        ranks: how many.
        phases: their names; "construction" is one of them.
    """

    def __init__(self, ranks: int, phases: Sequence[str]) -> None:
        self._memory, self.phases = mmap.mmap(-1, ranks * _CELL.size), tuple(phases)
        for rank in range(ranks):
            self.clear(rank)
        self.lengths = dict.fromkeys(phases, 0.0)

    def read(self, rank: int) -> tuple[int, float, float, float]:
        """The place of its phase in `phases`, -1 between phases; since when; seconds of the last such one; of construction."""
        return _CELL.unpack_from(self._memory, rank * _CELL.size)

    def phase_of(self, rank: int) -> str:
        """In words."""
        place = self.read(rank)[0]
        return self.phases[place] if place >= 0 else "between phases"

    def clear(self, rank: int) -> None:
        """A process begins."""
        _CELL.pack_into(self._memory, rank * _CELL.size, -1, 0.0, 0.0, 0.0)

    @contextlib.contextmanager
    def phase(self, rank: int, name: str) -> Iterator[None]:
        """Say that `rank` is in this phase; after it, in the one around it."""
        begin, around = time.monotonic(), self.read(rank)
        self._write(rank, self.phases.index(name), begin, self.lengths[name])
        yield
        self.lengths[name] = time.monotonic() - begin
        self._write(rank, *around[:3])

    def _write(self, rank: int, place: int, begin: float, length: float) -> None:
        cell = (place, begin, length, self.lengths["construction"])
        _CELL.pack_into(self._memory, rank * _CELL.size, *cell)


def await_moment(
    board: Board, rank: int, phase: str, at_least: int, usual: float, chance: random.Random, wait: float = 180.0
) -> float | None:
    """Return at a random moment of a phase of a rank's; how many seconds after it began. None if it does not come there.

    Args:
        at_least: the how-manieth such phase it is, seen from now on.
        usual: seconds that it takes, where the rank has not been through one.
    """
    place, seen, last, deadline = board.phases.index(phase), 0, 0.0, time.monotonic() + wait
    while time.monotonic() < deadline:
        at, since, length, _ = board.read(rank)
        if at == place and since != last:
            seen, last = seen + 1, since
            if seen >= at_least:
                time.sleep(chance.uniform(0.0, length or usual))
                return time.monotonic() - since
        time.sleep(1e-4)
    return None


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


def end(pids: Sequence[int]) -> None:
    """Kill these children, and see them dead."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def prepare() -> None:
    """For the process that forks ranks: what they would each do by themselves."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # A thread would not survive forks, but its locks would.
    # The first one imports for seconds.
    torch.optim.SGD(nn.Linear(1, 1).parameters())


def free_gigabytes() -> float:
    """Memory that nobody uses; as much as is needed where that cannot be told."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    return float("inf")


def tables_of(phases: Sequence[str], row_of: Callable[..., Run], runs: Sequence[Run]) -> str:
    """By phase and model, by way of training, and of all; `row_of` makes a line of some runs, behind columns given by name."""
    pairs = sorted({(phases.index(run["phase"]), run["megabytes"]) for run in runs})
    by_phase = [
        row_of(
            [run for run in runs if (run["phase"], run["megabytes"]) == (phases[place], megabytes)],
            **{"phase": phases[place], "model, MB": megabytes},
        )
        for place, megabytes in pairs
    ]
    by_way = [
        row_of([run for run in runs if run["way"] == way], way=way) for way in sorted({run["way"] for run in runs})
    ]
    return "\n".join([table([*by_phase, row_of(runs, **{"phase": "all", "model, MB": ""})]), "", table(by_way)])


class Planned(Protocol):
    """One run of a campaign."""

    @property
    def number(self) -> int: ...

    @property
    def megabytes(self) -> float: ...

    def gigabytes(self) -> float:
        """Memory that all its processes take together, at most."""
        ...


def run_missing(
    name: str,
    plans: Sequence[Planned],
    make: Callable[[Any], Run],
    tables: Callable[[Sequence[Run]], str],
    *,
    seed: int,
    minutes: float,
) -> None:
    """Make those runs that are not in results/NAME.json yet, smallest models first; write it after each, and print the tables."""
    path = Path(RESULTS, f"{name}.json")
    runs: list[Run] = json.loads(path.read_text())["runs"] if path.exists() else []
    known, deadline = {run["number"] for run in runs}, time.monotonic() + 60 * minutes
    missing = sorted((plan for plan in plans if plan.number not in known), key=lambda plan: plan.megabytes)
    for plan in tqdm(missing, desc=name, unit="run", initial=len(plans) - len(missing), total=len(plans)):
        if time.monotonic() > deadline:
            break
        if plan.gigabytes() > free_gigabytes() - 2:
            tqdm.write(f"{plan.number}: not run: it needs {plan.gigabytes():.1f} GB of memory, and 2 that stay free")
            continue
        load = os.getloadavg()[0]
        runs.append(make(plan) | {"load": load})
        runs.sort(key=lambda run: run["number"])
        about = machine() | {"load": f"{min(r['load'] for r in runs):.0f} to {max(r['load'] for r in runs):.0f}"}
        path.write_text(json.dumps({"machine": about, "seed": seed, "runs": runs}, indent=1) + "\n")
        words = ", ".join(f"{key} {value}" for key, value in about.items())
        path.with_suffix(".md").write_text(f"{words}\n\n{tables(runs)}\n")
    if runs:
        print(tables(runs))
