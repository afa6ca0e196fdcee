"""Topologies by name."""

from __future__ import annotations

from collections.abc import Callable

from fusedfog.errors import did_you_mean
from fusedfog.topology.base import Topology
from fusedfog.topology.circulant import (
    equi_dynamic,
    exponential,
    fully_connected,
    one_peer_exponential,
    ring,
    symmetric_exponential,
)
from fusedfog.topology.grouping import alternating_exponential_ring, base_graph
from fusedfog.topology.pairing import (
    inner_outer_exponential,
    inner_outer_ring,
    one_peer_hypercube,
    random_matching,
)
from fusedfog.topology.static import grid, hypercube, star

BY_SIZE: dict[str, Callable[[int], Topology]] = {
    "ring": ring,
    "star": star,
    "grid": grid,
    "fully_connected": fully_connected,
    "exponential": exponential,
    "symmetric_exponential": symmetric_exponential,
    "hypercube": hypercube,
    "one_peer_exponential": one_peer_exponential,
    "one_peer_hypercube": one_peer_hypercube,
    "base_graph": base_graph,
    "equi_dynamic": equi_dynamic,
    "random_matching": random_matching,
}
"""Topologies that a number of ranks defines."""

BY_MACHINES: dict[str, Callable[[int, int], Topology]] = {
    "inner_outer_ring": inner_outer_ring,
    "inner_outer_exponential": inner_outer_exponential,
    "alternating_exponential_ring": alternating_exponential_ring,
}
"""Topologies that (machines, local) define: how many machines, and how many ranks on each."""


def named(name: str, n: int) -> Topology:
    """The topology that the function of this name makes for ``n`` ranks, with its default arguments.

    Raises:
        ValueError: if there is none of this name, if it needs (machines, local), or if it does not exist for ``n``.
    """
    if name in BY_SIZE:
        return BY_SIZE[name](n)
    if name in BY_MACHINES:
        raise ValueError(
            f"{name!r} needs to know the machines: pass fusedfog.topology.{name}(machines, local) instead of its name"
        )
    raise ValueError(
        f"unknown topology {name!r}; known are {', '.join(BY_SIZE)}{did_you_mean(name, [*BY_SIZE, *BY_MACHINES])}"
    )
