"""Ranks in virtual time are an event loop in numpy; equal ones are synchronous; limits know neither speeds nor delays."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle, oracle_async, problems
from support.names import named
from torch import nn
from torch.nn.functional import mse_loss

from fusedfog import topology
from fusedfog.simulate import ModuleProblem, Quadratics, Trajectory, lognormal, simulate

EDGES = [(i, (i + 1) % 6) for i in range(6)] + [(0, 2), (0, 3), (2, 0), (4, 1)]
DIGRAPH = topology.from_networkx(networkx.DiGraph(EDGES))
PUSH = oracle.push_matrix(DIGRAPH.matrix())


def least_squares(n: int, d: int = 7) -> tuple[problems.Quadratics, Quadratics, np.ndarray]:
    data = problems.least_squares(n, d, 2 * d, seed=n)
    return data, Quadratics(torch.from_numpy(data.hessians), torch.from_numpy(data.linear)), problems.start(n, d)


UNEQUAL = [Fraction(1), Fraction(3), Fraction(1, 2), Fraction(2), Fraction(1), Fraction(5)]


@pytest.mark.parametrize("delay", [Fraction(0), Fraction(1, 2), Fraction(5)])
@pytest.mark.parametrize("algorithm", ["awc", "push_sum"])
def test_equals_an_event_loop_over_every_message(algorithm: str, delay: Fraction) -> None:
    data, problem, x0 = least_squares(6)
    keywords: dict[str, Any] = {"steps": 40, "lr": 0.02, "x0": x0, "delay": float(delay)}
    graph = "ring" if algorithm == "awc" else DIGRAPH
    path = simulate(problem, 6, graph, algorithm, speeds=[float(speed) for speed in UNEQUAL], **keywords)
    if algorithm == "awc":
        want = oracle_async.async_awc(data.grad, oracle.ring(6), x0, 0.02, UNEQUAL, 40, delay)
    else:
        want, masses = oracle_async.async_push_sum(data.grad, PUSH, x0, 0.02, UNEQUAL, 40, delay)
        np.testing.assert_allclose(path.masses, masses, rtol=1e-11)
    np.testing.assert_allclose(path.X.numpy(), want, rtol=1e-10, atol=1e-11)
    assert path.rank_steps[-1] == [40, 120, 20, 80, 40, 200]
    assert path.steps[-1] == 40


@given(
    st.lists(st.fractions(Fraction(1, 3), 4, max_denominator=4), min_size=4, max_size=4),
    st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(2)]),
)
@settings(max_examples=15, deadline=None)
def test_equals_it_at_any_speeds(speeds: list[Fraction], delay: Fraction) -> None:
    data, problem, x0 = least_squares(4, 3)
    keywords: dict[str, Any] = {
        "steps": 6,
        "lr": 0.05,
        "x0": x0,
        "speeds": [*map(float, speeds)],
        "delay": float(delay),
    }
    path = simulate(problem, 4, "exponential", "push_sum", **keywords)
    assert path.rank_steps[-1] == [math.floor(speed * 6) for speed in speeds]
    assert sum(path.masses) + path.mass_under_way == pytest.approx(4, abs=1e-12)
    p = oracle.push_matrix(oracle.static_exponential(4))
    want, _ = oracle_async.async_push_sum(data.grad, p, x0, 0.05, speeds, 6, delay)
    np.testing.assert_allclose(path.X.numpy(), want, rtol=1e-9, atol=1e-10)


SYNCHRONOUS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"communicate_every": 3, "mix_strength": lambda step, rate: rate / (1 + step)}),
    ("SGD", {"weights": [1.0, 2.0, 5.0, 1.0, 3.0, 0.5]}),
    ("AdamW", {"amsgrad": True, "weights": [1.0, 2.0, 5.0, 1.0, 3.0, 0.5]}),
    ("AccumAdamW", {"accum_steps": 3}),
]


@pytest.mark.parametrize("delay", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "options"), SYNCHRONOUS, ids=named)
def test_equal_speeds_are_the_synchronous_steps_bit_for_bit(kind: str, options: dict[str, Any], delay: float) -> None:
    _, problem, x0 = least_squares(6)
    rates = [0.02 * min(t / 5, 1.0) for t in range(90)]
    keywords: dict[str, Any] = {"optimizer": kind, "lr": rates.__getitem__, "x0": x0, **options}
    want = simulate(problem, 6, "exponential", steps=30, **keywords)
    found = simulate(problem, 6, "exponential", steps=30, speeds=[1.0] * 6, delay=delay, **keywords)
    assert torch.equal(found.X, want.X)
    assert found == Trajectory(**{**vars(want), "X": found.X, "states": found.states})
    assert all(torch.equal(found.states[name], want.states[name]) for name in want.states)
    thrice = simulate(problem, 6, "exponential", steps=10, speeds=[3.0] * 6, **keywords)
    assert torch.equal(thrice.X, want.X)


def test_equal_speeds_are_push_sum_that_updates_after_mixing() -> None:
    data, problem, x0 = least_squares(6)
    path = simulate(problem, 6, DIGRAPH, "push_sum", steps=50, lr=0.02, x0=x0, speeds=[1.0] * 6)
    want = oracle_async.synchronous_push_sum(data, PUSH, x0, 0.02, 50)
    np.testing.assert_allclose(path.X.numpy(), want, rtol=1e-11, atol=1e-12)


FIXED = [
    (1.0, 2.5),
    (1 / 3, 0.0),
    (0.1, 2.5),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1.0, 0.0), (0.1, 0.0)]),
]


@pytest.mark.parametrize(("slow", "delay"), FIXED)
def test_the_fixed_point_of_awc_knows_neither_speeds_nor_delays(slow: float, delay: float) -> None:
    """(I - W + a H) x = a c, with one rank as fast as the others, three and ten times slower."""
    data, problem, x0 = least_squares(4, 3)
    steps = round(1500 + 300 / slow)
    path = simulate(
        problem, 4, "ring", steps=steps, lr=0.1, x0=x0, speeds=[slow, 1, 1, 1], delay=delay, record_every=steps
    )
    np.testing.assert_allclose(path.X.numpy(), oracle.limit_awc(data, oracle.ring(4), 0.1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("speeds", [[1.0, 3.0, 0.3, 1.0, 2.0, 1.0], lognormal(0.8, seed=2)], ids=["given", "random"])
def test_push_sum_on_an_irregular_digraph_ends_in_the_exact_mean(speeds: Any) -> None:
    _, problem, x0 = least_squares(6)
    path = simulate(
        problem, 6, DIGRAPH, "push_sum", steps=400, lr=0.0, x0=x0, speeds=speeds, delay=0.7, record_every=400
    )
    np.testing.assert_allclose(path.X.numpy(), np.broadcast_to(x0.mean(0), (6, 7)), rtol=0, atol=1e-10)
    assert abs(sum(path.masses) + path.mass_under_way - 6) < 1e-10
    assert path.mass_under_way > 0


@pytest.mark.slow
def test_push_sum_counts_all_losses_alike_whatever_the_speeds() -> None:
    """A slow rank makes fewer updates but has collected more mass for each: the limit tends to the minimiser as lr falls."""
    data, problem, x0 = least_squares(6, 3)
    bias = []
    for rate in (0.04, 0.01):
        path = simulate(
            problem, 6, DIGRAPH, "push_sum", steps=round(25 / rate), lr=rate, x0=x0, speeds=[0.2, 1, 1, 2, 1, 1],
            record_every=10**6,
        )  # fmt: skip
        bias.append(data.mean_error(path.X.numpy()))
    assert bias[1] < 0.35 * bias[0]
    alone = data.minimiser(np.array([0.2, 1, 1, 2, 1, 1]) / 6.2)
    assert np.linalg.norm(alone - data.x_star) > 5 * bias[1]


def test_weighted_losses_at_any_speeds() -> None:
    data, problem, x0 = least_squares(4)
    weights = np.array([1.0, 4.0, 2.0, 1.0])
    path = simulate(
        problem, 4, "ring", steps=1500, lr=0.04, x0=x0, speeds=[1, 2, 0.5, 1], weights=list(weights), record_every=1500
    )
    parts = 4 * weights / weights.sum()
    losses = problems.Quadratics(data.hessians * parts[:, None, None], data.linear * parts[:, None])
    np.testing.assert_allclose(path.X.numpy(), oracle.limit_awc(losses, oracle.ring(4), 0.04), rtol=0, atol=1e-10)


def test_random_speeds_are_a_function_of_seed_rank_and_step() -> None:
    speed = lognormal(0.5, seed=3, speeds=[1.0, 4.0])
    assert speed(1, 7) == lognormal(0.5, 3, [1.0, 4.0])(1, 7) != lognormal(0.5, 4, [1.0, 4.0])(1, 7)
    drawn = np.log([speed(1, step) for step in range(2000)])
    assert np.median(drawn) == pytest.approx(np.log(4), abs=0.05)
    assert drawn.std() == pytest.approx(0.5, abs=0.03)
    assert lognormal(0.0)(5, 5) == 1.0
    _, problem, x0 = least_squares(4)
    runs = [simulate(problem, 4, "ring", steps=20, lr=0.02, x0=x0, speeds=lognormal(0.5, seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].X, runs[1].X)
    assert not torch.equal(runs[0].X, runs[2].X)
    assert len(set(runs[0].rank_steps[-1])) > 1
    assert [len(one) for one in runs[0].rank_steps] == [4] * 21


def test_a_module_at_unequal_speeds_is_asked_for_the_gradients_of_those_that_step() -> None:
    source = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 3, generator=source), torch.randn(20, 1, generator=source)) for _ in range(3)]
    problem = ModuleProblem(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), mse_loss, data, batch=4)
    X = torch.randn(3, len(problem.start()), generator=source, dtype=torch.float64)
    torch.testing.assert_close(problem.grad_of(5, [2, 0], X[[2, 0]]), problem.grad(5, X)[[2, 0]])
    path = simulate(problem, 3, "ring", optimizer="AdamW", steps=30, lr=0.02, speeds=[1.0, 0.5, 1.5])
    assert path.rank_steps[-1] == [30, 15, 45]
    assert path.losses[-1] < path.losses[0]


class Plain:
    """A problem with nothing but gradients."""

    def __init__(self, problem: Quadratics) -> None:
        self.problem = problem

    def grad(self, step: int, X: torch.Tensor) -> torch.Tensor:
        return self.problem.grad(step, X)


def test_a_problem_with_gradients_alone_and_noise_by_step() -> None:
    data, _, x0 = least_squares(4)
    noisy = Quadratics(torch.from_numpy(data.hessians), torch.from_numpy(data.linear), noise=0.3, seed=5)
    runs = [
        simulate(problem, 4, "ring", steps=20, lr=0.02, x0=x0, speeds=[1.0, 2.0, 0.5, 1.0])
        for problem in (noisy, Plain(noisy))
    ]
    torch.testing.assert_close(runs[0].X, runs[1].X, rtol=1e-12, atol=1e-13)


def test_local_ranks_and_one_rank_go_at_their_own_speeds() -> None:
    data, problem, x0 = least_squares(3)
    path = simulate(problem, 3, algorithm="local", steps=10, lr=0.05, x0=x0, speeds=[1.0, 2.0, 0.5])
    for rank, steps in enumerate((10, 20, 5)):
        np.testing.assert_allclose(path.X[rank], oracle.local(data, x0, 0.05, steps)[-1][rank], rtol=1e-12, atol=1e-13)
    one = simulate(Quadratics.random(1, 3), 1, steps=4, lr=0.1, speeds=[2.0])
    assert torch.equal(one.X, simulate(Quadratics.random(1, 3), 1, steps=8, lr=0.1).X)


@pytest.mark.parametrize(
    ("arguments", "keywords", "text"),
    [
        (("ring", "extra"), {}, "'extra' does not work with speeds=: .*use awc or push_sum"),
        (("ring", "atc"), {}, "'atc' does not work with speeds="),
        (("one_peer_exponential",), {}, "one_peer_exponential.* does not work with speeds=: .*use a static"),
        (("ring",), {"global_average_every": 4}, "global_average_every does not work with speeds="),
        (("ring",), {"speeds": [1.0] * 3}, "one number for each of 4 ranks, got 3"),
        (("ring",), {"speeds": [1.0, 0.0, 1.0, 1.0]}, "positive and finite, got 0.0 for rank 1"),
        (("ring",), {"speeds": [1.0, 1.0, math.inf, 1.0]}, "positive and finite"),
        (("ring",), {"speeds": lambda rank, step: 1.0 - step}, "got 0.0 for rank 0 in step 1"),
        (("ring",), {"speeds": lognormal(0.1, speeds=[1.0] * 3)}, "3 medians, and none for rank 3"),
        (("ring",), {"delay": -1.0}, "delay must be finite and not negative"),
        (("ring",), {"delay": math.nan}, "delay must be finite and not negative"),
        (("ring",), {"delay": 1.0, "speeds": None}, "0 without speeds="),
        (("ring",), {"lr": lambda step: math.nan if step else 0.1}, "lr must be finite"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: tuple[str, ...], keywords: dict[str, Any], text: str) -> None:
    given_: dict[str, Any] = {"steps": 5, "lr": 0.1, "speeds": [1.0] * 4} | keywords
    with pytest.raises(ValueError, match=text):
        simulate(Quadratics.random(4, 3), 4, *arguments, **given_)


def test_further_refusals() -> None:
    with pytest.raises(TypeError, match=r"speeds are numbers.*got '1' for rank 0"):
        simulate(Quadratics.random(2, 3), 2, "ring", steps=1, lr=0.1, speeds=["1", 1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="sigma must be finite"):
        lognormal(-0.5)
    dead_end = topology.from_networkx(networkx.DiGraph([(0, 1), (1, 0), (0, 2)]))
    with pytest.raises(ValueError, match="strongly connected topology, but what rank"):
        simulate(Quadratics.random(3, 3), 3, dead_end, "push_sum", steps=1, lr=0.1, speeds=[1.0] * 3)


def test_the_default_topology_is_static() -> None:
    path = simulate(Quadratics.random(4, 3), 4, steps=10, lr=0.02, speeds=[1.0, 2.0, 1.0, 1.0])
    assert path.rank_steps[-1] == [10, 20, 10, 10]
