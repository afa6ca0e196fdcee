"""FSDP2 inside machines, gossip across them: sharded training is unsharded training; evaluation, checkpoints, refusals."""

from __future__ import annotations

import copy
import os
import re
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedfog
from fusedfog.topology import from_matrix

SCRIPT = Path(__file__).parent / "framework_scripts" / "fsdp2.py"
TINY = 2e-4
"""MB; a parameter or two is a bucket."""
UNEVEN = from_matrix([[0.7, 0.3], [0.3, 0.7]])
"""Two machines that do not reach consensus in one step."""

Path_ = list[dict[str, Tensor]]


class Network(nn.Module):
    """Shapes that two shards split evenly, unevenly, and so that the second is empty; one parameter is never used."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second, self.last = nn.Linear(6, 11), nn.Linear(11, 8), nn.Linear(8, 1)
        self.scale, self.unused = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(3, 2))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * torch.tanh(self.second(torch.tanh(self.first(x)))))


def mesh_of(machines: int, local: int) -> DeviceMesh:
    return init_device_mesh("cpu", (machines, local), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in list(model.children())[:2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: nn.Module, step: int, member: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + member)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return (model(x.to(dtype)) - (x.sum(1, keepdim=True) * (1 + member)).to(dtype)).square().mean()


def iterate(model: nn.Module, opt: Any, first: int, last: int, dtype: torch.dtype = torch.float64) -> None:
    for step in range(first, last):
        opt.zero_grad()
        loss_of(model, step, dist.get_rank(), dtype).backward()
        opt.step()


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(value.detach()).clone() for name, value in model.state_dict().items()}


def furthest(one: Path_, other: Path_) -> float:
    pairs = zip(one, other, strict=True)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a)


def make(kind: str, model: nn.Module, **keywords: Any) -> Any:
    options = {"lr": 0.05, "topology": UNEVEN, "bucket_mb": TINY, **keywords}
    return getattr(fusedfog, kind)(model.parameters(), **options)


def build(kind: str, mesh: DeviceMesh | None = None, **keywords: Any) -> tuple[nn.Module, Any]:
    mesh = mesh or mesh_of(2, dist.get_world_size() // 2)
    model = shard(Network(keywords.pop("dtype", torch.float64)), mesh["shard"])
    return model, make(kind, model, mesh=mesh, **keywords)


# -- the same numbers -------------------------------------------------------------------------------------------------

Cases = list[tuple[str, torch.dtype, dict[str, Any]]]


def train_sharded(cases: Cases, steps: int, machines: int, by_group: bool) -> list[tuple[Path_, float]]:
    mesh = mesh_of(machines, dist.get_world_size() // machines)
    where = {"group": mesh.get_group("replicate")} if by_group else {"mesh": mesh}
    results = []
    for kind, dtype, keywords in cases:
        model = shard(Network(dtype), mesh["shard"])
        opt = make(kind, model, **where, **keywords)
        path = []
        for step in range(steps):
            iterate(model, opt, step, step + 1, dtype)
            if step % 4 == 3 or step == steps - 1:
                path.append(whole(model))
        results.append((path, opt.consensus_distance()))
    return results


def train_whole(cases: Cases, steps: int, local: int) -> list[tuple[Path_, float]]:
    """Each rank is a machine: it owns the whole model and averages the gradients of the machine's batches."""
    results = []
    for kind, dtype, keywords in cases:
        model = Network(dtype)
        opt = make(kind, model, **keywords)
        path = []
        for step in range(steps):
            opt.zero_grad()
            for member in range(local):
                (loss_of(model, step, local * dist.get_rank() + member, dtype) / local).backward()
            opt.step()
            if step % 4 == 3 or step == steps - 1:
                path.append(whole(model))
        results.append((path, opt.consensus_distance()))
    return results


