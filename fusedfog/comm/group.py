"""Who is here: the process group an optimizer or operation works in, and this process' place in it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.comm.launchers import Launch, read_launch, tasks_of_shell
from fusedfog.errors import LaunchError
from fusedfog.kernels import device
from fusedfog.log import warn_user


class Ranks(Protocol):
    """Some ranks, this one among them; a `GroupView` is that."""

    @property
    def rank(self) -> int:
        """This rank's place."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """All of them, by global rank."""


@dataclass(frozen=True)
class GroupView:
    """This process' place in a process group, or among some of its ranks; `group` is None when it is alone and none exists.

    Attributes:
        rank, size: this process' place, and how many there are.
        group: the process group.
        part: the global ranks, ascending, if it is not all of the group's; see `part_of`.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None
    part: tuple[int, ...] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the members, in group order."""
        if self.part is not None:
            return self.part
        return tuple(dist.get_process_group_ranks(self.group)) if self.group is not None else (0,)


def members_of(given: object) -> Members | None:
    """The ranks of a process group or a mesh, of the default group by default; None if this process is none of them."""
    ranks: Iterable[int] = ()
    if given is None and dist.is_initialized():
        ranks = range(dist.get_world_size())
    elif isinstance(given, dist.ProcessGroup) and given in dist.distributed_c10d._world.pg_map:
        ranks = dist.get_process_group_ranks(given)
    elif isinstance(given, DeviceMesh):
        ranks = given.mesh.flatten().tolist()
    members, me = tuple(sorted(ranks)), dist.get_rank() if dist.is_initialized() else -1
    return Members(members.index(me), members) if me in members else None


def part_of(view: GroupView, ranks: Iterable[int]) -> GroupView:
    """This process' place among some ranks of `view`, itself one of them; nothing is sent, and no process group is made."""
    part = tuple(sorted(ranks))
    return GroupView(part.index(view.ranks[view.rank]), len(part), view.group, part)


@dataclass(frozen=True)
class Members:
    """The ranks of a group that is yet to be made, and this one's place among them."""

    rank: int
    ranks: tuple[int, ...]


def find_group(group: dist.ProcessGroup | None = None) -> GroupView:
    """The given process group, or the default one, or a group of one process.

    Raises:
        RuntimeError: no process group exists although RANK and WORLD_SIZE say that there are other ranks.
        LaunchError: the launcher's variables are incomplete, or wrong.
        ValueError: this rank is not a member of `group`.

    Warns:
        RuntimeWarning: once, in a process without a process group that a launcher or `multiprocessing` started.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _check_alone(group)
        return GroupView(0, 1, None)
    group = group if group is not None else dist.distributed_c10d._get_default_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not a member of the process group it was given")
    return GroupView(rank, dist.get_world_size(group), group)


def _check_alone(group: dist.ProcessGroup | None) -> None:
    """Whether this process, which has no process group, is to work alone; raises, or warns, as `find_group` does."""
    try:
        launch = read_launch(os.environ)
    except LaunchError as error:
        raise LaunchError(
            f"torch.distributed is not initialized: {error}. All of that comes before fusedfog.init()"
        ) from None
    if launch is not None and launch.size > 1 and launch.by_torchrun:
        raise RuntimeError(
            f"torch.distributed is not initialized but WORLD_SIZE is {launch.size}: every rank would train alone. "
            f"Call fusedfog.init() (or torch.distributed.init_process_group) before building the optimizer"
        )
    if group is not None:
        raise RuntimeError(
            "torch.distributed is not initialized, so the process group that was given cannot be used: call fusedfog.init() "
            "first, or leave group= out"
        )
    why = _doubts(launch)
    if why and not _Warned.alone:
        _Warned.alone = True
        warn_user(f"{why}, or pass algorithm='local' if it is meant to", RuntimeWarning)


class _Warned:
    alone = False


def _doubts(launch: Launch | None) -> str:
    """Why this process, which has no process group, is probably not meant to be alone, and what to do; nothing if it is."""
    if launch is not None:
        here = f"{launch.launcher} started this process as rank {launch.rank} of {launch.size}, but no process group exists"
        return f"{here}, so it trains alone. Call fusedfog.init() first" if launch.size > 1 else ""
    tasks = tasks_of_shell(os.environ) or 1
    if tasks > 1:
        return (
            f"this process is the shell of a Slurm job of {tasks} tasks and none of the tasks, so it trains alone. Start it "
            f"with srun (srun python train.py) and call fusedfog.init()"
        )
    if multiprocessing.parent_process() is not None:
        return (
            "multiprocessing started this process, but no process group exists, so it trains alone. Set RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT in it (os.environ) before fusedfog.init(), or call init_process_group with its rank"
        )
    return ""


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process' rank in `group`, or in the default group; before there is one, as the launcher's variables say; alone, 0.

    Raises:
        RuntimeError: `group` is given, and torch.distributed is not initialized.
        LaunchError: the launcher's variables are incomplete, or wrong.
        ValueError: this process is not a member of `group`.
    """
    return _place(group)[0]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks `group`, or the default group, has; otherwise, and what is raised, as `rank`. Alone, 1."""
    return _place(group)[1]


def is_main(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this process is rank 0, the one that prints and saves what all ranks have alike; see `rank`."""
    return rank(group) == 0


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        view = find_group(group)
        return view.rank, view.size
    if group is not None:
        raise RuntimeError("torch.distributed is not initialized, so no process has a rank in the group that was given")
    launch = read_launch(os.environ)
    return (launch.rank, launch.size) if launch is not None else (0, 1)


