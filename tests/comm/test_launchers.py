"""Who a process is: the variables of every launcher, complete, incomplete and wrong."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.launches import KNOWS_FIRST_HOST, LAUNCHERS, SHELLS, alone, srun, torchrun
from torch import nn

import fusedfog
from fusedfog.comm.launchers import Launch, hosts, read_launch, tasks_of_shell


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(("size", "local"), [(4, 4), (8, 4), (2, 1), (1, 1)])
def test_every_rank_of_every_launcher_knows_its_place(launcher: str, size: int, local: int) -> None:
    found = [read_launch(LAUNCHERS[launcher](rank, size, local)) for rank in range(size)]
    assert [(one.rank, one.size, one.local_rank, one.local_size) for one in found if one is not None] == [
        (rank, size, rank % local, local) for rank in range(size)
    ]
    (where,) = {(one.address, one.port) for one in found if one is not None}
    if launcher == "torchrun":
        assert where == ("node0", 29500)
    else:
        assert where[0] == ("127.0.0.1" if size == local else KNOWS_FIRST_HOST.get(launcher))
        assert where[1] is not None
        assert 20000 <= where[1] < 30000


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_users_own_address_wins(launcher: str) -> None:
    found = read_launch({**LAUNCHERS[launcher](1, 4, 2), "MASTER_ADDR": "here", "MASTER_PORT": "1234"})
    assert found is not None
    assert (found.address, found.port) == ("here", 1234)
    found.check_meeting_point()


@pytest.mark.parametrize("launcher", ["mpirun (Open MPI)", "mpirun (MVAPICH)", "mpiexec (PMI)"])
def test_ranks_on_several_hosts_say_what_is_missing_and_how_to_give_it(launcher: str) -> None:
    found = read_launch(LAUNCHERS[launcher](1, 4, 2))
    assert found is not None
    with pytest.raises(
        fusedfog.LaunchError, match=r"rank 1 of 4 by mpi.*MASTER_ADDR is missing.*\n +mpi(run|exec) -np? 4"
    ):
        found.check_meeting_point()


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("srun", "torchrun"), ("srun", "mpirun (Open MPI)"), ("srun", "mpiexec (PMI)"), ("mpirun (Open MPI)", "torchrun")],
)
def test_the_nearest_launcher_counts(outer: str, inner: str) -> None:
    found = read_launch({**LAUNCHERS[outer](0, 1, 1), **LAUNCHERS[inner](3, 4, 4)})
    assert found is not None
    assert (found.launcher, found.rank, found.size) == (inner, 3, 4)


def test_a_batch_script_that_exports_half_of_torchruns_variables_leaves_the_rest_to_srun() -> None:
    for exported in ({"WORLD_SIZE": "4"}, {"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "4"}):
        found = read_launch({**srun(3, 4, 2), **exported})
        assert found is not None
        assert (found.rank, found.size, found.local_rank, found.address) == (3, 4, 1, "gpu07")


def test_several_jobs_on_one_host_meet_at_several_ports() -> None:
    ports = set()
    for job in range(50):
        found = read_launch({**srun(0, 4, 4), "SLURM_JOB_ID": str(job)})
        assert found is not None
        ports.add(found.port)
    assert len(ports) > 40


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_of_a_slurm_job_is_none_of_its_tasks(shell: str) -> None:
    assert read_launch(SHELLS[shell]) is None
    assert tasks_of_shell(SHELLS[shell]) == 4
    assert tasks_of_shell({**SHELLS[shell], **torchrun(0, 2, 2)}) is None


@pytest.mark.parametrize(
    "task",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[7-8]"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    ],
)
def test_tasks_of_srun_are_known_by_little(task: dict[str, str]) -> None:
    found = read_launch(task)
    assert found is not None
    assert (found.launcher, found.size) == ("srun", 2)
    assert found.address == task.get("SLURM_LAUNCH_NODE_IPADDR", "n7" if "SLURM_JOB_NODELIST" in task else None)
    assert tasks_of_shell(task) is None


WRONG = [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is missing"),
    ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is missing"),
    ({"RANK": "", "WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is missing"),
    ({"RANK": "1", "WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number of at least 1, and is 'four'"),
    ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK must be a whole number of at least 0, and is '-1'"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, and is '0'"),
    ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4 and WORLD_SIZE is 4, but ranks count from 0 to 3"),
    ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "a"}, "LOCAL_RANK must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number of 1 to 65535"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, but OMPI_COMM_WORLD_RANK is missing"),
    ({"PMI_RANK": "1"}, "PMI_RANK is 1, but PMI_SIZE is missing"),
    ({"MV2_COMM_WORLD_RANK": "x", "MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_RANK must be a whole number"),
    ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "its rank is 2 and its number of ranks is 2"),
    ({**srun(0, 4, 2), "SLURM_STEP_NODELIST": "gpu[a-b]"}, "is not a list of hosts"),
    ({**srun(0, 4, 2), "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is missing"),
]


@pytest.mark.parametrize(("env", "says"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_missing_or_wrong_is_named_by_init_and_by_optimizers(env: dict[str, str], says: str) -> None:
    with alone(env):
        for attempt in (fusedfog.init, fusedfog.rank, lambda: fusedfog.SGD([nn.Parameter(torch.zeros(3))])):
            with pytest.raises(RuntimeError, match=re.escape(says)) as caught:
                attempt()
            assert isinstance(caught.value, ValueError)
            assert "call fusedfog.init()" not in str(caught.value).lower()
    assert not dist.is_initialized()


def test_torchruns_complete_variables_need_no_sound_ones_of_others() -> None:
    found = read_launch({**torchrun(1, 2, 2), "OMPI_COMM_WORLD_RANK": "x", "SLURM_PROCID": "y"})
    assert found == Launch("torchrun", 1, 2, 1, 2, "node0", 29500)


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("gpu7", ["gpu7"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a-1,b-2", ["a-1", "b-2"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
    ],
)
def test_lists_of_hosts_as_slurm_writes_them(nodelist: str, names: list[str]) -> None:
    assert list(hosts(nodelist)) == names


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=5))
def test_any_list_of_hosts_is_all_of_its_names(spans: list[tuple[int, int, int]]) -> None:
    parts, names = [], []
    for start, more, width in spans:
        parts.append(f"{start:0{width}d}-{start + more:0{width}d}" if more else f"{start:0{width}d}")
        names += [f"n{number:0{width}d}" for number in range(start, start + more + 1)]
    assert list(hosts(f"n[{','.join(parts)}],z")) == [*names, "z"]


TEXT = st.sampled_from(["", "0", "1", "2", "3", "-1", "x", "2(x2)", "n[1-2]", "n[", "10.0.0.1", "99999999999999999999"])
NAMES = sorted({name for make in LAUNCHERS.values() for name in make(0, 2, 2)})


@given(st.dictionaries(st.sampled_from(NAMES), TEXT, max_size=8))
def test_whatever_the_variables_are_a_place_is_consistent_or_an_error(env: dict[str, str]) -> None:
    with contextlib.suppress(fusedfog.LaunchError):
        found = read_launch(env)
        if found is not None:
            assert 0 <= found.rank < found.size
            assert found.port is None or 0 < found.port < 65536
            again = read_launch(found.variables())
            assert again is not None
            assert (again.rank, again.size, again.address, again.port) == (
                found.rank, found.size, found.address, found.port,
            )  # fmt: skip
