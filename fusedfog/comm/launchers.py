"""Who this process is, by the variables that its launcher set: torchrun, mpirun, srun, or another that speaks PMI.

    read_launch(os.environ) -> Launch(launcher, rank, size, local_rank, local_size, address, port), or None for a process alone

`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT` are torchrun's, or the user's own, and win over everything
else, since torchrun itself may have been started by srun. Then comes the launcher that is nearest to the process: mpirun may
run inside a Slurm job and start its daemons by srun, so that srun's variables are those of the daemon.

    launcher            ranks                            where rank 0 is
    torchrun            RANK, WORLD_SIZE                 MASTER_ADDR, MASTER_PORT
    mpirun (Open MPI)   OMPI_COMM_WORLD_RANK, _SIZE      all ranks on one host: here; otherwise it does not say
    mpirun (MVAPICH)    MV2_COMM_WORLD_RANK, _SIZE       the same
    mpiexec (PMI)       PMI_RANK, PMI_SIZE               the same
    srun                SLURM_PROCID, SLURM_NTASKS       the first host of SLURM_STEP_NODELIST

Everything here is a function of the variables: no process is started, and no name is looked up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

from fusedfog.errors import LaunchError

Env: TypeAlias = Mapping[str, str]

_FIRST_PORT, _PORTS = 20000, 10000
"""Ports derived from a job's name lie below those that Linux hands out by itself (32768 to 60999)."""

_SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm numbers batch scripts, interactive shells and the like from here on."""

_LINES = {
    "torchrun": "torchrun --nproc-per-node 4 train.py",
    "mpirun": "mpirun -np 4 -x MASTER_ADDR=HOST -x MASTER_PORT=29500 python train.py  # HOST: where rank 0 runs",
    "mpiexec": "mpiexec -n 4 -genv MASTER_ADDR HOST -genv MASTER_PORT 29500 python train.py  # HOST: where rank 0 runs",
    "srun": "MASTER_ADDR=HOST MASTER_PORT=29500 srun python train.py  # HOST: where rank 0 runs",
}
"""How each launcher is given what it does not know by itself."""


@dataclass(frozen=True)
class Launch:
    """A process' place in the world that its launcher made.

    Attributes:
        launcher: who set the variables, for messages.
        rank, size: of all processes.
        local_rank, local_size: of those on this host; None where the launcher does not say.
        address, port: where rank 0 listens, the same on all ranks; None where nothing says so.
        substitute: another address for it, should `address` be a name that nobody knows.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None
    address: str | None = None
    port: int | None = None
    substitute: str | None = None

    @property
    def by_torchrun(self) -> bool:
        """Whether the ranks are RANK's and WORLD_SIZE's."""
        return self.launcher == "torchrun"

    def variables(self) -> dict[str, str]:
        """What torchrun would have set, as far as it is known: other libraries read that."""
        known = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in known.items() if value is not None}

    def check_meeting_point(self) -> None:
        """Raise LaunchError unless it is known where rank 0 listens; says what is missing, and how it is given."""
        given = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        missing = [name for name, value in given.items() if value is None]
        if not missing:
            return
        lack = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        known = (
            "RANK and WORLD_SIZE are set" if self.by_torchrun else "its variables do not say on which host rank 0 is"
        )
        found = f"rank {self.rank} of {self.size} by {self.launcher}: {known}, {'but' if self.by_torchrun else 'and'} {lack}"
        line = next(line for name, line in _LINES.items() if self.launcher.startswith(name))
        also = (
            ""
            if self.by_torchrun
            else "\nor, where torchrun starts the ranks:\n    torchrun --nproc-per-node 4 train.py"
        )
        own = "\nor set them yourself:\n    export MASTER_ADDR=HOST MASTER_PORT=29500  # HOST: where rank 0 runs"
        raise LaunchError(f"{found}, so the ranks cannot meet. Start them with\n    {line}{also or own}")


