"""Processes that join by the variables of every launcher, and those that are alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.launches import LAUNCHERS, SHELLS, VARIABLES, alone, hydra, open_mpi, srun, torchrun
from support.pool import Pool
from support.ports import free_port
from torch import nn

import fusedfog
from fusedfog.comm import group as places

ROOT = Path(__file__).resolve().parents[2]


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
        assert (
            one.stdout
            == f"{rank} 2 2 AdamW (awc on one_peer_exponential (auto: all ranks are on one machine), 2 ranks\n"
        )
    method = "AdamW awc on one_peer_exponential (auto: all ranks are on one machine)"
    said = f"fusedfog: 2 ranks, gloo, {method}, 5 parameters in 1 bucket, 512 bytes a step"
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
        timeout=300,
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
