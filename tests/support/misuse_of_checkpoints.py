"""What goes wrong with checkpoints, alone and on ranks, and what users are told: see `support.misuse`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import fusedfog
from fusedfog.optim import checkpoint
from support.misuse import misuse, net, said
from support.misuse_of_ranks import Texts, world


def build() -> tuple[nn.Module, Any]:
    model = net()
    return model, fusedfog.SGD(model.parameters(), lr=0.1, model=model)


@contextlib.contextmanager
def a_run(checkpoints: int = 0) -> Iterator[Path]:
    """A run's folder with so many checkpoints, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder).resolve() / "run"
        run.mkdir()
        for _ in range(checkpoints):
            fusedfog.save_checkpoint(run, *build())
        yield run


@misuse("give `save_checkpoint()` something that would have to be executed on load")
def no_data() -> None:
    with a_run() as run:
        fusedfog.save_checkpoint(run, *build(), settings=argparse.Namespace(seed=3))


@misuse("load a folder that has no checkpoint")
def no_checkpoint() -> None:
    with a_run() as run:
        fusedfog.load_checkpoint(run, *build())


@misuse("load a checkpoint with a damaged file: cut off")
def cut_off() -> None:
    with a_run(2) as run:
        newest = sorted(run.iterdir())[-1] / "rank-00000.safetensors"
        newest.write_bytes(newest.read_bytes()[:1000])
        fusedfog.load_checkpoint(run, *build())


@misuse("the same: a bit that flipped")
def flipped() -> None:
    with a_run(1) as run:
        newest = sorted(run.iterdir())[-1] / "rank-00000.safetensors"
        raw = bytearray(newest.read_bytes())
        raw[-1] ^= 1
        newest.write_bytes(raw)
        fusedfog.load_checkpoint(run, *build())


@misuse("load one of another model")
def of_another_model() -> None:
    with a_run(1) as run:
        model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 3))
        fusedfog.load_checkpoint(run, model, fusedfog.SGD(model.parameters(), lr=0.1))


@misuse("load a folder of `torch.distributed.checkpoint`")
def of_torch() -> None:
    with a_run() as run:
        (run / ".metadata").write_bytes(b"a pickle")
        fusedfog.load_checkpoint(run, *build())


@misuse("save into the folder of another run")
def of_another_run() -> None:
    with a_run(1) as run:
        checkpoint._Runs.names.clear()  # as in another process
        fusedfog.save_checkpoint(run, *build())


FULL_DISK = "the disk is full, on one rank"
OTHER_FOLDER = "give `save_checkpoint()` another folder on each rank"


@world(FULL_DISK, OTHER_FOLDER)
def cannot_save() -> Texts:
    model, opt = build()
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    run = Path(box[0]).resolve() / "run"
    sync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    apart = said(lambda: fusedfog.save_checkpoint(f"run-{dist.get_rank()}", model, opt))
    os.fsync = full if dist.get_rank() == 1 else sync
    try:
        text = said(lambda: fusedfog.save_checkpoint(run, model, opt))
    finally:
        os.fsync = sync
    dist.barrier()
    if dist.get_rank() == 0:
        for path in (run, run.parent):
            path.rmdir()
    return {FULL_DISK: text, OTHER_FOLDER: apart}