def read_launch(env: Env) -> Launch | None:
    """This process' place by its environment; None for one that no launcher started, and for a Slurm job's own shell.

    Raises:
        LaunchError: variables that are missing beside others, are no numbers, or contradict each other.
    """
    own = _number(env, "RANK"), _number(env, "WORLD_SIZE", 1)
    launch = _launched(env) if None in own else _launched_if_sound(env)
    if own == (None, None):
        pass
    elif launch is not None and all(mine in (None, its) for mine, its in zip(own, _ranks(launch), strict=True)):
        # A batch script that exports WORLD_SIZE leaves RANK to srun; whoever sets both may leave the address to it.
        launch = launch if None in own else replace(launch, **_given(_torchrun(env, *_ranks(launch))))
    elif own == (None, 1):
        launch = _torchrun(env, 0, 1)
    elif own[0] is None or own[1] is None:
        there, missing = ("WORLD_SIZE", "RANK") if own[0] is None else ("RANK", "WORLD_SIZE")
        raise LaunchError(
            f"{there} is {env[there]}, but {missing} is missing, so this process cannot know its place among the others: "
            f"start the ranks with torchrun, mpirun or srun, set {missing} too, or unset {there} to train alone"
        )
    else:
        launch = _torchrun(env, own[0], own[1])
    if launch is None:
        return None
    if launch.rank >= launch.size:
        rank, size = ("RANK", "WORLD_SIZE") if launch.by_torchrun else ("its rank", "its number of ranks")
        raise LaunchError(
            f"{launch.launcher}: {rank} is {launch.rank} and {size} is {launch.size}, but ranks count from 0 to {launch.size - 1}"
        )
    port = _number(env, "MASTER_PORT", 1)
    if port is not None and port > 65535:
        raise LaunchError(f"MASTER_PORT must be a whole number of 1 to 65535, and is {port}")
    given = _text(env, "MASTER_ADDR")
    found: dict[str, Any] = {"address": given, "substitute": None} if given else {}
    return replace(launch, port=port or launch.port, **found)


def tasks_of_shell(env: Env) -> int | None:
    """How many tasks the Slurm job has whose batch script, or interactive shell, this process is; None for other processes."""
    if _text(env, "RANK") or _launched_if_sound(env) is not None:
        return None
    return _number(env, "SLURM_NTASKS", 1)


def hosts(nodelist: str) -> Iterator[str]:
    """The names in one of Slurm's lists of hosts: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7 and login.

    Raises:
        LaunchError: it is not such a list.
    """
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        yield from _expanded(part.strip(), nodelist)


def _expanded(part: str, nodelist: str) -> Iterator[str]:
    head, bracket, tail = part.partition("[")
    if not bracket:
        yield head
        return
    inside, _, tail = tail.partition("]")
    for span in inside.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", span.strip())
        if bounds is None:
            raise LaunchError(f"{nodelist!r} is not a list of hosts as Slurm writes them")
        first, last = bounds[1], bounds[2] or bounds[1]
        for number in range(int(first), int(last) + 1):
            for rest in _expanded(tail, nodelist):
                yield f"{head}{number:0{len(first)}d}{rest}"


# -- launchers -------------------------------------------------------------------------------------------------------


