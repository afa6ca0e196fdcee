"""Deliveries: the ways to fill a bucket's inbox, behind one protocol, and what they share.

`Mailbox` knows no more of them than `Delivery` says, so a further way is a further class and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fusedfog.comm.transfer import Transfer
from fusedfog.gossip.buckets import BucketState, Inbox
from fusedfog.kernels import CompressedChannel
from fusedfog.params.flat import FlatSegment
from fusedfog.params.pages import zeros
from fusedfog.topology import Round, Topology

ROUNDS_AHEAD = 64
"""Of an endless topology are looked at ahead."""


@dataclass
class ExchangeStats:
    """Running totals of one rank, for `stats()`, and for `watch`, which alone shows `waited_for`.

    Attributes:
        waited_for: peer -> seconds that the host was blocked until something with that peer was over, and nothing else was left.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_across: int = 0
    blocked_s: float = 0.0
    torn_messages: int = 0
    refused: int = 0
    refused_from: dict[int, int] = field(default_factory=dict)
    healed: int = 0
    waited_for: dict[int, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The totals by name; who was refused, only if somebody was, so that healthy runs have nothing but numbers."""
        left_out = ("waited_for",) if self.refused_from else ("waited_for", "refused_from")
        found = dict(vars(self), refused_from=dict(self.refused_from))
        return {name: value for name, value in found.items() if name not in left_out}


class Delivery(Protocol):
    """One way to fill a bucket's inbox."""

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer | None:
        """Start exchange number `exchange` of a bucket; sets what its inbox will hold, and from whom it comes.

        Returns:
            The transfer; None if it leaves with another bucket that is not ready yet, and then is set with that one's.
        """
        ...

    def use_topology(self, topology: Topology | None) -> None:
        """Deliver along this topology from the next exchange on."""
        ...

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """Deliver these buckets, laid out anew, from now on."""
        ...

    def inbox_counts(self) -> set[int]:
        """How many tensors an inbox has for each message, in any round."""
        ...

    def most_inboxes(self) -> int:
        """The most of these; for endless topologies what they promise, or a ValueError."""
        ...

    def open_connections(self) -> None:
        """On NCCL, open the connections of every round, the first ones of an endless topology, so that no step has to."""
        ...


class OneMean:
    """What deliveries share that bring one tensor, mixed already, and keep nothing of the buckets."""

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """See `Delivery`."""

    def inbox_counts(self) -> set[int]:
        """A mean counts as one neighbour."""
        return {1}

    def most_inboxes(self) -> int:
        """A mean counts as one neighbour."""
        return 1


class InboxTensors:
    """The tensors in which messages arrive, made at their first use and the same in every step.

    Attributes:
        messages: names of the flat tensors that travel.
    """

    def __init__(self, messages: tuple[str, ...]) -> None:
        self.messages = messages
        self._tensors: dict[tuple[int, str], list[Tensor]] = {}
        self._together: dict[int, tuple[FlatSegment, ...]] = {}
        self._wholes: dict[tuple[int, str], list[Tensor]] = {}

    def lay_together(self, packs: Sequence[tuple[FlatSegment, ...]]) -> None:
        """From now on have the inboxes of each pack's segments, and of no others, lie behind one another; see `wholes`."""
        together = {id(segment): pack for pack in packs for segment in pack}
        for key in [key for key in self._tensors if key[0] in self._together or key[0] in together]:
            del self._tensors[key]
        self._together = together
        self._wholes.clear()

    def wholes(self, segments: tuple[FlatSegment, ...], name: str, count: int) -> list[Tensor]:
        """Where `count` neighbours' messages `name` arrive for the segments of a pack."""
        self._of(segments[0], name, segments[0].tensor(name), count)
        return self._wholes.get((id(segments[0]), name), [])[:count]

    def inbox(self, segment: FlatSegment, count: int, ends: tuple[CompressedChannel, ...] = ()) -> Inbox:
        """Where messages of up to `count` neighbours arrive, codes of these ends if there are some; without weights."""
        if not ends:
            return Inbox(tuple([self._of(segment, name, segment.tensor(name), count) for name in self.messages]))
        pairs = list(zip(self.messages, ends, strict=True))
        codes = [self._of(segment, f"{name} codes", end.codes, count) for name, end in pairs]
        scales: list[tuple[Tensor | None, ...]] = [
            (None,) * count if end.scales is None else self._of(segment, f"{name} scales", end.scales, count)
            for name, end in pairs
        ]
        return Inbox(tuple(codes), scales=tuple(scales), channels=ends)

    def _of(self, segment: FlatSegment, name: str, like: Tensor, count: int) -> tuple[Tensor, ...]:
        tensors = self._tensors.setdefault((id(segment), name), [])
        while len(tensors) < count:
            together = self._together.get(id(segment), (segment,)) if name in self.messages else (segment,)
            if len(together) == 1:
                tensors.append(zeros(like.numel(), like.dtype, like.device))
                continue
            sizes = [one.layout.numel for one in together]
            whole = zeros(sum(sizes), like.dtype, like.device)
            self._wholes.setdefault((id(together[0]), name), []).append(whole)
            for one, piece in zip(together, whole.split(sizes), strict=True):
                self._tensors.setdefault((id(one), name), []).append(piece)
        return tuple(tensors[:count])


class Rounds:
    """The rounds of a topology as one of its nodes has them."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.topology: Topology | None = None
        self._latest: tuple[int, Round] | None = None

    def use(self, topology: Topology | None) -> None:
        """Take the rounds of this topology from now on."""
        self.topology, self._latest = topology, None

    def of(self, exchange: int) -> Round:
        """The round that all buckets of an exchange share, worked out for the first of them."""
        if self._latest is None or self._latest[0] != exchange:
            assert self.topology is not None
            self._latest = (exchange, self.topology.round(self.node, exchange))
        return self._latest[1]

    def ahead(self) -> Iterator[Round]:
        """All rounds, or the first ones of an endless topology."""
        if self.topology is not None:
            for step in range(self.topology.period or ROUNDS_AHEAD):
                yield self.topology.round(self.node, step)
