"""Sequences that end in the exact average, and how many rounds they take."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from support.mixing_matrices import assert_rounds_are, distance_to_mean, from_hops, product

import fusedfog.topology as ft
from fusedfog.topology import analysis

SIZES = [*range(1, 35), 63, 64, 65, 127, 128, 129]
"""Of all up to 130, those that are tried each time."""


@pytest.mark.parametrize("n", [pytest.param(n, marks=() if n in SIZES else pytest.mark.slow) for n in range(1, 131)])
def test_one_peer_exponential_is_exact_iff_power_of_two(n: int) -> None:
    topology = ft.one_peer_exponential(n)
    tau = math.ceil(math.log2(n))
    power = n == 2**tau
    assert topology.period == max(1, tau)
    for step in range(tau):
        np.testing.assert_allclose(topology.matrix(step), from_hops(n, {2**step}))
    for start in (0, 1, 5):
        assert (distance_to_mean(product(topology, tau, start)) < 1e-12) == power
    assert topology.rounds_to_exact(300) == (max(1, tau) if power else None)
    assert (topology.spectral_gap() == 1) == power


@pytest.mark.parametrize(
    ("n", "residual"),
    [(3, 0.25), (5, 0.202), (6, 0.2165), (7, 0.125), (9, 0.1175), (12, 0.209), (17, 0.0614), (24, 0.207)],
)
def test_residual_of_one_peer_exponential(n: int, residual: float) -> None:
    assert ft.one_peer_exponential(n).consensus_factor(math.ceil(math.log2(n))) == pytest.approx(residual, abs=6e-4)


@pytest.mark.parametrize("dimensions", range(7))
def test_one_peer_hypercube(dimensions: int) -> None:
    n = 2**dimensions
    topology = ft.one_peer_hypercube(n)
    assert topology.period == max(1, dimensions)
    for step in range(dimensions):
        expected = [[0.5 * (a == b or a == b ^ (1 << step)) for b in range(n)] for a in range(n)]
        np.testing.assert_array_equal(topology.matrix(step), expected)
        assert_rounds_are(topology, step, np.array(expected))
    assert topology.is_symmetric() and topology.is_doubly_stochastic()
    assert distance_to_mean(product(topology, max(1, dimensions), 3)) < 1e-12
    assert topology.rounds_to_exact() == max(1, dimensions)


LENGTHS = {
    1: "2:1 3:3 4:2 5:5 6:4 7:5 8:3 9:7 10:6 11:7 12:5 13:7 14:6 15:7 16:4 17:9 18:8 20:7 24:6 25:9 31:9 32:5",
    2: "3:1 4:2 5:3 6:2 7:4 8:3 9:2 10:4 12:3 16:4 27:3 32:5",
    3: "4:1 5:3 6:2 8:2 12:2 16:2 25:5 32:3",
}


@pytest.mark.parametrize(("k", "lengths"), LENGTHS.items())
def test_lengths_of_base_graph(k: int, lengths: str) -> None:
    expected = {int(n): int(length) for n, length in (pair.split(":") for pair in lengths.split())}
    assert {n: ft.base_graph(n, k).period for n in expected} == expected


def test_base_graph_takes_the_shorter_construction() -> None:
    # 22 = 4 * 5 + 2 takes 2 + 1 + 1 rounds; 2 copies of 11 = 2 * 5 + 1 would take as many, and one more between them.
    topology = ft.base_graph(22, 4)
    assert topology.period == 4
    np.testing.assert_allclose(product(topology, 4), np.full((22, 22), 1 / 22), atol=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", range(1, 41))
def test_base_graph_is_exact(n: int, k: int) -> None:
    topology = ft.base_graph(n, k)
    period = topology.period
    assert period is not None and period <= 2 * math.log(n, k + 1) + 2
    for step in range(period):
        weights = topology.matrix(step)
        np.testing.assert_allclose(weights, weights.T)
        assert ((weights != 0).sum(axis=1) - weights.diagonal().astype(bool)).max() <= k
    np.testing.assert_allclose(product(topology, period), np.full((n, n), 1 / n), atol=1e-15)
    assert topology.rounds_to_exact() == period
    assert topology.rounds_to_exact(period - 1) is None
    if period > 1:
        assert distance_to_mean(product(topology, period - 1)) > 1e-3


def test_base_graph_keeps_an_exact_mean_in_rational_arithmetic() -> None:
    topology = ft.base_graph(7, 1)
    values = [Fraction(3**rank) for rank in range(7)]
    mean = sum(values) / 7
    for step in range(topology.period or 0):
        rounds = [topology.round(rank, step) for rank in range(7)]
        values = [
            Fraction(one.self_weight).limit_denominator(50) * values[rank]
            + sum(Fraction(weight).limit_denominator(50) * values[peer] for peer, weight in one.recv.items())
            for rank, one in enumerate(rounds)
        ]
    assert values == [mean] * 7


def test_exactness_is_not_mere_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ft.ring(5).rounds_to_exact(2000) is None
    assert ft.equi_dynamic(5).rounds_to_exact(500) is None
    assert ft.ring(5).then(ft.fully_connected(5)).rounds_to_exact() == 2
    assert ft.ring(6).then(ft.grid(6)).then(ft.fully_connected(6)).rounds_to_exact() == 2
    monkeypatch.setattr(analysis, "LARGEST_DENSE_SPECTRUM", 4)
    assert ft.from_matrix(ft.ring(6).matrix()).then(ft.fully_connected(6)).rounds_to_exact() == 2
