"""Links, and what messages and all-reduces cost on them.

A link is Hockney's alpha-beta model: a message of s bytes takes ``alpha + s / beta`` (Hockney 1994). Ranks live on machines
of `local` ranks each. Ranks of one machine talk over `inside`, each with its own port; traffic between machines goes through
one network card per machine, which they share. Every port is full duplex and serialises what goes the same way through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusedfog.topology import Topology

Times = npt.NDArray[np.float64]
"""One number per rank (or per machine)."""

Collective = Literal["ring", "tree", "hierarchical"]


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        latency_s: alpha, seconds that a message takes however small it is.
        bandwidth: beta, bytes per second each way; infinity is allowed.

    Raises:
        ValueError: a negative latency or a bandwidth that is not positive.
    """

    latency_s: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"a link's latency must be zero or more seconds, got {self.latency_s!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"a link's bandwidth must be positive, got {self.bandwidth!r} B/s")


@dataclass(frozen=True)
class Network:
    """Ranks on machines, rank = machine * local + local rank.

    Attributes:
        ranks: how many in all.
        across: the link between machines; its bandwidth is that of a machine's network card, whatever `local` is.
        local: ranks per machine; 1 for a flat network.
        inside: the link between ranks of one machine; its bandwidth is that of one rank's port. Needed if `local` > 1.

    Raises:
        ValueError: no ranks, ranks that do not fill the machines, or a missing `inside`.
    """

    ranks: int
    across: Link
    local: int = 1
    inside: Link | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.local < 1:
            raise ValueError(f"a network needs at least one rank, on machines of at least one: got {self}")
        if self.ranks % self.local:
            raise ValueError(f"{self.ranks} ranks do not fill machines of {self.local}")
        if self.local > 1 and self.inside is None:
            raise ValueError(f"machines of {self.local} ranks need a link inside: give its latency and bandwidth")

    @property
    def machines(self) -> int:
        """How many machines."""
        return self.ranks // self.local

    @property
    def slowest(self) -> float:
        """The bandwidth of the slowest kind of link that a ring through all ranks crosses, in B/s."""
        kinds = [self.across] * (self.machines > 1) + [self.inside or self.across] * (self.local > 1)
        return min((kind.bandwidth for kind in kinds), default=math.inf)


def allreduce_seconds(network: Network, size: float, kind: Collective = "ring") -> float:
    """Seconds of an all-reduce of `size` bytes, n ranks on m machines of L, once all ranks have started.

    ring:          2 (n-1)/n s / beta + 2 (n-1) alpha           (Patarasuk and Yuan 2009); the ring passes through each
                   machine once, so beta is the slowest link's and alpha the mean over the ring's hops
    tree:          2 s / beta + 2 ((L-1) alpha_in + ceil(log2 m) alpha)          (two trees, Sanders et al. 2009; NCCL)
    hierarchical:  reduce-scatter and all-gather inside, L rings across on a share of s / L each:
                   2 (L-1)/L s / beta_in + 2 (L-1) alpha_in + 2 (m-1)/m s / beta + 2 (m-1) alpha

    Raises:
        ValueError: an unknown `kind`.
    """
    n, m, local = network.ranks, network.machines, network.local
    if n == 1:
        return 0.0
    across, inside = network.across, network.inside or network.across
    if kind == "ring":
        outside = m / n if m > 1 else 0.0
        latency = outside * across.latency_s + (1 - outside) * inside.latency_s
        return 2 * (n - 1) / n * size / network.slowest + 2 * (n - 1) * latency
    if kind == "tree":
        depth = (local - 1) * inside.latency_s + math.ceil(math.log2(m)) * across.latency_s
        return 2 * size / network.slowest + 2 * depth
    if kind == "hierarchical":
        within = 2 * (local - 1) / local * size / inside.bandwidth + 2 * (local - 1) * inside.latency_s
        return within + 2 * (m - 1) / m * size / across.bandwidth + 2 * (m - 1) * across.latency_s
    raise ValueError(f"unknown all-reduce {kind!r}; there are ring, tree and hierarchical")


