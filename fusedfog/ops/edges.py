"""Who sends to whom in one operation, and with which weights: reading and checking arguments. Pure, no process group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fusedfog.topology import Round, Topology, exponential, named
from fusedfog.topology.round import whole

RecvWeights: TypeAlias = Mapping[int, float]
SendWeights: TypeAlias = Mapping[int, float] | Sequence[int]


@dataclass(frozen=True)
class Edges:
    """One rank's part in an operation: ``out = self_weight * x + sum_j recv[j] * (what j sends)``.

    Attributes:
        self_weight: weight of the rank's own tensor.
        recv: weight by sender, in the order in which results are put together; None if only the senders know.
        send: by receiver, what the tensor is multiplied by before it is sent; None if only the receivers know.
    """

    self_weight: float
    recv: dict[int, float] | None
    send: dict[int, float] | None


def read_topology(topology: Topology | str | None, size: int, what: str = "group") -> Topology:
    """The topology meant: given, named, or exponential by default.

    Raises:
        TypeError: for something else.
        ValueError: for an unknown name, or a topology of another size than `size`.
    """
    if topology is None:
        return exponential(size)
    if isinstance(topology, str):
        return named(topology, size)
    if not isinstance(topology, Topology):
        raise TypeError(
            f"topology must be a fusedfog.Topology, a name or None, not {type(topology).__name__}; a matrix becomes one by "
            f"fusedfog.topology.from_matrix(W)"
        )
    if topology.size != size:
        raise ValueError(f"the topology {topology!r} has {topology.size} ranks but the {what} has {size}")
    return topology


def weighted_edges(
    rank: int,
    size: int,
    topology: Topology | str | None,
    step: int,
    self_weight: float | None,
    recv_weights: RecvWeights | None,
    send_weights: SendWeights | None,
) -> Edges:
    """Edges of `neighbor_allreduce`; see there for the rules.

    Raises:
        TypeError: for arguments of the wrong kind.
        ValueError: for weights that are not finite, are incomplete, or go to the rank itself, to no rank or to none of
            the topology's neighbours.
    """
    if (self_weight is None) != (recv_weights is None):
        given, missing = ("self_weight", "recv_weights") if recv_weights is None else ("recv_weights", "self_weight")
        raise ValueError(f"{given} was given without {missing}; pass both, or neither to use the topology's weights")
    recv = None if recv_weights is None else read_weights(recv_weights, "recv_weights", rank, size)
    send = None if send_weights is None else read_weights(send_weights, "send_weights", rank, size, listed=True)
    if recv is None or self_weight is None:
        round_ = read_topology(topology, size).round(rank, whole(step, "step", 0))
        return Edges(round_.self_weight, round_.recv, _every_edge(round_, send))
    own = read_weight(self_weight, "self_weight")
    if topology is None:
        return Edges(own, recv, send)
    round_ = read_topology(topology, size).round(rank, whole(step, "step", 0))
    _only_neighbours(recv, round_.recv, "recv_weights", "receives from")
    if send is not None:
        _only_neighbours(send, round_.send, "send_weights", "sends to")
        return Edges(own, recv, send)
    # The topology's neighbours send whatever their weights here are, so their messages must be taken even if unused.
    return Edges(own, {peer: recv.get(peer, 0.0) for peer in round_.recv}, dict.fromkeys(round_.send, 1.0))


def gathered_edges(
    rank: int,
    size: int,
    topology: Topology | str | None,
    step: int,
    recv_ranks: Sequence[int] | None,
    send_ranks: Sequence[int] | None,
) -> Edges:
    """Edges of `neighbor_allgather`, whose weights are all 1; see there for the rules.

    Raises:
        TypeError: for arguments of the wrong kind.
        ValueError: for a rank that is listed twice, is the rank itself, no rank, or none of the topology's neighbours.
    """
    recv = None if recv_ranks is None else _listed(recv_ranks, "recv_ranks", rank, size)
    send = None if send_ranks is None else _listed(send_ranks, "send_ranks", rank, size)
    if topology is None and (recv is not None or send is not None):
        return Edges(1.0, recv, send)
    round_ = read_topology(topology, size).round(rank, whole(step, "step", 0))
    if recv is not None:
        _only_neighbours(recv, round_.recv, "recv_ranks", "receives from")
    if send is not None:
        _only_neighbours(send, round_.send, "send_ranks", "sends to")
    return Edges(
        1.0,
        dict.fromkeys(round_.recv, 1.0) if recv is None else recv,
        dict.fromkeys(round_.send, 1.0) if send is None else send,
    )


def pair_edges(rank: int, size: int, peer: int | None, weight: float) -> Edges:
    """Edges of `pair_gossip`.

    Raises:
        ValueError: if the weight is not finite, or the peer is the rank itself or no rank.
    """
    share = read_weight(weight, "weight")
    if peer is None:
        return Edges(1.0, {}, {})
    other = _peer(peer, "peer", rank, size)
    return Edges(1.0 - share, {other: share}, {other: 1.0})


def read_rank(given: int, name: str, size: int) -> int:
    """A rank of a group of `size`.

    Raises:
        ValueError: if it is none.
    """
    rank = whole(given, f"{name}: a rank", 0)
    if rank >= size:
        raise ValueError(f"{name}: there is no rank {rank}, the group's ranks are 0..{size - 1}")
    return rank


def read_weights(
    given: Mapping[int, float] | Sequence[int], name: str, rank: int, size: int, listed: bool = False
) -> dict[int, float]:
    """Weights by rank, in ascending order; with `listed`, a list of ranks means weights of 1.

    Raises:
        TypeError: for arguments of the wrong kind.
        ValueError: for weights that are not finite, or go to the rank itself, to no rank or to one twice.
    """
    if listed and _is_list(given):
        return dict(sorted(_listed(given, name, rank, size).items()))
    if not isinstance(given, Mapping):
        also = ", or a list of ranks for weights of 1" if listed else ""
        raise TypeError(f"{name} must be a dict {{rank: weight}}{also}, not {type(given).__name__}")
    weights: dict[int, float] = {}
    for key, value in given.items():
        peer = _peer(key, name, rank, size)
        if peer in weights:
            raise ValueError(f"{name} names rank {peer} twice")
        weights[peer] = read_weight(value, f"{name}[{peer}]")
    # Ascending: every rank must sum in the same order, whatever order its dict was written in.
    return dict(sorted(weights.items()))


def _listed(given: Iterable[int], name: str, rank: int, size: int) -> dict[int, float]:
    if not _is_list(given):
        raise TypeError(f"{name} must be a list of ranks, not {type(given).__name__}")
    peers: dict[int, float] = {}
    for entry in given:
        peer = _peer(entry, name, rank, size)
        if peer in peers:
            raise ValueError(f"{name} names rank {peer} twice")
        peers[peer] = 1.0
    return peers


def _is_list(given: object) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (Mapping, str, bytes))


def _peer(given: int, name: str, rank: int, size: int) -> int:
    peer = read_rank(given, name, size)
    if peer == rank:
        raise ValueError(f"{name} names rank {peer} itself; its own share is self_weight")
    return peer


def read_weight(given: float, name: str) -> float:
    """A finite number.

    Raises:
        ValueError: if it is none.
    """
    try:
        weight = float(given)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {given!r}") from None
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite, got {weight}")
    return weight


def _only_neighbours(given: dict[int, float], neighbours: dict[int, float], name: str, verb: str) -> None:
    strangers = [peer for peer in given if peer not in neighbours]
    if strangers:
        raise ValueError(
            f"{name} names rank {strangers[0]}, but in this step of the topology this rank {verb} {list(neighbours)} only; "
            f"leave the topology out to choose edges freely"
        )


def _every_edge(round_: Round, send: dict[int, float] | None) -> dict[int, float]:
    """Multipliers for all of a round's outgoing edges, which its receivers wait for."""
    if send is None:
        return dict.fromkeys(round_.send, 1.0)
    _only_neighbours(send, round_.send, "send_weights", "sends to")
    missing = [peer for peer in round_.send if peer not in send]
    if missing:
        raise ValueError(
            f"send_weights leaves out rank {missing[0]}, which receives from this rank by the topology's weights; give it a "
            f"weight (0 sends zeros), or pass self_weight and recv_weights on all ranks"
        )
    return send
