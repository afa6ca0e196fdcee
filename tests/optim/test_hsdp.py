"""FSDP2 inside machines, gossip across them: sharded training is unsharded training; gradients, evaluation, edits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fusedfog

# -- the same numbers -------------------------------------------------------------------------------------------------

Cases = list[tuple[str, torch.dtype, dict[str, Any]]]


def train_sharded(cases: Cases, steps: int, machines: int, by_group: bool) -> list[tuple[Trajectory, float]]:
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


def train_whole(cases: Cases, steps: int, local: int) -> list[tuple[Trajectory, float]]:
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


def train_hsdp() -> tuple[Trajectory, Trajectory]:
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


def overflow() -> tuple[float, list[Trajectory], int]:
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
    first, *remainder = model.parameters()
    opt = fusedfog.AdamW([first], lr=0.05, mesh=mesh, model=model)
    iterate(model, opt, 0, 2)
    opt.add_param_group({"params": remainder, "lr": 0.02})
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
