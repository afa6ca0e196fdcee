"""Users' own graphs and hierarchies: matrices, networkx, rounds, sequences, one_peer, machines; and bad input."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedfog.topology as ft
from fusedfog.topology import Round, Topology

ROW_ONLY = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]])


def dense(topology: Topology, step: int) -> np.ndarray:
    """The matrix as the receivers see it, checked against what the senders see."""
    n = topology.size
    rows, columns = np.zeros((n, n)), np.zeros((n, n))
    for rank in range(n):
        one = topology.round(rank, step)
        rows[rank, rank] = columns[rank, rank] = one.self_weight
        rows[rank, list(one.recv)] = list(one.recv.values())
        columns[list(one.send), rank] = list(one.send.values())
        assert list(one.recv) == sorted(one.recv) and list(one.send) == sorted(one.send)
    np.testing.assert_array_equal(rows, columns)
    np.testing.assert_allclose(rows, topology.matrix(step), atol=1e-15)
    return rows


# --------------------------------------------------------------------------------------------------------- matrices


def test_from_matrix_keeps_the_matrix() -> None:
    topology = ft.from_matrix(ROW_ONLY)
    np.testing.assert_array_equal(dense(topology, 5), ROW_ONLY)
    assert topology.round(1) == Round(0.5, {0: 0.25, 2: 0.25}, {0: 0.5})
    assert topology.is_row_stochastic() and not topology.is_doubly_stochastic() and not topology.is_symmetric()
    assert topology.period == 1 and topology.is_static
    columns = ft.from_matrix(ROW_ONLY.T, stochastic="column")
    np.testing.assert_array_equal(columns.matrix(), ROW_ONLY.T)
    assert columns.is_column_stochastic() and not columns.is_row_stochastic()


def test_from_matrix_is_its_own_copy() -> None:
    weights = np.full((2, 2), 0.5)
    topology = ft.from_matrix(weights)
    weights[0, 0] = 9
    topology.round(0).recv[1] = 9
    assert topology.round(0) == Round(0.5, {1: 0.5}, {1: 0.5})


def test_negative_and_float32_weights_are_fine() -> None:
    optimal = [[0.75, 0.5, -0.25], [0.5, 0.0, 0.5], [-0.25, 0.5, 0.75]]
    assert ft.from_matrix(optimal).is_doubly_stochastic() and ft.from_matrix(optimal).is_symmetric()
    assert ft.from_matrix(np.full((7, 7), 1 / 7, dtype=np.float32)).is_doubly_stochastic()


def test_equal_weights_are_equal_topologies() -> None:
    graph = nx.cycle_graph(6)
    assert ft.from_networkx(graph) == ft.from_matrix(ft.from_networkx(graph).matrix())
    assert ft.from_matrix(np.eye(3)) != ft.from_matrix(np.eye(4))
    assert ft.from_matrix(ROW_ONLY) != ft.from_matrix(ROW_ONLY.T, stochastic="column")


def with_entry(value: float) -> list[list[float]]:
    return [[0.5, 0.5], [value, 0.5]]


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"square matrix.*\(2, 3\)"),
        (np.ones(4), {}, r"square matrix.*\(4,\)"),
        (np.ones((0, 0)), {}, "square matrix"),
        ([[1.0], [0.5, 0.5]], {}, "not a matrix of real numbers"),
        (np.eye(2) * 1j, {}, "real"),
        (with_entry(math.nan), {}, r"W\[1, 0\] is nan"),
        (with_entry(math.inf), {}, r"W\[1, 0\] is inf"),
        (with_entry(0.4), {}, "row 1 sums to 0.9 instead of 1; divide each row by its sum"),
        (with_entry(0.500002), {}, "row 1 sums to 1.000002"),
        (with_entry(0.4), {"stochastic": "column"}, "column 0 sums to 0.9 instead of 1"),
        (ROW_ONLY, {"stochastic": "column"}, r'column 0 sums to 1.75 instead of 1; its rows do: pass stochastic="row"'),
        (ROW_ONLY.T, {}, r'row 0 sums to 1.75 instead of 1; its columns do: pass stochastic="column", or transpose'),
        (np.eye(2), {"stochastic": "both"}, 'stochastic must be "row" or "column"'),
    ],
)
def test_bad_matrices(weights: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.from_matrix(weights, **options)


# --------------------------------------------------------------------------------------------------------- networkx


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_metropolis_weights_of_any_graph(n: int, seed: int) -> None:
    graph = nx.gnp_random_graph(n, 0.3, seed=seed)
    topology = ft.from_networkx(graph)
    weights = dense(topology, 0)
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    for a in range(n):
        for b in range(n):
            if a != b:
                degrees = 1 + graph.degree[a], 1 + graph.degree[b]
                assert weights[a, b] == (pytest.approx(1 / max(degrees)) if graph.has_edge(a, b) else 0)
    assert topology.is_symmetric() and topology.is_doubly_stochastic()


def test_directed_edges_point_from_sender_to_receiver() -> None:
    topology = ft.from_networkx(nx.DiGraph([(0, 1), (0, 2), (1, 2), (2, 0)]))
    assert topology.round(2) == Round(1 / 3, {0: 1 / 3, 1: 1 / 3}, {0: 0.5})
    assert topology.is_row_stochastic() and not topology.is_doubly_stochastic()
    assert ft.from_networkx(nx.cycle_graph(5, create_using=nx.DiGraph)).is_doubly_stochastic()
    np.testing.assert_allclose(
        ft.from_networkx(nx.cycle_graph(5, create_using=nx.DiGraph)).matrix(), ft.ring(5, "right").matrix()
    )


def test_given_weights() -> None:
    graph = nx.Graph()
    graph.add_weighted_edges_from([(0, 1, 0.25), (1, 2, 0.5), (2, 2, 0.5)])
    assert dense(ft.from_networkx(graph), 0).tolist() == [[0.75, 0.25, 0], [0.25, 0.25, 0.5], [0, 0.5, 0.5]]
    graph.edges[2, 2]["weight"] = 0.25
    with pytest.raises(ValueError, match=r'row 2 sums to 0.75 instead of 1; use weights="sinkhorn"'):
        ft.from_networkx(graph)
    arrows = nx.DiGraph()
    arrows.add_weighted_edges_from([(0, 1, 0.5), (1, 0, 0.3)])
    with pytest.raises(ValueError, match=r"column 0 sums to 1.2 instead of 1; use weights"):
        ft.from_networkx(arrows)


def test_sinkhorn_balances_and_keeps_edges() -> None:
    graph = nx.Graph()
    graph.add_weighted_edges_from([(0, 1, 5.0), (1, 2, 0.1), (2, 3, 2.0), (3, 0, 1.0), (0, 0, 2.0)])
    weights = dense(ft.from_networkx(graph, weights="sinkhorn"), 0)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(weights, weights.T, atol=1e-9)
    given_weights = nx.to_numpy_array(graph) + np.diag([0, 1, 1, 1])
    np.testing.assert_array_equal(weights != 0, given_weights != 0)
    # Diagonal scaling leaves cross ratios of weights alone.
    scaled, original = (w[0, 1] * w[2, 3] / (w[1, 2] * w[3, 0]) for w in (weights, given_weights))
    assert scaled == pytest.approx(original)
    arrows = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    assert ft.from_networkx(arrows, weights="sinkhorn").is_doubly_stochastic()
    with pytest.raises(ValueError, match="strongly connected"):
        ft.from_networkx(nx.DiGraph([(0, 1)]), weights="sinkhorn")


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        (nx.Graph(), {}, "no nodes"),
        (nx.Graph([("a", "b")]), {}, r"ranks 0..1, not 'a'.*convert_node_labels_to_integers"),
        (nx.Graph([(0, 2)]), {}, r"ranks 0..1, not 2"),
        (nx.MultiGraph([(0, 1), (0, 1)]), {}, "multigraph"),
        (nx.Graph([(0, 1, {"weight": math.nan})]), {}, r"edge \(0, 1\) has weight nan"),
        (nx.Graph([(0, 1, {"weight": "x"})]), {}, r"edge \(0, 1\) has weight 'x'"),
        (nx.Graph([(0, 1, {"weight": 0.5}), (1, 2)]), {}, r"edge \(1, 2\) has no weight while others have"),
        (nx.DiGraph([(0, 1)]), {"weights": "metropolis"}, "undirected"),
        (nx.Graph([(0, 1, {"weight": -1.0})]), {"weights": "sinkhorn"}, "positive"),
        (nx.path_graph(3), {"weights": "best"}, "auto, metropolis, sinkhorn, uniform"),
    ],
)
def test_bad_graphs(graph: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.from_networkx(graph, **options)


# ------------------------------------------------------------------------------------------------- rounds, sequences


def turning_ring(step: int) -> dict[int, dict[int, float]]:
    return {rank: {(rank - 1 - step % 3) % 4: 0.25} for rank in range(4)}


def lopsided(step: int) -> dict[int, dict[int, float]]:
    return {2: {0: 0.5, 1: 0.25}} if step % 2 else {}


def test_from_rounds() -> None:
    topology = ft.from_rounds(4, turning_ring, period=3)
    for step in range(7):
        expected = 0.75 * np.eye(4) + 0.25 * np.roll(np.eye(4), 1 + step % 3, axis=0)
        np.testing.assert_array_equal(dense(topology, step), expected)
    assert topology.is_doubly_stochastic() and not topology.is_symmetric() and topology.max_degree == 1
    assert "turning_ring" in repr(topology)
    assert pickle.loads(pickle.dumps(topology)) == topology


def test_from_rounds_may_be_idle_and_lopsided() -> None:
    topology = ft.from_rounds(3, lopsided, period=2)
    assert topology.round(2, 0) == Round(1.0, {}, {})
    assert topology.round(2, 1) == Round(0.25, {0: 0.5, 1: 0.25}, {})
    assert topology.round(0, 1) == Round(1.0, {}, {2: 0.5})
    assert not topology.is_doubly_stochastic() and topology.max_degree == 2


def test_endless_rounds_promise_nothing_unless_told() -> None:
    endless = ft.from_rounds(4, turning_ring)
    assert endless.period is None and not endless.is_static
    assert endless.is_row_stochastic() and not endless.is_doubly_stochastic() and not endless.is_symmetric()
    assert ft.from_rounds(4, turning_ring, doubly_stochastic=True).is_doubly_stochastic()
    broken = ft.from_rounds(3, lopsided, doubly_stochastic=True)
    with pytest.raises(ValueError, match=r"round 1 of from_rounds.* column \d sums to"):
        broken.round(0, 1)
    for figure in (endless.spectral_gap, lambda: endless.max_degree):
        with pytest.raises(ValueError, match=r"never repeats.*consensus_factor"):
            figure()
    assert 0 < endless.consensus_factor(6) < 1


def test_fingerprint_of_rounds_sees_every_weight() -> None:
    def other(step: int) -> dict[int, dict[int, float]]:
        weights = turning_ring(step)
        return weights if step < 2 else {**weights, 0: {1: 0.25000001}}

    same = ft.from_rounds(4, lambda step: turning_ring(step), period=3)
    assert same == ft.from_rounds(4, turning_ring, period=3)
    assert ft.from_rounds(4, other, period=3) != same
    assert ft.from_rounds(4, turning_ring) != same


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: {0: 0.5}}, "rank 0 lists itself"),
        ({3: {0: 0.5}}, "rank 3 is not one of 0..2"),
        ({0: {3: 0.5}}, "peers of rank 0: rank 3 is not one of 0..2"),
        ({0: {-1: 0.5}}, "a rank must be at least 0, got -1"),
        ({"a": {}}, "a rank must be a whole number, got 'a'"),
        ({0: {1: math.nan}}, "rank 0 weighs rank 1 with nan; a weight must be a finite number"),
        ({0: {1: None}}, "rank 0 weighs rank 1 with None; a weight must be a finite number"),
        ({0: [1, 1]}, r"rank 0 must have \{peer: weight\}, got list"),
        ([0], r"must be \{rank: \{peer: weight\}\}, got list"),
    ],
)
def test_bad_rounds(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.from_rounds(3, lambda step: weights)
    later = ft.from_rounds(3, lambda step: weights if step == 4 else {})
    with pytest.raises(ValueError, match=f"round 4 .*{message}"):
        later.round(1, 4)


def test_sequence_takes_turns_in_own_rounds() -> None:
    a, b, c = ft.one_peer_exponential(8), ft.ring(8), ft.base_graph(8)
    topology = ft.sequence([a, b, c])
    assert topology.period == 9
    for step in range(20):
        np.testing.assert_array_equal(dense(topology, step), (a, b, c)[step % 3].matrix(step // 3))
    assert ft.sequence([a, b]).period == 6 and a.then(b) == ft.sequence([a, b]) and b.then(a) != a.then(b)
    assert ft.sequence([a, ft.equi_dynamic(8, 0)]).period is None
    assert ft.sequence([b]).is_static
    assert not ft.sequence([b, ft.one_peer(ft.star(8))]).is_doubly_stochastic()


def test_lazy_halves_the_edges() -> None:
    for topology in (ft.exponential(6), ft.base_graph(7), ft.from_matrix(ROW_ONLY)):
        for step in range(3):
            expected = (np.eye(topology.size) + topology.matrix(step)) / 2
            np.testing.assert_allclose(dense(topology.lazy(), step), expected, atol=1e-15)
        assert topology.lazy().period == topology.period
        assert topology.lazy().is_doubly_stochastic() == topology.is_doubly_stochastic()


# --------------------------------------------------------------------------------------------------------- one_peer


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 33), seed=st.integers(0, 99), step=st.integers(0, 40))
def test_one_peer_takes_turns_clockwise(n: int, seed: int, step: int) -> None:
    graph = nx.gnp_random_graph(n, 0.2, seed=seed, directed=True)
    topology = ft.one_peer(ft.from_networkx(graph))
    receives: dict[int, list[int]] = {rank: [] for rank in range(n)}
    for rank in range(n):
        clockwise = sorted(graph.successors(rank), key=lambda peer: (peer - rank) % n)
        if clockwise:
            receives[clockwise[step % len(clockwise)]].append(rank)
    expected = np.zeros((n, n))
    for rank, senders in receives.items():
        expected[rank, [rank, *senders]] = 1 / (len(senders) + 1)
    np.testing.assert_allclose(dense(topology, step), expected)


def test_one_peer_is_doubly_stochastic_on_graphs_alike_from_all_ranks_only() -> None:
    assert ft.one_peer(ft.ring(6)).is_doubly_stochastic() and ft.one_peer(ft.exponential(7)).is_doubly_stochastic()
    assert ft.one_peer(ft.from_matrix(ft.exponential(7).matrix())).is_doubly_stochastic()
    for static in (ft.star(5), ft.grid(6), ft.hypercube(8)):
        topology = ft.one_peer(static)
        assert topology.is_row_stochastic() and not topology.is_doubly_stochastic()
    assert ft.one_peer(ft.star(5)).period == 4 and ft.one_peer(ft.grid(12)).period == 12
    one_peer, direct = ft.one_peer(ft.exponential(8)), ft.one_peer_exponential(8)
    for step in range(6):
        np.testing.assert_array_equal(one_peer.matrix(step), direct.matrix(step))
    assert ft.one_peer(ft.from_matrix(np.eye(3))).round(1, 4) == Round(1.0, {}, {})


# -------------------------------------------------------------------------------------------------------- hierarchy


def bluefog_inner_outer(machines: int, local: int, step: int, exponential: bool) -> np.ndarray:
    """BlueFog's GetInnerOuter{Ring,Expo2}DynamicSendRecvRanks, sends only, for local > 2 and machines > 1."""
    n = machines * local
    weights = 0.5 * np.eye(n)
    outgoing = step % local
    far = 2 ** (step % (int(math.log2(machines - 1)) + 1)) if exponential else 1
    for rank in range(n):
        machine, own = divmod(rank, local)
        if own == outgoing:
            target = (machine + far) % machines * local + own
        else:
            hop = 2 ** (step % (int(math.log2(local - 2)) + 1)) if exponential else 1
            if hop >= (outgoing - own) % local:
                hop += 1
            target = machine * local + (own + hop) % local
        weights[target, rank] += 0.5
    return weights


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize(("machines", "local"), [(2, 3), (3, 4), (5, 3), (4, 8), (3, 5), (9, 3)])
def test_inner_outer_is_bluefogs(machines: int, local: int, exponential: bool) -> None:
    make = ft.inner_outer_exponential if exponential else ft.inner_outer_ring
    topology = make(machines, local)
    for step in range(25):
        np.testing.assert_array_equal(dense(topology, step), bluefog_inner_outer(machines, local, step, exponential))


