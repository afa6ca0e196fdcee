"""Spectral gaps, consensus factors and smallest eigenvalues against formulas and dense linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.mixing_matrices import distance_to_mean, product

import fusedfog.topology as ft
from fusedfog.topology import Topology, analysis


@pytest.mark.parametrize("n", range(2, 130))
def test_gap_of_exponential(n: int) -> None:
    gap, formula = ft.exponential(n).spectral_gap(), 2 / (1 + math.ceil(math.log2(n)))
    if n % 2 == 0:
        assert gap == pytest.approx(formula, abs=1e-12)
    else:
        assert 0.084 <= gap - formula <= 0.334


@pytest.mark.parametrize(
    ("topology", "rho"),
    [
        (ft.ring(8), 0.804738),
        (ft.ring(16), 0.949253),
        (ft.ring(32), 0.987190),
        (ft.ring(9, "right"), math.cos(math.pi / 9)),
        (ft.star(10), 0.9),
        (ft.star(2), 0.0),
        (ft.fully_connected(6), 0.0),
        (ft.exponential(5), 0.25),
        (ft.exponential(7), 1 - 0.646447),
    ],
)
def test_known_second_eigenvalues(topology: Topology, rho: float) -> None:
    assert 1 - topology.spectral_gap() == pytest.approx(rho, abs=1e-6)
    assert topology.consensus_factor(1) == pytest.approx(rho, abs=1e-6)


@pytest.mark.parametrize(
    "topology",
    [
        ft.grid(30),
        ft.star(11),
        ft.ring(10),
        ft.exponential(11),
        ft.inner_outer_ring(3, 3),
        ft.one_peer_exponential(12),
        ft.ring(9).then(ft.grid(9)),
        ft.one_peer(ft.star(5)),
        ft.exponential(12).lazy(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("largest_dense", [analysis.LARGEST_DENSE_SPECTRUM, 4])
def test_figures_equal_dense_linear_algebra(
    topology: Topology, largest_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "LARGEST_DENSE_SPECTRUM", largest_dense)
    period = topology.period
    assert period is not None
    whole = product(topology, period)
    rho = np.sort(np.abs(np.linalg.eigvals(whole)))[-2]
    assert topology.spectral_gap() == pytest.approx(1 - rho ** (1 / period), abs=1e-8)
    for steps, start in ((1, 0), (3, 2)):
        expected = distance_to_mean(product(topology, steps, start))
        assert topology.consensus_factor(steps, start) == pytest.approx(expected, abs=1e-8)
    if period == 1 and topology.is_symmetric():
        expected = np.linalg.eigvalsh(topology.matrix())[0]
        assert topology.smallest_eigenvalue() == pytest.approx(expected, abs=1e-8)
    assert topology.rounds_to_exact() is None


def test_even_ring_is_at_the_edge_of_exact_diffusion() -> None:
    assert ft.ring(8).smallest_eigenvalue() == pytest.approx(-1 / 3)
    assert ft.ring(8).lazy().smallest_eigenvalue() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="not static and symmetric"):
        ft.exponential(8).smallest_eigenvalue()


def test_sparse_solver_takes_over_when_large() -> None:
    line = ft.grid(2053)  # prime, so a path: its matrix is I - L/3 with L the path's Laplacian
    expected = 1 - (2 - 2 * np.cos(np.pi * np.arange(2053) / 2053)) / 3
    assert line.smallest_eigenvalue() == pytest.approx(expected[-1], abs=1e-8)
    assert line.spectral_gap() == pytest.approx(1 - expected[1], abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 8, 9, 50])
def test_gap_of_random_sequences_is_the_expected_contraction(n: int) -> None:
    hops = [0.5 * np.eye(n) + 0.5 * (np.eye(n) / n + (n - 1) / n * np.roll(np.eye(n), a, axis=0)) for a in range(1, n)]
    second_moment = np.mean([W.T @ W for W in hops], axis=0) - 1 / n
    assert ft.equi_dynamic(n).spectral_gap() == pytest.approx(1 - np.linalg.norm(second_moment, 2) ** 0.5, abs=1e-12)
    together = 1 / (n - 1) if n % 2 == 0 else 1 / n  # chance that two given ranks are paired
    expected = np.full((n, n), together / 2)
    np.fill_diagonal(expected, 1 - (n - 1) * together / 2)
    assert ft.random_matching(n).spectral_gap() == pytest.approx(
        1 - max(0.0, np.linalg.norm(expected - 1 / n, 2)) ** 0.5, abs=1e-7
    )


def test_random_draws_are_what_they_say() -> None:
    matching = ft.random_matching(7, seed=3)
    partners = np.zeros((7, 7))
    for step in range(4200):
        for rank in range(7):
            one = matching.round(rank, step)
            for peer in one.recv:
                partners[rank, peer] += 1
    off_diagonal = partners[~np.eye(7, dtype=bool)]
    assert abs(off_diagonal / 4200 - 1 / 7).max() < 0.03
    hops = [next(iter(ft.equi_dynamic(6, 1).round(0, step).send)) for step in range(1000)]
    assert {hop: pytest.approx(200, abs=60) for hop in range(1, 6)} == {hop: hops.count(hop) for hop in range(1, 6)}
    one = ft.equi_dynamic(6, 1).round(2, 5)
    assert one.self_weight == pytest.approx(0.5 + 1 / 12) and list(one.recv.values()) == pytest.approx([5 / 12])
    assert not np.array_equal(ft.random_matching(8, 1).matrix(0), ft.random_matching(8, 2).matrix(0))
