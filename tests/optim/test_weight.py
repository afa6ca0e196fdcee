"""Ranks of different weight minimise sum_i p_i f_i: they are the papers' recursions with n p_i g_i, or lr n p_i with Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import oracle, problems
from support.batches import BATCHES, build, net, steps_of, values
from support.oracle_weighted import Weighted
from support.pool import Pool
from support.training import train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import topology
from fusedfog.engine.rank_weights import part_of_node, parts
from fusedfog.simulate import Quadratics, simulate

N, D = 4, 13
WEIGHTS = [3.0, 1.0, 7.5, 2.0]
RATES = [0.02 * min(t / 5, 1.0) * (0.1 if t >= 40 else 1.0) for t in range(60)]


def least_squares() -> Weighted:
    return Weighted(problems.least_squares(N, D, 2 * D, seed=N), np.array(WEIGHTS))


def irregular() -> topology.Topology:
    edges = [(i, (i + 1) % 4) for i in range(4)] + [(0, 2), (0, 3), (2, 0)]
    return topology.from_networkx(networkx.DiGraph(edges))


RING, EXP, ALL = oracle.ring(N), oracle.static_exponential(N), oracle.complete(N)
SGD = {"momentum": 0.9, "weight_decay": 0.1}
SGD_RULE = oracle.SGD(**SGD)
ADAMW_RULE = oracle.Adam(weight_decay=0.1, decoupled=True)


def by_gradient(recursion: Callable[..., Any], w: Any, **rule: Any) -> Callable[..., Any]:
    return lambda weighted, x0, rate, steps: recursion(weighted, w, x0, rate, steps, **rule)


def by_rate(recursion: Callable[..., Any], w: Any, **rule: Any) -> Callable[..., Any]:
    return lambda weighted, x0, rate, steps: recursion(
        weighted.problem, w, x0, lambda t: rate(t) * weighted.parts, steps, **rule
    )


def push_sum(weighted: Weighted, x0: Any, rate: Any, steps: int) -> Any:
    shape = irregular().matrix()
    return oracle.push_sum(weighted, oracle.push_matrix(shape), x0, rate, steps)


def data_parallel(rule: Any) -> Callable[..., Any]:
    return lambda weighted, x0, rate, steps: oracle.local(weighted.mean, x0, rate, steps, rule)


RECURSIONS: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "SGD awc": ("SGD", {"topology": "ring", **SGD}, by_gradient(oracle.awc, RING, rule=SGD_RULE)),
    "SGD atc hooks": (
        "SGD",
        {"topology": "exponential", "algorithm": "atc", "fused_backward": True, **SGD},
        by_gradient(oracle.atc, EXP, rule=SGD_RULE),
    ),
    "SGD awc capturable": (
        "SGD",
        {"topology": "ring", "capturable": True, **SGD},
        by_gradient(oracle.awc, RING, rule=SGD_RULE),
    ),
    "decentlam": ("SGD", {"topology": "ring", "algorithm": "decentlam", **SGD}, by_gradient(oracle.decentlam, RING, **SGD)),
    "quasi_global": (
        "SGD",
        {"topology": "ring", "algorithm": "quasi_global", **SGD},
        by_gradient(oracle.quasi_global, RING, **SGD),
    ),
    "exact_diffusion": (
        "SGD",
        {"topology": "ring", "algorithm": "exact_diffusion", **SGD},
        by_gradient(oracle.exact_diffusion, RING, rule=SGD_RULE),
    ),
    "extra": ("SGD", {"topology": "ring", "algorithm": "extra"}, by_gradient(oracle.extra, RING)),
    "momentum_tracking": (
        "SGD",
        {"topology": "exponential", "algorithm": "momentum_tracking", **SGD},
        by_gradient(oracle.momentum_tracking_engine, EXP, **SGD),
    ),
    "push_sum": ("SGD", {"topology": irregular(), "algorithm": "push_sum"}, push_sum),
    "allreduce": ("SGD", {"algorithm": "allreduce", **SGD}, data_parallel(SGD_RULE)),
    "allreduce hooks": (
        "AdamW",
        {"algorithm": "allreduce", "weight_decay": 0.1, "fused_backward": True},
        data_parallel(ADAMW_RULE),
    ),
    "AdamW awc": ("AdamW", {"topology": "ring", "weight_decay": 0.1}, by_rate(oracle.awc, RING, rule=ADAMW_RULE)),
    "Adam atc": (
        "Adam",
        {"topology": "exponential", "algorithm": "atc", "weight_decay": 0.1},
        by_rate(oracle.atc, EXP, rule=oracle.Adam(weight_decay=0.1)),
    ),
    "AdamW quasi_global": (
        "AdamW",
        {"topology": "ring", "algorithm": "quasi_global", "weight_decay": 0.1},
        by_rate(oracle.quasi_global_adam, RING, rule=ADAMW_RULE),
    ),
    "AdamW gradient_tracking": (
        "AdamW",
        {"topology": "exponential", "algorithm": "gradient_tracking", "weight_decay": 0.1},
        by_gradient(oracle.gt_adam, EXP, rule=ADAMW_RULE),
    ),
    "AdamW dag": (
        "AdamW",
        {"topology": "ring", "algorithm": "dag", "weight_decay": 0.1},
        by_gradient(oracle.dag_adam, RING, rule=ADAMW_RULE),
    ),
}  # fmt: skip


SLOW = ("decentlam", "extra", "allreduce", "Adam atc", "SGD awc")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RECURSIONS])
def test_real_ranks_are_the_recursion_of_the_weighted_problem(ranks: Pool, name: str) -> None:
    kind, keywords, recursion = RECURSIONS[name]
    weighted = least_squares()
    x0 = problems.start(N, D, equal="allreduce" in name)
    data = weighted.problem
    paths = ranks.run(N, train, kind, data.hessians, data.linear, x0, RATES, weights=WEIGHTS, **keywords)
    want = recursion(weighted, x0, RATES.__getitem__, len(RATES))
    tolerance = 1e-9 if "dag" in name else 1e-11
    np.testing.assert_allclose(np.stack(paths, axis=1), want, rtol=tolerance, atol=tolerance)


def test_real_ranks_end_in_the_weighted_optimum(ranks: Pool) -> None:
    data, weights = problems.least_squares(4, 4, 8, seed=2), [3.0, 1.0, 4.0, 2.0]
    arguments = ("SGD", data.hessians, data.linear, problems.start(4, 4), [0.1] * 500)
    found = ranks.run(
        4, train, *arguments, weights=weights, algorithm="exact_diffusion", topology="ring", record=False, bucket_mb=1
    )
    want = Weighted(data, np.array(weights)).minimiser
    for path in found:
        np.testing.assert_allclose(path[-1], want, rtol=0, atol=1e-10)


# -- limits, on simulated ranks, which are real ones bit for bit -------------------------------------------------------

EXACT = {
    "exact_diffusion": ("ring", "star", "grid", "symmetric_exponential", "fully_connected"),
    "extra": ("grid", "ring", "star", "symmetric_exponential", "fully_connected"),
    "gradient_tracking": ("one_peer_exponential", "exponential", "ring", "base_graph", "equi_dynamic"),
    "momentum_tracking": ("base_graph", "exponential", "one_peer_exponential"),
}
"""The first of each, and of gradient tracking two, in `make test`."""
CASES = [
    pytest.param(name, graph, marks=[pytest.mark.slow] * (place > (name == "gradient_tracking")))
    for name, graphs in EXACT.items()
    for place, graph in enumerate(graphs)
]


def of_eight() -> tuple[Weighted, Quadratics]:
    data = problems.standard()
    weights = np.array([1.0, 3.0, 2.0, 0.5, 4.0, 1.0, 3.0, 1.5])
    return Weighted(data, weights), Quadratics(torch.from_numpy(data.hessians), torch.from_numpy(data.linear))


@pytest.mark.parametrize(("algorithm", "graph"), CASES)
def test_exact_methods_reach_the_weighted_optimum_on_every_class_of_graphs(algorithm: str, graph: str) -> None:
    weighted, problem = of_eight()
    momentum = {"momentum": 0.5} if algorithm == "momentum_tracking" else {}
    path = simulate(
        problem, 8, graph, algorithm, steps=2500, lr=0.03, record_every=2500, weights=list(weighted.weights), **momentum
    )
    want = np.broadcast_to(weighted.minimiser, (8, 10))
    np.testing.assert_allclose(path.X.numpy(), want, rtol=0, atol=1e-10)
    assert path.distances[-1] < 1e-10
    assert np.linalg.norm(weighted.minimiser - weighted.problem.x_star) > 0.1


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_other_methods_have_the_fixed_point_of_the_weighted_losses(algorithm: str, graph: str) -> None:
    weighted, problem = of_eight()
    path = simulate(
        problem, 8, graph, algorithm, steps=1000, lr=0.05, record_every=1000, weights=list(weighted.weights)
    )
    w = oracle.ring(8) if graph == "ring" else oracle.static_exponential(8)
    want = getattr(oracle, f"limit_{algorithm}")(weighted.losses, w, 0.05)
    np.testing.assert_allclose(path.X.numpy(), want, rtol=0, atol=1e-10)


def test_adam_stands_still_where_the_weighted_updates_cancel() -> None:
    """With signs as updates (no memory), of 3 against 1 + 1: the two light ranks cannot outvote the heavy one."""
    minima = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    problem = Quadratics(torch.ones(3, 1, 1, dtype=torch.float64), minima)
    ends = [
        simulate(
            problem, 3, "fully_connected", "atc", optimizer="Adam", steps=1000, lr=5e-3, betas=(0.0, 0.0), x0=[0.0],
            record_every=1000, weights=weights,
        ).X.mean()
        for weights in ([3.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    ]  # fmt: skip
    assert ends[0] == pytest.approx(1.0, abs=0.02)
    assert ends[1] == pytest.approx(-1.0, abs=0.02)


# -- a batch of its own size on every rank -----------------------------------------------------------------------------


def of_own_batch(kind: str, steps: int, keywords: dict[str, Any]) -> list[Tensor]:
    model, rank = net(), dist.get_rank()
    if keywords.get("mesh"):
        keywords = {**keywords, "mesh": init_device_mesh("cpu", (2, 2))}
    opt = build(kind, model.parameters(), weight=BATCHES[rank], bucket_mb=1e-4, **keywords)
    steps_of(model, opt, range(steps), [rank])
    opt.drain()
    return values(model)


def alone(kind: str, steps: int, members: list[int]) -> list[Tensor]:
    model = net()
    inner = getattr(torch.optim, "AdamW" if kind == "Decentralized" else kind)
    steps_of(model, inner(model.parameters(), lr=0.05 if kind == "SGD" else 0.02), range(steps), members)
    return values(model)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Decentralized"])
@pytest.mark.parametrize("keywords", [{"algorithm": "allreduce"}, {"data_parallel_steps": 6}], ids=str)
def test_data_parallel_steps_are_those_of_one_rank_with_all_samples(
    ranks: Pool, kind: str, keywords: dict[str, Any]
) -> None:
    want = alone(kind, 6, [0, 1, 2, 3])
    for found in ranks.run(4, of_own_batch, kind, 6, keywords):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_atc_sgd_on_the_complete_graph_is_that_too(ranks: Pool) -> None:
    want = alone("SGD", 6, [0, 1, 2, 3])
    for found in ranks.run(4, of_own_batch, "SGD", 6, {"algorithm": "atc", "topology": "fully_connected"}):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def of_machine(kind: str, steps: int, keywords: dict[str, Any]) -> list[Tensor]:
    """One of two ranks, with the samples of two: what a machine of them is."""
    model, rank = net(), dist.get_rank()
    members = [2 * rank, 2 * rank + 1]
    opt = build(kind, model.parameters(), weight=sum(BATCHES[one] for one in members), **keywords)
    steps_of(model, opt, range(steps), members)
    opt.drain()
    return values(model)


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        ("SGD", {"momentum": 0.9}),
        ("AdamW", {"algorithm": "atc"}),
        ("Decentralized", {}),
        ("SGD", {"max_grad_norm": 0.1}),
    ],
    ids=str,
)
def test_a_machine_weighs_what_its_ranks_do_together(ranks: Pool, kind: str, keywords: dict[str, Any]) -> None:
    found = ranks.run(4, of_own_batch, kind, 6, {"mesh": True, "topology": "ring", **keywords})
    nodes = ranks.run(2, of_machine, kind, 6, {"topology": "ring", **keywords})
    for rank, one in enumerate(found):
        torch.testing.assert_close(one, nodes[rank // 2], rtol=1e-7, atol=1e-9)


# -- equal weights, unmixed parameters, clipping -----------------------------------------------------------------------


def twins(kind: str, keywords: dict[str, Any], weight: float) -> bool:
    """Whether training with this weight on all ranks is training without."""
    one, other = net(), net()
    for model, more in ((one, {}), (other, {"weight": weight})):
        steps_of(model, build(kind, model.parameters(), **keywords, **more), range(5), [dist.get_rank()])
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize(
    ("kind", "keywords"), [("SGD", {}), ("AdamW", {"algorithm": "atc"}), ("SGD", {"algorithm": "allreduce"})]
)
def test_equal_weights_change_no_bit(ranks: Pool, kind: str, keywords: dict[str, Any]) -> None:
    assert ranks.run(3, twins, kind, keywords, 0.1) == [True] * 3


@given(st.floats(1e-300, 1e300), st.integers(1, 9))
def test_equal_weights_are_parts_of_exactly_one(weight: float, n: int) -> None:
    assert parts([weight] * n, range(n)) == (1.0,) * n
    assert part_of_node([weight] * n, [0], n) == 1


def clipped_and_unmixed(kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """A step of rank i on parameters that are mixed with nobody (lr of others is 0): with the weight, and by hand."""
    rank, gradient = dist.get_rank(), torch.arange(1.0, 4.0, dtype=torch.float64)
    moves = []
    for by_hand in (False, True):
        mixed, own = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
        part = 4 * WEIGHTS[rank] / sum(WEIGHTS)
        groups = [{"params": [mixed]}, {"params": [own], "mix": False}]
        weight = {} if by_hand else {"weight": torch.tensor(WEIGHTS[rank], dtype=torch.float64)}
        opt = build(kind, groups, topology="ring", mix_strength=0.0, max_grad_norm=1.0, **weight)
        mixed.grad, own.grad = gradient.clone(), gradient.clone()
        rates = [group["lr"] for group in opt.param_groups]
        if by_hand:
            opt.param_groups[0]["lr"] *= part  # A first step of SGD is linear in lr too.
        opt.step()
        moves.append([mixed.detach().clone(), own.detach().clone()])
        assert by_hand or [group["lr"] for group in opt.param_groups] == rates
    return moves[0], moves[1], [mixed.grad, gradient]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Decentralized"])
def test_weighing_comes_after_clipping_and_leaves_what_is_not_mixed(ranks: Pool, kind: str) -> None:
    for weighed, by_hand, _ in ranks.run(4, clipped_and_unmixed, kind):
        torch.testing.assert_close(weighed, by_hand, rtol=1e-12, atol=0)
        assert weighed[0].abs().min() > 0


def left_out() -> list[Tensor]:
    """The mean of gradients of which rank 2's are not finite."""
    p, rank = nn.Parameter(torch.zeros(3)), dist.get_rank()
    opt = fusedfog.SGD([p], lr=1.0, algorithm="allreduce", weight=WEIGHTS[rank])
    p.grad = torch.full((3,), float("nan") if rank == 2 else float(rank + 1))
    opt.step()
    return [p.detach().clone()]


def test_a_weighted_mean_without_a_rank_is_that_of_the_others(ranks: Pool) -> None:
    want = -(3.0 * 1 + 1.0 * 2 + 2.0 * 4) / 6.0
    for (found,) in ranks.run(4, left_out):
        torch.testing.assert_close(found, torch.full((3,), want))
