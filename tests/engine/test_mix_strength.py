"""mix_strength: real ranks against dense recursions with W_t = I + s_t (W - I), whichever way messages go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import oracle, problems
from support.pool import Pool
from support.recursion import trained, w_of
from support.training import QuadraticLoss, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import Outer, topology
from fusedfog.engine import passes

STEPS = 60


def schedule(base: float) -> list[float]:
    """From zero (two steps of lr = 0) up, with a drop by four and another one."""
    return [base * min(max(t - 1, 0) / 8, 1.0) * (1.0 if t < 25 else 0.25 if t < 45 else 0.1) for t in range(STEPS)]


def fading(step: int) -> float:
    return 0.0 if step % 7 == 3 else 1.0 / (1.0 + 0.1 * step)


def as_rate(step: int, rate: float, power: float = 0.5) -> float:
    return rate**power if step else 0.9


def strength_at(given: Any, rates: list[float]) -> float | Callable[[int], float]:
    """s, of each step if it changes, from the schedule: the rate is lr over the largest so far, and 1 while that is zero."""
    if given is fading:
        return fading
    if given is as_rate:
        tops = [max(rates[: t + 1]) for t in range(len(rates))]
        return lambda t: 0.9 if t == 0 else (rates[t] / tops[t] if tops[t] else 1.0) ** 0.5
    return given


def sgd(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return options, {"rule": oracle.SGD(**options)}


def same(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return options, options


def adamw(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return options, {"rule": oracle.Adam(**options, decoupled=True)}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# optimizer, algorithm, topology, strength, (optimizer's options, oracle's options), oracle recursion, fused_backward
CASES: list[Any] = [
    ("SGD", "awc", "one_peer_exponential", as_rate, sgd(momentum=0.9, weight_decay=0.1), oracle.awc, False),
    ("SGD", "awc", "ring", 0.3, sgd(momentum=0.8, nesterov=True), oracle.awc, True),
    ("SGD", "awc", "exponential", fading, sgd(), oracle.awc, True),
    ("SGD", "atc", "exponential", as_rate, sgd(momentum=0.9), oracle.atc, True),
    ("AdamW", "awc", "ring", as_rate, adamw(weight_decay=0.1), oracle.awc, False),
    ("SGD", "momentum_tracking", "one_peer_exponential", as_rate, same(momentum=0.8), oracle.momentum_tracking_engine, False),
    ("SGD", "exact_diffusion", "ring", 0.6, sgd(momentum=0.5), oracle.exact_diffusion, False),
    slow("AdamW", "atc", "one_peer_exponential", fading, adamw(weight_decay=0.1), oracle.atc, True),
    slow("SGD", "quasi_global", "one_peer_exponential", fading, same(momentum=0.9), oracle.quasi_global, True),
    slow("SGD", "gradient_tracking", "exponential", fading, same(), oracle.momentum_tracking_engine, True),
    slow("SGD", "decentlam", "ring", 0.4, same(momentum=0.9), oracle.decentlam, True),
    slow("SGD", "extra", "ring", 0.6, sgd(), oracle.extra, False),
    slow("SGD", "extra", "ring", 0.0, sgd(momentum=0.5), oracle.extra_one_state, True),
    slow("AdamW", "dag", "ring", as_rate, adamw(weight_decay=0.1), oracle.dag_adam, False),
    slow("AdamW", "quasi_global", "ring", fading, adamw(weight_decay=0.1), oracle.quasi_global_adam, False),
    slow("AdamW", "gradient_tracking", "exponential", as_rate, adamw(weight_decay=0.1), oracle.gt_adam, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "algorithm", "graph", "strength", "options", "recursion", "fused_backward"),
    CASES,
    ids=lambda v: getattr(v, "__name__", None),
)
def test_ranks_equal_the_dense_recursion(
    ranks: Pool,
    kind: str,
    algorithm: str,
    graph: str,
    strength: Any,
    options: Any,
    recursion: Callable[..., np.ndarray],
    fused_backward: bool,
) -> None:
    rates = schedule(0.04 if kind == "SGD" else 0.01)
    given, for_oracle = options
    problem, x0, got = trained(
        ranks, 4, 13, kind, rates,
        algorithm=algorithm, topology=graph, mix_strength=strength, fused_backward=fused_backward, **given,
    )  # fmt: skip
    w, s = w_of(graph, 4), strength_at(strength, rates)
    want = recursion(problem, oracle.strengthened(w, s), x0, rates.__getitem__, STEPS, **for_oracle)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    if strength != 0:
        full = recursion(problem, w, x0, rates.__getitem__, STEPS, **for_oracle)
        assert np.abs(want - full).max() > 1e-3, "the strength made no difference"


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_steps_are_counted_and_not_exchanges_and_averages_over_all_ranks_are_weaker_too(
    ranks: Pool, algorithm: str
) -> None:
    rates = schedule(0.04)
    problem, x0, got = trained(
        ranks, 4, 13, "SGD", rates, algorithm=algorithm, topology="one_peer_exponential",
        communicate_every=2, global_average_every=5, mix_strength=fading,
    )  # fmt: skip
    w = oracle.rhythm(oracle.one_peer_exponential(4), every=2, average_every=5)
    want = getattr(oracle, algorithm)(problem, oracle.strengthened(w, fading), x0, rates.__getitem__, STEPS)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_on_a_mesh_w_is_that_of_all_ranks(ranks: Pool) -> None:
    rates = schedule(0.04)
    problem = problems.least_squares(4, 13, 26, seed=4)
    x0 = problems.start(4, 13)
    paths = ranks.run(4, train_on_mesh, problem.hessians, problem.linear, x0, rates)
    w = np.kron(np.array([[0.5, 0.5], [0.5, 0.5]]), np.full((2, 2), 0.5))
    s = strength_at(as_rate, rates)
    want = oracle.awc(problem, oracle.strengthened(w, s), x0, rates.__getitem__, STEPS)
    np.testing.assert_allclose(np.stack(paths, axis=1), want, rtol=1e-11, atol=1e-11)


def train_on_mesh(hessians: np.ndarray, linear: np.ndarray, x0: np.ndarray, rates: list[float]) -> np.ndarray:
    mesh = init_device_mesh("cpu", (2, 2))
    return train(
        "SGD", hessians, linear, x0, rates, mesh=mesh, inside="parameters", topology="ring", mix_strength=as_rate
    )


def test_an_outer_step_mixes_with_the_strength_of_its_step(ranks: Pool) -> None:
    rates, graph = [0.05] * 40, topology.random_matching(4, 3)
    problem = problems.least_squares(4, 13, 26, seed=4)
    x0 = problems.start(4, 13, equal=True)
    got = ranks.run(
        4, train, "SGD", problem.hessians, problem.linear, x0, rates, algorithm="local",
        outer=Outer(every=5, lr=0.7, momentum=0.5), topology=graph, mix_strength=fading,
    )  # fmt: skip
    w = oracle.strengthened(graph.matrix, lambda k: fading(5 * k + 4))
    want = oracle.with_outer(problem, x0, 0.05, 40, 5, oracle.NoLoCo(w, 0.7, 0.5))
    np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-10, atol=1e-10)


# -- compressed messages -----------------------------------------------------------------------------------------------


def falling(step: int) -> float:
    return 1.0 if step < 40 else 0.3 if step < 70 else 0.6


@pytest.mark.parametrize("algorithm", ["awc", pytest.param("atc", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_compressed_messages_lead_where_the_last_strength_leads(ranks: Pool, algorithm: str, form: str) -> None:
    """Were the strength in the sum of differences, earlier ones would stay in it."""
    problem = problems.least_squares(4, 6, 12, seed=4)
    x0 = problems.start(4, 6)
    got = ranks.run(
        4, final, problem.hessians, problem.linear, x0, 450,
        {"algorithm": algorithm, "topology": "ring", "wire_dtype": form, "mix_strength": falling},
    )  # fmt: skip
    w = oracle.strengthened(oracle.ring(4), 0.6)
    want = getattr(oracle, f"limit_{algorithm}")(problem, w, 0.1)
    np.testing.assert_allclose(np.stack(got), want, rtol=0, atol=1e-6)
    assert np.abs(want - getattr(oracle, f"limit_{algorithm}")(problem, oracle.ring(4), 0.1)).max() > 1e-3


def final(hessians: np.ndarray, linear: np.ndarray, x0: np.ndarray, steps: int, keywords: dict[str, Any]) -> np.ndarray:
    return train("SGD", hessians, linear, x0, [0.1] * steps, record=False, bucket_mb=1, **keywords)[-1]


# -- Decentralized -----------------------------------------------------------------------------------------------------


def inside_and_fused(algorithm: str, strength: Any, x0: np.ndarray, rates: list[float]) -> tuple[Any, Any]:
    problem, rank = problems.least_squares(4, 13, 26, seed=4), dist.get_rank()
    ends = []
    for wrapped in (True, False):
        model = QuadraticLoss(problem.hessians[rank], problem.linear[rank], x0[rank])
        keywords = {"algorithm": algorithm, "topology": "exponential", "sync_init": False, "mix_strength": strength}
        opt: Any
        if wrapped:
            opt = fusedfog.Decentralized(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **keywords)
        else:
            opt = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, **keywords)
        for rate in rates:
            opt.param_groups[0]["lr"] = rate
            opt.zero_grad()
            model().backward()
            opt.step()
        ends.append(model.vector())
    return ends[0], ends[1]


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_another_optimizer_is_mixed_as_strongly(ranks: Pool, algorithm: str) -> None:
    rates = schedule(0.04)
    problem, x0 = problems.least_squares(4, 13, 26, seed=4), problems.start(4, 13)
    got = ranks.run(4, inside_and_fused, algorithm, as_rate, x0, rates)
    w = oracle.strengthened(oracle.static_exponential(4), strength_at(as_rate, rates))
    want = getattr(oracle, algorithm)(problem, w, x0, rates.__getitem__, STEPS, oracle.SGD(momentum=0.9))[-1]
    for rank, (inside, fused) in enumerate(got):
        np.testing.assert_allclose(inside, want[rank], rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(fused, want[rank], rtol=1e-11, atol=1e-11)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def resumed(keywords: dict[str, Any], forget: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where a run ends, and one that goes on from what the first had saved when its learning rate had fallen."""
    rates, ends = schedule(0.05), []
    saved: Any = None
    for again in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
        opt = fusedfog.SGD(model.parameters(), lr=0.3, momentum=0.9, mix_strength=as_rate, **keywords)
        if again:
            with opt.paused():
                model.load_state_dict(saved[0])
            if forget:
                del saved[1]["fusedfog"]["largest_lr"]
            opt.load_state_dict(saved[1])
        for step in range(30 if again else 0, STEPS):
            if step == 30 and not again:
                saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
            torch.manual_seed(1000 * step + dist.get_rank())
            opt.param_groups[0]["lr"] = rates[step]
            opt.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    return ends[0], ends[1]


