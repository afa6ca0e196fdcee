"""Dense mixing matrices in tests: products, distance to the mean, rounds read off rows and columns."""

from __future__ import annotations

import numpy as np
import pytest

from fusedfog.topology import Topology


def product(topology: Topology, steps: int, start: int = 0) -> np.ndarray:
    """[n, n]: what `steps` steps from `start` on do together."""
    result = np.eye(topology.size)
    for step in range(start, start + steps):
        result = topology.matrix(step) @ result
    return result


def distance_to_mean(matrix: np.ndarray) -> float:
    """The factor by which the worst disagreement shrinks."""
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


def from_hops(n: int, hops: set[int]) -> np.ndarray:
    """[n, n]: every rank sends to those `hops` ahead of it, and all weights of a row are equal."""
    weights = np.zeros((n, n))
    for sender in range(n):
        for hop in hops | {0}:
            weights[(sender + hop) % n, sender] = 1 / (len(hops) + 1)
    return weights
