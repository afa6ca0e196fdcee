"""New process groups of some of the ranks, made by these alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fusedfog.comm.agreement import absent, level_group_counts, next_agreement
from fusedfog.comm.calls import Call, current_call
from fusedfog.comm.group import GroupView, Members, unbound
from fusedfog.comm.guard import guarded
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.errors import PeerTimeout


def new_group(ranks: Sequence[int], timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A process group of these ranks, made by them alone: nobody else needs to call, or to be alive.

    For ranks that go on without others. `torch.distributed.new_group(ranks, use_local_synchronization=True)` does it where
    the default group is bound to no device. Where it is (`fusedfog.init()` on GPUs, or `init_process_group(device_id=...)`)
    that call hangs: it splits the default communicator, which is a collective of all ranks.

    Args:
        ranks: global ranks; every one of them calls with the same ones.
        timeout: how long its operations wait; None is the default group's own.

    Raises:
        PeerTimeout: one of these ranks did not call within the timeout; names it.
        RuntimeError: there is no default process group.
        ValueError: no ranks, one of them twice or not in the world, or this rank is none of them.
    """
    default = dist.distributed_c10d._get_default_group()
    members, me = tuple(sorted(ranks)), dist.get_rank()
    view = range(dist.get_world_size())
    if not members or len(set(members)) < len(members) or not set(members) <= set(view):
        raise ValueError(
            f"rank {me}: ranks must be different global ranks of 0..{len(view) - 1}, at least one, got {list(ranks)}"
        )
    if me not in members:
        raise ValueError(f"rank {me} is none of {list(members)}: only members make the group, so it must not call")
    if timeout is None:
        timeout = default._get_backend(default.bound_device_id or default._device_types[0]).options._timeout
    with Call("new_group()", Members(members.index(me), members)):
        return dedicated_group(members, timeout)


def dedicated_group(
    ranks: tuple[int, ...], timeout: timedelta, options: Any = None, backend: str | None = None
) -> dist.ProcessGroup:
    """A new group of these ranks, made by them alone unless they are all.

    Args:
        options: for its NCCL backend.
        backend: its only one; None takes those of the default group.

    Raises:
        PeerTimeout: a rank did not come within the timeout.
        ExchangeError: on gloo, a rank has ended; names it.
    """
    whole = len(ranks) == dist.get_world_size()
    if not whole:
        level_group_counts(ranks, timeout)

    def make() -> dist.ProcessGroup:
        # All ranks together may split the default group's communicator, which is quick.
        with contextlib.nullcontext() if whole else unbound():
            group = dist.new_group(
                list(ranks),
                timeout=timeout,
                backend=backend,
                pg_options=options,
                use_local_synchronization=not whole,
                group_desc="fusedfog",
            )
        assert isinstance(group, dist.ProcessGroup)
        return group

    return guarded(Members(ranks.index(dist.get_rank()), ranks), make, current_call() or "opening a communicator")


def nccl_options(view: GroupView, place: torch.device, timeout: timedelta, comm_sms: int | None) -> Any:
    """Options of a group whose transfers run beside computation; None for backends that are not torch's NCCL.

    A high-priority stream: a transfer that is ready starts as soon as a block of the running kernels ends, instead of after
    all that are queued. `comm_sms` bounds the blocks of one NCCL kernel, and with them the SMs that it holds: a block that
    waits for its peer spins, and keeps its SM from the computation, for as long as the peer is late. Too few blocks cannot
    fill the link; NVLink takes 8 to 16, a network card 1 to 4.
    """
    assert view.group is not None
    if view.group._get_backend(place).name() != "nccl" or not dist.is_nccl_available():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    if comm_sms is not None:
        options.config.max_ctas = comm_sms
    return options


def check_one_rank_per_gpu(view: GroupView, place: torch.device, timeout: timedelta) -> None:
    """Raise ValueError on every rank if two of them are on one GPU, which NCCL does not do; names them.

    Raises:
        PeerTimeout: another rank did not come to this check.
    """
    store, prefix = own_store(), next_agreement(view)
    identity = gpu_identity(place) or f"of rank {view.rank}"
    before = store.add(f"{prefix}/on/{identity}", 1) - 1
    if before:
        other = f"{prefix}/on/{identity}/first"
        if absent(store, [other], timeout, view):
            raise PeerTimeout(f"rank {view.rank}: the other rank on GPU {identity} did not come within {timeout}")
        store.set(f"{prefix}/clash", f"ranks {store.get(other).decode()} and {view.rank} are both on GPU {identity}")
    else:
        store.set(f"{prefix}/on/{identity}/first", str(view.rank))
    store.set(f"{prefix}/came/{view.rank}", "")
    missing = absent(store, [f"{prefix}/came/{rank}" for rank in range(view.size)], timeout, view)
    if missing:
        raise PeerTimeout(
            f"rank {view.rank}: {name_ranks(missing)} of the group did not come to open its communicator within {timeout}"
        )
    if store.check([f"{prefix}/clash"]):
        raise ValueError(
            f"rank {view.rank}: {store.get(f'{prefix}/clash').decode()}, and NCCL needs a GPU for each rank. Call "
            f"torch.cuda.set_device(LOCAL_RANK) (fusedfog.init() does) before the model is moved, start as many ranks as there "
            f"are GPUs, or train on CPUs (fusedfog.init('gloo'))"
        )


def gpu_identity(place: torch.device) -> str | None:
    """The GPU's name among all there are; None where several ranks may share it."""
    if place.type != "cuda" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return None
    return str(torch.cuda.get_device_properties(place).uuid)