def check_equal(ranks: Pool, cases: Cases, steps: int, machines: int = 2, by_group: bool = False) -> None:
    sharded = ranks.run(2 * machines, train_sharded, cases, steps, machines, by_group)
    unsharded = ranks.run(machines, train_whole, cases, steps, 2)
    for number, (kind, dtype, keywords) in enumerate(cases):
        near = 1e-12 if dtype == torch.float64 else 1e-6
        for rank in range(2 * machines):
            (path, distance), (wanted, wanted_distance) = sharded[rank][number], unsharded[rank // 2][number]
            assert furthest(path, wanted) < near, (kind, keywords)
            assert distance == pytest.approx(wanted_distance, rel=1e-5, abs=near)
        apart = furthest(sharded[0][number][0], sharded[2][number][0])
        assert (apart > 1e-3) == (keywords["algorithm"] != "allreduce"), (kind, keywords, apart)


@pytest.mark.parametrize(
    ("kind", "extra", "algorithm"),
    [
        ("SGD", {"momentum": 0.9}, "awc"),
        ("AdamW", {"weight_decay": 0.1}, "atc"),
        pytest.param("SGD", {"momentum": 0.9}, "atc", marks=pytest.mark.slow),
        pytest.param("AdamW", {"weight_decay": 0.1}, "awc", marks=pytest.mark.slow),
    ],
)
def test_sharded_training_is_unsharded_training(ranks: Pool, kind: str, extra: dict[str, Any], algorithm: str) -> None:
    keywords = {"algorithm": algorithm, "max_grad_norm": 0.5, **extra}
    cases = [(kind, dtype, keywords) for dtype in (torch.float64, torch.float32)]
    check_equal(ranks, cases, steps=12, by_group=algorithm == "atc")


@pytest.mark.slow
def test_more_machines_on_a_time_varying_graph(ranks: Pool) -> None:
    keywords = {"topology": "base_graph", "momentum": 0.9, "communicate_every": 2, "global_average_every": 5}
    check_equal(ranks, [("SGD", torch.float64, {"algorithm": "awc", **keywords})], steps=6, machines=3)


@pytest.mark.slow
def test_other_methods_are_the_unsharded_ones_too(ranks: Pool) -> None:
    cases = [
        ("SGD", {"algorithm": "gradient_tracking"}),
        ("SGD", {"algorithm": "push_sum", "momentum": 0.9, "communicate_every": 2}),
        ("AdamW", {"algorithm": "quasi_global"}),  # takes a norm over the whole replica
        ("AdamW", {"algorithm": "allreduce", "max_grad_norm": 0.5}),
        ("AdamW", {"algorithm": "local", "max_grad_norm": 0.5}),
        ("SGD", {"algorithm": "local", "outer": fusedfog.Outer(every=2)}),
        ("AdamW", {"algorithm": "awc", "wire_dtype": "bf16"}),
        ("AccumAdamW", {"algorithm": "atc", "accum_steps": 2}),
    ]
    check_equal(ranks, [(kind, torch.float64, keywords) for kind, keywords in cases], steps=5)


def train_hsdp() -> tuple[Path_, Path_]:
    """FSDP's own HSDP without gossip, and the mean gradient over machines of shards inside them."""
    mesh = mesh_of(2, 2)
    options = {"max_grad_norm": 0.5}
    one = shard(Network(), mesh)
    iterate(one, make("AdamW", one, algorithm="local", **options), 0, 4)
    other, opt = build("AdamW", mesh, algorithm="allreduce", **options)
    iterate(other, opt, 0, 4)
    return [whole(one)], [whole(other)]


def test_hsdp_with_local_is_allreduce(ranks: Pool) -> None:
    for one, other in ranks.run(4, train_hsdp):
        assert furthest(one, other) < 1e-12


def resume_hsdp(path: str, machines: int) -> tuple[Path_, Path_]:
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


# -- gradients --------------------------------------------------------------------------------------------------------


def clipped_by_torch() -> tuple[float, float]:
    paths = []
    for limit in (None, 0.5):
        model, opt = build("SGD", max_grad_norm=limit)
        loss_of(model, 0, dist.get_rank()).backward()
        if limit is None:
            norm = full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item()
        opt.step()
        paths.append([whole(model)])
    return norm, furthest(*paths)


def test_max_grad_norm_clips_as_torch_does(ranks: Pool) -> None:
    results = ranks.run(4, clipped_by_torch)
    assert results[0][0] == results[1][0] != results[2][0] == results[3][0] > 1
    assert all(distance < 1e-9 for _, distance in results)  # the factor is fp32


def overflow() -> tuple[float, list[Path_], int]:
    model, opt = build("SGD", dtype=torch.float32, lr=0.01, algorithm="atc")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    path = [[whole(model)]]
    for step in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(model, step, dist.get_rank(), torch.float32)).backward()
        if step == 1 and dist.get_rank() == 1:
            model.first.weight.grad._local_tensor[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        path.append([whole(model)])
    return scaler.get_scale(), path, opt.stats()["exchanges"]


def test_an_overflow_in_one_shard_skips_its_whole_replica_and_no_exchange(ranks: Pool) -> None:
    results = ranks.run(4, overflow)
    assert [scale for scale, _, _ in results] == [512.0, 512.0, 1024.0, 1024.0]
    for _, path, exchanges in results:
        assert exchanges == 3
        assert all(value.isfinite().all() for value in path[-1][0].values())
    (first,), (second,) = results[0][1][1:3]
    (others,) = results[2][1][1]
    # Machine 0 only mixed, with what machine 1 had made of its parameters in that step.
    (others_second,) = results[2][1][2]
    for name in first:
        updated = (others_second[name] - 0.3 * first[name]) / 0.7
        torch.testing.assert_close(second[name], 0.7 * first[name] + 0.3 * updated, rtol=1e-4, atol=1e-5)
    assert furthest([others], [others_second]) > 1e-3


def accumulate() -> float:
    paths = []
    for apart in (True, False):
        model, opt = build("AdamW")
        model.set_requires_gradient_sync(apart)
        loss_of(model, 0, dist.get_rank()).backward()
        model.set_requires_gradient_sync(True)
        loss_of(model, 1, dist.get_rank()).backward()
        opt.step()
        paths.append([whole(model)])
    return furthest(*paths)


@pytest.mark.slow
def test_accumulation_with_and_without_reductions(ranks: Pool) -> None:
    assert max(ranks.run(4, accumulate)) < 1e-12


def wrapped() -> float:
    """`Decentralized` around torch's AdamW on DTensors, against the fused one."""
    furthest_yet = 0.0
    for algorithm in ("awc", "atc"):
        model, opt = build("AdamW", algorithm=algorithm, max_grad_norm=0.5)
        other = shard(Network(), mesh_of(2, 2)["shard"])
        keywords = {"algorithm": algorithm, "max_grad_norm": 0.5, "topology": UNEVEN, "mesh": mesh_of(2, 2)}
        around = fusedfog.Decentralized(torch.optim.AdamW(other.parameters(), lr=0.05), **keywords)
        iterate(model, opt, 0, 4)
        iterate(other, around, 0, 2)
        around.load_state_dict(copy.deepcopy(around.state_dict()))
        assert around.stats()["steps"] == 2
        iterate(other, around, 2, 4)
        furthest_yet = max(furthest_yet, furthest([whole(model)], [whole(other)]))
    return furthest_yet


@pytest.mark.slow
def test_any_torch_optimizer_on_shards(ranks: Pool) -> None:
    assert max(ranks.run(4, wrapped)) < 1e-12


def low_precision() -> list[float]:
    losses = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype, way in ((torch.float32, None), (torch.bfloat16, "master"), (torch.bfloat16, "stochastic")):
        mesh, model = mesh_of(2, 2), Network(dtype)
        fully_shard(model, mesh=mesh["shard"], mp_policy=policy if way is None else MixedPrecisionPolicy())
        opt = make("AdamW", model, mesh=mesh, low_precision=way, wire_dtype=None)
        iterate(model, opt, 0, 1, torch.bfloat16)
        before = loss_of(model, 0, dist.get_rank(), torch.bfloat16).item()
        iterate(model, opt, 1, 15, torch.bfloat16)
        losses.append(loss_of(model, 0, dist.get_rank(), torch.bfloat16).item() / before)
    return losses


@pytest.mark.slow
def test_mixed_precision_and_16_bit_parameters(ranks: Pool) -> None:
    assert max(max(losses) for losses in ranks.run(4, low_precision)) < 0.9


# -- evaluation and edits ---------------------------------------------------------------------------------------------


def evaluate() -> tuple[dict[str, Tensor], dict[str, Tensor], float, bool]:
    """With all parameters in FSDP's root, which stays gathered after a forward without backward."""
    mesh = mesh_of(2, 2)
    model = fully_shard(Network(), mesh=mesh["shard"])
    opt = make("SGD", model, mesh=mesh)
    iterate(model, opt, 0, 3)
    with torch.no_grad():
        before = loss_of(model, 0, 0).item()
    with opt.averaged():
        with torch.no_grad():
            inside = loss_of(model, 0, 0).item()
        average = whole(model)
        with torch.no_grad():
            model(torch.ones(1, 6, dtype=torch.float64))
    with torch.no_grad():
        restored = loss_of(model, 0, 0).item() == before
    # A step between two forwards without backward must not leave FSDP with what it gathered for the first.
    opt.step()
    with torch.no_grad():
        stepped = loss_of(model, 0, 0).item()
    alone = Network()
    alone.load_state_dict(whole(model))
    assert stepped == pytest.approx(loss_of(alone, 0, 0).item(), rel=1e-12) != before
    model.reshard()
    return whole(model), average, inside, restored


def test_averaged_holds_the_mean_of_all_machines_and_the_model_uses_it(ranks: Pool) -> None:
    results = ranks.run(4, evaluate)
    alone = Network()
    alone.load_state_dict(results[0][1])
    for _, average, inside, restored in results:
        assert furthest([average], [results[0][1]]) == 0
        assert inside == pytest.approx(loss_of(alone, 0, 0).item(), rel=1e-12)
        assert restored
    assert furthest([results[0][0]], [results[2][0]]) > 1e-3


def edit() -> tuple[list[int], list[str], float]:
    model, opt = build("AdamW")
    iterate(model, opt, 0, 1)
    counts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for pauses in (True, False):
            if pauses:
                with opt.paused(), torch.no_grad():
                    model.first.weight.mul_(0.9)
            else:
                with torch.no_grad():
                    model.first.weight.mul_(0.9)
            iterate(model, opt, 1, 2)
            counts.append(opt.stats()["torn_messages"])
    model.to(torch.float64).load_state_dict(model.state_dict())  # which changes nothing, and moves nothing
    opt.drain()
    iterate(model, opt, 2, 3)
    with opt.paused(), torch.no_grad():
        model.to(torch.float32)
    with pytest.raises(fusedfog.StorageReplacedError, match="was given a new storage"):
        opt.step()
    return counts, [str(one.message) for one in caught if "torn" in str(one.message)], opt.stats()["steps"]


def test_edits_are_seen_on_the_dtensor(ranks: Pool) -> None:
    for counts, texts, steps in ranks.run(4, edit):
        assert counts == [0, 1] and len(texts) == 1 and steps == 4


def grow() -> tuple[int, float, str]:
    mesh = mesh_of(2, 2)
    model = shard(Network(), mesh["shard"])
    first, *rest = model.parameters()
    opt = fusedfog.AdamW([first], lr=0.05, mesh=mesh, model=model)
    iterate(model, opt, 0, 2)
    opt.add_param_group({"params": rest, "lr": 0.02})
    iterate(model, opt, 2, 4)
    try:
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    except ValueError as error:
        return len(opt.state_dict()["state"]), opt.consensus_distance(), str(error)
    return 0, 0.0, ""


@pytest.mark.slow
def test_groups_may_be_added_if_they_are_sharded_alike(ranks: Pool) -> None:
    for states, distance, text in ranks.run(4, grow):
        assert states == 8 and distance > 1e-3 and "not sharded as" in text


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    """Processes that have seen nothing of a run that is resumed in them."""
    pool = Pool()
    yield pool
    pool.close()


def states_of(model: nn.Module, opt: Any, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt, options=options)}