def check_mesh(mesh: DeviceMesh, view: GroupView) -> None:
    """Raise ValueError unless the mesh is machines x local ranks over all ranks of the world."""
    if mesh.ndim != 2:
        raise ValueError(f"mesh must have two dimensions (machines, local ranks), got {mesh.ndim}")
    if sorted(mesh.mesh.flatten().tolist()) != sorted(view.ranks):
        raise ValueError(
            f"mesh covers ranks {mesh.mesh.tolist()} but the optimizer's group has ranks {list(view.ranks)}"
        )


def group_timeout(view: GroupView, device: torch.device) -> timedelta:
    """How long this world's operations on tensors of `device` wait for their peers: the group's timeout.

    Groups that were made without one, as those of a `DeviceMesh`, have torch's default of half an hour; they wait as long
    as the default group, if that is less.
    """
    assert view.group is not None
    timeout: timedelta = view.group._get_backend(device).options._timeout
    default = dist.distributed_c10d._get_default_group()
    if view.group is not default and timeout in (default_pg_timeout, default_pg_nccl_timeout):
        with contextlib.suppress(RuntimeError):  # The default group may have no backend for this device.
            timeout = min(timeout, default._get_backend(device).options._timeout)
    return timeout


def store_timeout(view: GroupView) -> timedelta:
    """How long what travels through the store waits: the timeout of the group's first backend."""
    assert view.group is not None
    return group_timeout(view, view.group._device_types[0])


def check_backend(view: GroupView, place: torch.device) -> None:
    """Raise ValueError for tensors on a GPU in a group whose backend does not queue its works on streams, as NCCL does."""
    if not device.on_gpu(place) or view.group is None:
        return
    try:
        backend = view.group._get_backend(place)
        found, fits = backend.name(), backend.name() not in ("gloo", "mpi", "ucc")
    except RuntimeError:  # There is none for this type of device.
        found, fits = "none", False
    if not fits:
        raise ValueError(
            f"rank {view.rank}: tensors on {place} travel by NCCL, but the process group's backend for them is {found}. Make "
            f"the group with fusedfog.init(), init_process_group('cpu:gloo,cuda:nccl') or new_group(backend='nccl'), or move "
            f"the model, or the tensor, to the CPU"
        )


@contextlib.contextmanager
def unbound() -> Iterator[None]:
    """Inside, new groups are made without splitting the communicator of the default group.

    A default group that is bound to a device (`init_process_group(device_id=...)`) has torch make each new NCCL communicator
    by `ncclCommSplit`, a collective of *all* ranks: those that are not in the new group must call `new_group` too, and never
    do when its members make it alone (torch 2.9 to 2.13).
    """
    default = dist.distributed_c10d._get_default_group()
    bound = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound
