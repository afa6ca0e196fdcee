"""Real gloo ranks against the dense float64 recursions of the oracle, for the papers' methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx
import numpy as np
import pytest
from support import oracle, problems
from support.pool import Pool
from support.recursion import trained, w_of
from support.training import train

from fusedfog import Outer, topology

STEPS = 300


def warm_up(base: float) -> list[float]:
    """From zero (two steps of lr = 0), with a drop by ten: what breaks textbook D2 and forms with 1/lr."""
    return [base * min(max(t - 1, 0) / 10, 1.0) * (0.1 if t >= 200 else 1.0) for t in range(STEPS)]


def symmetric_exponential(n: int) -> np.ndarray:
    return topology.symmetric_exponential(n).matrix()


Oracle = Callable[..., np.ndarray]


def sgd(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return options, {"rule": oracle.SGD(**options)}


def same(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return options, options


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# algorithm, topology, (optimizer's options, oracle's options), oracle recursion
SGD_METHODS: list[Any] = [
    ("decentlam", "ring", same(momentum=0.9), oracle.decentlam),
    slow("decentlam", "ring", same(momentum=0.8, weight_decay=0.1), oracle.decentlam_heavy_ball),
    ("quasi_global", "one_peer_exponential", same(momentum=0.9), oracle.quasi_global),
    slow("quasi_global", "ring", same(momentum=0.7, nesterov=True, weight_decay=0.1), oracle.quasi_global),
    ("exact_diffusion", "ring", sgd(), oracle.exact_diffusion),
    slow("exact_diffusion", "ring", sgd(momentum=0.5, weight_decay=0.1), oracle.exact_diffusion_dual),
    ("extra", "ring", sgd(), oracle.extra),
    slow("extra", "ring", sgd(momentum=0.5, weight_decay=0.1), oracle.extra_one_state),
    ("gradient_tracking", "exponential", same(), oracle.momentum_tracking_engine),
    ("momentum_tracking", "ring", same(momentum=0.9, weight_decay=0.1), oracle.momentum_tracking),
    slow("momentum_tracking", "one_peer_exponential", same(momentum=0.8), oracle.momentum_tracking_engine),
]


@pytest.mark.parametrize("n", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("algorithm", "graph", "options", "recursion"), SGD_METHODS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_sgd_methods_equal_the_dense_recursion(
    ranks: Pool, algorithm: str, graph: str, options: Any, recursion: Oracle, n: int
) -> None:
    rates = warm_up(0.05)
    given, for_oracle = options
    fused_backward = n == 4
    problem, x0, got = trained(
        ranks, n, 13, "SGD", rates, algorithm=algorithm, topology=graph, fused_backward=fused_backward, **given
    )
    want = recursion(problem, w_of(graph, n), x0, rates.__getitem__, STEPS, **for_oracle)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def directed(n: int) -> topology.Topology:
    """An irregular strongly connected digraph: a directed ring with chords out of rank 0."""
    edges = [(i, (i + 1) % n) for i in range(n)] + [(0, j) for j in range(2, n, 2)]
    return topology.from_networkx(networkx.DiGraph(edges))


@pytest.mark.parametrize(("kind", "options"), [slow("SGD", {"momentum": 0.9}), ("AdamW", {"weight_decay": 0.1})], ids=str)
def test_push_sum_on_an_irregular_digraph(ranks: Pool, kind: str, options: dict[str, Any]) -> None:
    rates = warm_up(0.02)
    graph = directed(8)
    problem, x0, got = trained(
        ranks, 8, 13, kind, rates, algorithm="push_sum", topology=graph, communicate_every=2, **options
    )
    rule = oracle.SGD(**options) if kind == "SGD" else oracle.Adam(**options, decoupled=True)
    shares = oracle.push_matrix(graph.matrix())
    want = oracle.push_sum(problem, lambda t: shares if t % 2 else np.eye(8), x0, rates.__getitem__, STEPS, rule=rule)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


ADAM_METHODS: list[Any] = [
    slow("dag", "ring", {"weight_decay": 0.1}, oracle.dag_adam, 1e-10),
    ("dag", "exponential", {"amsgrad": True}, oracle.dag_adam, 1e-10),
    ("quasi_global", "one_peer_exponential", {"weight_decay": 0.1}, oracle.quasi_global_adam, 1e-10),
    slow("gradient_tracking", "ring", {"weight_decay": 0.1}, oracle.gt_adam, 1e-10),
    ("gradient_tracking", "exponential", {"amsgrad": True}, oracle.gt_adam, 1e-10),
]


@pytest.mark.parametrize("kind", [pytest.param("Adam", marks=pytest.mark.slow), "AdamW"])
@pytest.mark.parametrize(
    ("algorithm", "graph", "options", "recursion", "tolerance"),
    ADAM_METHODS,
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_adam_methods_equal_the_dense_recursion(
    ranks: Pool, kind: str, algorithm: str, graph: str, options: dict[str, Any], recursion: Oracle, tolerance: float
) -> None:
    # dag amplifies rounding where sqrt(v) is small beside (1 - lambda_min)/2; hence its own tolerance.
    rates = warm_up(0.01)
    problem, x0, got = trained(ranks, 4, 13, kind, rates, algorithm=algorithm, topology=graph, **options)
    rule = oracle.Adam(decoupled=kind == "AdamW", **{"weight_decay": 0.01 if kind == "AdamW" else 0.0} | options)
    want = recursion(problem, w_of(graph, 4), x0, rates.__getitem__, STEPS, rule)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("algorithm", ["awc", slow("atc")])
def test_accum_adamw(ranks: Pool, algorithm: str) -> None:
    rates = warm_up(0.01)
    problem, x0, got = trained(
        ranks, 4, 13, "AccumAdamW", rates, algorithm=algorithm, topology="exponential", accum_steps=4, weight_decay=0.1
    )
    rule = oracle.AccumAdam(accum_steps=4, weight_decay=0.1, decoupled=True)
    want = getattr(oracle, algorithm)(problem, oracle.static_exponential(4), x0, rates.__getitem__, STEPS, rule)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize("algorithm", ["awc", "atc", "gradient_tracking"])
def test_global_average_every(ranks: Pool, algorithm: str, fused_backward: bool) -> None:
    rates = [0.03] * 60
    problem, x0, got = trained(
        ranks, 8, 13, "SGD", rates, algorithm=algorithm, topology="one_peer_exponential",
        communicate_every=2, global_average_every=5, fused_backward=fused_backward,
    )  # fmt: skip
    w = oracle.rhythm(oracle.one_peer_exponential(8), every=2, average_every=5)
    recursion = oracle.momentum_tracking_engine if algorithm == "gradient_tracking" else getattr(oracle, algorithm)
    np.testing.assert_allclose(got, recursion(problem, w, x0, 0.03, 60), rtol=1e-11, atol=1e-11)


def test_tracking_stays_exact_with_local_steps_between(ranks: Pool) -> None:
    problem = problems.least_squares(4, 10, 20, seed=1)
    x0 = problems.start(4, problem.d)
    got = ranks.run(
        4, train, "SGD", problem.hessians, problem.linear, x0, [0.04] * 1500, algorithm="gradient_tracking",
        topology="fully_connected", communicate_every=8, record=False, bucket_mb=1,
    )  # fmt: skip
    np.testing.assert_allclose([path[-1] for path in got], np.tile(problem.x_star, (4, 1)), atol=1e-9)


def test_outer_is_diloco_and_noloco(ranks: Pool) -> None:
    rates = [0.05] * 60
    for outer, graph, turn in (
        (Outer(every=5, lr=0.7, momentum=0.9, nesterov=True), topology.fully_connected(4), oracle.DiLoCo(0.7, 0.9)),
        (Outer(every=5, lr=0.7, momentum=0.5), topology.random_matching(4, 3), None),
    ):
        problem = problems.least_squares(4, 13, 26, seed=4)
        x0 = problems.start(4, 13, equal=True)
        got = ranks.run(
            4, train, "SGD", problem.hessians, problem.linear, x0, rates, algorithm="local", outer=outer, topology=graph
        )
        rule = turn if turn is not None else oracle.NoLoCo(graph.matrix, 0.7, 0.5)
        want = oracle.with_outer(problem, x0, 0.05, 60, 5, rule)
        np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-10, atol=1e-10)


def change_everything(opt: Any, step: int) -> None:
    """In mid-run: another momentum where there is one, and another graph."""
    if step == 150:
        opt.set_topology("symmetric_exponential")
        for group in opt.param_groups:
            group["momentum"] = group["momentum"] / 2


@pytest.mark.parametrize(
    ("algorithm", "momentum"),
    [
        ("gradient_tracking", 0.0),
        slow("exact_diffusion", 0.6),
        slow("extra", 0.4),
        slow("momentum_tracking", 0.6),
    ],
)
def test_exact_methods_stay_exact_through_changes_in_mid_run(ranks: Pool, algorithm: str, momentum: float) -> None:
    problem = problems.least_squares(4, 10, 20, seed=1)
    rates = [0.05] * 300 + [0.02] * 1200
    got = ranks.run(
        4, train, "SGD", problem.hessians, problem.linear, problems.start(4, 10), rates, algorithm=algorithm,
        topology="ring", momentum=momentum, record=False, bucket_mb=1, touch=change_everything,
    )  # fmt: skip
    np.testing.assert_allclose([path[-1] for path in got], np.tile(problem.x_star, (4, 1)), atol=1e-8)
