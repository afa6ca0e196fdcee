"""The variables that launchers set, as functions of rank, number of ranks and ranks a host."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_.*|(OMPI|PMI|PMIX|MPI|MV2|SLURM|PALS|TORCHELASTIC)_.*)$"
)
"""All that any of them sets."""


def torchrun(rank: int, size: int, local: int) -> dict[str, str]:
    """As torchrun sets them, `local` ranks a host."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def open_mpi(rank: int, size: int, local: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local), "PMIX_NAMESPACE": "prterun-node0-7@1", "PMIX_RANK": str(rank),
    }  # fmt: skip


def mvapich(rank: int, size: int, local: int) -> dict[str, str]:
    return {
        "MV2_COMM_WORLD_RANK": str(rank), "MV2_COMM_WORLD_SIZE": str(size), "MV2_COMM_WORLD_LOCAL_RANK": str(rank % local),
        "MV2_COMM_WORLD_LOCAL_SIZE": str(local), "PMI_ID": str(rank),
    }  # fmt: skip


def hydra(rank: int, size: int, local: int) -> dict[str, str]:
    """As MPICH's and Intel MPI's mpiexec set them."""
    return {
        "PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": str(rank % local), "MPI_LOCALNRANKS": str(local),
    }  # fmt: skip


def pals(rank: int, size: int, local: int) -> dict[str, str]:
    return {
        "PMI_RANK": str(rank), "PMI_SIZE": str(size), "PMI_LOCAL_RANK": str(rank % local), "PMI_LOCAL_SIZE": str(local),
        "PALS_APID": "b4d2",
    }  # fmt: skip


def srun(rank: int, size: int, local: int) -> dict[str, str]:
    nodes = size // local
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(rank % local), "SLURM_JOB_ID": "812",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NODEID": str(rank // local),
        "SLURM_STEP_NODELIST": f"gpu[07-{6 + nodes:02d}]" if nodes > 1 else "gpu07", "SLURM_NNODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{local}(x{nodes})" if nodes > 1 else str(local), "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    }  # fmt: skip


LAUNCHERS = {
    "torchrun": torchrun,
    "mpirun (Open MPI)": open_mpi,
    "mpirun (MVAPICH)": mvapich,
    "mpiexec (PMI)": hydra,
    "mpiexec (PMI) of PALS": pals,
    "srun": srun,
}
KNOWS_FIRST_HOST = {"torchrun": "node0", "srun": "gpu07"}

SHELLS = {
    "a batch script": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "a shell of salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    "a shell of salloc on a node": {**srun(0, 4, 4), "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "1"},
}


@contextlib.contextmanager
def alone(env: dict[str, str]) -> Iterator[None]:
    """Inside, the environment has none of the launchers' variables but these."""
    before = dict(os.environ)
    for name in [name for name in os.environ if VARIABLES.match(name)]:
        del os.environ[name]
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
