"""Real gloo ranks against the dense float64 recursions of the oracle, for AWC, ATC, all-reduce and local."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import oracle, problems
from support.pool import Pool
from support.recursion import trained, w_of
from support.training import train

STEPS = 100


def schedule(kind: str) -> list[float]:
    """A learning rate that warms up from zero, moves and drops."""
    base = 0.02 if kind == "SGD" else 0.01
    return [base * min(t / 5, 1.0) * (0.1 if t >= 70 else 1.0) for t in range(STEPS)]


SGD_RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov, decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.7, "dampening": 0.3, "weight_decay": 0.05},
}


@pytest.mark.parametrize(("n", "fused_backward"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("topology", ["ring", "exponential", "one_peer_exponential"])
@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_sgd_equals_the_dense_recursion(
    ranks: Pool, n: int, algorithm: str, topology: str, fused_backward: bool
) -> None:
    rates = schedule("SGD")
    graphs = ("ring", "exponential", "one_peer_exponential")
    options = list(SGD_RULES.values())[(graphs.index(topology) + fused_backward + 2 * (n == 8)) % len(SGD_RULES)]
    problem, x0, got = trained(
        ranks, n, 13, "SGD", rates, algorithm=algorithm, topology=topology, fused_backward=fused_backward, **options
    )
    rule = oracle.SGD(**options)
    want = getattr(oracle, algorithm)(problem, w_of(topology, n), x0, rates.__getitem__, STEPS, rule)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_adam_equals_the_dense_recursion(ranks: Pool, algorithm: str, kind: str) -> None:
    rates = schedule("Adam")
    amsgrad = algorithm == "atc"
    problem, x0, got = trained(
        ranks, 4, 13, kind, rates, algorithm=algorithm, topology="exponential", weight_decay=0.1, amsgrad=amsgrad
    )
    rule = oracle.Adam(weight_decay=0.1, decoupled=kind == "AdamW", amsgrad=amsgrad)
    want = getattr(oracle, algorithm)(problem, oracle.static_exponential(4), x0, rates.__getitem__, STEPS, rule)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_communicate_every_counts_exchanges_for_the_topology(ranks: Pool, algorithm: str) -> None:
    rates = [0.02] * 40
    problem, x0, got = trained(
        ranks, 8, 13, "SGD", rates, algorithm=algorithm, topology="one_peer_exponential", communicate_every=3
    )
    w = oracle.rhythm(oracle.one_peer_exponential(8), every=3)
    want = getattr(oracle, algorithm)(problem, w, x0, 0.02, 40)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused_backward", [False, True])
def test_allreduce_is_data_parallel_training(ranks: Pool, fused_backward: bool) -> None:
    rates = schedule("SGD")
    problem, x0, got = trained(
        ranks, 4, 13, "SGD", rates, algorithm="allreduce", fused_backward=fused_backward, momentum=0.9
    )
    want = oracle.allreduce(problem, x0, rates.__getitem__, STEPS, oracle.SGD(momentum=0.9))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_local_ranks_are_alone(ranks: Pool) -> None:
    problem, x0, got = trained(ranks, 4, 13, "SGD", [0.05] * 30, algorithm="local")
    np.testing.assert_allclose(got, oracle.local(problem, x0, 0.05, 30), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["ring", "exponential"])
@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_limit_points_are_those_of_the_linear_solve(ranks: Pool, algorithm: str, topology: str) -> None:
    # 600 steps contract the slowest mode by exp(-0.1 mu 600) = 1e-15.
    problem = problems.standard()
    x0 = problems.start(8, problem.d)
    got = ranks.run(
        8, train, "SGD", problem.hessians, problem.linear, x0, [0.1] * 600,
        algorithm=algorithm, topology=topology, record=False, bucket_mb=1,
    )  # fmt: skip
    want = getattr(oracle, f"limit_{algorithm}")(problem, w_of(topology, 8), 0.1)
    np.testing.assert_allclose([path[-1] for path in got], want, rtol=1e-10, atol=1e-10)


def test_atc_on_the_complete_graph_is_data_parallel_training_and_awc_is_not(ranks: Pool) -> None:
    problem = problems.standard()
    x0 = problems.start(8, problem.d, equal=True)
    arguments = ("SGD", problem.hessians, problem.linear, x0, [0.02] * 60)
    want = oracle.allreduce(problem, x0, 0.02, 60)[-1]
    atc = ranks.run(8, train, *arguments, algorithm="atc", topology="fully_connected")
    np.testing.assert_allclose([path[-1] for path in atc], want, rtol=1e-12, atol=1e-12)
    awc = ranks.run(8, train, *arguments, algorithm="awc", topology="fully_connected")
    assert np.abs(np.stack([path[-1] for path in awc]) - want).max() > 1e-3