@pytest.mark.parametrize("make", [ft.inner_outer_ring, ft.inner_outer_exponential])
@settings(max_examples=25, deadline=None)
@given(machines=st.integers(1, 9), local=st.integers(1, 7))
def test_inner_outer_of_all_sizes(make: Callable[[int, int], Topology], machines: int, local: int) -> None:
    topology = make(machines, local)
    period = topology.period
    assert topology.size == machines * local and period is not None and topology.is_doubly_stochastic()
    whole = np.eye(topology.size)
    for step in range(period):
        weights = dense(topology, step)
        assert set(np.unique(weights)) <= {0.0, 0.5, 1.0}
        np.testing.assert_array_equal(weights.sum(axis=0), 1)
        np.testing.assert_array_equal(weights.sum(axis=1), 1)
        whole = weights @ whole
    np.testing.assert_array_equal(topology.matrix(period + 1), topology.matrix(1))
    # Everybody reaches everybody within a few periods: nothing stays cut off on small machines.
    assert (np.linalg.matrix_power(whole, 40) > 0).all()


def aer_by_scanning(machines: int, local: int) -> list[np.ndarray]:
    """The scan with a running counter of the Decent-DP construction."""
    exponents = machines.bit_length() - 1
    rounds = [np.zeros((machines, machines)) for _ in range(2 * exponents)]
    count = 0
    for exponent in range(exponents):
        seen: set[int] = set()
        for j in range(machines):
            if j in seen:
                continue
            pair = [j, j + 2**exponent]
            seen.update(pair)
            halves = [rounds[2 * exponent], rounds[2 * exponent + 1]]
            first, second = halves if count % 2 == 0 else halves[::-1]
            first[pair, pair] = 1
            second[np.ix_(pair, pair)] = 0.5
            count += 1
    return [np.kron(weights, np.full((local, local), 1 / local)) for weights in rounds]


