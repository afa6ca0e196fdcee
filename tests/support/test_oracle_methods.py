"""The oracle held to the papers: tracking, push-sum, adaptive methods, compression, noise, and outer steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from support import oracle as o
from support.oracle_cases import EQUAL, PULL, PUSH, X0, A, D, N, P, W, same, still, warm_up
from support.problems import Quadratics, consensus_distance, least_squares

# ---- T10: tracking


@pytest.mark.parametrize("order", ["diging", "atc", "semi_atc"])
def test_trackers_keep_the_mean_gradient_and_reach_the_minimum(order: str) -> None:
    for w in (W, o.static_exponential(N), o.one_peer_exponential(N)):
        seen: list = []
        x = o.gradient_tracking(P, w, X0, 0.02, 3000, order, seen)[-1]
        assert P.error(x) < 1e-10
        same(np.array([y.mean(0) for y, _ in seen]), np.array([g.mean(0) for _, g in seen]), 1e-11)


@pytest.mark.parametrize("b", [0.0, 0.9])
def test_momentum_tracking_forms_agree(b: float) -> None:
    rate = warm_up(0.02)
    engine = o.momentum_tracking_engine(P, W, X0, rate, 200, b, 0.1)
    same(o.momentum_tracking(P, W, X0, rate, 200, b, 0.1), engine)
    if b == 0:
        same(o.gradient_tracking(P.with_decay(0.1), W, X0, rate, 200), engine)
    else:
        assert np.abs(o.momentum_tracking(P, W, X0, 0.02, 200, b, consensual_start=True)[-1] - engine[-1]).max() > 1e-6


@pytest.mark.parametrize("method", [o.momentum_tracking, o.momentum_tracking_engine])
def test_momentum_tracking_is_exact(method: Callable) -> None:
    for w, b in itertools.product((W, o.one_peer_exponential(N)), (0.0, 0.9)):
        assert P.error(method(P, w, X0, 0.015 * (1 - b), 5000, b)[-1]) < 1e-10


def test_engine_form_tracks_the_mean_momentum_over_any_graphs() -> None:
    seen: list = []
    o.momentum_tracking_engine(P, o.rhythm(o.one_peer_exponential(N), 2), X0, 0.002, 300, 0.9, 0.01, seen)
    same(np.array([y.mean(0) for y, _ in seen]), np.array([u.mean(0) for _, u in seen]), 1e-10)


def test_directed_tracking_is_exact() -> None:
    assert P.error(o.push_diging(P, PUSH, X0, 0.02, 3000)[-1]) < 1e-10
    assert P.error(o.push_pull(P, PULL, PUSH, X0, 0.02, 3000)[-1]) < 1e-10


# ---- T11: push-sum


def test_push_sum_averages_over_an_irregular_digraph() -> None:
    scalars: list = []
    z = o.push_sum(still, PUSH, X0, 0.0, 200, scalars=scalars)[-1]
    same(z, np.tile(X0.mean(0), (N, 1)))
    assert min(scalars[-1]) < 0.8 and max(scalars[-1]) > 1.2
    assert np.abs(o.run(X0, 200, lambda t, x: PULL @ x)[-1] - X0.mean(0)).max() > 0.1
    assert np.abs(o.run(X0, 200, lambda t, x: PUSH @ x)[-1] - X0.mean(0)).max() > 0.1


def test_push_sum_bias_is_linear_in_the_rate() -> None:
    err = [P.error(o.push_sum(P, PUSH, X0, a, int(30 / a))[-1]) for a in (0.02, 0.01, 0.005)]
    assert err[0] / err[1] == pytest.approx(2, rel=0.1) and err[1] / err[2] == pytest.approx(2, rel=0.1)
    assert err[2] < 0.05


@pytest.mark.parametrize("rule", [o.SGD(momentum=0.9, nesterov=True, weight_decay=0.1), o.Adam(decoupled=True)])
def test_push_sum_on_a_regular_graph_is_atc(rule: o.SGD | o.Adam) -> None:
    for w in (o.static_exponential(N), o.one_peer_exponential(N)):
        same(o.push_sum(P, w, X0, 0.01, 200, rule), o.atc(P, w, X0, 0.01, 200, rule))
    same(o.push_matrix(o.static_exponential(N)), o.static_exponential(N), 1e-15)


def test_push_sum_decays_the_unbiased_model() -> None:
    decayed = o.push_sum(P.with_decay(0.3), PUSH, X0, 0.02, 200)
    same(o.push_sum(P, PUSH, X0, 0.02, 200, o.SGD(weight_decay=0.3)), decayed)


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_overlapped_push_sum_conserves_mass(delay: int) -> None:
    totals: list = []
    z = o.overlap_push_sum(still, PUSH, X0, 0.0, 300 * delay, delay, totals)[-1]
    same(np.array([x for x, _ in totals]), np.tile(X0.sum(0), (len(totals), 1)), 1e-11)
    same(np.array([v for _, v in totals]), np.full(len(totals), float(N)), 1e-11)
    same(z, np.tile(X0.mean(0), (N, 1)))


def test_relay_sum_is_exact_on_trees() -> None:
    for edges in ([(i, i + 1) for i in range(7)], [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6), (3, 7)]):
        assert P.error(o.relay_sgd(P, edges, X0, 0.05, 2500)[-1]) < 1e-10


# ---- T12, T13: adaptive methods


def test_adams_bias_stays_while_communicate_then_adapt_shrinks() -> None:
    ams = o.Adam(amsgrad=True)
    for method in (o.atc, o.awc):
        assert min(P.mean_error(method(P, W, EQUAL, a, 6000, ams)[-1]) for a in (0.01, 0.003)) > 1.0
    for a in (0.01, 0.003):  # gt = 0 is D-SGD's fixed point, whatever the preconditioner
        same(o.dag_adam(P, W, EQUAL, a, 8000, ams)[-1], o.limit_atc(P, W, a), 1e-10)
    ratio = P.mean_error(o.limit_atc(P, W, 0.01)) / P.mean_error(o.limit_atc(P, W, 0.003))
    assert ratio == pytest.approx(10 / 3, rel=0.05)


def test_communicate_then_adapt_without_communication_is_adam() -> None:
    for rule in (o.Adam(weight_decay=0.1), o.Adam(weight_decay=0.1, decoupled=True, amsgrad=True)):
        same(o.dag_adam(P, np.eye(N), X0, 0.01, 60, rule), o.local(P, X0, 0.01, 60, rule), 1e-10)


def test_tracked_adam_is_exact_and_tracked_second_moment_nearly() -> None:
    seen: list = []
    assert P.error(o.gt_adam(P, W, X0, 0.003, 6000, trackers=seen)[-1]) < 1e-10
    same(np.array([y.mean(0) for y, _ in seen]), np.array([g.mean(0) for _, g in seen]), 1e-11)
    errors = [P.mean_error(o.decentralized_amsgrad(P, W, EQUAL, a, 8000)[-1]) for a in (0.01, 0.003)]
    assert errors[0] < 0.04 and errors[0] / errors[1] == pytest.approx(10 / 3, rel=0.1)


def test_quasi_global_adam_normalizes_the_move() -> None:
    """One hand-computed step from zero moments, then the moments by the second."""
    rule, a = o.Adam(betas=(0.9, 0.99), eps=0.0), 0.01
    x = o.quasi_global_adam(P, W, X0, a, 2, rule)
    g = P.grads(X0)
    same(x[1], W @ (X0 - a * 10 * np.sign(g)))  # m = g without (1 - b1), corrected by 1/(1 - b1) = 10
    d = (X0 - x[1]) / (np.linalg.norm(X0 - x[1], axis=1)[:, None] + 1e-8)
    g = P.grads(x[1])
    m, v = 0.9 * 0.1 * d + g, 0.99 * 0.01 * d**2 + 0.01 * g**2
    same(x[2], W @ (x[1] - a * (m / (1 - 0.9**2)) / np.sqrt(v / (1 - 0.99**2))))


def test_accumulated_adam() -> None:
    for decoupled in (False, True):
        options = {"betas": (0.9, 0.99), "weight_decay": 0.1, "decoupled": decoupled}
        accumulated = o.awc(P, W, X0, 0.01, 100, o.AccumAdam(1, **options))
        same(accumulated, o.awc(P, W, X0, 0.01, 100, o.Adam(**options)))
    g = np.array([[3.0, -0.2]])
    for s in (1, 3):
        x = o.local(lambda t, x: g, np.zeros((1, 2)), 0.01, 20, o.AccumAdam(s, eps=0.0))
        same(np.diff(x, axis=0), np.broadcast_to(-0.01 * np.sign(g), (20, 1, 2)))


def test_accumulated_adam_commits_the_mean_gradient_every_s_steps() -> None:
    g = [np.array([[v]]) for v in (1.0, 3.0, -2.0)]
    x = o.local(lambda t, x: g[t], np.zeros((1, 1)), 0.1, 3, o.AccumAdam(2, (0.9, 0.99), 0.0))
    same(x[1:3, 0, 0], np.array([-0.1, -0.2]))  # provisional: k = 1 and zero moments make each a full Adam step
    m, v = 0.1 * 2.0, 0.01 * 2.0**2  # the mean of 1 and 3
    m, v = (0.9 * m + 0.1 * -2.0) / (1 - 0.9**2), (0.99 * v + 0.01 * 4.0) / (1 - 0.99**2)
    assert x[3, 0, 0] - x[2, 0, 0] == pytest.approx(-0.1 * m / np.sqrt(v), abs=1e-13)


# ---- T14, T15 and rhythms


@pytest.mark.parametrize(("k", "gamma"), [(10, 0.2), (2, 0.2), (1, 0.05)])
def test_compressed_gossip_has_the_lazy_limit(k: int, gamma: float) -> None:
    lazy = (1 - gamma) * np.eye(N) + gamma * W
    same(o.choco(P, W, X0, A, 8000, gamma, o.top_k(k))[-1], o.limit_atc(P, lazy, A), 1e-9)


def test_compressed_gossip_sends_what_the_others_do_not_know_yet() -> None:
    same(o.choco(P, W, X0, A, 50, 0.2, o.top_k(D)), o.atc(P, 0.8 * np.eye(N) + 0.2 * W, X0, A, 50))
    x, half = o.choco(P, W, X0, A, 1, 0.2, o.top_k(2))[1], X0 - A * P.grads(X0)
    known = np.where(np.abs(half) >= np.sort(np.abs(half))[:, -2:-1], half, 0.0)
    same(x, half + 0.2 * (W @ known - known))


def steady_error(method: Callable, problem: Quadratics, w: np.ndarray, a: float) -> float:
    x = method(problem.noisy(1.0), w, np.tile(problem.x_star, (problem.n, 1)), a, 5000)[1000:]
    return float(((x - problem.x_star) ** 2).sum(-1).mean())


def test_exact_diffusion_under_noise() -> None:
    """Far better on a sparse heterogeneous graph, somewhat worse on a homogeneous or nearly complete one."""
    n, a = 20, 0.05
    different, alike = (least_squares(n, 5, 20, noise=0.0, spread=s) for s in (1.0, 0.0))
    ring, dense = o.ring(n), 0.9 * o.complete(n) + 0.1 * np.eye(n)
    ed = {name: steady_error(o.exact_diffusion, p, ring, a) for name, p in (("het", different), ("hom", alike))}
    assert steady_error(o.atc, different, ring, a) / ed["het"] > 7
    assert ed["het"] == pytest.approx(ed["hom"], rel=1e-6)  # independent of b2
    assert 1.1 < ed["hom"] / steady_error(o.atc, alike, ring, a) < 1.9
    dense_ratio = steady_error(o.exact_diffusion, different, dense, a) / steady_error(o.atc, different, dense, a)
    assert 1.1 < dense_ratio < 2


@pytest.mark.parametrize(("h", "value"), [(2, 1.19e-3), (6, 4.16e-3), (12, 6.53e-3), (48, 9.54e-3)])
def test_gossip_pga_errors(h: int, value: float) -> None:
    x = o.atc(P, o.rhythm(W, average_every=h), X0, A, 6000 // h * h)[-1]
    assert P.error(x) == pytest.approx(value, abs=6e-6)


@pytest.mark.parametrize(("h", "full", "gossip"), [(2, 2.4e-3, 0.0791), (4, 7.3e-3, 0.151), (8, 1.69e-2, 0.278)])
def test_local_sgd_errors(h: int, full: float, gossip: float) -> None:
    assert P.error(o.atc(P, o.rhythm(o.complete(N), h), X0, A, 6000)[-1]) == pytest.approx(full, rel=0.012)
    assert P.error(o.atc(P, o.rhythm(W, h), X0, A, 6000)[-1]) == pytest.approx(gossip, rel=0.003)


def test_slow_momentum_keeps_the_limit_of_periodic_averaging() -> None:
    for b in (0.0, 0.7):
        x = o.with_outer(P, X0, A, 6000, 12, o.SlowMo(b), w=W)[-1]
        assert P.error(x) == pytest.approx(6.533e-3, abs=1e-6)


def test_outer_steps_against_torch() -> None:
    """DiLoCo's outer optimizer is torch.optim.SGD(nesterov) on the mean of phi - theta."""
    ours = o.with_outer(P, EQUAL, 0.02, 40, 8, o.DiLoCo(0.7, 0.9), o.Adam())
    phi = torch.tensor(EQUAL[0], requires_grad=True)
    outer, inner = torch.optim.SGD([phi], 0.7, momentum=0.9, nesterov=True), o.Adam().start()
    for _ in range(5):
        theta = np.tile(phi.detach().numpy(), (N, 1))
        for _ in range(8):
            theta = inner(theta, P.grads(theta), 0.02)
        phi.grad = phi.detach() - torch.tensor(theta.mean(0))
        outer.step()
    same(ours[-1], np.tile(phi.detach().numpy(), (N, 1)))
    gossip = o.with_outer(P, EQUAL, 0.02, 40, 8, o.DiLoCo(0.7, 0.9, w=o.complete(N)), o.Adam())
    same(gossip, ours)
    plain = o.with_outer(P, EQUAL, 0.02, 24, 8, o.DiLoCo(1.0, 0.0))
    same(plain, o.atc(P, o.rhythm(o.complete(N), 8), EQUAL, 0.02, 24))


def test_noloco_consensus() -> None:
    rng = np.random.default_rng(0)
    pairs = [rng.permutation(N).reshape(-1, 2) for _ in range(400)]

    def w(k: int) -> np.ndarray:
        matrix = np.zeros((N, N))
        for i, j in pairs[k]:
            matrix[np.ix_([i, j], [i, j])] = 0.5
        return matrix

    for mu, contracts in ((0.0, True), (0.3, True), (0.5, True), (0.9, False)):
        x = o.with_outer(still, X0, 0.0, 400, 1, o.NoLoCo(w, 0.7, mu))[-1]
        assert (consensus_distance(x) < 1e-12) is contracts
        same(x.mean(0), X0.mean(0), 1e-10)
