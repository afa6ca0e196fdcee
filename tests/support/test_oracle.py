"""The oracle held to the papers: its inner steps, D-SGD, momentum, exact diffusion, and where methods must coincide."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from support import oracle as o
from support.oracle_cases import EQUAL, PULL, PUSH, SYMMETRIC_EXP, X0, A, D, N, P, W, same, still, warm_up
from support.problems import consensus_distance, equal_data

# ---- the ground it stands on


def test_oracle_needs_neither_torch_nor_fusedfog() -> None:
    code = "import sys; from support import oracle; print(sorted({'torch', 'fusedfog', 'kernels'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


def test_standard_problem() -> None:
    assert P.smoothness == pytest.approx(2.68, abs=5e-3)
    assert P.convexity == pytest.approx(0.569, abs=5e-4)
    assert P.heterogeneity == pytest.approx(13.5, abs=0.05)
    assert np.linalg.norm(W - 1 / N, 2) == pytest.approx(0.804738, abs=1e-6)
    same(P.grads(np.tile(P.x_star, (N, 1))).mean(0), np.zeros(D))
    same(P.grads(X0)[3], P.grad(3, X0[3]))


def test_gradient_is_the_derivative_of_the_loss() -> None:
    def loss(x: np.ndarray) -> float:
        return 0.5 * x @ P.hessians[2] @ x - P.linear[2] @ x

    h = 1e-5
    numeric = [(loss(X0[2] + h * e) - loss(X0[2] - h * e)) / (2 * h) for e in np.eye(D)]
    same(P.grad(2, X0[2]), np.array(numeric), 1e-8)


def test_matrices_are_stochastic_as_named() -> None:
    hyper, one_peer = o.one_peer_hypercube(8), o.one_peer_exponential(8)
    for w in (W, o.complete(5), o.static_exponential(12), SYMMETRIC_EXP, hyper(1), one_peer(2), PUSH):
        same(w.sum(0), np.ones(len(w)), 1e-15)
    for w in (W, o.static_exponential(12), one_peer(2), PULL):
        same(w.sum(1), np.ones(len(w)), 1e-15)
    assert np.abs(PUSH.sum(1) - 1).max() > 0.2 and np.abs(PULL.sum(0) - 1).max() > 0.2
    assert one_peer(1)[5, 3] == 0.5 and one_peer(4)[5, 3] == 0.5  # from i - 2^(t mod tau)
    same(hyper(2) @ hyper(0) @ hyper(1), o.complete(8), 1e-15)
    same(one_peer(2) @ one_peer(3) @ one_peer(1), o.complete(8), 1e-15)


def test_rhythm_counts_exchanges_as_rounds() -> None:
    seen = o.rhythm(lambda t: np.full((2, 2), t), every=3, average_every=4)
    expected = [np.eye(2), np.eye(2), 0.0, 0.5, np.eye(2), 1.0, np.eye(2), 0.5, 2.0]
    for t, value in enumerate(expected):
        same(seen(t), np.broadcast_to(value, (2, 2)))


SGD_OPTIONS = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": wd, "maximize": mx}
    for m, d, n, wd, mx in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True))
    if not (n and (m == 0 or d))
]
ADAM_OPTIONS = [
    {"betas": (0.8, 0.95), "weight_decay": wd, "amsgrad": ams, "maximize": mx}
    for wd, ams, mx in itertools.product((0.0, 0.1), (False, True), (False, True))
]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_inner_steps_are_torchs(kind: str) -> None:
    for options in SGD_OPTIONS if kind == "SGD" else ADAM_OPTIONS:
        rule = o.SGD(**options) if kind == "SGD" else o.Adam(**options, decoupled=kind == "AdamW")
        ours = o.local(P, X0, warm_up(0.05), 60, rule)
        x = torch.tensor(X0, requires_grad=True)
        optimizer = getattr(torch.optim, kind)([x], lr=0.05, **options)
        for t in range(60):
            optimizer.param_groups[0]["lr"] = warm_up(0.05)(t)
            x.grad = torch.tensor(P.grads(x.detach().numpy()))
            optimizer.step()
        assert np.abs(ours[-1] - X0).max() > 1e-2
        np.testing.assert_allclose(ours[-1], x.detach().numpy(), rtol=1e-12, atol=1e-12, err_msg=str(options))


# ---- T6: limits of D-SGD


@pytest.mark.parametrize(
    ("a", "atc", "awc"),
    [
        (0.04, 0.2813, 0.3572),
        (0.02, 0.1517, 0.1955),
        (0.01, 0.0790, 0.1027),
        (0.005, 0.04034, 0.05268),
        (0.0025, 0.02039, 0.02670),
    ],
)
def test_published_errors_on_the_ring(a: float, atc: float, awc: float) -> None:
    digits = 0.51e-4 if a > 0.005 else 0.6e-5
    assert P.error(o.limit_atc(P, W, a)) == pytest.approx(atc, abs=digits)
    assert P.error(o.limit_awc(P, W, a)) == pytest.approx(awc, abs=digits)


def test_recursions_reach_their_linear_solves() -> None:
    for w in (W, o.static_exponential(N)):
        same(o.atc(P, w, X0, 0.01, 6000)[-1], o.limit_atc(P, w, 0.01), 1e-10)
        same(o.awc(P, w, X0, 0.01, 6000)[-1], o.limit_awc(P, w, 0.01), 1e-10)
        same(o.cta(P, w, X0, 0.01, 6000)[-1], o.limit_cta(P, w, 0.01), 1e-10)
        same(w @ o.limit_cta(P, w, 0.01), o.limit_atc(P, w, 0.01), 1e-12)
    assert np.abs(o.limit_awc(P, W, 0.01) - o.limit_atc(P, W, 0.01)).max() > 1e-2


def test_halving_the_rate_halves_the_error() -> None:
    err = [P.error(o.limit_atc(P, W, a)) for a in (0.01, 0.005, 0.0025)]
    assert err[0] / err[1] == pytest.approx(1.958, abs=6e-4)
    assert err[1] / err[2] == pytest.approx(1.979, abs=6e-4)


def test_published_errors_on_other_graphs() -> None:
    assert P.error(o.limit_atc(P, o.complete(N), A)) < 1e-12
    # The published value belongs to the other edge direction: node i hears i + 2^k.
    assert P.error(o.limit_atc(P, o.static_exponential(N).T, A)) == pytest.approx(0.0083, abs=5e-5)
    for w, value in ((o.one_peer_exponential(N), 0.0160), (o.one_peer_hypercube(N), 0.0155)):
        cycle = o.atc(P, w, X0, A, 6000)[-3:]  # the limit is a cycle of the period's length
        assert np.mean([P.error(x) for x in cycle]) == pytest.approx(value, rel=0.015)


def test_row_stochastic_weights_go_to_the_perron_weighted_minimum() -> None:
    values, vectors = np.linalg.eig(PULL.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    x = o.atc(P, PULL, X0, 0.001, 20000)[-1].mean(0)
    to_weighted = np.linalg.norm(x - P.minimiser(pi / pi.sum()))
    assert np.linalg.norm(x - P.x_star) > 20 * to_weighted
    assert to_weighted < 1e-2


def test_weight_decay_acts_on_the_unmixed_model() -> None:
    decayed = P.with_decay(0.3)
    same(o.awc(P, W, X0, 0.02, 300, o.SGD(weight_decay=0.3))[-1], o.awc(decayed, W, X0, 0.02, 300)[-1])
    step = o.awc(still, W, X0, 0.1, 1, o.Adam(weight_decay=0.5, decoupled=True))[1]
    same(step, W @ X0 - 0.1 * 0.5 * X0)


# ---- T7, T8: momentum


@pytest.mark.parametrize(("b", "dmsgd", "awc"), [(0.5, 0.0790, 0.1027), (0.8, 0.186, 0.239), (0.9, 0.339, 0.428)])
def test_momentum_limits(b: float, dmsgd: float, awc: float) -> None:
    rule, far, near = o.SGD(momentum=b), A / (1 - b), o.limit_atc(P, W, A)
    same(o.atc(P, W, X0, A, 6000, rule)[-1], o.limit_atc(P, W, far), 1e-10)
    same(o.awc(P, W, X0, A, 6000, rule)[-1], o.limit_awc(P, W, far), 1e-10)
    assert P.error(o.limit_atc(P, W, far)) == pytest.approx(dmsgd, abs=6e-4)
    assert P.error(o.limit_awc(P, W, far)) == pytest.approx(awc, abs=6e-4)
    same(o.decentlam(P, W, X0, A, 8000, b)[-1], near, 1e-10)
    same(o.quasi_global(P, W, X0, A, 8000, b)[-1], near, 1e-10)
    # At rest mh = 0 and m = g, so the Nesterov variant moves by g + b m = (1 + b) g: its limit does depend on b.
    same(o.quasi_global(P, W, X0, A, 8000, b, True)[-1], o.limit_atc(P, W, A * (1 + b)), 1e-10)


def test_momentum_error_on_one_peer() -> None:
    cycle = o.atc(P, o.one_peer_exponential(N), X0, A, 3000, o.SGD(momentum=0.9))[-3:]
    assert np.mean([P.error(x) for x in cycle]) == pytest.approx(0.154, rel=0.015)


@pytest.mark.parametrize("rate", [0.02, warm_up(0.05)], ids=["constant", "schedule"])
def test_decentlam_forms_agree(rate: float | Callable[[int], float]) -> None:
    for b, wd in ((0.0, 0.0), (0.9, 0.1)):
        paper = o.decentlam(P, W, X0, rate, 150, b, wd)
        same(paper, o.decentlam_heavy_ball(P, W, X0, rate, 150, b, wd))
    same(o.decentlam(P, W, X0, rate, 150), o.atc(P, W, X0, rate, 150))
    same(o.quasi_global(P, W, X0, rate, 150), o.atc(P, W, X0, rate, 150))


def test_zero_rate_mixes_and_forgets_nothing() -> None:
    """A pause of k steps at lr = 0 under W = I is as if the steps had not been."""

    def paused(t: int) -> float:
        return 0.0 if 20 <= t < 25 else 0.02

    def w(t: int) -> np.ndarray:
        return np.eye(N) if 20 <= t < 25 else W

    def names(w: o.Mixing, rate: Callable, steps: int) -> list[np.ndarray]:
        return [
            o.decentlam(P, w, X0, rate, steps, 0.9)[-1],
            o.decentlam_heavy_ball(P, w, X0, rate, steps, 0.9)[-1],
            o.quasi_global(P, w, X0, rate, steps, 0.9, True)[-1],
            o.dag_adam(P, w, X0, rate, steps)[-1],
            o.quasi_global_adam(P, w, X0, rate, steps)[-1],
        ]

    for with_pause, without in zip(names(w, paused, 45), names(W, lambda t: 0.02, 40), strict=True):
        same(with_pause, without)
    for x in (o.decentlam(P, W, X0, lambda t: 0.0, 1, 0.9), o.dag_adam(P, W, X0, lambda t: 0.0, 1)):
        same(x[1], W @ X0)


def test_decentlam_needs_symmetric_static_weights() -> None:
    for w in (o.static_exponential(N), o.one_peer_exponential(N), o.one_peer_hypercube(N)):
        assert P.error(o.decentlam(P, w, X0, A, 600, 0.9)[-1]) > 1e3
        assert P.error(o.quasi_global(P, w, X0, A, 6000, 0.9)[-1]) < 0.02
    for b in (0.9, 0.99):
        same(o.decentlam(P, SYMMETRIC_EXP, X0, A, 8000, b)[-1], o.limit_atc(P, SYMMETRIC_EXP, A), 1e-10)


# ---- T9: exact diffusion and EXTRA


@pytest.mark.parametrize("rate", [0.05, warm_up(0.2)], ids=["constant", "schedule"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_exact_diffusion_forms_agree(rate: float | Callable[[int], float], momentum: float) -> None:
    rule = o.SGD(momentum=momentum, weight_decay=0.1)
    psi = o.exact_diffusion(P, W, X0, rate, 150, rule)
    same(psi, o.d2(P, W, X0, rate, 150, rule))
    same(psi, o.exact_diffusion_dual(P, W, X0, rate, 150, rule))
    same(psi[1], o.atc(P, o.lazy(W), X0, rate, 1, rule)[1])
    one_state = o.extra_one_state(P, W, X0, rate, 150, rule)
    same(o.extra(P, W, X0, rate, 150, rule), one_state)
    same(one_state[1], o.awc(P, W, X0, rate, 1, rule)[1])


@pytest.mark.parametrize("method", [o.exact_diffusion, o.d2, o.exact_diffusion_dual, o.extra, o.extra_one_state])
def test_exact_methods_reach_the_minimum_also_after_a_drop_of_the_rate(method: Callable) -> None:
    def drop(t: int) -> float:
        return 0.1 if t < 300 else 0.01

    for rate, rule in ((0.05, o.SGD()), (drop, o.SGD()), (0.01, o.SGD(momentum=0.8))):
        assert P.error(method(P, W, X0, rate, 4500, rule)[-1]) < 1e-8


def test_exact_diffusion_stability_edge() -> None:
    """lambda_min(W) > -1/3: the ring with side weights .33 converges, .34 does not; (I+W)/2 mends .45."""
    for side, lazily, converges in (
        (0.33, False, True),
        (0.34, False, False),
        (0.45, False, False),
        (0.45, True, True),
    ):
        with np.errstate(over="ignore", invalid="ignore"):
            x = o.exact_diffusion(P, o.ring(N, 1 - 2 * side), X0, 0.05, 4000, lazily=lazily)[-1]
        assert (P.error(x) < 1e-6) is converges


def test_single_precision_drift() -> None:
    """The consensus mean integrates rounding: textbook forms drift linearly, the dual-difference form does not."""
    p32, w32, x32 = P.astype(np.float32), W.astype(np.float32), EQUAL.astype(np.float32)
    textbook = o.exact_diffusion(p32, w32, x32, A, 20000)
    dual = o.exact_diffusion_dual(p32, w32, x32, A, 20000)
    assert textbook.dtype == dual.dtype == np.float32
    assert P.mean_error(textbook[-1].astype(float)) > 1e-2
    assert P.mean_error(dual[-1].astype(float)) < 1e-4
    assert P.mean_error(dual[-1].astype(float)) < 3 * P.mean_error(dual[4000].astype(float))


def test_local_steps_break_the_methods_that_remember_the_graph() -> None:
    w = o.rhythm(W, 8)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not P.error(o.extra(P, w, X0, 0.05, 4000)[-1]) < 1e3
        assert not P.error(o.decentlam(P, w, X0, 0.05, 4000, 0.9)[-1]) < 1e3
    assert P.error(o.momentum_tracking_engine(P, w, X0, 0.005, 6000, 0.5)[-1]) < 1e-8


# ---- T16, T17: where methods must coincide


def test_complete_graph_is_data_parallel() -> None:
    w, rate = o.complete(N), warm_up(0.05)
    for rule in (o.SGD(), o.SGD(momentum=0.9, weight_decay=0.1), o.SGD(momentum=0.9, nesterov=True)):
        same(o.atc(P, w, EQUAL, rate, 150, rule), o.allreduce(P, EQUAL, rate, 150, rule))
    together = o.allreduce(P, EQUAL, rate, 150, o.SGD(momentum=0.9, weight_decay=0.1))
    # A rate of zero stops DecentLaM's momentum, not torch's: compare from where the schedule is positive.
    constant = o.allreduce(P, EQUAL, 0.05, 150, o.SGD(momentum=0.9, weight_decay=0.1))
    same(o.decentlam(P, w, EQUAL, 0.05, 150, 0.9, 0.1), constant)
    assert np.abs(o.decentlam(P, w, EQUAL, rate, 150, 0.9, 0.1)[-1] - together[-1]).max() > 1e-6
    same(o.quasi_global(P, w, EQUAL, rate, 150), o.allreduce(P, EQUAL, rate, 150))


def test_quasi_global_on_the_complete_graph_is_its_own_single_node_run_on_the_mean_gradient() -> None:
    """Not heavy-ball SGD: mh+ = (1 - (1-b)^2) mh + (1-b) g has another memory, though the same total gain 1/(1-b)."""
    w = o.complete(N)

    def mean(t: int, x: np.ndarray) -> np.ndarray:
        return P.grads(np.tile(x, (N, 1))).mean(0, keepdims=True)

    for nesterov in (False, True):
        alone = o.quasi_global(mean, np.eye(1), EQUAL[:1], 0.05, 150, 0.9, nesterov)
        same(o.quasi_global(P, w, EQUAL, 0.05, 150, 0.9, nesterov), np.repeat(alone, N, 1))
        heavy_ball = o.allreduce(P, EQUAL, 0.05, 150, o.SGD(momentum=0.9, nesterov=nesterov))
        assert np.abs(heavy_ball[5] - alone[5]).max() > 1e-2


def test_exact_methods_agree_on_the_complete_graph_and_awc_keeps_a_distance() -> None:
    w = o.complete(N)
    for x in (o.exact_diffusion(P, w, X0, 0.05, 3000), o.extra(P, w, X0, 0.05, 3000)):
        assert P.error(x[-1]) < 1e-8
    assert P.error(o.gradient_tracking(P, w, X0, 0.05, 3000)[-1]) < 1e-8
    assert consensus_distance(o.limit_awc(P, w, 0.04)) == pytest.approx(0.16, rel=0.15)
    assert consensus_distance(o.limit_atc(P, w, 0.04)) < 1e-12


def test_equal_data_is_one_node() -> None:
    p = equal_data(N, D)
    b, a, rule = 0.9, 0.02, o.SGD(momentum=0.9)
    one = o.local(p, EQUAL, a, 150, rule)
    for x in (
        o.awc(p, W, EQUAL, a, 150, rule),
        o.atc(p, W, EQUAL, a, 150, rule),
        o.decentlam(p, W, EQUAL, a, 150, b),
        o.exact_diffusion(p, W, EQUAL, a, 150, rule),
        o.extra(p, W, EQUAL, a, 150, rule),
        o.momentum_tracking(p, W, EQUAL, a, 150, b),
        o.push_sum(p, o.static_exponential(N), EQUAL, a, 150, rule),
    ):
        same(x, one)
    adam = o.local(p, EQUAL, a, 150, o.Adam())
    same(o.awc(p, W, EQUAL, a, 150, o.Adam()), adam)
    same(o.gt_adam(p, W, EQUAL, a, 150), adam, 1e-8)
    # Weights that are powers of two keep equal rows equal to the last bit, so nothing is there to be amplified.
    same(o.dag_adam(p, o.ring(N, 0.5), EQUAL, a, 150), adam)
    for x in (o.quasi_global(p, W, EQUAL, a, 150, b), o.quasi_global_adam(p, W, EQUAL, a, 150)):
        assert consensus_distance(x[-1]) < 1e-12


def test_communicate_then_adapt_amplifies_small_disagreement() -> None:
    """Where sqrt(v) < (1 - lambda_min(W)) / 2 the term (I - W) x / a overshoots: rounding grows to a visible distance.

    So this method alone is not the single-node optimizer on equal data, and is only comparable with an oracle for as
    long as rounding has not grown.
    """
    p = equal_data(N, D)
    x = o.dag_adam(p, W, EQUAL, 0.02, 60)
    assert consensus_distance(x[1]) < 1e-14
    assert consensus_distance(x[20]) > 1e-5
    assert max(consensus_distance(step) for step in o.awc(p, W, EQUAL, 0.02, 60, o.Adam())) < 1e-14
