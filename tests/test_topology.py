"""Every topology, every size: stochasticity, rounds against matrices, spectra, fingerprints."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedfog.topology as ft
from fusedfog.topology import Topology, analysis

SIZES = st.integers(1, 130)
EVERY_SIZE: dict[str, Callable[[int], Topology]] = {
    "ring": ft.ring,
    "ring left": lambda n: ft.ring(n, "left"),
    "ring right": lambda n: ft.ring(n, direction="right"),
    "star": ft.star,
    "star off centre": lambda n: ft.star(n, center=n - 1),
    "grid": ft.grid,
    "fully_connected": ft.fully_connected,
    "exponential": ft.exponential,
    "exponential 3": lambda n: ft.exponential(n, base=3),
    "symmetric_exponential": ft.symmetric_exponential,
    "one_peer ring": lambda n: ft.one_peer(ft.ring(n)),
    "one_peer exponential": lambda n: ft.one_peer(ft.exponential(n)),
    "one_peer_exponential": ft.one_peer_exponential,
    "base_graph": ft.base_graph,
    "base_graph 2": lambda n: ft.base_graph(n, 2),
    "base_graph 5": lambda n: ft.base_graph(n, max_degree=5),
    "equi_dynamic": lambda n: ft.equi_dynamic(n, 7),
    "random_matching": lambda n: ft.random_matching(n, 7),
    "lazy": lambda n: ft.one_peer_exponential(n).lazy(),
    "then": lambda n: ft.ring(n).then(ft.base_graph(n)),
    "random then star": lambda n: ft.random_matching(n, 1).then(ft.star(n)),
}
SYMMETRIC = {
    *("ring", "star", "star off centre", "grid", "fully_connected", "symmetric_exponential"),
    *("base_graph", "base_graph 2", "base_graph 5", "random_matching", "then", "random then star"),
}
SOME_ROUNDS = 13


def steps_of(topology: Topology) -> range:
    return range(SOME_ROUNDS if topology.period is None else min(SOME_ROUNDS, topology.period))


def product(topology: Topology, steps: int, start: int = 0) -> np.ndarray:
    result = np.eye(topology.size)
    for step in range(start, start + steps):
        result = topology.matrix(step) @ result
    return result


def distance_to_mean(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix - 1 / len(matrix), 2))


def assert_rounds_are(topology: Topology, step: int, weights: np.ndarray) -> None:
    """Every rank's round holds its row and its column, off-diagonal zeros left out, in ascending order."""
    n = topology.size
    for rank in range(n):
        one = topology.round(rank, step)
        assert one.self_weight == pytest.approx(weights[rank, rank], abs=1e-15)
        for found, expected in ((one.recv, weights[rank, :]), (one.send, weights[:, rank])):
            edges = [peer for peer in np.flatnonzero(expected) if peer != rank]
            assert list(found) == edges
            assert list(found.values()) == pytest.approx(expected[edges], abs=1e-15)