@pytest.mark.parametrize("keywords", [{}, {"algorithm": "atc", "fused_backward": True}, {"capturable": True}], ids=str)
def test_a_resumed_run_knows_the_largest_learning_rate(ranks: Pool, keywords: dict[str, Any]) -> None:
    for whole, again in ranks.run(4, resumed, keywords, False):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_checkpoint_without_it_counts_from_where_it_begins(ranks: Pool) -> None:
    for whole, again in ranks.run(2, resumed, {}, True):
        assert all(p.isfinite().all() for p in again)
        assert not all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


# -- groups ------------------------------------------------------------------------------------------------------------


def rates_seen() -> list[tuple[int, float]]:
    seen: list[tuple[int, float]] = []

    def strength(step: int, rate: float) -> float:
        seen.append((step, rate))
        return rate

    own, shared, other = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [own], "mix": False, "lr": 9.0}, {"params": [shared]}, {"params": [other], "lr": 5.0}]
    opt = fusedfog.SGD(groups, lr=0.0, communicate_every=2, mix_strength=strength)
    seen.clear()
    for rate in (0.0, 0.0, 4.0, 1.0, 2.0, 6.0, 3.0, 1.5):
        opt.param_groups[1]["lr"] = rate
        for param in (own, shared, other):
            param.grad = torch.zeros(3)
        opt.step()
    return seen


