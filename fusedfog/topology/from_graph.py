"""networkx graphs as topologies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Topology
from fusedfog.topology.explicit import Explicit, check_sums

if TYPE_CHECKING:
    import networkx as nx

Floats = npt.NDArray[np.float64]
Ranks = npt.NDArray[np.int64]

SINKHORN_ROUNDS = 10_000
SINKHORN_PRECISION = 1e-13


def from_networkx(G: nx.Graph | nx.DiGraph, weights: str = "auto") -> Topology:
    """A static graph from a networkx graph on nodes 0..n-1; an edge (u, v) of a DiGraph means that u sends to v.

    ``weights="auto"``: edge attributes ``weight`` if there are any, else Metropolis-Hastings ``1 / max(d_i, d_j)``,
    degrees counting self, on an undirected graph, and on a DiGraph a uniform average of what a rank receives and its
    own (doubly stochastic only where everybody has as many in- as out-neighbours throughout). The attributes must make
    a doubly stochastic matrix; a self loop's weight is the rank's own, else that is 1 minus what it receives.
    ``"metropolis"`` and ``"uniform"`` ignore attributes; ``"sinkhorn"`` scales them (1 where missing, a missing self
    loop too) to a doubly stochastic matrix with the same edges.

    Raises:
        ValueError: if the nodes are not 0..n-1, edges are doubled, a weight is no finite number, the weighted matrix is
            not doubly stochastic (naming the row or column), or it cannot be made so.
    """
    makers = {"auto", "metropolis", "uniform", "sinkhorn"}
    if weights not in makers:
        raise ValueError(f"weights must be one of {', '.join(sorted(makers))}; got {weights!r}")
    n = _checked_nodes(G)
    receivers, senders, given, own_given = _edges(G, n)
    weighted = bool(np.isfinite(given).any() or np.isfinite(own_given).any())
    if weights == "sinkhorn":
        edge_weights, own = _balanced(n, receivers, senders, _or_one(given), _or_one(own_given))
    elif weights == "auto" and weighted:
        edge_weights, own = _as_given(n, receivers, senders, given, own_given)
    elif weights == "metropolis" or (weights == "auto" and not G.is_directed()):
        if G.is_directed():
            raise ValueError('Metropolis weights are for undirected graphs; use weights="uniform" or "sinkhorn"')
        degrees = 1 + _sums(receivers, np.ones(len(receivers)), n)
        edge_weights = 1 / np.maximum(degrees[receivers], degrees[senders])
        own = 1 - _sums(receivers, edge_weights, n)
    else:
        own = 1 / (1 + _sums(receivers, np.ones(len(receivers)), n))
        edge_weights = own[receivers]
    return Explicit("from_networkx", own, receivers, senders, edge_weights)


def _checked_nodes(G: Any) -> int:
    if G.is_multigraph():
        raise ValueError("a multigraph may hold an edge twice; convert it to nx.Graph or nx.DiGraph first")
    n = int(G.number_of_nodes())
    if n == 0:
        raise ValueError("the graph has no nodes")
    strange = [node for node in G.nodes if not isinstance(node, int) or not 0 <= node < n]
    if strange:
        raise ValueError(
            f"nodes must be the ranks 0..{n - 1}, not {strange[0]!r}; nx.convert_node_labels_to_integers helps"
        )
    return n


def _edges(G: Any, n: int) -> tuple[Ranks, Ranks, Floats, Floats]:
    """(receivers, senders, weights, own weights), nan where the attribute is missing."""
    own = np.full(n, np.nan)
    receivers: list[int] = []
    senders: list[int] = []
    given: list[float] = []
    for sender, receiver, attribute in G.edges(data="weight"):
        weight = math.nan if attribute is None else _number(attribute, sender, receiver)
        if sender == receiver:
            own[sender] = weight
            continue
        directions = [(receiver, sender)] if G.is_directed() else [(receiver, sender), (sender, receiver)]
        for to, origin in directions if weight != 0 else []:
            receivers.append(to)
            senders.append(origin)
            given.append(weight)
    return np.array(receivers, dtype=np.int64), np.array(senders, dtype=np.int64), np.array(given, dtype=float), own


def _number(attribute: Any, sender: int, receiver: int) -> float:
    try:
        weight = float(attribute)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"edge ({sender}, {receiver}) has weight {attribute!r}; every weight must be a finite number")
    return weight


def _sums(owners: Ranks, weights: Floats, n: int) -> Floats:
    return np.bincount(owners, weights, minlength=n).astype(np.float64)


def _or_one(given: Floats) -> Floats:
    return np.where(np.isnan(given), 1.0, given)


def _as_given(n: int, receivers: Ranks, senders: Ranks, given: Floats, own_given: Floats) -> tuple[Floats, Floats]:
    if np.isnan(given).any():
        edge = int(np.isnan(given).argmax())
        raise ValueError(
            f"edge ({senders[edge]}, {receivers[edge]}) has no weight while others have; give all edges a weight, or "
            'use weights="metropolis", "uniform" or "sinkhorn"'
        )
    own = np.where(np.isnan(own_given), 1 - _sums(receivers, given, n), own_given)
    way_out = 'use weights="sinkhorn" to balance them, or "metropolis" or "uniform" to ignore them'
    check_sums(own + _sums(receivers, given, n), "row", way_out)
    check_sums(own + _sums(senders, given, n), "column", way_out)
    return given, own


def _balanced(n: int, receivers: Ranks, senders: Ranks, edges: Floats, own: Floats) -> tuple[Floats, Floats]:
    """Sinkhorn-Knopp: alternately scale rows and columns to sum 1 (Sinkhorn and Knopp 1967)."""
    if (edges < 0).any() or (own <= 0).any():
        raise ValueError('weights="sinkhorn" needs positive weights, on self loops too')
    rows, columns = np.ones(n), np.ones(n)
    for _ in range(SINKHORN_ROUNDS):
        rows = 1 / (own * columns + _sums(receivers, edges * columns[senders], n))
        columns = 1 / (own * rows + _sums(senders, edges * rows[receivers], n))
        row_sums = rows * (own * columns + _sums(receivers, edges * columns[senders], n))
        if np.abs(row_sums - 1).max() < SINKHORN_PRECISION:
            return rows[receivers] * edges * columns[senders], rows * own * columns
    raise ValueError(
        "these weights cannot be balanced: every edge must lie on a cycle (the graph, or each part of it, strongly "
        f"connected); after {SINKHORN_ROUNDS} rounds row {int(np.abs(row_sums - 1).argmax())} still sums to "
        f"{row_sums[np.abs(row_sums - 1).argmax()]:.8g}"
    )
