"""NCCL in an elastic run: how its groups are made, and how they are left when they will never be complete.

An operation of NCCL whose peer has died waits on the GPU for ever, and torch ends the process over it. Here the host follows
what is in flight (`Transfer`), and a communicator that has failed is aborted. An abort ends what waits on the GPU; what had not
come counts as complete then, with whatever lies in its memory.

What is said here of torch is read in its sources (ProcessGroupNCCL.hpp and .cpp, distributed_c10d.py); no GPU has run it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from fusedfog.comm.waiter import Task, leak

NCCL = "nccl"

_ABORTED_WITHIN = 30.0
"""Seconds; NCCL takes less than one, or hangs."""

_PAUSE = 1e-3

_SETTINGS = {
    # torch's watchdog ends the process over an error, or the timeout, of an operation. torchrun sets 1.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # Whoever sees an error writes so into the run's store, and a process that reads it there is ended after some minutes.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # Else the watchdog stands still for a minute over an error, with the lock that every operation needs.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}


class NotAborted(RuntimeError):
    """NCCL does not let go of the GPU, so this process cannot train on."""


class _Used:
    backend: ClassVar[str] = ""
    store: ClassVar[Store | None] = None
    beside: ClassVar[Store | None] = None


def use() -> None:
    """Have epochs have groups of NCCL's too; called before there is one.

    Raises:
        ValueError: the environment asks for torch's watchdog, which would end the process when another one dies.
    """
    debugs = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL"
    if debugs or os.environ.get("TORCH_NCCL_DESYNC_DEBUG", "0").lower() not in ("0", "", "false", "n", "no"):
        raise ValueError(
            "init(elastic=True): with TORCH_DISTRIBUTED_DEBUG=DETAIL or TORCH_NCCL_DESYNC_DEBUG torch ends a process when NCCL "
            "fails, as it does when another process dies: unset them, or train without elastic=True"
        )
    os.environ.update(_SETTINGS)
    _Used.backend = NCCL


def backend() -> str | None:
    """What torch calls NCCL, if epochs have groups of it."""
    return _Used.backend or None


def backends(gloo: str) -> str:
    """What torch calls the backends of an epoch's default group, of which `gloo` is that of CPU tensors."""
    return f"cpu:{gloo},cuda:{_Used.backend}" if _Used.backend else gloo


def store_beside(store: Store) -> Store:
    """A connection to the same store for torch's groups; the same one again while the epochs' own stays the same.

    A thread that makes a communicator waits in the store for a rank that may have died, and keeps others from that connection.
    """
    if not _Used.backend or not isinstance(store, TCPStore):
        return store
    if _Used.store is not store or _Used.beside is None:
        known: Any = store  # torch's types have no clone().
        _Used.store, _Used.beside = store, known.clone()
    assert _Used.beside is not None
    return _Used.beside


def connect(group: dist.ProcessGroup, place: torch.device) -> None:
    """Make a group's communicator, with all of its ranks. For a thread that can be abandoned: it waits for dead ones for ever."""
    store, beside = _Used.store, _Used.beside
    _Used.beside = None
    if place.type == "cuda":
        torch.cuda.set_device(place)
    group._get_backend(place).eager_connect_single_device(place)
    if _Used.store is store and _Used.beside is None:
        _Used.beside = beside  # No thread is blocked in it.


def abort_all(works: Sequence[dist.Work] = ()) -> None:
    """End all operations of NCCL's in this epoch, on the GPU too. Afterwards those in flight count as complete, and are not.

    All communicators at once, each by a thread: one may be queued behind an operation of another.

    Args:
        works: those whose memory is used again afterwards; none of them writes there any more.

    Raises:
        NotAborted: they do not end.
    """
    deadline = time.monotonic() + _ABORTED_WITHIN
    world = dist.distributed_c10d._world
    groups = sorted(world.pg_names, key=lambda group: world.pg_names[group], reverse=True)
    for group in groups:
        leak(group)  # Its destructor would wait for torch's watchdog.
    tasks = [Task(one.abort) for one in _of_gpus(groups)]
    for task in tasks:
        if not task.over.wait(max(0.0, deadline - time.monotonic())):
            raise _not_aborted()
        try:
            task.result()
        except RuntimeError as error:
            raise _not_aborted(f" ({error})") from error
    while not all(work.is_completed() for work in works):
        if time.monotonic() > deadline:
            raise _not_aborted()
        time.sleep(_PAUSE)


def _not_aborted(why: str = "") -> NotAborted:
    who = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    return NotAborted(
        f"{who}NCCL has not let go of the GPU within {_ABORTED_WITHIN:g} s of an abort{why}. Start this process again"
    )


def _of_gpus(groups: Iterable[dist.ProcessGroup]) -> list[Any]:
    """Those of these groups for tensors on GPUs, each once."""
    found: list[Any] = []
    for group in groups:
        try:
            found.append(group._get_backend(torch.device("cuda")))
        except RuntimeError:  # It has none.
            continue
    return found
