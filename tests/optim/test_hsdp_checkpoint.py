"""FSDP2 inside machines, gossip across them: checkpoints, and the README's script."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pool import Pool
from support.sharded import (
    UNEVEN,
    Network,
    Trajectory,
    build,
    full,
    furthest,
    iterate,
    loss_of,
    make,
    mesh_of,
    shard,
    whole,
)
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import fusedfog

SCRIPT = Path(__file__).parents[1] / "framework_scripts" / "fsdp2.py"


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    """Processes that have seen nothing of a run that is resumed in them."""
    pool = Pool()
    yield pool
    pool.close()


def states_of(model: nn.Module, opt: Any, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt, options=options)}


def dcp_save(path: str, kind: str, flat: bool, keywords: dict[str, Any]) -> Trajectory:
    mesh = mesh_of(2, 2)
    model, opt = build(kind, mesh, communicate_every=3, **keywords)
    iterate(model, opt, 0, 7)
    folder, group = f"{path}/machine{mesh.get_local_rank('replicate')}", mesh.get_group("shard")
    dcp.save(states_of(model, opt, flat), checkpoint_id=folder, process_group=group)
    iterate(model, opt, 7, 12)
    return [whole(model)]


def dcp_resume(path: str, kind: str, flat: bool, keywords: dict[str, Any]) -> Trajectory:
    mesh = mesh_of(2, 2)
    model, opt = build(kind, mesh, communicate_every=3, **keywords)
    folder, group = f"{path}/machine{mesh.get_local_rank('replicate')}", mesh.get_group("shard")
    state = states_of(model, opt, flat)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    if flat:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["optimizer"], options=options)
    else:
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert (opt.stats()["steps"], opt.stats()["exchanges"]) == (7, 2)
    iterate(model, opt, 7, 12)
    return [whole(model)]


@pytest.mark.parametrize(
    ("kind", "flat", "keywords"),
    [
        ("AdamW", False, {"wire_dtype": "int8"}),
        pytest.param("AdamW", True, {"algorithm": "atc", "amsgrad": True}, marks=pytest.mark.slow),
        pytest.param("SGD", False, {}, marks=pytest.mark.slow),
    ],
)
def test_dcp_resumes_bit_for_bit(
    ranks: Pool, others: Pool, tmp_path: Path, kind: str, flat: bool, keywords: dict[str, Any]
) -> None:
    uninterrupted = ranks.run(4, dcp_save, str(tmp_path), kind, flat, keywords)
    resumed = others.run(4, dcp_resume, str(tmp_path), kind, flat, keywords)
    for one, other in zip(uninterrupted, resumed, strict=True):
        assert furthest(one, other) == 0


def save(path: str, keywords: dict[str, Any]) -> tuple[Trajectory, dict[Any, Any], Trajectory]:
    model, opt = build("SGD", **keywords)
    iterate(model, opt, 0, 7)
    fusedfog.save_checkpoint(path, model, opt, step=7)
    saved = [whole(model)]
    states = {key: full(state["momentum_buffer"]).clone() for key, state in opt.state_dict()["state"].items()}
    iterate(model, opt, 7, 12)
    return saved, states, [whole(model)]


def load(
    path: str, keywords: dict[str, Any], machines: int, local: int, topology: Any
) -> tuple[Trajectory, dict, Trajectory]:
    model, opt = build("SGD", mesh_of(machines, local), **{**keywords, "topology": topology})
    assert fusedfog.load_checkpoint(path, model, opt) == {"step": 7}
    loaded, clock = [whole(model)], opt.state_dict()["fusedfog"]["steps"]
    assert clock == 7
    states = {key: full(state["momentum_buffer"]).clone() for key, state in opt.state_dict()["state"].items()}
    iterate(model, opt, 7, 12)
    return loaded, states, [whole(model)]


@pytest.mark.slow
def test_save_checkpoint_keeps_a_replica_per_machine(ranks: Pool, others: Pool, tmp_path: Path) -> None:
    keywords = {"momentum": 0.9, "algorithm": "push_sum", "communicate_every": 2}
    saved = ranks.run(4, save, str(tmp_path), keywords)
    machines = [saved[0], saved[2]]
    assert furthest(saved[0][0], saved[2][0]) > 1e-3
    for rank, (loaded, _, later) in enumerate(others.run(4, load, str(tmp_path), keywords, 2, 2, UNEVEN)):
        assert furthest(loaded, machines[rank // 2][0]) == 0
        assert furthest(later, machines[rank // 2][2]) == 0
    # The same machines with other numbers of ranks.
    for rank, (loaded, states, _) in enumerate(others.run(6, load, str(tmp_path), keywords, 2, 3, UNEVEN)):
        assert furthest(loaded, machines[rank // 3][0]) == 0
        assert furthest([states], [machines[rank // 3][1]]) == 0
    # Another number of machines starts from the mean, of push-sum weighed by its scalars, here 1.
    mean = {name: (value + saved[2][0][0][name]) / 2 for name, value in saved[0][0][0].items()}
    mean_states = {key: (value + saved[2][1][key]) / 2 for key, value in saved[0][1].items()}
    for loaded, states, _ in others.run(6, load, str(tmp_path), keywords, 3, 2, "ring"):
        assert furthest(loaded, [mean]) < 1e-12
        assert furthest([states], [mean_states]) < 1e-12


def save_shards(path: str) -> None:
    model, opt = build("AdamW")
    iterate(model, opt, 0, 2)
    fusedfog.save_checkpoint(path, model, opt, rank=fusedfog.rank())


def load_shards(path: str, machines: int, local: int) -> tuple[Any, str]:
    """What a rank gets back of what it gave, or what it is told; and whether anything has changed then."""
    model, opt = build("AdamW", mesh_of(machines, local), topology=UNEVEN)
    before = whole(model)
    try:
        return fusedfog.load_checkpoint(path, model, opt)["rank"], ""
    except fusedfog.CheckpointError as error:
        assert furthest([before], [whole(model)]) == 0
        return None, str(error)


def test_every_rank_of_a_machine_has_a_file_and_damage_in_any_is_told_on_all_ranks(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(4, save_shards, str(tmp_path))
    (saved,) = tmp_path.iterdir()
    assert [found for found, _ in ranks.run(4, load_shards, str(tmp_path), 2, 2)] == [0, 1, 2, 3]
    assert [found for found, _ in ranks.run(2, load_shards, str(tmp_path), 2, 1)] == [0, 2]
    last = saved / "rank-00003.safetensors"
    raw = bytearray(last.read_bytes())
    raw[-1] ^= 128
    last.write_bytes(raw)
    for machines, local in ((2, 2), (2, 1)):
        for rank, (_, told) in enumerate(ranks.run(machines * local, load_shards, str(tmp_path), machines, local)):
            assert told.startswith(
                f"rank {rank}: load_checkpoint() failed on rank {machines * local - 1}: {last} is damaged"
            )


def whole_states() -> tuple[bool, bool]:
    """Full optimizer states, of another sharded run and of torch.optim on the whole model."""
    (model, opt), (other, loaded) = build("AdamW"), build("AdamW")
    iterate(model, opt, 0, 3)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, opt, options=options), options=options)
    one, two = opt.state_dict(), loaded.state_dict()
    pairs = [(one["state"][key][name], two["state"][key][name]) for key in one["state"] for name in one["state"][key]]
    same = all(torch.equal(full(a), full(b)) for a, b in pairs) and one["fusedfog"] == two["fusedfog"]
    alone = Network()
    plain = torch.optim.AdamW(alone.parameters(), lr=0.05)
    loss_of(alone, 0, 0).backward()
    plain.step()
    loaded.load_state_dict(plain.state_dict())
    state = plain.state_dict()["state"]
    shown = loaded.state_dict()["state"]
    return same, all(torch.equal(full(shown[key]["exp_avg"]), state[key]["exp_avg"]) for key in state)


def test_whole_states_are_cut_into_shards(ranks: Pool) -> None:
    assert ranks.run(4, whole_states) == [(True, True)] * 4


def average_in_a_file(path: str) -> tuple[bool, bool]:
    model, opt = build("SGD", mesh_of(2, 2), momentum=0.9)
    iterate(model, opt, 0, 3)
    before = whole(model)
    opt.save_averaged(path, model)
    same = furthest([before], [whole(model)]) == 0
    with opt.averaged(model):
        average = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    saved = torch.load(path, weights_only=True)
    return same, all(torch.equal(saved[name], value) for name, value in average.items()) and len(saved) == len(average)


def test_the_average_of_shards_is_one_file_of_whole_tensors(ranks: Pool, tmp_path: Path) -> None:
    assert ranks.run(4, average_in_a_file, str(tmp_path / "model.pt")) == [(True, True)] * 4


def resume_hsdp(path: str, machines: int) -> tuple[Trajectory, Trajectory]:
    """FSDP alone, over all ranks: what is averaged, and what follows a resume, against what is there and would follow."""
    mesh = mesh_of(machines, 4 // machines)
    (model, opt), (other, loaded) = (
        (one, make("AdamW", one, algorithm="local")) for one in (shard(Network(), mesh), shard(Network(), mesh))
    )
    iterate(model, opt, 0, 3)
    assert opt.consensus_distance() == 0
    ours = [whole(model)]
    with opt.averaged(model):
        theirs = [whole(model)]
    fusedfog.save_checkpoint(path, model, opt)
    fusedfog.load_checkpoint(path, other, loaded)
    for one, optimizer, found in ((model, opt, ours), (other, loaded, theirs)):
        iterate(one, optimizer, 3, 5)
        found.append(whole(one))
    return ours, theirs


@pytest.mark.parametrize("machines", [1, 2])
def test_fsdp_without_gossip_is_averaged_and_resumed(ranks: Pool, tmp_path: Path, machines: int) -> None:
    for ours, theirs in ranks.run(4, resume_hsdp, str(tmp_path), machines):
        assert furthest(ours, theirs) == 0


def run_script(folder: str) -> list[str]:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two machines
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return sorted(os.listdir(folder))


@pytest.mark.slow
def test_the_readme_snippet_runs_on_two_machines(ranks: Pool, tmp_path: Path) -> None:
    files = ranks.run(4, run_script, str(tmp_path), init=False)
    assert "averaged.pt" in files[0] and "checkpoint" in files[0]
    averaged = torch.load(tmp_path / "averaged.pt")
    assert averaged["0.weight"].shape == (8, 6) and not isinstance(averaged["0.weight"], DTensor)
