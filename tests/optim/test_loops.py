"""Training loops as people write them: accumulation, clipping, GradScaler, unused parameters, mixed dtypes, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.algorithm import Outer
from fusedfog.algorithms import TABLE

TINY = 0.0005


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2)).double()


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if dist.is_initialized() else 0))
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def accumulate(fused_backward: bool) -> torch.Tensor:
    model = net()
    opt = fusedfog.AdamW(model.parameters(), lr=0.01, topology="ring", fused_backward=fused_backward, bucket_mb=TINY)
    for step in range(6):
        for micro in range(3):
            loss = model(batch(10 * step + micro)).pow(2).mean() / 3
            if fused_backward and micro < 2:
                with opt.no_sync():
                    loss.backward()
            else:
                loss.backward()
        opt.step()
        opt.zero_grad()
    return vector(model)


def test_gradient_accumulation_is_the_same_in_both_modes(ranks: Pool) -> None:
    for a, b in zip(ranks.run(4, accumulate, False), ranks.run(4, accumulate, True), strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_without_no_sync_is_an_error_under_fused_backward() -> None:
    model = net()
    fusedfog.SGD(model.parameters(), lr=0.1, algorithm="local")
    opt = fusedfog.SGD(model.parameters(), lr=0.1, fused_backward=True)
    model(batch(0)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no_sync"):
        model(batch(1)).sum().backward()
    del opt


@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_max_grad_norm_is_clip_grad_norm(max_norm: float, fused_backward: bool) -> None:
    ours, theirs = net(), net()
    opt = fusedfog.SGD(ours.parameters(), lr=0.1, max_grad_norm=max_norm, fused_backward=fused_backward, bucket_mb=TINY)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step in range(5):
        opt.zero_grad()
        ours(batch(step)).pow(2).sum().backward()
        opt.step()
        reference.zero_grad()
        theirs(batch(step)).pow(2).sum().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        reference.step()
    torch.testing.assert_close(vector(ours), vector(theirs), rtol=1e-6, atol=1e-7)


def scaled(algorithm: str, fused_backward: bool, clip: bool) -> tuple[list[torch.Tensor], dict[str, float], float]:
    model = net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    opt = fusedfog.SGD(
        model.parameters(), lr=0.05, algorithm=algorithm, topology="fully_connected", fused_backward=fused_backward
    )
    path = []
    for step in range(4):
        opt.zero_grad()
        loss = model(batch(step).float()).pow(2).mean()
        if step == 2 and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(opt)
        scaler.update()
        path.append(vector(model))
    return path, opt.stats(), scaler.get_scale()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused_backward", [False, True])
def test_a_grad_scaler_skips_the_update_of_one_rank_but_never_its_exchange(
    ranks: Pool, fused_backward: bool, clip: bool
) -> None:
    results = ranks.run(4, scaled, "awc", fused_backward, clip)
    for rank, (path, stats, scale) in enumerate(results):
        assert stats["exchanges"] == 4
        assert all(torch.isfinite(x).all() for x in path)
        assert scale == 2.0**10 / (2 if rank == 1 else 1)
    # On the complete graph every rank mixes to the mean; the rank that overflowed adds no update of its own to it.
    mean = torch.stack([path[1] for path, _, _ in results]).mean(0)
    torch.testing.assert_close(results[1][0][2], mean, rtol=1e-6, atol=1e-7)
    assert (results[0][0][2] - mean).abs().max() > 1e-4


def test_allreduce_skips_on_all_ranks_if_one_overflows(ranks: Pool) -> None:
    for path, _, _ in ranks.run(4, scaled, "allreduce", False, False):
        assert torch.equal(path[1], path[2])
        assert torch.isfinite(path[3]).all()


def branches(algorithm: str, fused_backward: bool) -> tuple[torch.Tensor, list[int]]:
    # Rank-dependent branches: even ranks use one head, odd ranks the other; one parameter is frozen, one never used.
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(6, 2) for _ in range(3)]).double()
    heads[1].bias.requires_grad_(False)
    opt = fusedfog.Adam(
        heads.parameters(), lr=0.01, algorithm=algorithm, topology="ring", fused_backward=fused_backward, bucket_mb=1e-4
    )
    for step in range(5):
        opt.zero_grad()
        heads[dist.get_rank() % 2](batch(step)).pow(2).mean().backward()
        opt.step()
    return vector(heads), sorted(opt.state_dict()["state"])


@pytest.mark.parametrize("algorithm", ["awc", "atc", "allreduce"])
def test_unused_frozen_and_rank_dependent_parameters(ranks: Pool, algorithm: str) -> None:
    step_mode = ranks.run(4, branches, algorithm, False)
    hooks = ranks.run(4, branches, algorithm, True)
    for rank, ((a, states), (b, _)) in enumerate(zip(step_mode, hooks, strict=True)):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
        used = [0, 1, 2] if algorithm == "allreduce" else [[0, 1], [2]][rank % 2]
        assert states == used


def mixed_dtypes() -> tuple[list[torch.dtype], float]:
    torch.manual_seed(dist.get_rank())
    model = nn.ModuleList(
        [nn.Linear(6, 6).bfloat16(), nn.Linear(6, 6), nn.Linear(6, 6).double(), nn.Linear(6, 6).half()]
    )
    opt = fusedfog.SGD(model.parameters(), lr=0.0, topology="fully_connected", sync_init=False)
    opt.step()
    return [p.dtype for p in model.parameters()], opt.consensus_distance()


def test_a_model_of_several_dtypes_mixes_each_in_its_own(ranks: Pool) -> None:
    for dtypes, distance in ranks.run(4, mixed_dtypes):
        assert dtypes == [d for d in (torch.bfloat16, torch.float32, torch.float64, torch.float16) for _ in range(2)]
        assert distance < 0.05


def unmixed_group() -> tuple[float, float]:
    mixed, own = nn.Parameter(torch.full((5,), float(dist.get_rank()))), nn.Parameter(torch.ones(5))
    opt = fusedfog.SGD(
        [{"params": [mixed]}, {"params": [own], "mix": False}], lr=0.1, topology="fully_connected", sync_init=False
    )
    own.grad = torch.full((5,), float(dist.get_rank()))
    opt.step()
    return mixed[0].item(), own[0].item()


def test_a_group_with_mix_false_is_updated_and_never_communicated(ranks: Pool) -> None:
    results = ranks.run(4, unmixed_group)
    assert [m for m, _ in results] == [1.5] * 4
    assert [o for _, o in results] == pytest.approx([1.0, 0.9, 0.8, 0.7])


def resume(
    kind: str, algorithm: str, fused_backward: bool, keywords: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    def make() -> tuple[nn.Module, Any]:
        model = net()
        return model, getattr(fusedfog, kind)(
            model.parameters(),
            lr=0.02,
            algorithm=algorithm,
            fused_backward=fused_backward,
            bucket_mb=TINY,
            **keywords,
        )

    def run(model: nn.Module, opt: Any, first: int, last: int) -> None:
        for step in range(first, last):
            for group in opt.param_groups:
                group["lr"] = 0.02 / (1 + step // 7)
            opt.zero_grad()
            model(batch(step)).pow(2).mean().backward()
            opt.step()

    model, opt = make()
    run(model, opt, 0, 20)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    run(model, opt, 20, 40)
    again, resumed = make()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, 20, 40)
    return vector(model), vector(again)


RESUMED = [
    (kind, name)
    for family, kinds in (("SGD", ["SGD"]), ("Adam", ["Adam", "AdamW"]), ("AccumAdam", ["AccumAdamW"]))
    for name in TABLE[family]
    for kind in kinds[:: 1 if name == "awc" else -1][:1]
]
"""Every algorithm of every family once."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize(("kind", "algorithm"), RESUMED)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    ranks: Pool, kind: str, algorithm: str, fused_backward: bool
) -> None:
    keywords: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" and algorithm != "gradient_tracking" else {}
    if algorithm in ("awc", "atc", "push_sum", "momentum_tracking"):
        keywords |= {"communicate_every": 2, "topology": "one_peer_exponential"}
    for one, other in ranks.run(4, resume, kind, algorithm, fused_backward, keywords):
        assert torch.equal(one, other)


