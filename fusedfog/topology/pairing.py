"""Sequences in which a rank exchanges with at most one peer per round, weights 1/2 and 1/2."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Topology
from fusedfog.topology.circulant import Circulant, common_draw
from fusedfog.topology.grouping import base_graph, machines_left
from fusedfog.topology.round import Matrix, Round, whole
from fusedfog.topology.static import power_of_two


class OnePeer(Topology):
    """See `one_peer`."""

    def __init__(self, static: Topology) -> None:
        super().__init__(f"one_peer({static!r})", static.size, None)
        self.static = static
        self._clockwise: dict[int, list[int]] = {}

    @property
    def period(self) -> int:
        """Least common multiple of the ranks' numbers of out-neighbours."""
        if self._period is None:
            ranks = range(1 if isinstance(self.static, Circulant) else self.size)
            self._period = math.lcm(*(max(1, len(self._out_neighbors(rank))) for rank in ranks))
        return self._period

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        if isinstance(self.static, Circulant) or not self.is_column_stochastic():
            return one_peer(self.static.resized(n, kept))
        return super()._resized(n, kept)

    def _out_neighbors(self, rank: int) -> list[int]:
        if rank not in self._clockwise:
            self._clockwise[rank] = sorted(self.static.round(rank).send, key=lambda peer: (peer - rank) % self.size)
        return self._clockwise[rank]

    def _target(self, rank: int, step: int) -> int | None:
        targets = self._out_neighbors(rank)
        return targets[step % len(targets)] if targets else None

    def _senders(self, rank: int, step: int) -> list[int]:
        return [peer for peer in self.static.round(rank).recv if self._target(peer, step) == rank]

    def _round(self, rank: int, step: int) -> Round:
        senders = self._senders(rank, step)
        share = 1 / (len(senders) + 1)
        target = self._target(rank, step)
        send = {} if target is None else {target: 1 / (len(self._senders(target, step)) + 1)}
        return Round(share, dict.fromkeys(senders, share), send)

    def is_row_stochastic(self) -> bool:
        """True: a receiver weighs itself and what it gets uniformly."""
        return True

    def is_column_stochastic(self) -> bool:
        """Whether in every round everyone receives exactly one message, as on a graph that looks alike from all ranks.

        Elsewhere some ranks receive two messages and some none, and the mean drifts.
        """
        return isinstance(self.static, Circulant) or super().is_column_stochastic()

    def _identity(self) -> bytes:
        return f"one_peer:{self.static.fingerprint()}".encode()


def one_peer(static: Topology) -> Topology:
    """At step t each rank sends to its (t mod outdegree)-th out-neighbour in clockwise order (BlueFog).

    The receiver weighs itself and what it gets uniformly. On graphs that look alike from every rank (`exponential`,
    `ring`) everyone gets one message, and the sequence is doubly stochastic. On others (`star`, `grid`, and even
    `hypercube`, whose clockwise orders differ) it is only row-stochastic: `is_doubly_stochastic` says so, and only
    push-sum then finds the true mean.

    Raises:
        ValueError: if ``static`` is not a static topology.
    """
    if not isinstance(static, Topology) or not static.is_static:
        raise ValueError(f"one_peer takes turns over the edges of a static topology, got {static!r}")
    return OnePeer(static)


class _Matching(Topology):
    """Disjoint pairs average: every matrix is a symmetric projection."""

    def _partner(self, rank: int, step: int) -> int:
        """The peer of this round, or ``rank`` itself if it pauses."""
        raise NotImplementedError

    def _round(self, rank: int, step: int) -> Round:
        partner = self._partner(rank, step)
        if partner == rank:
            return Round(1.0, {}, {})
        return Round(0.5, {partner: 0.5}, {partner: 0.5})

    def is_row_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_column_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_symmetric(self) -> bool:
        """True by construction."""
        return True

    @property
    def max_degree(self) -> int:
        """One, and none for one rank."""
        return min(1, self.size - 1)


