"""Who writes into whose window, and with which weights: reading and checking arguments. Pure, no process group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fusedfog.ops.edges import SendWeights, read_rank, read_topology, read_weight, read_weights
from fusedfog.ops.tensors import describe
from fusedfog.topology import Topology

ExplicitEdges: TypeAlias = Iterable[tuple[int, int]]
"""Pairs (sender, receiver), the same ones on all ranks."""


@dataclass(frozen=True)
class WindowEdges:
    """One rank's edges of a window.

    Attributes:
        words: what all ranks must have alike, for errors.
        self_weight, recv: weights of `update`, by default; `recv` by sender, in ascending order.
        send: the receivers, in ascending order.
    """

    words: str
    self_weight: float
    recv: dict[int, float]
    send: tuple[int, ...]


def read_window_edges(topology: Topology | str | ExplicitEdges | None, rank: int, size: int) -> WindowEdges:
    """The edges of a static topology with its weights, or of pairs, whose receivers weigh themselves and all senders alike.

    Raises:
        TypeError: for something else.
        ValueError: for a topology that changes or has another size, pairs of ranks that do not exist, of one rank with
            itself, or twice the same.
    """
    if topology is None or isinstance(topology, (Topology, str)):
        given = read_topology(topology, size)
        if not given.is_static:
            raise ValueError(
                f"a window has the same neighbours for as long as it lives, and {given.name} changes them: use a static topology "
                f"('exponential', 'ring', ...) or pairs (sender, receiver) of all edges, and weights= in each call to choose "
                f"among them"
            )
        round_ = given.round(rank)
        return WindowEdges(
            f"{given.name} ({given.fingerprint()[:8]})",
            round_.self_weight,
            dict(sorted(round_.recv.items())),
            tuple(sorted(round_.send)),
        )
    if not isinstance(topology, Iterable):
        raise TypeError(
            f"topology must be a fusedfog.Topology, a name or pairs (sender, receiver), not {type(topology).__name__}"
        )
    pairs = _read_pairs(topology, size)
    senders = [sender for sender, receiver in pairs if receiver == rank]
    weight = 1 / (len(senders) + 1)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:8]
    return WindowEdges(
        f"{len(pairs)} pairs ({digest})",
        weight,
        dict.fromkeys(senders, weight),
        tuple(receiver for sender, receiver in pairs if sender == rank),
    )


def _read_pairs(given: ExplicitEdges, size: int) -> list[tuple[int, int]]:
    pairs: set[tuple[int, int]] = set()
    for entry in given:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise TypeError(f"topology: explicit edges are pairs (sender, receiver), not {entry!r}")
        pair = read_rank(entry[0], "topology", size), read_rank(entry[1], "topology", size)
        if pair[0] == pair[1]:
            raise ValueError(f"topology: rank {pair[0]} has no edge to itself; its own share is self_weight")
        if pair in pairs:
            raise ValueError(f"topology: the edge {pair} is there twice")
        pairs.add(pair)
    return sorted(pairs)


@dataclass(frozen=True)
class WindowArguments:
    """Checks the arguments of a window's calls.

    Attributes:
        rank, size: this rank, and how many there are.
        edges: its edges.
        like: its tensor.
    """

    rank: int
    size: int
    edges: WindowEdges
    like: Tensor

    def send_weights(self, given: SendWeights | None) -> dict[int, float]:
        """By receiver; 1 for all if None."""
        if given is None:
            return dict.fromkeys(self.edges.send, 1.0)
        weights = read_weights(given, "weights", self.rank, self.size, listed=True)
        self._only(weights, self.edges.send, "weights", "sends to")
        return self._usable(weights, "weights")

    def get_weights(self, given: SendWeights | None) -> dict[int, float]:
        """By sender; 1 for all if None."""
        if given is None:
            return dict.fromkeys(self.edges.recv, 1.0)
        weights = read_weights(given, "weights", self.rank, self.size, listed=True)
        self._only(weights, self.edges.recv, "weights", "receives from")
        return self._usable(weights, "weights")

    def update_weights(
        self, self_weight: float | None, recv_weights: Mapping[int, float] | None
    ) -> tuple[float, dict[int, float]]:
        """The own one, and by sender; the edges' own if both are None."""
        if (self_weight is None) != (recv_weights is None):
            given, missing = (
                ("self_weight", "recv_weights") if recv_weights is None else ("recv_weights", "self_weight")
            )
            raise ValueError(f"{given} was given without {missing}; pass both, or neither to use the window's weights")
        own, recv = self.edges.self_weight, self.edges.recv
        if self_weight is not None and recv_weights is not None:
            own = read_weight(self_weight, "self_weight")
            recv = read_weights(recv_weights, "recv_weights", self.rank, self.size)
            self._only(recv, self.edges.recv, "recv_weights", "receives from")
        return self.one_weight(own, "self_weight"), self._usable(recv, "recv_weights")

    def ranks(self, given: Iterable[int] | None, own: bool) -> list[int]:
        """The neighbours that a mutex is asked of: receivers, or with `own` senders."""
        neighbours = list(self.edges.recv) if own else list(self.edges.send)
        if given is None:
            return neighbours
        chosen = read_weights(list(given), "ranks", self.rank, self.size, listed=True)
        self._only(chosen, neighbours, "ranks", "receives from" if own else "sends to")
        return list(chosen)

    def one_weight(self, weight: float, name: str) -> float:
        """A weight that this window's dtype can be multiplied by."""
        weight = read_weight(weight, name)
        if not self.like.dtype.is_floating_point and not self.like.dtype.is_complex and weight != int(weight):
            raise TypeError(
                f"{name} is {weight:g}, but integers are multiplied by whole weights only: give the window "
                f"a floating-point tensor, or use collect() and whole weights"
            )
        return weight

    def same_kind(self, x: Tensor, name: str) -> Tensor:
        """x, which must be like the window's tensor."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
        if (x.shape, x.dtype, x.device) != (self.like.shape, self.like.dtype, self.like.device):
            raise ValueError(
                f"{name} is {describe(x)} on {x.device}, but the window's tensor is {describe(self.like)} on {self.like.device}"
            )
        return x.detach()

    def _usable(self, weights: dict[int, float], name: str) -> dict[int, float]:
        return {peer: self.one_weight(weight, f"{name}[{peer}]") for peer, weight in weights.items()}

    def _only(self, given: Iterable[int], neighbours: Iterable[int], name: str, verb: str) -> None:
        strangers = [peer for peer in given if peer not in neighbours]
        if strangers:
            raise ValueError(
                f"{name} names rank {strangers[0]}, but in this window rank {self.rank} {verb} {list(neighbours)} only"
            )
