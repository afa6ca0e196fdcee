"""The process groups of an epoch: one set of gloo connections, which is the default group of torch.distributed meanwhile.

On GPUs the default group has NCCL too, which its first user connects, and the optimizer's communicator a group of its own.

The connections are made by a thread that can be abandoned, as gloo waits for several times its timeout for a member that dies
meanwhile, and only then is the default group made of them, in no time. The optimizer's communicator uses them too (its tags
begin where a user's end): one set of connections is to be made, and shut down, for each epoch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from fusedfog.comm.elastic import nccl
from fusedfog.comm.elastic.record import Record
from fusedfog.comm.sockets import Sockets
from fusedfog.comm.store import keep_store
from fusedfog.comm.waiter import Task

BACKEND = "fusedfog"
"""What torch calls the backend of these groups; it is gloo."""

_LOOK_EVERY = 0.05


class NotFormed(RuntimeError):
    """An epoch did not come to be; says why."""


@dataclass
class Epoch:
    """The process groups of one epoch.

    Attributes:
        record: what it is.
        rank: this member's.
        backend: the connections.
        sockets: of these.
        handed: the default group has them.
        claimed: a communicator has them too.
    """

    record: Record
    rank: int
    backend: Any
    sockets: Sockets
    handed: bool = False
    claimed: bool = False


class _Current:
    epoch: ClassVar[Epoch | None] = None
    registered: ClassVar[bool] = False
    hooks: ClassVar[tuple[Any, Any]] = (None, None)


def claim_connections(size: int) -> Sockets | None:
    """The sockets of the default group, which a communicator of so many ranks may use if they are all; once in an epoch."""
    epoch = _Current.epoch
    if epoch is None or epoch.claimed or size < len(epoch.record.seats):
        return None
    epoch.claimed = True
    return epoch.sockets


def open_epoch(
    record: Record, rank: int, store: Store, timeout: timedelta, patience: float, give_up: Callable[[], str]
) -> None:
    """Make this epoch's default group, together with its other members.

    Args:
        store: a connection of this epoch's own.
        timeout: how long operations wait.
        patience: seconds in which the members connect.
        give_up: called now and then; says why they never will, or "".

    Raises:
        NotFormed: they do not.
    """
    own = PrefixStore(f"fusedfog/epoch/{record.epoch}", store)
    sockets, waited = Sockets(), 0.0

    def connect() -> tuple[Any, Store]:
        beside = PrefixStore(f"fusedfog/epoch/{record.epoch}", nccl.store_beside(store))
        return dist.ProcessGroupGloo(
            PrefixStore("gloo", own), rank, len(record.seats), timedelta(seconds=patience)
        ), beside

    task = Task(connect)
    while not task.over.wait(_LOOK_EVERY):
        waited += _LOOK_EVERY
        why = give_up() or ("the members did not connect in time" if waited > 2 * patience else "")
        if why:
            raise NotFormed(why)
    try:
        backend, beside = task.result()
    except RuntimeError as error:
        raise NotFormed(str(error).split("\n")[0]) from None
    sockets.take_new()
    backend.options._timeout = timeout
    _Current.epoch = Epoch(record, rank, backend, sockets)
    if not _Current.registered:
        _Current.registered = True
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    with _one_hook():
        dist.init_process_group(
            nccl.backends(BACKEND), store=beside, rank=rank, world_size=len(record.seats), timeout=timeout
        )
    keep_store(own)


def close_epoch() -> None:
    """The default group is no more. Its communicators have been closed."""
    _Current.epoch = None
    if not dist.is_initialized():
        return
    if nccl.backend() is not None:
        nccl.abort_all()
        dist.distributed_c10d._abort_process_group()  # It waits for nobody, as destroying does.
    else:
        dist.destroy_process_group()


def _create(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """What torch asks for a backend; the first time in an epoch for the default group."""
    epoch = _Current.epoch
    if epoch is not None and not epoch.handed:
        epoch.handed = True
        return epoch.backend
    backend = dist.ProcessGroupGloo(store, rank, size, timeout)
    if epoch is not _Current.epoch:  # A thread that was abandoned must not add a group to the next world.
        raise RuntimeError("the epoch in which this group was begun is over")
    return backend


@contextlib.contextmanager
def _one_hook() -> Any:
    """Inside, torch puts a hook for uncaught exceptions before the last one, each time; have it replace its own."""
    ours, before = _Current.hooks
    if sys.excepthook is ours and ours is not None:
        sys.excepthook = before
    else:
        before = sys.excepthook
    yield
    _Current.hooks = (sys.excepthook, before)
