"""Who talks to whom: static graphs and sequences of graphs, for every number of ranks, without a process group."""

from fusedfog.topology.base import Topology, sequence
from fusedfog.topology.circulant import (
    equi_dynamic,
    exponential,
    fully_connected,
    one_peer_exponential,
    ring,
    symmetric_exponential,
)
from fusedfog.topology.explicit import from_matrix
from fusedfog.topology.from_graph import from_networkx
from fusedfog.topology.grouping import alternating_exponential_ring, base_graph
from fusedfog.topology.names import named
from fusedfog.topology.pairing import (
    inner_outer_exponential,
    inner_outer_ring,
    one_peer,
    one_peer_hypercube,
    random_matching,
)
from fusedfog.topology.round import Round
from fusedfog.topology.rounds import from_rounds
from fusedfog.topology.static import grid, hypercube, star

__all__ = [
    "Round",
    "Topology",
    "alternating_exponential_ring",
    "base_graph",
    "equi_dynamic",
    "exponential",
    "from_matrix",
    "from_networkx",
    "from_rounds",
    "fully_connected",
    "grid",
    "hypercube",
    "inner_outer_exponential",
    "inner_outer_ring",
    "named",
    "one_peer",
    "one_peer_exponential",
    "one_peer_hypercube",
    "random_matching",
    "ring",
    "sequence",
    "star",
    "symmetric_exponential",
]