def test_a_function_is_asked_once_an_exchange_with_the_first_mixed_groups_rate(ranks: Pool) -> None:
    for seen in ranks.run(2, rates_seen):
        assert seen == [(1, 1.0), (3, 0.25), (5, 1.0), (7, 0.25)]


# -- the topology's own W ----------------------------------------------------------------------------------------------


def one(step: int) -> float:
    return 1.0


def trained_with(keywords: dict[str, Any]) -> tuple[list[torch.Tensor], bool]:
    """Parameters after some steps; whether all passes had the very weights of their inboxes."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    opt = fusedfog.AdamW(model.parameters(), lr=0.02, bucket_mb=2e-4, **keywords)
    untouched, real = [], passes.weights_of

    def look(engine: Any, inbox: Any) -> Any:
        untouched.append(real(engine, inbox) is inbox.weights)
        return real(engine, inbox)

    passes.weights_of = look
    try:
        for step in range(8):
            torch.manual_seed(1000 * step + dist.get_rank())
            opt.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            opt.step()
    finally:
        passes.weights_of = real
    return [p.detach().clone() for p in model.parameters()], bool(untouched) and all(untouched)


def with_full_strength(keywords: dict[str, Any]) -> list[tuple[list[torch.Tensor], bool]]:
    return [trained_with(keywords | more) for more in ({}, {"mix_strength": 1}, {"mix_strength": one})]


@pytest.mark.parametrize(
    "keywords", [{"topology": "ring"}, {"wire_dtype": "int8"}, {"global_average_every": 3}], ids=str
)
def test_a_strength_of_one_changes_no_bit_and_no_weights(ranks: Pool, keywords: dict[str, Any]) -> None:
    for (plain, _), *others in ranks.run(3, with_full_strength, keywords):
        for ours, untouched in others:
            assert untouched
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
