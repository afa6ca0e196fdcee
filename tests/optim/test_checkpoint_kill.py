"""kill -9 at random moments of `save_checkpoint`: whatever it hits, the run resumes from a complete checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog

ELEMENTS = 200_000
ENDS = ("Died", "PeerTimeout", "ExchangeError")
"""How a rank may end: as the victim, or by being told of it."""


def build() -> tuple[nn.Module, Any]:
    model = nn.ParameterList([nn.Parameter(torch.zeros(ELEMENTS // 2)) for _ in range(2)])
    return model, fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, topology="ring", sync_init=False)


def last_promised(promises: Path) -> int:
    return max(map(int, promises.read_text().split()), default=-1)


def open_world() -> None:
    """With a TCP store: torch's file store loops for ever on what a rank has half written that is killed meanwhile."""
    rank, size, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=30)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    # Deaths are seen without it, and who is only late on a busy machine must not be taken for dead before anybody is.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)


def live(run: str, promises: str, victims: list[int], after: float) -> int:
    """Resume, check what was loaded, and save until the victims are killed `after` seconds from the first save on."""
    open_world()
    rank, number = dist.get_rank(), 0
    model, opt = build()
    if last_promised(Path(promises)) >= 0:
        number = fusedfog.load_checkpoint(run, model, opt)["number"]
        # Never older than what a save has returned for, and all of one moment.
        assert number >= last_promised(Path(promises)), (number, last_promised(Path(promises)))
        assert all(bool((p == number + rank / 4).all()) for p in model.parameters())
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    killer = " ".join(str(pids[victim]) for victim in victims)
    while True:
        number += 1
        with opt.paused(), torch.no_grad():
            for p in model.parameters():
                p.fill_(number + rank / 4)
        fusedfog.save_checkpoint(run, model, opt, keep=2, number=number)
        if rank == 0:
            with Path(promises).open("a") as file:
                file.write(f"{number}\n")
        if killer and rank == 0:
            # Another process: this one's threads could do it only where Python lets them.
            subprocess.Popen(["sh", "-c", f"sleep {after:.4f}; kill -9 {killer}"])
            killer = ""


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_every_kill_leaves_a_complete_checkpoint(ranks: Pool, tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    run, promises = tmp_path / "run", tmp_path / "promises"
    promises.touch()
    unfinished = resumed = 0
    for kill in range(kills):
        victims = [[0, 1], [0], [1]][kill % 3]
        lives = (str(run), str(promises), victims, chance.uniform(0, 0.3))
        outcomes = ranks.outcomes(2, live, *lives, init=False)
        bad = [outcome for outcome in outcomes if outcome.error_type not in ENDS]
        assert bad == [], "\n".join(f"{one.error_type}: {one.message}\n{one.traceback}" for one in bad)
        assert all(outcomes[victim].error_type == "Died" for victim in victims)
        left = list(run.glob(".unfinished-*"))
        unfinished += bool(left)
        for path in left:
            shutil.rmtree(path)
        resumed += kill > 0
    found = ranks.run(2, load, str(run), str(promises))
    assert found[0] == found[1]
    resumed += 1
    print(f"{kills} kills, {unfinished} of them with a checkpoint half written or half removed: {resumed} resumed")
    assert resumed == kills


def load(run: str, promises: str) -> int:
    model, opt = build()
    number = int(fusedfog.load_checkpoint(run, model, opt)["number"])
    assert number >= last_promised(Path(promises))
    assert all(bool((p == number + dist.get_rank() / 4).all()) for p in model.parameters())
    return number