def dcp_save(path: str, kind: str, flat: bool, keywords: dict[str, Any]) -> Path_:
    mesh = mesh_of(2, 2)
    model, opt = build(kind, mesh, communicate_every=3, **keywords)
    iterate(model, opt, 0, 7)
    folder, group = f"{path}/machine{mesh.get_local_rank('replicate')}", mesh.get_group("shard")
    dcp.save(states_of(model, opt, flat), checkpoint_id=folder, process_group=group)
    iterate(model, opt, 7, 12)
    return [whole(model)]


def dcp_resume(path: str, kind: str, flat: bool, keywords: dict[str, Any]) -> Path_:
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


def save(path: str, keywords: dict[str, Any]) -> tuple[Path_, dict[Any, Any], Path_]:
    model, opt = build("SGD", **keywords)
    iterate(model, opt, 0, 7)
    fusedfog.save_checkpoint(path, model, opt, step=7)
    saved = [whole(model)]
    states = {key: full(state["momentum_buffer"]).clone() for key, state in opt.state_dict()["state"].items()}
    iterate(model, opt, 7, 12)
    return saved, states, [whole(model)]


def load(path: str, keywords: dict[str, Any], machines: int, local: int, topology: Any) -> tuple[Path_, dict, Path_]:
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


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    rank, inside = dist.get_rank(), mesh["shard"]
    one = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    grid = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("replicate", "shard"))
    crossed = [dist.new_group(members) for members in ([0, 3], [1, 2])]

    def of(where: DeviceMesh, change: Callable[[nn.Module], Any] | None = None, **keywords: Any) -> Callable[[], Any]:
        def attempt() -> Any:
            model = Network()
            if change is not None:
                change(model)
            return make("AdamW", shard(model, where), **keywords)

        return attempt

    def gathered() -> Any:
        model = fully_shard(Network(), mesh=inside)
        with torch.no_grad():
            loss_of(model, 0, 0)
        return make("AdamW", model, mesh=mesh)

    def cut(dim: int) -> Any:
        model = fully_shard(nn.Linear(6, 6), mesh=inside, shard_placement_fn=lambda p: Shard(dim if p.ndim == 2 else 0))
        return make("AdamW", model, group=mesh.get_group("replicate"))

    def tensors(*placed: tuple[DeviceMesh, Any]) -> Any:
        params = [nn.Parameter(distribute_tensor(torch.zeros(4, 4), where, [how])) for where, how in placed]
        return fusedfog.SGD(params, mesh=mesh)

    def mixed() -> Any:
        sharded = shard(Network(), inside).parameters()
        return fusedfog.SGD([*sharded, nn.Parameter(torch.zeros(2, dtype=torch.float64))], mesh=mesh)

    def narrower(model: nn.Module) -> None:
        # Both shards of 10 rows are as large as those of 9 rows in place 0.
        model.first = nn.Linear(6, 10 if rank >= 2 else 9).double()

    return {
        "hsdp": of(mesh, mesh=mesh),
        "hsdp by group": of(mesh, group=mesh.get_group("replicate")),
        "no mesh": of(inside),
        "group of shards": of(inside, group=mesh.get_group("shard")),
        "sharded over all": of(one["shard"], mesh=mesh),
        "one machine": of(one["shard"], mesh=one),
        "one machine by group": of(one["shard"], group=one.get_group("replicate")),
        "averages without a mesh": lambda: of(inside, algorithm="local")().consensus_distance(),
        "fused_backward": of(inside, mesh=mesh, fused_backward=True),
        "capturable": of(inside, mesh=mesh, capturable=True),
        "three dimensions": of(inside, mesh=init_device_mesh("cpu", (2, 2, 1))),
        "topology of ranks": of(inside, mesh=mesh, topology=fusedfog.topology.ring(4)),
        "plain among them": mixed,
        "gathered": gathered,
        "replicated": lambda: tensors((inside, Replicate())),
        "two meshes": lambda: tensors((inside, Shard(0)), (one["shard"], Shard(0))),
        "other order": of(inside, mesh=grid),
        "crossed": of(inside, group=crossed[rank in (1, 2)]),
        "other shapes": of(inside, narrower, mesh=mesh),
        "other shapes by group": of(inside, narrower, group=mesh.get_group("replicate")),
        "other dim": lambda: cut(1 if rank >= 2 else 0),
        "other rate": of(inside, mesh=mesh, lr=0.1 if rank == 1 else 0.2),
        "copy": lambda: copy.deepcopy(of(inside, mesh=mesh)()),
    }


