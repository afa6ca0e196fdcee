"""How this process joins the others: `init`."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from fusedfog.comm.calls import enter_world
from fusedfog.comm.elastic import nccl
from fusedfog.comm.elastic.identity import read_identity
from fusedfog.comm.elastic.run import Change, Run
from fusedfog.comm.group import find_group, store_timeout
from fusedfog.comm.launchers import Launch, read_launch
from fusedfog.errors import LaunchError, UnsupportedEnvironment
from fusedfog.log import log, warn_user

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init(
    backend: str | None = None,
    timeout: timedelta | float | None = None,
    init_method: str | None = None,
    *,
    elastic: bool = False,
    min_ranks: int = 1,
    dead_after: float = 30.0,
    on_membership_change: Callable[[Change], object] | None = None,
) -> torch.device:
    """Join the world that torchrun, mpirun, srun or another launcher started, and pick this rank's device.

    What torchrun would have set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is set afterwards,
    since other libraries read it. Without a launcher, and in a world of one, nothing is initialized: one rank needs no process
    group. If one exists already, only the device is picked.

    Args:
        backend: as in `torch.distributed.init_process_group`; None takes NCCL on GPUs and gloo otherwise.
        timeout: how long an operation waits for its peers, as a timedelta or in seconds; None is torch's default.
        init_method: where the ranks meet, as in `torch.distributed.init_process_group`: "tcp://host:port", "file:///path"; None
            takes MASTER_ADDR and MASTER_PORT, and without them what the launcher says (`fusedfog.comm.launchers`). A file does
            for experiments: of a record that a rank was killed in the middle of writing, torch's file store never stops reading.
        elastic: join a run whose members may change: the others train on when a process dies, and it is admitted again when it
            is restarted. See "Survive" in fusedfog/optim/README.md. The process group is that of the current members, and is
            replaced when they change: ranks count from 0 to their number - 1. On GPUs it has gloo and NCCL; no GPU has run that
            yet.
        min_ranks: in an elastic run, with how many members training goes on; fewer wait for others.
        dead_after: seconds after which a member counts as lost that neither answers nor is known to have ended. If it is there
            again later, it comes back by itself, as a restarted one does.
        on_membership_change: called, in the thread that trains, with a `Change` (epoch, members, left, joined, cause) when the
            members have changed, once at the beginning, and in a newcomer when it has been admitted.

    Returns:
        `cuda:LOCAL_RANK` (made the current device) where a GPU is there for every local rank and gloo was not asked for, or
        the one GPU that srun or mpirun gave to this process; else `cpu`.

    Raises:
        LaunchError (a RuntimeError and a ValueError): the launcher's variables do not say who this process is, or where the
            ranks meet; says what is missing. Nothing has been initialized or changed.
        ValueError: `timeout` is not positive, or a process group of another backend exists already. In an elastic run, `backend`
            or `init_method` is given, or on GPUs the environment has torch end processes over failures of NCCL's.
        UnsupportedEnvironment: GPUs are to be used by several ranks and this torch was built without NCCL.

    Warns:
        RuntimeWarning: a process group with another timeout exists already.
    """
    if elastic:
        return _join_elastic(backend, timeout, init_method, min_ranks, dead_after, on_membership_change)
    if isinstance(timeout, (int, float)):
        timeout = timedelta(seconds=timeout)
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")
    joined = dist.is_initialized()
    launch = _read_launch(joined)
    if joined:
        _check_joined(backend, timeout)
    device = _pick_device(backend, launch)
    joining = not joined and _is_joining(launch, init_method)
    if joining and device.type == "cuda" and backend is None:
        _check_nccl(launch)
    if joining and launch is not None and init_method in (None, "env://"):
        launch.check_meeting_point()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if joining:
        # Control traffic and CPU tensors need gloo even where gradients and parameters are on GPUs.
        chosen = backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        _join(launch, init_method, chosen, timeout, device if device.type == "cuda" else None)
        atexit.register(_leave, dist.distributed_c10d._get_default_group())
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # From now on a rank that ends is missed, whether it has built anything or not.
        enter_world(store_timeout(find_group()).total_seconds())
    return device


def _join_elastic(
    backend: str | None,
    timeout: timedelta | float | None,
    init_method: str | None,
    min_ranks: int,
    dead_after: float,
    on_change: Callable[[Change], object] | None,
) -> torch.device:
    if backend not in (None, "gloo") or init_method is not None:
        raise ValueError(
            f"init(elastic=True) makes groups of gloo, and of NCCL beside it where there are GPUs, and finds the others by "
            f"FUSEDFOG_STORES, or by MASTER_ADDR and MASTER_PORT: leave backend and init_method out, or take backend 'gloo' to "
            f"train on the CPU; got {backend!r} and {init_method!r}"
        )
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    seconds = default_pg_timeout.total_seconds() if seconds is None else seconds
    if not (seconds > 0 and dead_after > 0 and min_ranks >= 1):
        raise ValueError(
            f"timeout and dead_after are seconds, and min_ranks is at least 1; got {timeout}, {dead_after}, {min_ranks}"
        )
    if dist.is_initialized() or Run.current() is not None:
        raise ValueError("init(elastic=True): a process group exists already, and an elastic run makes its own")
    identity, device = read_identity(os.environ), torch.device("cpu")
    if backend is None and torch.cuda.is_available():
        launch = _read_launch(joined=True)  # Who this process is, FUSEDFOG_SLOT and its kin say.
        device = _pick_device(backend, launch)
    if device.type == "cuda":
        _check_nccl(launch)
        nccl.use()
        torch.cuda.set_device(device)
    run = Run(identity, timeout=seconds, min_ranks=min_ranks, dead_after=dead_after, on_change=on_change)
    run.begin()
    return device


def _check_nccl(launch: Launch | None) -> None:
    if not dist.is_nccl_available():
        who = f"rank {launch.rank}: " if launch is not None else ""
        raise UnsupportedEnvironment(
            f"{who}ranks on GPUs talk by NCCL, and this torch ({torch.__version__}) was built without it: "
            f"install a build that has it (the CUDA wheels for Linux do), or train on the CPU with fusedfog.init('gloo')"
        )


def _read_launch(joined: bool) -> Launch | None:
    if not joined:
        return read_launch(os.environ)
    with contextlib.suppress(LaunchError):  # Whoever made the group knew better.
        return read_launch(os.environ)
    return None


def _is_joining(launch: Launch | None, init_method: str | None) -> bool:
    """Whether there is a world to join; raises LaunchError if there should be, and something is missing."""
    if launch is None:
        if init_method is None or _says_rank(init_method):
            return init_method is not None
        raise LaunchError(
            f"init_method={init_method!r} says where the ranks meet, but nothing says which rank this is: start the ranks with "
            f"torchrun, mpirun or srun, set RANK and WORLD_SIZE, or leave init_method out to train alone"
        )
    return launch.size > 1 or (launch.by_torchrun and bool(launch.address and launch.port))


def _says_rank(init_method: str) -> bool:
    return "rank=" in init_method and "world_size=" in init_method


def _join(
    launch: Launch | None,
    init_method: str | None,
    backend: str,
    timeout: timedelta | None,
    device: torch.device | None,
) -> None:
    url = None if init_method == "env://" else init_method
    by_env = url is None and all(os.environ.get(name) for name in _ENV)
    if launch is None or by_env or (url is not None and _says_rank(url)):
        dist.init_process_group(backend, init_method=url, timeout=timeout, device_id=device)
    else:
        launch = launch if url else _with_known_host(launch)
        where = url or f"tcp://{_bracketed(launch.address or '')}:{launch.port}"
        try:
            dist.init_process_group(
                backend,
                init_method=where,
                timeout=timeout,
                rank=launch.rank,
                world_size=launch.size,
                device_id=device,
            )
        except dist.DistNetworkError as error:
            derived = "" if url or os.environ.get("MASTER_PORT") else ", a port derived from the job's name"
            raise LaunchError(
                f"rank {launch.rank} of {launch.size} by {launch.launcher}: cannot meet the others at {where}{derived}. Set "
                f"MASTER_ADDR to a host name of rank 0 and MASTER_PORT to a free port there, the same on all ranks"
            ) from error
        meeting = {} if url is None else {"MASTER_ADDR", "MASTER_PORT"}
        for name, value in launch.variables().items():
            if name not in meeting and not os.environ.get(name):
                os.environ[name] = value
        log.debug("rank %d of %d by %s met the others at %s", launch.rank, launch.size, launch.launcher, where)


def _with_known_host(launch: Launch) -> Launch:
    """With the substitute for an address that is a name nobody knows."""
    if launch.substitute is None or launch.address is None:
        return launch
    try:
        socket.getaddrinfo(launch.address, None)
    except OSError:
        return dataclasses.replace(launch, address=launch.substitute)
    return launch


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def _pick_device(backend: str | None, launch: Launch | None) -> torch.device:
    cpu = torch.device("cpu")
    if backend == "gloo" or not torch.cuda.is_available():
        return cpu
    count = torch.cuda.device_count()
    local_rank, local_size = (None, None) if launch is None else (launch.local_rank, launch.local_size)
    given = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    if launch is not None and not launch.by_torchrun and count == len(given) == 1:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 and its like show each rank one GPU, its own.
    if count < (local_size or 1):
        return cpu
    if local_rank is None and launch is not None and launch.size > 1 and count > 1:
        raise LaunchError(
            f"rank {launch.rank} of {launch.size} by {launch.launcher}: LOCAL_RANK is missing, so it is not known which of the "
            f"{count} GPUs of this host is its own. Set LOCAL_RANK (0 for the first rank on each host), or let torchrun do it"
        )
    if (local_rank or 0) >= count:
        raise LaunchError(
            f"this process is rank {local_rank} on its host, and there are {count} GPUs: set LOCAL_RANK (and LOCAL_WORLD_SIZE) "
            f"right, start as many ranks as there are GPUs, or train on CPUs with fusedfog.init('gloo')"
        )
    return torch.device("cuda", local_rank or 0)


def _check_joined(backend: str | None, timeout: timedelta | None) -> None:
    """Whether the process group that exists is what is asked for."""
    who = f"rank {dist.get_rank()}: a process group exists already"
    config = str(dist.get_backend_config()).lower()
    existing = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    for part in (backend or "").lower().split(",") if backend else ():
        kind, colon, name = part.partition(":")
        if not (existing.get(kind) == name if colon else kind in existing.values()):
            raise ValueError(
                f"{who}, with backend {config}, and {backend!r} was asked for: call fusedfog.init({backend!r}) before anything "
                f"else makes a process group, destroy that one first, or leave backend out"
            )
    if timeout is None:
        return
    default = dist.distributed_c10d._get_default_group()
    found = default._get_backend(default.bound_device_id or default._device_types[0]).options._timeout
    if timeout != found:
        warn_user(f"{who}, whose operations wait {found}; timeout={timeout} changes nothing", RuntimeWarning)


def _leave(view: dist.ProcessGroup) -> None:
    # A process that exits with a gloo group alive aborts now and then, in plain torch too: what init joined, it leaves.
    if dist.is_initialized() and dist.distributed_c10d._get_default_group() is view:
        dist.destroy_process_group()
