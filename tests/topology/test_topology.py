"""Every topology, every size: stochasticity, rounds against matrices, weights, fingerprints."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixing_matrices import assert_rounds_are, from_hops

import fusedfog.topology as ft
from fusedfog.topology import Topology

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
        begin = time.thread_time()  # Which others that run on this machine do not lengthen.
        topology = make()
        rounds = [topology.round(rank, 5) for rank in (1, 77_777)]
        topology.fingerprint()
        fastest = min(fastest, time.thread_time() - begin)
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
