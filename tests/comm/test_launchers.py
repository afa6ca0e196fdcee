"""Who a process is: the variables of every launcher, complete, incomplete and wrong, and processes that join by them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.comm import group as places
from fusedfog.comm.launchers import Launch, hosts, read_launch, tasks_of_shell

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_.*|(OMPI|PMI|PMIX|MPI|MV2|SLURM|PALS|TORCHELASTIC)_.*)$"
)


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


SHELLS = {
    "a batch script": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "a shell of salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    "a shell of salloc on a node": {**srun(0, 4, 4), "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "1"},
}


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


# -- processes -------------------------------------------------------------------------------------------------------


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


def joined_by(launcher: str, size: int, port: int) -> tuple[object, ...]:
    rank = int(os.environ["RANK"])
    env = LAUNCHERS[launcher](rank, size, size)
    if launcher == "srun":
        env |= {"SLURM_JOB_ID": str(port)}
    elif launcher == "mpirun (Open MPI)":
        env |= {"PMIX_NAMESPACE": str(port)}
    else:
        env |= {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    with alone(env):
        before = (fusedfog.rank(), fusedfog.world_size(), fusedfog.is_main())
        device = fusedfog.init(timeout=30)
        assert fusedfog.init() == device  # again: harmless
        opt = fusedfog.SGD([nn.Parameter(torch.full((3,), float(rank)))], lr=0.1, topology="fully_connected")
        mean = opt.param_groups[0]["params"][0]
        after = (fusedfog.rank(), fusedfog.world_size(), fusedfog.is_main())
        shown = {
            name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        }
        with pytest.raises(ValueError, match=r"a process group exists already, with backend .*gloo"):
            fusedfog.init("nccl")
        with pytest.warns(RuntimeWarning, match="timeout=0:01:01 changes nothing"):
            fusedfog.init(timeout=timedelta(seconds=61))
        return device.type, before, after, mean.tolist(), shown


def joined_beside_an_unknown_name(port: int) -> str:
    rank = int(os.environ["RANK"])
    env = {**srun(rank, 2, 1), "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env["SLURM_STEP_NODELIST"] = "no-such-host[1-2].invalid"
    with alone(env):
        fusedfog.init(timeout=30)
        return os.environ["MASTER_ADDR"]


def test_srun_whose_hosts_have_names_that_nobody_knows_is_joined_at_its_own_address(ranks: Pool) -> None:
    assert ranks.run(2, joined_beside_an_unknown_name, free_port(), init=False) == ["127.0.0.1"] * 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("launcher", ["srun", "mpirun (Open MPI)", "mpirun (MVAPICH)", "mpiexec (PMI)", "torchrun"])
def test_ranks_of_every_launcher_join_each_other(ranks: Pool, launcher: str) -> None:
    for rank, found in enumerate(ranks.run(2, joined_by, launcher, 2, free_port(), init=False)):
        place = (rank, 2, rank == 0)
        shown = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }
        assert found == ("cpu", place, place, [0.0, 0.0, 0.0], shown)


TRAINED = """
    import os, torch, fusedfog

    device = fusedfog.init(timeout=60)
    torch.manual_seed(fusedfog.rank())
    model = torch.nn.Linear(4, 1).to(device)
    opt = fusedfog.AdamW(model.parameters(), lr=0.1, model=model)
    for _ in range(3):
        model(torch.ones(2, 4)).square().mean().backward()
        opt.step()
    assert opt.stats()["exchanges"] == 3
    print(fusedfog.rank(), fusedfog.world_size(), os.environ["WORLD_SIZE"], repr(opt).partition(chr(10))[0])