def test_an_outer_optimizer_resumes_bit_for_bit(ranks: Pool) -> None:
    for one, other in ranks.run(4, resume, "SGD", "local", False, {"outer": Outer(every=3), "topology": "ring"}):
        assert torch.equal(one, other)


def load_before_the_first_step() -> float:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.0, algorithm="local", outer=Outer(every=2), topology="ring")
    start = vector(model)
    opt.load_state_dict(opt.state_dict())
    for _ in range(4):
        opt.step()
    return (vector(model) - start).abs().max().item()


def test_an_outer_optimizer_may_be_loaded_before_it_has_stepped(ranks: Pool) -> None:
    assert max(ranks.run(4, load_before_the_first_step)) < 1e-12


def extra_forwards() -> float:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="one_peer_exponential")
    for step in range(6):
        opt.zero_grad()
        for _ in range(dist.get_rank()):
            model(batch(step))
        model(batch(step)).pow(2).mean().backward()
        opt.step()
    return opt.consensus_distance()


def test_extra_forwards_on_some_ranks_do_not_de_phase_the_topology(ranks: Pool) -> None:
    assert len(set(ranks.run(4, extra_forwards))) == 1


def test_a_tied_and_twice_used_weight_is_updated_once_under_fused_backward() -> None:
    torch.manual_seed(0)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        one, two = nn.Linear(5, 5), nn.Linear(5, 5)
        two.weight = one.weight
        nets.append(nn.Sequential(one, two, one))
    ours, theirs = nets
    opt = fusedfog.SGD(ours.parameters(), lr=0.1, fused_backward=True, bucket_mb=1e-4)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for o, n in ((opt, ours), (reference, theirs)):
        for _ in range(3):
            o.zero_grad()
            n(torch.ones(2, 5)).pow(2).sum().backward()
            o.step()
    torch.testing.assert_close(vector(ours), vector(theirs), rtol=1e-6, atol=1e-7)
