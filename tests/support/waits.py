"""Ranks that wait for one another where a sleep would be a guess, and timeouts that begin where a test wants them to strike.

    model, opt = build()                    # ranks may be late by seconds, as on a busy machine
    iterate(model, opt, 2)
    meet("trained")
    shorten(2.0)                            # from here on this rank gives up after two seconds

They meet by the default group's store: nothing is posted to a process group, and no connection hangs on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from fusedfog.comm import calls, whereabouts
from fusedfog.comm.communicator import Communicator

LONG = timedelta(seconds=60)
"""Until a rank that is only late has come for certain."""


def say(what: str) -> None:
    """Let the other ranks know, and go on."""
    dist.distributed_c10d._get_default_store().set(f"said/{what}", "")


def await_said(*what: str) -> None:
    """Return once all of this has been said."""
    dist.distributed_c10d._get_default_store().wait([f"said/{one}" for one in what], LONG)


def is_said(what: str) -> bool:
    """Whether somebody has said it."""
    return bool(dist.distributed_c10d._get_default_store().check([f"said/{what}"]))


def meet(what: str) -> None:
    """Return once all ranks have come to this."""
    say(f"{what}/{dist.get_rank()}")
    await_said(*(f"{what}/{rank}" for rank in range(dist.get_world_size())))


def shorten(seconds: float) -> None:
    """From now on, whoever waits in this process gives up after so long; what it waits for was built with a longer timeout.

    A short timeout from the beginning would strike at whatever a busy machine delays, before what a test is about.
    """
    limit = timedelta(seconds=seconds)
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(limit, group)
    for communicator in Communicator._all:
        communicator.timeout = limit
        communicator.membership = dataclasses.replace(communicator.membership, timeout=limit)
    if calls._Here.world is not None:
        calls.enter_world(seconds)


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Inside, a rank that is asked where it is has as long to answer as a busy machine may take; for ranks that all live on."""
    ask = whereabouts.ask

    def patiently(world: Any, ranks: Iterable[int], own: Any, patience: float = whereabouts.PATIENCE) -> Any:
        return ask(world, ranks, own, 20.0 if patience >= whereabouts.PATIENCE else patience)

    with mock.patch.object(whereabouts, "ask", patiently):
        yield


def await_true(condition: Callable[[], object]) -> None:
    """Return once this is so."""
    deadline = time.monotonic() + LONG.total_seconds()
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.01)


def pids_of_all() -> list[int]:
    """The process ids of all ranks."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    return pids


def end_all_but(survivors: Collection[int]) -> None:
    """Have the other ranks end here, without a word, when all ranks have come to this; return when they have ended."""
    pids = pids_of_all()
    meet("the end of some")
    if dist.get_rank() not in survivors:
        os._exit(0)
    await_true(lambda: all(rank in survivors or has_ended(pid) for rank, pid in enumerate(pids)))


def has_ended(pid: int) -> bool:
    """Whether a process has ended, and with it its connections; its parent may not have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