"""


@pytest.mark.parametrize("launcher", ["mpirun (Open MPI)", pytest.param("srun", marks=pytest.mark.slow)])
def test_a_script_trains_together_without_torchrun(launcher: str) -> None:
    envs = [LAUNCHERS[launcher](rank, 2, 2) for rank in range(2)]
    for env in envs:
        env |= {"SLURM_JOB_ID": str(os.getpid())} if launcher == "srun" else {"PMIX_NAMESPACE": str(os.getpid())}
        env |= {"FUSEDFOG_LOG": "info", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda env: run_alone(TRAINED, **env), envs))
    for rank, one in enumerate(done):
        assert one.returncode == 0, one.stderr
        assert one.stdout == f"{rank} 2 2 AdamW (awc on one_peer_exponential, 2 ranks\n"
    said = "fusedfog: 2 ranks, gloo, AdamW awc on one_peer_exponential, 5 parameters in 1 bucket, 512 bytes a step"
    assert said in done[0].stderr.splitlines()
    assert "fusedfog:" not in done[1].stderr


def joined_at(url: str) -> tuple[int, int]:
    env = open_mpi(int(os.environ["RANK"]), 2, 1)  # on two hosts: it does not know the address
    with alone(env):
        fusedfog.init(init_method=url)
        return fusedfog.rank(), fusedfog.world_size()


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_init_method_says_where_the_ranks_meet(ranks: Pool, kind: str, tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{tmp_path}/meet"
    assert ranks.run(2, joined_at, url, init=False) == [(0, 2), (1, 2)]


def test_a_taken_port_is_an_error_that_says_which_variables_to_set() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        env = {**hydra(0, 2, 2), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        with (
            alone(env),
            pytest.raises(RuntimeError, match=r"cannot meet the others at tcp://127\.0\.0\.1:.*MASTER_PORT"),
        ):
            fusedfog.init()


def test_an_init_method_without_ranks_says_what_is_missing() -> None:
    with alone({}), pytest.raises(RuntimeError, match=r"nothing says which rank this is.*RANK and WORLD_SIZE"):
        fusedfog.init(init_method="tcp://127.0.0.1:1")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_world_of_one_needs_no_group(launcher: str) -> None:
    env = LAUNCHERS[launcher](0, 1, 1)
    env.pop("MASTER_ADDR", None)
    with alone(env):
        assert fusedfog.init() == torch.device("cpu")
        assert not dist.is_initialized()
        assert (fusedfog.rank(), fusedfog.world_size(), fusedfog.is_main()) == (0, 1, True)


def test_ranks_without_an_address_are_told_what_is_missing() -> None:
    with (
        alone({"RANK": "0", "WORLD_SIZE": "2"}),
        pytest.raises(RuntimeError, match="MASTER_ADDR and MASTER_PORT are missing"),
    ):
        fusedfog.init()


def test_a_helper_for_a_group_needs_one() -> None:
    with alone({}), pytest.raises(RuntimeError, match="not initialized"):
        fusedfog.rank(object())  # type: ignore[arg-type]


def on_subgroup() -> tuple[object, ...]:
    group = dist.new_group([1, 2])
    if fusedfog.rank() == 0:
        with pytest.raises(ValueError, match="not a member"):
            fusedfog.rank(group)
        return ()
    assert group is not None
    return fusedfog.rank(group), fusedfog.world_size(group), fusedfog.is_main(group)


def test_helpers_count_in_the_group_that_they_are_given(ranks: Pool) -> None:
    assert ranks.run(3, on_subgroup) == [(), (0, 2, True), (1, 2, False)]


# -- alone, and not meant to be --------------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places._Warned, "alone", False)


ALONE = {
    "mpirun (Open MPI) started this process as rank 1 of 4": open_mpi(1, 4, 4),
    "mpiexec (PMI) started this process as rank 1 of 4": hydra(1, 4, 2),
    "srun started this process as rank 1 of 4": srun(1, 4, 2),
    "the shell of a Slurm job of 4 tasks": SHELLS["a batch script"],
}


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("says", ALONE)
def test_an_optimizer_without_a_group_warns_once_that_it_trains_alone(
    says: str, recwarn: pytest.WarningsRecorder
) -> None:
    with alone(ALONE[says]):
        for kind in (fusedfog.SGD, fusedfog.AdamW):
            kind([nn.Parameter(torch.zeros(3))], lr=0.1)
        fusedfog.neighbor_allreduce(torch.zeros(3))
    found = [one for one in recwarn if issubclass(one.category, RuntimeWarning)]
    assert len(found) == 1
    assert re.search(f"{re.escape(says)}.*trains alone.*fusedfog.init\\(\\).*algorithm='local'", str(found[0].message))
    assert found[0].filename == __file__


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("env", [open_mpi(0, 1, 1), srun(0, 1, 1), {}, torchrun(0, 1, 1), *ALONE.values()])
def test_nobody_warns_those_who_are_meant_to_be_alone(env: dict[str, str], recwarn: pytest.WarningsRecorder) -> None:
    with alone(env):
        algorithm = "local" if env in ALONE.values() else "awc"
        fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, algorithm=algorithm)
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)]


def run_alone(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not VARIABLES.match(name)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_of_multiprocessing_are_warned_too() -> None:
    code = """
        import torch, fusedfog

        def work(rank):
            for _ in range(2):
                fusedfog.init()
                fusedfog.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)

        if __name__ == "__main__":
            import multiprocessing
            child = multiprocessing.get_context("fork").Process(target=work, args=(0,))
            child.start()
            child.join()
            fusedfog.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    """
    done = run_alone(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trains alone") == 1
    assert "multiprocessing started this process" in done.stderr
    assert "Set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT" in done.stderr


# -- GPUs ------------------------------------------------------------------------------------------------------------

GPUS = [
    (torchrun(1, 2, 2), 2, None, "cuda:1"),
    (torchrun(1, 4, 4), 2, None, "cpu"),
    (srun(1, 2, 2), 2, None, "cuda:1"),
    (srun(1, 2, 2), 1, "3", "cuda:0"),  # --gpus-per-task=1
    (srun(1, 2, 2), 1, None, "cpu"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, 1, None, "cuda:0"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, 2, None, "LOCAL_RANK is missing"),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 2, None, "there are 2 GPUs"),
    ({}, 2, None, "cuda:0"),
]


@pytest.mark.parametrize(("env", "count", "visible", "expected"), GPUS, ids=[str(n) for n in range(len(GPUS))])
def test_each_rank_picks_its_own_gpu(
    env: dict[str, str], count: int, visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("fusedfog.comm.join._join", lambda *everything: None)
    monkeypatch.setattr("fusedfog.comm.join.atexit.register", lambda *everything: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: None)
    given = {**env, "CUDA_VISIBLE_DEVICES": visible} if visible is not None else env
    if env:
        given = {"MASTER_ADDR": "h", "MASTER_PORT": "1", **given}
    with alone(given):
        if expected.startswith(("c",)):
            assert str(fusedfog.init()) == expected
            assert [str(device) for device in chosen] == ([expected] if expected != "cpu" else [])
        else:
            with pytest.raises(fusedfog.LaunchError, match=expected):
                fusedfog.init()
            assert chosen == []