WORDS = {
    "hsdp": "ValueError.*HSDP.*averages gradients.*algorithm='local'",
    "hsdp by group": "ValueError.*HSDP",
    "no mesh": r"ValueError.*hold the shards of one replica.*fully_shard\(model, mesh=mesh\[.shard.\]\) and mesh=mesh",
    "group of shards": "ValueError.*hold the shards of one replica",
    "sharded over all": "ValueError.*hold the shards of one replica",
    "one machine": "ValueError.*no other replica.*algorithm='local'",
    "one machine by group": "ValueError.*no other replica",
    "averages without a mesh": "ValueError.*hold the shards of one replica",
    "fused_backward": "ValueError.*fused_backward does not work on FSDP2",
    "capturable": "ValueError.*capturable does not work on FSDP2",
    "three dimensions": "ValueError.*mesh must have two dimensions",
    "topology of ranks": "ValueError.*is for 4 ranks but the group has 2",
    "plain among them": "ValueError.*parameter 8 is a plain tensor",
    "gathered": r"ValueError.*call model.reshard\(\)",
    "replicated": "ValueError.*sharded along one dimension",
    "two meshes": "ValueError.*sharded over the same ranks",
    "other order": r"MismatchError.*order of shards along mesh is \[1, 0\] on rank 2",
    "crossed": "MismatchError.*place is shard",
    "other shapes": r"MismatchError.*\(10, 6\).* on rank 2 but shape \(9, 6\)",
    "other shapes by group": r"MismatchError.*\(10, 6\).* on rank 1 but shape \(9, 6\)",
    "other dim": "MismatchError.*sharded on dim 1 on rank 1 but .* sharded on dim 0",
    "other rate": "MismatchError.*lr of group 0 is 0.1 on rank 1",
    "copy": "TypeError.*cannot be pickled",
}


def attempt_all() -> dict[str, str]:
    said = {}
    for name, attempt in refused(mesh_of(2, 2)).items():
        try:
            attempt()
            said[name] = "nothing"
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def said(ranks: Pool) -> list[dict[str, str]]:
    return ranks.run(4, attempt_all)


@pytest.mark.parametrize("name", WORDS)
def test_bad_input_is_named_on_every_rank(said: list[dict[str, str]], name: str) -> None:
    assert set(said[0]) == set(WORDS)
    for texts in said:
        assert re.match(WORDS[name], texts[name]), texts[name]


# -- the README -------------------------------------------------------------------------------------------------------


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