@dataclass(frozen=True)
class Meeting:
    """One round of a topology as transfers: for each rank those that it takes part in, as sender or as receiver.

    A transfer starts when both ends have posted it and lasts alpha + s / rate. Rates are shares: a port that k messages
    leave (or reach) gives each 1/k, so that all end together, when serialised messages would have ended too.

    Attributes:
        partner: the other end of each transfer (a rank itself for "nothing"), transfers of rank i from `start[i]` on.
        latency_s, s_per_byte: of each transfer.
        start, count: [n] first transfer of each rank, and how many.
        incoming, outgoing: [n] messages that each rank receives and sends.
        outside: messages that leave a machine, summed over machines.
    """

    partner: npt.NDArray[np.int64]
    latency_s: Times
    s_per_byte: Times
    start: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    incoming: Times
    outgoing: Times
    outside: int

    def finish(self, begin: Times, size: float) -> Times:
        """When each rank is through with all its transfers of `size` bytes; `begin[i]` is when rank i has posted its own."""
        owner_begin = np.repeat(begin, self.count)
        ends = np.maximum(owner_begin, begin[self.partner]) + self.latency_s + self.s_per_byte * size
        done: Times = np.maximum.reduceat(ends, self.start)
        return done


def meeting(topology: Topology, step: int, network: Network) -> Meeting:
    """Round `step` of a topology over the network's ranks.

    Raises:
        ValueError: the topology is of another size.
    """
    if topology.size != network.ranks:
        raise ValueError(f"topology {topology.name} has {topology.size} ranks, the network {network.ranks}")
    n = network.ranks
    edges = [(rank, peer) for rank in range(n) for peer in topology.round(rank, step).send]
    sender, receiver = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    outside = sender // network.local != receiver // network.local
    # Ports 0..n-1 are the ranks' own, those behind them the machines' network cards.
    leaves = np.where(outside, n + sender // network.local, sender)
    reaches = np.where(outside, n + receiver // network.local, receiver)
    crowd = np.maximum(
        np.bincount(leaves, minlength=2 * n)[leaves],
        np.bincount(reaches, minlength=2 * n)[reaches],
    )
    inside = network.inside or network.across
    latency = np.where(outside, network.across.latency_s, inside.latency_s)
    pace = crowd / np.where(outside, network.across.bandwidth, inside.bandwidth)
    # Every rank also meets itself at no cost, so that none is without a transfer.
    own, free = np.arange(n), np.zeros(n)
    owner = np.concatenate([own, sender, receiver])
    order = np.argsort(owner, kind="stable")
    return Meeting(
        np.concatenate([own, receiver, sender])[order],
        np.concatenate([free, latency, latency])[order],
        np.concatenate([free, pace, pace])[order],
        np.searchsorted(owner[order], own),
        np.bincount(owner, minlength=n),
        np.bincount(receiver, minlength=n).astype(np.float64),
        np.bincount(sender, minlength=n).astype(np.float64),
        int(outside.sum()),
    )


def between_machines(network: Network) -> Network:
    """The machines of a network as ranks of a flat one: where a mesh's topology lives."""
    return Network(network.machines, network.across)


def finish_by_machine(network: Network, round_: Meeting, begin: Times, size: float, *, collects: bool) -> Times:
    """When each rank has mixed `size` bytes on a mesh (`fusedfog.comm.two_level`): collected inside, exchanged, handed round.

    Inside, each local rank exchanges shards of s/L with the L-1 others, before (unless they are equal, and not `collects`) and
    after: (L-1)/L s / beta_in + alpha_in each time. Across, a machine sends its model once to each neighbour machine of
    `round_`, L shards side by side.
    """
    local = network.local
    within = 0.0
    if local > 1 and network.inside is not None:
        within = (local - 1) / local * size / network.inside.bandwidth + network.inside.latency_s
    together = begin.reshape(-1, local).max(axis=1) + within * collects
    mixed = round_.finish(together, size) + within
    return np.repeat(mixed, local)