@pytest.mark.parametrize("kind", EVERY_SIZE)
@settings(max_examples=12, deadline=None)
@given(n=SIZES)
def test_rounds_matrices_and_promises_agree(kind: str, n: int) -> None:
    topology = EVERY_SIZE[kind](n)
    assert topology.size == n
    assert topology.is_doubly_stochastic()
    if kind in SYMMETRIC:
        assert topology.is_symmetric()
    degree = 0
    symmetric = True
    for step in steps_of(topology):
        weights = topology.matrix(step)
        assert weights.dtype == np.float64 and (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
        assert_rounds_are(topology, step, weights)
        symmetric &= bool(np.allclose(weights, weights.T, atol=1e-12))
        off_diagonal = (weights - np.diag(weights.diagonal())) != 0
        degree = max(degree, off_diagonal.sum(axis=0).max(), off_diagonal.sum(axis=1).max())
    if topology.period is None:
        assert topology.is_symmetric() <= symmetric
    elif topology.period <= SOME_ROUNDS:
        assert topology.is_symmetric() == symmetric
        assert topology.max_degree == degree
    if topology.period is not None:
        np.testing.assert_array_equal(topology.matrix(2), topology.matrix(2 + topology.period))


@pytest.mark.parametrize("kind", EVERY_SIZE)
def test_one_rank_keeps_everything(kind: str) -> None:
    topology = EVERY_SIZE[kind](1)
    assert topology.round(0, 3) == ft.Round(1.0, {}, {})
    assert topology.matrix(3).tolist() == [[1.0]]
    assert topology.spectral_gap() == 1 or topology.period is None
    assert topology.consensus_factor(2) == 0
    assert topology.rounds_to_exact() == 1
    assert topology.max_degree == 0


# ----------------------------------------------------------------- static weights, written out again from the papers


def from_hops(n: int, hops: set[int]) -> np.ndarray:
    weights = np.zeros((n, n))
    for sender in range(n):
        for hop in hops | {0}:
            weights[(sender + hop) % n, sender] = 1 / (len(hops) + 1)
    return weights


@given(n=st.integers(2, 130))
@settings(max_examples=25, deadline=None)
def test_circulant_weights(n: int) -> None:
    np.testing.assert_allclose(ft.ring(n, "right").matrix(), from_hops(n, {1}))
    np.testing.assert_allclose(ft.ring(n, "left").matrix(), from_hops(n, {n - 1}))
    np.testing.assert_allclose(ft.ring(n).matrix(), from_hops(n, {1, n - 1}))
    np.testing.assert_allclose(ft.fully_connected(n).matrix(), np.full((n, n), 1 / n))
    for base in (2, 3, 10):
        powers = {base**k for k in range(8) if base**k < n}
        np.testing.assert_allclose(ft.exponential(n, base).matrix(), from_hops(n, powers))
        distances = {hop for hop in range(1, n) if (hop if hop <= n // 2 else n - hop) in powers}
        np.testing.assert_allclose(ft.symmetric_exponential(n, base).matrix(), from_hops(n, distances))


def test_powers_of_three_include_243() -> None:
    assert ft.exponential(300, 3).round(0).send.keys() == {1, 3, 9, 27, 81, 243}


def metropolis(graph: nx.Graph) -> np.ndarray:
    n = graph.number_of_nodes()
    weights = np.zeros((n, n))
    for a, b in graph.edges:
        weights[a, b] = weights[b, a] = 1 / max(graph.degree[a] + 1, graph.degree[b] + 1)
    return weights + np.diag(1 - weights.sum(axis=1))


@pytest.mark.parametrize(
    ("n", "shape", "rows", "columns"),
    [(12, None, 3, 4), (16, None, 4, 4), (7, None, 1, 7), (12, (6, 2), 6, 2), (1, None, 1, 1), (36, (1, 36), 1, 36)],
)
def test_grid_weights(n: int, shape: tuple[int, int] | None, rows: int, columns: int) -> None:
    lattice = nx.grid_2d_graph(rows, columns)
    ranks = nx.relabel_nodes(lattice, {(r, c): r * columns + c for r, c in lattice})
    np.testing.assert_allclose(ft.grid(n, shape).matrix(), metropolis(ranks), atol=1e-15)


@pytest.mark.parametrize(("n", "center"), [(2, 0), (5, 0), (9, 4)])
def test_star_weights(n: int, center: int) -> None:
    expected = np.diag(np.full(n, 1 - 1 / n))
    expected[center] = expected[:, center] = 1 / n
    np.testing.assert_allclose(ft.star(n, center).matrix(), expected)


@pytest.mark.parametrize("dimensions", range(8))
def test_hypercube(dimensions: int) -> None:
    n = 2**dimensions
    cube = ft.hypercube(n)
    expected = [[(a ^ b).bit_count() <= 1 for b in range(n)] for a in range(n)]
    np.testing.assert_allclose(cube.matrix(), np.array(expected) / (dimensions + 1))
    assert_rounds_are(cube, 0, cube.matrix())
    assert cube.is_symmetric() and cube.is_doubly_stochastic() and cube.max_degree == dimensions
    eigenvalues = np.linalg.eigvalsh(cube.matrix())
    assert cube.smallest_eigenvalue() == pytest.approx(eigenvalues[0], abs=1e-12)
    rho = max(abs(eigenvalues[:-1]), default=0.0)
    assert cube.spectral_gap() == pytest.approx(1 - rho, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- spectra


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


# ------------------------------------------------------------------------------------------------- exact sequences


@pytest.mark.parametrize("n", range(1, 131))
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


# --------------------------------------------------------------------------------------- equality, pickling, size


def everything() -> list[Topology]:
    return [
        *(make(12) for make in EVERY_SIZE.values()),
        ft.hypercube(16),
        ft.one_peer_hypercube(16),
        ft.one_peer(ft.grid(12)),
        ft.inner_outer_ring(3, 4),
        ft.inner_outer_exponential(3, 4),
        ft.alternating_exponential_ring(4, 3),
        ft.from_matrix(np.eye(12)),
        ft.from_networkx(nx.petersen_graph()),
        ft.equi_dynamic(12, 8),
        ft.ring(13),
        ft.star(12, 5),
        ft.grid(12, (2, 6)),
        ft.base_graph(12).then(ft.ring(12)),
    ]


def test_fingerprints_tell_all_apart_and_equality_follows() -> None:
    topologies = everything()
    assert len({topology.fingerprint() for topology in topologies}) == len(topologies)
    for topology, again in zip(topologies, everything(), strict=True):
        assert topology == again and hash(topology) == hash(again)
        assert topology == pickle.loads(pickle.dumps(topology))
    assert topologies[0] != "ring(12)"


def test_pickled_topology_still_works() -> None:
    for topology in everything():
        topology.round(0, 1)
        again = pickle.loads(pickle.dumps(topology))
        assert [again.round(rank, 3) for rank in range(topology.size)] == [
            topology.round(rank, 3) for rank in range(topology.size)
        ]


PRINT_FINGERPRINTS = """
import sys, types
package = types.ModuleType("fusedfog")
package.__path__ = [sys.argv[1]]
sys.modules["fusedfog"] = package
import fusedfog.topology as ft
print(ft.random_matching(9, 4).fingerprint(), ft.one_peer(ft.grid(6)).lazy().fingerprint(),
      ft.from_matrix([[0.25, 0.75], [0.75, 0.25]]).fingerprint(), ft.random_matching(9, 4).round(2, 11).recv)
print([name for name in ("torch", "matplotlib", "scipy") if name in sys.modules])
"""


def test_other_processes_agree_and_import_nothing_heavy() -> None:
    folder = str(__import__("pathlib").Path(ft.__file__).parents[1])
    output = subprocess.run(
        [sys.executable, "-c", PRINT_FINGERPRINTS, folder], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    matching = ft.random_matching(9, 4)
    expected = [
        matching.fingerprint(),
        ft.one_peer(ft.grid(6)).lazy().fingerprint(),
        ft.from_matrix([[0.25, 0.75], [0.75, 0.25]]).fingerprint(),
    ]
    assert output == [f"{' '.join(expected)} {matching.round(2, 11).recv}", "[]"]


@pytest.mark.parametrize("topology", everything(), ids=repr)
def test_repr_makes_it_again(topology: Topology) -> None:
    text = repr(topology)
    if "<" in text:
        assert f"{topology.size} ranks" in text
    else:
        assert eval(text, vars(ft)) == topology
    assert text.startswith(topology.name.partition(".")[0])


HUNDRED_THOUSAND: list[Callable[[], Topology]] = [
    lambda: ft.ring(100_000),
    lambda: ft.star(100_000),
    lambda: ft.grid(100_000),
    lambda: ft.exponential(100_000),
    lambda: ft.symmetric_exponential(100_000),
    lambda: ft.hypercube(131_072),
    lambda: ft.one_peer(ft.exponential(100_000)),
    lambda: ft.one_peer_exponential(100_000),
    lambda: ft.one_peer_hypercube(131_072),
    lambda: ft.base_graph(100_000),
    lambda: ft.base_graph(99_999, 3),
    lambda: ft.equi_dynamic(100_000, 1),
    lambda: ft.random_matching(100_000, 1),
    lambda: ft.inner_outer_ring(12_500, 8),
    lambda: ft.inner_outer_exponential(12_500, 8),
    lambda: ft.alternating_exponential_ring(16_384, 8),
]


@pytest.mark.parametrize("make", HUNDRED_THOUSAND)
def test_a_hundred_thousand_ranks_are_instant(make: Callable[[], Topology]) -> None:
    fastest = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        topology = make()
        rounds = [topology.round(rank, 5) for rank in (1, 77_777)]
        topology.fingerprint()
        fastest = min(fastest, time.perf_counter() - begin)
    assert fastest < 0.05
    for rank, one in zip((1, 77_777), rounds, strict=True):
        for peer, weight in one.send.items():
            assert topology.round(peer, 5).recv[rank] == weight
        for peer, weight in one.recv.items():
            assert topology.round(peer, 5).send[rank] == weight
    with pytest.raises(ValueError, match="use round"):
        topology.matrix()


def test_named() -> None:
    for name in ("ring", "star", "grid", "exponential", "base_graph", "random_matching", "one_peer_hypercube"):
        assert ft.named(name, 8).name == name
        assert ft.named(name, 8) == getattr(ft, name)(8)
    with pytest.raises(ValueError, match=r"unknown topology 'rnig'; known are ring, star"):
        ft.named("rnig", 8)
    with pytest.raises(ValueError, match=r"needs to know the machines.*inner_outer_ring\(machines, local\)"):
        ft.named("inner_outer_ring", 8)
    with pytest.raises(ValueError, match=r"power of two, got n=12; exponential\(12\) and base_graph\(12\)"):
        ft.named("hypercube", 12)
