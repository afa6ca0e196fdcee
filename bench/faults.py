"""Kill -9 at random moments, and see who is told what, and when: python bench/faults.py

Ranks on one machine train over gloo, with a process group's timeout of ten minutes, which nobody must wait for. One rank is
killed at a random moment of a phase: while it builds the optimizer, in forward and backward, in step(), averaged(),
consensus_distance() or save_checkpoint(). The others are to raise, all of them, within two seconds, an error whose `origin` is
the rank that was killed. They catch it and stay, so that nobody learns of it by the end of their processes. The store lives in
another process, as torchrun's does. (results/faults.json and .md)

    python bench/faults.py                      20 kills, models of 0.1 and 20 MB: a few minutes
    python bench/faults.py --full               200 kills, models of 200 MB too
    python bench/faults.py --elastic [--full]   the same for elastic runs, whose others train on: see faults_elastic.py
    python bench/faults_losses.py               what three kills and returns change of the loss

Run number k is drawn from the seed and k alone: number of ranks, model, way of training, phase, victim and moment. What has
been run is in the file of runs, and only what is missing there is run, so that a campaign can be interrupted and enlarged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import faults_elastic
import torch
import torch.distributed as dist
from faults_common import (
    LARGE,
    MODELS,
    WAYS,
    Board,
    Run,
    await_moment,
    end,
    model_of,
    open_store,
    prepare,
    run_missing,
    tables_of,
)
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import fusedfog

PHASES = ("construction", "forward", "step", "averaged", "consensus_distance", "save")
TIMEOUT = timedelta(minutes=10)
LIMIT = 60.0
"""Seconds after the kill in which a rank that has not raised counts as hanging."""

SOON = 2.0
"""Seconds in which all are to have raised."""


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
    def draw(cls, number: int, seed: int) -> Plan:
        """The run of this number. Phases and models go round, so that each pair is as frequent."""
        random_ = random.Random(f"{seed} {number}")
        ranks = random_.choice((4, 6))
        phase, megabytes = PHASES[number % len(PHASES)], MODELS[number // len(PHASES) % len(MODELS)]
        return cls(number, ranks, megabytes, random_.choice(list(WAYS)), phase, random_.randrange(ranks))

    def gigabytes(self) -> float:
        """Memory that all ranks take together, at most."""
        return self.ranks * (0.3 + 8 * self.megabytes / 1e3)


@dataclass
class Told:
    """What a rank that was not killed has raised, when, and since when it had been in that call."""

    rank: int
    at: float
    since: float
    kind: str
    origin: int | None
    text: str


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


def kill_once(plan: Plan, seed: int, constructions: dict[float, float]) -> Run:
    """One run and its kill; what the others were told.

    Args:
        constructions: how long the construction of a model of so many megabytes took the last time; the run's is noted.
    """
    board, random_ = Board(plan.ranks, PHASES), random.Random(f"{seed} {plan.number} moment")
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
        end([*pids, host])
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
    at_least = 2 if plan.megabytes > LARGE else random_.randint(2, 4)
    at_least = 1 if plan.phase == "construction" else at_least
    when = await_moment(board, plan.victim, plan.phase, at_least, construction, random_)
    if when is not None:
        return when
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


def row_of(runs: Sequence[Run], **first: object) -> dict[str, Any]:
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


def show(run: Run) -> None:
    """One line of a run, and what is not as it should be."""
    seconds = "-" if run["seconds"] is None else f"{run['seconds']:.2f}"
    about = f"{run['phase']}, {run['megabytes']:g} MB, {run['way']}, rank {run['victim']} of {run['ranks']}"
    tqdm.write(f"{run['number']}: {about}: {seconds} s, hang {run['hang']}, ended {run['gone']}")
    for one in run["told"]:
        if one["origin"] != run["victim"]:
            tqdm.write(f"    {one}")


def make(plan: Plan, seed: int, constructions: dict[float, float]) -> Run:
    """One run as it is kept."""
    run = kill_once(plan, seed, constructions)
    show(run)
    for one in run["told"]:
        one["at"], one["since"] = round(one["at"], 4), round(one["since"], 4)
        if one["origin"] == run["victim"]:
            del one["text"]
    return run


def main() -> None:
    """Run what is missing of a campaign, write and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elastic", action="store_true", help="runs whose members may change")
    parser.add_argument("--full", action="store_true", help="200 kills, with models of all sizes")
    parser.add_argument("--kills", type=int, help="another number of them")
    parser.add_argument("--models", type=float, nargs="+", choices=MODELS, help="of these sizes only, MB of parameters")
    parser.add_argument("--phases", nargs="+", help="in these only", choices=[*PHASES, *faults_elastic.ADDED])
    parser.add_argument("--numbers", type=int, nargs="+", help="these runs only")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the files in results/")
    given = parser.parse_args()
    prepare()
    kind: Any = faults_elastic.Plan if given.elastic else Plan
    kills = given.kills or (200 if given.full else 20)
    models = given.models or [size for size in MODELS if given.full or size < LARGE]
    plans = [
        plan
        for number in (given.numbers or range(10 * kills))
        if (plan := kind.draw(number, given.seed)).megabytes in models and plan.phase in (given.phases or [plan.phase])
    ][:kills]
    make_one = faults_elastic.make if given.elastic else make
    run_missing(
        given.name or ("faults-elastic" if given.elastic else "faults"),
        plans,
        partial(make_one, seed=given.seed, constructions={}),
        partial(tables_of, faults_elastic.PHASES, faults_elastic.row_of)
        if given.elastic
        else partial(tables_of, PHASES, row_of),
        seed=given.seed,
        minutes=given.minutes,
    )


if __name__ == "__main__":
    main()