def _torchrun(env: Env, rank: int, size: int) -> Launch:
    return Launch("torchrun", rank, size, _number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE", 1))


def _launched_if_sound(env: Env) -> Launch | None:
    """As `_launched`, where torchrun's variables are complete and nothing else needs to be."""
    try:
        return _launched(env)
    except LaunchError:
        return None


def _launched(env: Env) -> Launch | None:
    """The place that a launcher other than torchrun says."""
    for launcher in _MPI:
        if _text(env, launcher.rank) or _text(env, launcher.size):
            return _by_mpi(env, launcher)
    return _by_srun(env) if _in_step(env) else None


@dataclass(frozen=True)
class _Mpi:
    """The variables of one launcher; of several names for one thing, the first that is set counts."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...] = ()


_MPI = (
    _Mpi(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"),
    ),
    _Mpi(
        "mpirun (MVAPICH)",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Mpi(
        "mpiexec (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        ("PALS_APID", "FLUX_JOB_ID", "PMI_JOBID"),
    ),
)


def _by_mpi(env: Env, launcher: _Mpi) -> Launch:
    rank, size = _needed(env, launcher.name, launcher.rank, launcher.size)
    local_rank, local_size = _first_number(env, launcher.local_rank), _first_number(env, launcher.local_size)
    here = "127.0.0.1" if local_size == size else None
    job = "/".join(_text(env, name) for name in (*launcher.job, "SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID"))
    return Launch(launcher.name, rank, size, local_rank, local_size, here, _port(job))


def _in_step(env: Env) -> bool:
    """Whether srun started this process: a batch script or a shell of salloc has SLURM_NTASKS and SLURM_PROCID=0 too."""
    if not _text(env, "SLURM_PROCID"):
        return False
    step = _text(env, "SLURM_STEP_ID") or _text(env, "SLURM_STEPID")
    if step:
        return not (step.isdecimal() and int(step) >= _SPECIAL_STEPS)
    if _text(env, "SLURM_PROCID") != "0" or not (_text(env, "SLURM_JOB_ID") or _text(env, "SLURM_JOBID")):
        return True
    return any(env.get(name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"))


def _by_srun(env: Env) -> Launch:
    size_name = "SLURM_STEP_NUM_TASKS" if _text(env, "SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    rank, size = _needed(env, "srun", "SLURM_PROCID", size_name)
    local_size = _tasks_here(env, size)
    address = "127.0.0.1" if local_size == size else None
    # The host of srun itself is the first one's where a batch script calls it, and a login node elsewhere.
    by_srun = _text(env, "SLURM_LAUNCH_NODE_IPADDR") or None
    nodelists = (_text(env, name) for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"))
    named = [host for nodelist in nodelists if nodelist for host in islice(hosts(nodelist), 1)]
    found = [one for one in (*named[:1], by_srun) if one is not None] if address is None else [address]
    job = _text(env, "SLURM_JOB_ID") or _text(env, "SLURM_JOBID")
    step = _text(env, "SLURM_STEP_ID") or _text(env, "SLURM_STEPID")
    address, substitute, *_ = [*found, None, None]
    port = _port(f"{job}.{step}")
    return Launch("srun", rank, size, _number(env, "SLURM_LOCALID"), local_size, address, port, substitute)


def _tasks_here(env: Env, size: int) -> int | None:
    """The tasks on this node, of "2(x3),1" and this node's number."""
    if "1" in (_text(env, "SLURM_STEP_NUM_NODES") or _text(env, "SLURM_NNODES"), str(size)):
        return size
    counts: list[int] = []
    for part in (_text(env, "SLURM_STEP_TASKS_PER_NODE") or _text(env, "SLURM_TASKS_PER_NODE")).split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(env, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


# -- values ----------------------------------------------------------------------------------------------------------


def _ranks(launch: Launch) -> tuple[int, int]:
    return launch.rank, launch.size


def _given(launch: Launch) -> dict[str, Any]:
    return {name: value for name, value in vars(launch).items() if value is not None}


def _text(env: Env, name: str) -> str:
    return env.get(name, "").strip()


def _number(env: Env, name: str, least: int = 0) -> int | None:
    """A variable's whole number; None where it is not set, or empty."""
    text = _text(env, name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise LaunchError(f"{name} must be a whole number of at least {least}, and is {env[name]!r}")
    return int(text)


def _first_number(env: Env, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := _number(env, name)) is not None), None)


def _needed(env: Env, launcher: str, rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(env, rank_name), _number(env, size_name, 1)
    if rank is None or size is None:
        there, missing = (size_name, rank_name) if rank is None else (rank_name, size_name)
        raise LaunchError(
            f"{launcher} seems to have started this process, since {there} is {env[there]}, but {missing} is missing: "
            f"start the ranks with torchrun, set RANK and WORLD_SIZE, or unset {there} to train alone"
        )
    return rank, size


def _port(job: str) -> int:
    """A port that all ranks of a job derive alike; where two jobs derive the same one, `init` says how to set another."""
    digest = hashlib.sha256(job.encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:8], "big") % _PORTS