class OnePeerHypercube(_Matching):
    """See `one_peer_hypercube`."""

    def __init__(self, size: int) -> None:
        dimensions = size.bit_length() - 1
        super().__init__(f"one_peer_hypercube({size})", size, max(1, dimensions))
        self.dimensions = dimensions

    def _partner(self, rank: int, step: int) -> int:
        return rank ^ (1 << step % self.dimensions) if self.dimensions else rank

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        # As symmetric, one peer a round, and exact for every n; the same graph for powers of two.
        return base_graph(n) if n & (n - 1) else one_peer_hypercube(n)

    def _matrix(self, step: int) -> Matrix:
        if not self.dimensions:
            return np.ones((1, 1))
        low = 2 ** (step % self.dimensions)
        pairs = np.asarray(np.kron(np.full((2, 2), 0.5), np.eye(low)), dtype=np.float64)
        return np.asarray(np.kron(np.eye(self.size // (2 * low)), pairs), dtype=np.float64)

    @property
    def _exact_after(self) -> int:
        return max(1, self.dimensions)


def one_peer_hypercube(n: int) -> Topology:
    """Step t pairs rank i with i xor 2^(t mod log2 n); any log2 n consecutive steps average exactly.

    Like `one_peer_exponential` but symmetric: each matrix is a projection.

    Raises:
        ValueError: if ``n`` is not a power of two.
    """
    return OnePeerHypercube(power_of_two(n, "one_peer_hypercube"))


class RandomMatching(_Matching):
    """See `random_matching`."""

    REMEMBERED = 4

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(f"random_matching({size}, seed={seed})", size, None if size > 2 else 1)
        self.seed = seed
        self._partners: dict[int, npt.NDArray[np.int64]] = {}

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return random_matching(n, self.seed)

    def _partner(self, rank: int, step: int) -> int:
        return int(self._all_partners(step)[rank])

    def _all_partners(self, step: int) -> npt.NDArray[np.int64]:
        if step not in self._partners:
            while len(self._partners) >= self.REMEMBERED:
                del self._partners[next(iter(self._partners))]
            self._partners[step] = self._draw(step)
        return self._partners[step]

    def _draw(self, step: int) -> npt.NDArray[np.int64]:
        # Raw Philox bits and a stable sort, not Generator.permutation: numpy may change that one between versions,
        # and ranks that disagree about their partners wait for each other for ever.
        key = int.from_bytes(common_draw(self.seed, step)[:16], "little")
        order = np.argsort(np.random.Philox(key=key).random_raw(self.size), kind="stable")
        partners = np.arange(self.size)
        paired = self.size // 2 * 2
        first, second = order[0:paired:2], order[1:paired:2]
        partners[first], partners[second] = second, first
        return partners

    def _matrix(self, step: int) -> Matrix:
        identity = np.eye(self.size)
        return (identity + identity[self._all_partners(step)]) / 2

    def spectral_gap(self) -> float:
        """``1 - sqrt(||E[W] - J||)``: that norm is 1/2 for odd n, (n-2) / (2n-2) for even n."""
        n = self.size
        factor = 0.5 * (n > 1) if n % 2 else (n - 2) / (2 * n - 2)
        return 1 - math.sqrt(factor)


def random_matching(n: int, seed: int = 0) -> Topology:
    """Each step pairs the ranks at random, from a common seed; for odd n one rank pauses. Weights 1/2 and 1/2.

    Raises:
        ValueError: if ``n`` is not a whole number of at least 1, or ``seed`` of at least 0.
    """
    return RandomMatching(whole(n, "n"), whole(seed, "seed", 0))


class Permuting(Topology):
    """Everyone sends to at most one rank, and no two to the same: ``W = (I + P) / 2`` for a permutation P."""

    def _peers(self, rank: int, step: int) -> tuple[int, int]:
        """(sends to, receives from)."""
        raise NotImplementedError

    def _round(self, rank: int, step: int) -> Round:
        target, source = self._peers(rank, step)
        return Round(0.5, {source: 0.5}, {target: 0.5})

    def is_row_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_column_stochastic(self) -> bool:
        """True by construction."""
        return True

    @property
    def max_degree(self) -> int:
        """One."""
        return 1


class InnerOuter(Permuting):
    """See `inner_outer_ring` and `inner_outer_exponential`; at least two machines of at least two ranks."""

    def __init__(self, name: str, machines: int, local: int, hops: Callable[[int], list[int]]) -> None:
        self.machines = machines
        self.local = local
        self._outer = hops(machines)
        self._inner = hops(local - 1 if local > 2 else 2)
        period = 2 * len(self._outer) if local == 2 else math.lcm(local, len(self._outer), len(self._inner))
        super().__init__(f"{name}({machines}, {local})", machines * local, period)
        self._hops = hops

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        left = machines_left(n, kept, self.local)
        return super()._resized(n, kept) if left is None else _inner_outer(self.name, *left, self._hops)

    def _peers(self, rank: int, step: int) -> tuple[int, int]:
        machine, own = divmod(rank, self.local)
        if self.local == 2:
            if step % 2 == 0:
                return rank ^ 1, rank ^ 1
            return self._outside(machine, own, step // 2)
        outgoing = step % self.local
        if own == outgoing:
            return self._outside(machine, own, step)
        return self._inside(machine, own, outgoing, self._inner[step % len(self._inner)])

    def _outside(self, machine: int, own: int, round_: int) -> tuple[int, int]:
        hop = self._outer[round_ % len(self._outer)]
        target, source = (machine + hop) % self.machines, (machine - hop) % self.machines
        return target * self.local + own, source * self.local + own

    def _inside(self, machine: int, own: int, outgoing: int, hop: int) -> tuple[int, int]:
        """A hop on the circle of the machine's ranks without ``outgoing``, counted from the rank after it."""
        others = self.local - 1
        place = (own - outgoing) % self.local - 1
        target, source = (
            machine * self.local + (outgoing + 1 + there % others) % self.local for there in (place + hop, place - hop)
        )
        return target, source


def inner_outer_ring(machines: int, local: int) -> Topology:
    """At step t local rank t mod L sends to its like in the next machine, the others to the next within (BlueFog).

    Rank = machine * L + local rank, weights 1/2 and 1/2. With two ranks per machine the other would have nobody, and
    the two would never mix: there even steps are within the machine and odd steps between machines. One machine, or
    one rank per machine, is a ring.

    Raises:
        ValueError: if ``machines`` or ``local`` is not a whole number of at least 1.
    """
    return _inner_outer("inner_outer_ring", machines, local, _ring_hops)


def inner_outer_exponential(machines: int, local: int) -> Topology:
    """Like `inner_outer_ring`, with hops 2^(t mod tau) between machines and within (BlueFog's InnerOuterExpo2).

    tau is the number of powers of two less than the number of machines, respectively of ranks that stay inside.

    Raises:
        ValueError: if ``machines`` or ``local`` is not a whole number of at least 1.
    """
    return _inner_outer("inner_outer_exponential", machines, local, _exponential_hops)


def _inner_outer(name: str, machines: int, local: int, hops: Callable[[int], list[int]]) -> Topology:
    machines, local = whole(machines, "machines"), whole(local, "local")
    if machines == 1 or local == 1:
        n = machines * local
        rounds = [{hop: 0.5} for hop in hops(n)] if n > 1 else [{}]
        return Circulant(f"{name}({machines}, {local})", n, rounds, partial(_on_one_circle, name, hops, machines == 1))
    return InnerOuter(name, machines, local, hops)


def _on_one_circle(name: str, hops: Callable[[int], list[int]], one_machine: bool, n: int) -> Topology:
    return _inner_outer(name, *((1, n) if one_machine else (n, 1)), hops)


def _ring_hops(members: int) -> list[int]:
    return [1]


def _exponential_hops(members: int) -> list[int]:
    return [1 << power for power in range((members - 1).bit_length())]
