"""Who is here: the process group an optimizer or operation works in, and how to join one."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.errors import UnsupportedEnvironment
from fusedfog.kernels import device


@dataclass(frozen=True)
class GroupView:
    """This process' place in a process group; `group` is None when it is alone and none exists."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the members, in group order."""
        return tuple(dist.get_process_group_ranks(self.group)) if self.group is not None else (0,)


def find_group(group: dist.ProcessGroup | None = None) -> GroupView:
    """The given process group, or the default one, or a group of one process.

    Raises:
        RuntimeError: no process group exists although `WORLD_SIZE` says that there are other ranks.
        ValueError: this rank is not a member of `group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if group is None and size == 1:
            return GroupView(0, 1, None)
        raise RuntimeError(
            f"torch.distributed is not initialized but WORLD_SIZE is {size}: every rank would train alone. "
            f"Call fusedfog.init() (or torch.distributed.init_process_group) before building the optimizer"
        )
    group = group if group is not None else dist.distributed_c10d._get_default_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not a member of the process group it was given")
    return GroupView(rank, dist.get_world_size(group), group)


def check_mesh(mesh: DeviceMesh, view: GroupView) -> None:
    """Raise ValueError unless the mesh is machines x local ranks over all ranks of the world."""
    if mesh.ndim != 2:
        raise ValueError(f"mesh must have two dimensions (machines, local ranks), got {mesh.ndim}")
    if sorted(mesh.mesh.flatten().tolist()) != sorted(view.ranks):
        raise ValueError(
            f"mesh covers ranks {mesh.mesh.tolist()} but the optimizer's group has ranks {list(view.ranks)}"
        )


def group_timeout(view: GroupView, device: torch.device) -> timedelta:
    """How long this world's operations on tensors of `device` wait for their peers."""
    assert view.group is not None
    timeout: timedelta = view.group._get_backend(device).options._timeout
    return timeout


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


def init(backend: str | None = None, timeout: timedelta | float | None = None) -> torch.device:
    """Join the torchrun world if no process group exists yet, and pick this rank's device.

    Args:
        backend: as in `torch.distributed.init_process_group`; None takes NCCL on GPUs and gloo otherwise.
        timeout: how long an operation waits for its peers, as a timedelta or in seconds; None is torch's default.

    Returns:
        `cuda:LOCAL_RANK` (made the current device) where a GPU is there for every local rank and gloo was not asked for,
        else `cpu`. Outside torchrun nothing is initialized: a world of one rank needs no process group.

    Raises:
        ValueError: `timeout` is not positive.
        UnsupportedEnvironment: GPUs are to be used by several ranks and this torch was built without NCCL.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = backend != "gloo" and torch.cuda.is_available()
    on_gpu = on_gpu and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    joining = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if on_gpu and joining and backend is None and not dist.is_nccl_available():
        raise UnsupportedEnvironment(
            f"rank {os.environ['RANK']}: ranks on GPUs talk by NCCL, and this torch ({torch.__version__}) was built without it: "
            f"install a build that has it (the CUDA wheels for Linux do), or train on the CPU with fusedfog.init('gloo')"
        )
    if on_gpu:
        torch.cuda.set_device(device)
    if isinstance(timeout, (int, float)):
        timeout = timedelta(seconds=timeout)
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")
    if joining:
        # Control traffic and CPU tensors need gloo even where gradients and parameters are on GPUs.
        chosen = backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        dist.init_process_group(chosen, timeout=timeout, device_id=device if on_gpu else None)
        atexit.register(_leave, dist.distributed_c10d._get_default_group())
    return device


def _leave(view: dist.ProcessGroup) -> None:
    # A process that exits with a gloo group alive aborts now and then, in plain torch too: what init joined, it leaves.
    if dist.is_initialized() and dist.distributed_c10d._get_default_group() is view:
        dist.destroy_process_group()