@pytest.mark.parametrize("exponents", range(1, 5))
@pytest.mark.parametrize("local", [1, 2, 3])
def test_alternating_exponential_ring(exponents: int, local: int) -> None:
    machines = 2**exponents
    topology = ft.alternating_exponential_ring(machines, local)
    expected = aer_by_scanning(machines, local)
    assert topology.period == len(expected) == 2 * exponents
    for step, weights in enumerate(expected):
        np.testing.assert_allclose(dense(topology, step), weights, atol=1e-15)
        np.testing.assert_allclose(weights @ weights, weights, atol=1e-12)
    assert topology.is_symmetric() and topology.is_doubly_stochastic() and topology.max_degree == 2 * local - 1
    assert topology.consensus_factor(2 * exponents) < 1e-12 and topology.consensus_factor(2 * exponents, 2) < 1e-12
    assert topology.consensus_factor(2 * exponents + 1, 1) < 1e-12
    if machines >= 4:
        assert topology.consensus_factor(2 * exponents, 1) > 0.1
    assert topology.rounds_to_exact() == 2 * exponents


def test_one_machine_averages_within() -> None:
    topology = ft.alternating_exponential_ring(1, 4)
    np.testing.assert_allclose(dense(topology, 3), np.full((4, 4), 0.25))
    assert topology.period == 1 and topology.rounds_to_exact() == 1 and topology.max_degree == 3


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.ring(0), "n must be at least 1, got 0"),
        (lambda: ft.exponential(2.5), "n must be a whole number, got 2.5"),
        (lambda: ft.exponential(4, base=1), "base must be at least 2"),
        (lambda: ft.ring(4, "up"), 'direction must be "both", "left" or "right"'),
        (lambda: ft.star(4, 4), r"center 4 is not one of the ranks 0\.\.3"),
        (lambda: ft.grid(12, (5, 2)), "shape 5 x 2 holds 10 ranks, not 12"),
        (lambda: ft.grid(12, (2, 2, 3)), "shape must be"),
        (lambda: ft.hypercube(6), r"hypercube needs a power of two, got n=6; exponential\(6\)"),
        (lambda: ft.one_peer_hypercube(6), "one_peer_hypercube needs a power of two"),
        (lambda: ft.base_graph(5, 0), "max_degree must be at least 1"),
        (lambda: ft.equi_dynamic(5, -1), "seed must be at least 0"),
        (lambda: ft.random_matching(5, "x"), "seed must be a whole number"),
        (lambda: ft.alternating_exponential_ring(3, 2), r"power of two machines, got 3; base_graph\(6\)"),
        (lambda: ft.inner_outer_ring(2, 0), "local must be at least 1"),
        (lambda: ft.one_peer(ft.base_graph(6)), "static topology, got base_graph"),
        (lambda: ft.one_peer(5), "static topology, got 5"),
        (lambda: ft.sequence([]), "at least one topology"),
        (lambda: ft.sequence([np.eye(2)]), "not a Topology"),
        (lambda: ft.ring(4).then(ft.ring(5)), r"same size: topologies\[0\] has 4 ranks, topologies\[1\] has 5"),
        (lambda: ft.from_rounds(3, {}), "fn must be a function"),
        (lambda: ft.from_rounds(3, lopsided, period=0), "period must be at least 1"),
        (lambda: ft.ring(4).round(4), r"rank 4 is not in ring\(4.*ranks are 0\.\.3"),
        (lambda: ft.ring(4).round(-1), "rank -1 is not in"),
        (lambda: ft.ring(4).round(0, -1), "step must not be negative"),
        (lambda: ft.ring(4).matrix(-1), "step must not be negative"),
        (lambda: ft.ring(4).consensus_factor(0), "steps must be at least 1"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
