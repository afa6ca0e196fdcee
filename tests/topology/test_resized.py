"""Topologies of those that are left: every name and number of ranks, and graphs given weight by weight."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixing_matrices import assert_rounds_are

import fusedfog.topology as ft
from fusedfog.topology import Topology
from fusedfog.topology.names import BY_MACHINES, BY_SIZE

Kind = Callable[[int], Topology]

OTHERS: dict[str, Kind] = {
    "ring right": lambda n: ft.ring(n, "right"),
    "exponential 3": lambda n: ft.exponential(n, base=3),
    "star off centre": lambda n: ft.star(n, center=n - 1),
    "grid of two columns": lambda n: ft.grid(n, (n // 2, 2)) if n % 2 == 0 else ft.grid(n),
    "base_graph 2": lambda n: ft.base_graph(n, max_degree=2),
    "equi_dynamic 5": lambda n: ft.equi_dynamic(n, 5),
    "lazy": lambda n: ft.star(n).lazy(),
    "then": lambda n: ft.ring(n).then(ft.random_matching(n, 3)),
    "one_peer ring": lambda n: ft.one_peer(ft.ring(n)),
    "one_peer star": lambda n: ft.one_peer(ft.star(n)),
    "networkx": lambda n: ft.from_networkx(nx.path_graph(n)),
    "directed circle": lambda n: ft.from_matrix(ft.ring(n, "right").matrix()),
    "one_peer directed circle": lambda n: ft.one_peer(ft.from_matrix(ft.ring(n, "right").matrix())),
    "matchings": lambda n: ft.sequence([pairs(n, 0), pairs(n, 1)]),
    "own rounds": lambda n: ft.from_rounds(
        n, lambda step: {} if n == 1 else {(step + 1) % n: {step % n: 0.5}, step % n: {(step + 1) % n: 0.5}}, n
    ),
}


def pairs(n: int, first: int) -> Topology:
    """Every second neighbouring pair of a line averages."""
    graph = nx.empty_graph(n)
    graph.add_edges_from((rank, rank + 1) for rank in range(first, n - 1, 2))
    return ft.from_networkx(graph)


ALL: dict[str, Kind] = {
    **BY_SIZE,
    **{name: lambda n, make=make: make(n // 2, 2) for name, make in BY_MACHINES.items()},
    **{f"{name} of one machine": lambda n, make=make: make(1, n) for name, make in BY_MACHINES.items()},
    **OTHERS,
}


def rounds_of(topology: Topology) -> range:
    return range(20 if topology.period is None else topology.period)


def is_connected(topology: Topology) -> bool:
    union = sum(np.abs(topology.matrix(step)) for step in rounds_of(topology))
    return nx.is_strongly_connected(nx.from_numpy_array(union, create_using=nx.DiGraph))


def assert_sound(left: Topology, whole: Topology) -> None:
    """Whatever the whole promises is promised by what is left, and kept."""
    for promise in ("is_row_stochastic", "is_column_stochastic", "is_symmetric"):
        assert getattr(left, promise)() >= getattr(whole, promise)(), promise
    assert left.is_static >= whole.is_static
    for step in rounds_of(left):
        weights = left.matrix(step)
        assert_rounds_are(left, step, weights)
        if whole.is_row_stochastic():
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
        if whole.is_column_stochastic():
            np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
        if whole.is_symmetric():
            np.testing.assert_allclose(weights, weights.T, atol=1e-12)
    assert is_connected(left)


def made(make: Kind, n: int) -> Topology | None:
    """None for a size that this kind has not got."""
    try:
        topology = make(n)
    except ValueError:
        return None
    return topology if topology.size == n else None


@pytest.mark.parametrize("kind", ALL)
def test_every_topology_of_up_to_twelve_ranks_is_resized_to_every_smaller_number(kind: str) -> None:
    for size in (1, 2, 4, 5, 8, 12):
        whole = made(ALL[kind], size)
        for n in range(1, size + 1) if whole is not None else ():
            left = whole.resized(n)
            assert left.size == n
            assert_sound(left, whole)


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_ranks_may_be_the_ones_that_stay(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([8, 12] if kind in ("hypercube", "one_peer_hypercube") else [6, 8, 12]))
    whole = made(ALL[kind], size) or ALL[kind](8)
    kept = sorted(data.draw(st.sets(st.sampled_from(range(whole.size)), min_size=1)))
    left = whole.resized(len(kept), kept)
    assert left.size == len(kept)
    assert_sound(left, whole)
    again = sorted(data.draw(st.sets(st.sampled_from(range(len(kept))), min_size=1)))
    assert_sound(left.resized(len(again), again), whole)


@pytest.mark.parametrize("name", BY_SIZE)
def test_a_name_is_made_anew_for_every_number_of_ranks_or_says_that_it_cannot(name: str) -> None:
    for n in range(1, 13):
        expected = made(BY_SIZE[name], n)
        if expected is not None:
            assert BY_SIZE[name](8).resized(n) == expected
        elif name == "one_peer_hypercube":
            assert BY_SIZE[name](8).resized(n) == ft.base_graph(n)
        elif n > 8:
            with pytest.raises(ValueError, match="needs a power of two"):
                BY_SIZE[name](8).resized(n)


def test_arguments_are_kept() -> None:
    assert ft.ring(8, "right").resized(5) == ft.ring(5, "right")
    assert ft.exponential(8, base=3).resized(5) == ft.exponential(5, base=3)
    assert ft.base_graph(8, max_degree=3).resized(5) == ft.base_graph(5, max_degree=3)
    assert ft.equi_dynamic(8, 5).resized(5) == ft.equi_dynamic(5, 5)
    assert ft.random_matching(8, 5).resized(9) == ft.random_matching(9, 5)
    assert ft.one_peer(ft.ring(8)).resized(5) == ft.one_peer(ft.ring(5))
    assert ft.ring(4).lazy().then(ft.exponential(4)).resized(6) == ft.ring(6).lazy().then(ft.exponential(6))


def test_the_centre_of_a_star_stays_the_same_rank() -> None:
    assert ft.star(6, center=4).resized(3, kept=[1, 4, 5]) == ft.star(3, center=1)
    assert ft.star(6, center=4).resized(3, kept=[1, 2, 3]) == ft.star(3, center=0)
    assert ft.star(6, center=4).resized(9) == ft.star(9, center=4)


@pytest.mark.parametrize("make", BY_MACHINES.values(), ids=BY_MACHINES)
def test_whole_machines_that_are_left_are_machines(make: Callable[[int, int], Topology]) -> None:
    whole = make(4, 3)
    assert whole.resized(6, kept=[3, 4, 5, 9, 10, 11]) == make(2, 3)
    assert whole.resized(8, kept=[0, 1, 3, 5, 7, 8, 9, 10]) == make(4, 2)
    assert whole.resized(24) == make(8, 3)
    with pytest.raises(ValueError, match="who the neighbours of 13 would be"):
        whole.resized(13)


def test_a_permutation_closes_over_the_rank_that_left() -> None:
    left = ft.inner_outer_ring(4, 3).resized(11, kept=[rank for rank in range(12) if rank != 4])
    for step in range(left.period or 0):
        weights = left.matrix(step) - np.diag(left.matrix(step).diagonal())
        assert set(weights.ravel()) <= {0.0, 0.5} and (weights.sum(axis=0) <= 0.5).all()


# ------------------------------------------------------------------------ weight by weight, against formulas in numpy


def metropolis(graph: nx.Graph) -> np.ndarray:
    n = graph.number_of_nodes()
    weights = np.zeros((n, n))
    for a, b in graph.edges:
        weights[a, b] = weights[b, a] = 1 / max(graph.degree[a] + 1, graph.degree[b] + 1)
    return weights + np.diag(1 - weights.sum(axis=1))


def relabelled(graph: nx.Graph, kept: Sequence[int]) -> nx.Graph:
    ordered = nx.empty_graph(len(kept))
    ordered.add_edges_from(nx.relabel_nodes(graph, {rank: place for place, rank in enumerate(kept)}).edges)
    return ordered


def joined_by_lost(graph: nx.Graph, kept: Sequence[int]) -> nx.Graph:
    """An edge between any two that are connected without a third of those kept."""
    lost = set(graph) - set(kept)
    joined = nx.empty_graph(kept)
    for a in kept:
        for b in kept:
            if a < b and nx.has_path(graph.subgraph({a, b} | lost), a, b):
                joined.add_edge(a, b)
    return relabelled(joined, kept)


@given(n=st.integers(2, 9), seed=st.integers(0, 9999), density=st.floats(0, 0.6), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_symmetric_graph_keeps_its_edges_with_metropolis_weights(
    n: int, seed: int, density: float, data: st.DataObject
) -> None:
    graph = nx.compose(nx.gnp_random_graph(n, density, seed=seed), nx.random_labeled_tree(n, seed=seed))
    kept = sorted(data.draw(st.sets(st.sampled_from(range(n)), min_size=1, max_size=n - 1)))
    induced = relabelled(graph.subgraph(kept), kept)
    expected = induced if nx.is_connected(induced) else joined_by_lost(graph, kept)
    left = ft.from_networkx(graph).resized(len(kept), kept)
    np.testing.assert_allclose(left.matrix(), metropolis(expected), atol=1e-14)
    assert ft.from_matrix(ft.from_networkx(graph).matrix()).resized(len(kept), kept).matrix() == pytest.approx(
        left.matrix()
    )


def complement(weights: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    lost = [rank for rank in range(len(weights)) if rank not in kept]
    block = weights[np.ix_(lost, lost)]
    through = np.linalg.solve(np.eye(len(lost)) - block, weights[np.ix_(lost, kept)])
    return weights[np.ix_(kept, kept)] + weights[np.ix_(kept, lost)] @ through


@pytest.mark.parametrize("stochastic", ["row", "column", "both"])
@given(n=st.integers(2, 8), seed=st.integers(0, 9999), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_directed_graph_is_left_with_its_stochastic_complement(
    stochastic: str, n: int, seed: int, data: st.DataObject
) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(n)
    weights = np.diag(random.uniform(0.1, 1, n)) + (random.random((n, n)) < 0.3) * random.random((n, n))
    weights[order, np.roll(order, 1)] += 1
    weights /= weights.sum(axis=1, keepdims=True)
    if stochastic == "both":
        shift = np.zeros((n, n))
        shift[order, np.roll(order, 1)] = 1
        weights = 0.2 * np.eye(n) + 0.5 * shift + 0.3 * np.linalg.matrix_power(shift, 2)
    whole = ft.from_matrix(weights.T if stochastic == "column" else weights, stochastic.replace("both", "row"))
    kept = sorted(data.draw(st.sets(st.sampled_from(range(n)), min_size=1, max_size=n - 1)))
    left = whole.resized(len(kept), kept)
    assert_sound(left, whole)
    if not whole.is_symmetric():
        expected = complement(weights, kept)
        np.testing.assert_allclose(left.matrix(), expected.T if stochastic == "column" else expected, atol=1e-12)


def test_matchings_that_fall_apart_become_a_static_graph_of_those_they_connected() -> None:
    whole = ft.sequence([pairs(5, 0), pairs(5, 1)])
    assert whole.resized(4).period == 2
    np.testing.assert_allclose(
        whole.resized(4).matrix(1), [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]
    )
    without_the_middle = whole.resized(4, kept=[0, 1, 3, 4])
    assert without_the_middle.is_static
    np.testing.assert_allclose(without_the_middle.matrix(), metropolis(nx.path_graph(4)))


def test_a_directed_rank_that_is_heard_and_hears_nobody_leaves_its_weight_to_the_listeners() -> None:
    calls = {0: {1: {0: 0.5}}, 1: {2: {1: 0.25}}, 2: {0: {2: 0.75}}}
    whole = ft.from_rounds(3, lambda step: calls[step], period=3)
    left = whole.resized(2, kept=[1, 2])  # rank 0's rounds are gone: what is left is their mean over the period
    expected = complement(sum(whole.matrix(step) for step in range(3)) / 3, [1, 2])
    np.testing.assert_allclose(left.matrix(), expected, atol=1e-12)
    assert left.is_static


# ---------------------------------------------------------------------------------------------- identity and refusals


def test_what_is_left_depends_on_who_is_in_alone() -> None:
    whole = ft.from_networkx(nx.petersen_graph())
    once = whole.resized(6, kept=[0, 2, 3, 5, 8, 9])
    twice = whole.resized(8, kept=[0, 2, 3, 4, 5, 7, 8, 9]).resized(6, kept=[0, 1, 2, 4, 6, 7])
    assert once == twice == pickle.loads(pickle.dumps(once)) != whole.resized(6)
    assert once.fingerprint() == twice.fingerprint()
    assert whole.resized(10) is whole
    assert repr(once).endswith(".resized(6, kept=[0, 2, 3, 5, 8, 9])") and once.name == "from_networkx.resized"


def test_nobody_changes_what_is_left_through_a_round() -> None:
    left = ft.from_networkx(nx.cycle_graph(4)).resized(3)
    left.round(0).recv[1] = 9
    assert left.round(0).recv[1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ALL)
def test_every_topology_can_be_sent_to_another_process(kind: str) -> None:
    if kind == "own rounds":
        pytest.skip("holds a function of the test")
    whole = ALL[kind](8)
    assert pickle.loads(pickle.dumps(whole)).resized(5) == whole.resized(5)


DISCONNECTED = nx.Graph([(0, 1), (2, 3)])
NEGATIVE = np.array([[0.5, 0.75, -0.25], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])
TO_ONE_RANK: dict[str, tuple[Callable[[], Topology], str]] = {
    "endless": (lambda: ft.from_rounds(4, lambda step: {}), "never repeats.*give it a period"),
    "long": (lambda: ft.from_rounds(4, lambda step: {}, 5000), "only after 5000 rounds"),
    "apart": (lambda: ft.from_networkx(DISCONNECTED), "do not all hear of each other"),
    "one way": (lambda: ft.from_matrix([[1.0, 0.0], [0.5, 0.5]]), "do not all hear of each other"),
    "negative": (lambda: ft.from_matrix(NEGATIVE), "negative weights on directed edges"),
    "lazy": (lambda: ft.from_networkx(DISCONNECTED).lazy(), "do not all hear of each other"),
    "part": (lambda: ft.random_matching(4).then(ft.from_networkx(DISCONNECTED)), "do not all hear of each other"),
    "mixed": (
        lambda: ft.sequence(
            [ft.from_matrix([[0.5, 0.5], [1, 0]]), ft.from_matrix([[0.5, 1], [0.5, 0]], "column")]
        ).then(ft.from_matrix(np.eye(2))),
        "rows that do not sum to 1, and others",
    ),
}


@pytest.mark.parametrize("case", TO_ONE_RANK)
def test_what_cannot_be_resized_says_so_whoever_is_kept(case: str) -> None:
    make, reason = TO_ONE_RANK[case]
    whole = make()
    assert whole.resized(whole.size) is whole
    for n in range(1, whole.size):
        with pytest.raises(ValueError, match=f"cannot be resized.*{reason}"):
            whole.resized(n, kept=range(whole.size - n, whole.size))


@pytest.mark.parametrize(
    ("n", "kept", "reason"),
    [
        (0, None, "n must be at least 1"),
        (2.5, None, "n must be a whole number"),
        (2, [1], "kept must be 2 of the ranks 0..3"),
        (2, [1, 4], "kept must be 2 of the ranks 0..3"),
        (2, [2, 1], "in ascending order, got [2, 1]"),
        (2, [1, 1], "in ascending order"),
        (5, [0, 1, 2, 3, 4], "kept must be 5"),
    ],
)
def test_ranks_that_cannot_be_the_ones_kept_are_refused(n: int, kept: list[int] | None, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        ft.ring(4).resized(n, kept)


def test_nobody_can_join_a_graph_given_weight_by_weight() -> None:
    for whole in (ft.from_networkx(nx.path_graph(3)), ft.from_networkx(nx.path_graph(3)).resized(2)):
        with pytest.raises(ValueError, match="who the neighbours of 4 would be"):
            whole.resized(4)
