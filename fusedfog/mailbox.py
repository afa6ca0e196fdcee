"""What each bucket sent and got: inboxes, and the weights that go with their contents.

A `Lane` is one bucket on its way through steps. `Mailbox.send` starts its exchange, `Mailbox.receive` hands out what came.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.averaging import GradientAverage
from fusedfog.errors import TornMessageWarning
from fusedfog.exchange import Link, Message, Parcel
from fusedfog.flat import FlatSegment
from fusedfog.hierarchy import Hierarchy
from fusedfog.layout import Bucket
from fusedfog.topology import Topology


@dataclass(frozen=True)
class Inbox:
    """What a pass mixes: for each message its K neighbours' tensors, their weights, and the weight of what was sent."""

    tensors: tuple[tuple[Tensor, ...], ...] = ()
    weights: tuple[float, ...] = ()
    row_sum: float = 1.0


EMPTY = Inbox()


@dataclass
class Lane:
    """One bucket: its place in the order of buckets, and its message in flight."""

    number: int
    segment: FlatSegment
    bucket: Bucket
    region_index: int
    message: Message | None = None
    inbox: Inbox = EMPTY
    versions: int = 0
    ready: int = 0
    average: GradientAverage | None = None

    @property
    def whole(self) -> slice:
        """The bucket's elements in its segment's flat tensors."""
        return slice(self.bucket.start, self.bucket.stop)

    def edits(self) -> int:
        """In-place edits of the bucket's parameters since it was sent."""
        return self.segment.versions(self.bucket) - self.versions


@dataclass
class Figures:
    """Running totals of one rank, for `stats()`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_across: int = 0
    blocked_s: float = 0.0
    torn_messages: int = 0


@dataclass
class Mailbox:
    """Sends and receives the buckets of one optimizer.

    Attributes:
        messages: names of the flat tensors that travel.
        hierarchy: this rank's place on a mesh; rounds are then between machines.
        in_flight: every message not yet waited for, for whoever must finish them.
    """

    link: Link
    channel: int
    messages: tuple[str, ...]
    figures: Figures
    hierarchy: Hierarchy | None = None
    in_flight: list[Message] = field(default_factory=list)
    _inboxes: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    _warned_torn: bool = False

    def send(self, lane: Lane, topology: Topology, exchange: int, label: str) -> None:
        """Start exchange number `exchange` of a bucket with this rank's neighbours in that round."""
        if self.hierarchy is not None:
            self._send_by_machine(lane, self.hierarchy, topology, exchange, label)
            return
        turn = topology.round(self.link.world.rank, exchange)
        sends: list[Parcel] = []
        recvs: list[Parcel] = []
        inboxes = []
        for name in self.messages:
            flat = lane.segment.tensor(name)
            inbox = self._inbox(lane.segment, name, len(turn.recv))
            sends += [(peer, flat[lane.whole]) for peer in turn.send]
            recvs += [(peer, buffer[lane.whole]) for peer, buffer in zip(turn.recv, inbox, strict=True)]
            inboxes.append(inbox)
        lane.inbox = Inbox(tuple(inboxes), tuple(turn.recv.values()))
        # Two exchanges of one bucket are never in flight together; parity keeps neighbouring ones apart all the same.
        number = (2 * lane.number + exchange % 2) * len(self.messages)
        self._launch(lane, self.link.start(sends, recvs, tag=self.link.tag(self.channel, number), label=label))
        self.figures.bytes_sent += sum(tensor.nbytes for _, tensor in sends)
        self.figures.bytes_received += sum(tensor.nbytes for _, tensor in recvs)

    def _send_by_machine(self, lane: Lane, hierarchy: Hierarchy, topology: Topology, exchange: int, label: str) -> None:
        turn = topology.round(hierarchy.machine, exchange)
        inboxes = tuple(self._inbox(lane.segment, name, 1) for name in self.messages)
        sent = [lane.segment.tensor(name)[lane.whole] for name in self.messages]
        pairs = list(zip(sent, (inbox[0][lane.whole] for inbox in inboxes), strict=True))
        number = (2 * lane.number + exchange % 2) * len(self.messages)
        before = hierarchy.bytes_inside + hierarchy.bytes_across
        self._launch(lane, hierarchy.start(self.link, pairs, turn, number, label))
        moved = hierarchy.bytes_inside + hierarchy.bytes_across - before
        self.figures.bytes_sent += moved
        self.figures.bytes_received += moved
        self.figures.bytes_across = hierarchy.bytes_across
        # What comes is mixed already: mixed = x + 1 (inbox - x).
        lane.inbox = Inbox(inboxes, (1.0,))

    def send_to_all(self, lane: Lane, label: str) -> None:
        """Start a full average of a bucket: the inbox will hold the mean over all ranks, with weight one."""
        message = Message(self.link, label)
        size = self.link.world.size
        inboxes = []
        for name in self.messages:
            inbox = self._inbox(lane.segment, name, 1)
            buffer = inbox[0][lane.whole]
            torch.mul(lane.segment.tensor(name)[lane.whole], 1.0 / size, out=buffer)
            work = dist.all_reduce(buffer, group=self.link.group, async_op=True)
            message.pending.append((work, "averaging with all ranks"))
            message.keep_alive.append(buffer)
            inboxes.append(inbox)
            self.figures.bytes_sent += 2 * buffer.nbytes * (size - 1) // size
            self.figures.bytes_received += 2 * buffer.nbytes * (size - 1) // size
        lane.inbox = Inbox(tuple(inboxes), (1.0,))
        self._launch(lane, message)

    def _launch(self, lane: Lane, message: Message) -> None:
        lane.message = message
        lane.versions = lane.segment.versions(lane.bucket)
        self.in_flight.append(message)

    def _inbox(self, segment: FlatSegment, name: str, neighbours: int) -> tuple[Tensor, ...]:
        inbox = self._inboxes.setdefault((id(segment), name), [])
        while len(inbox) < neighbours:
            inbox.append(torch.zeros_like(segment.tensor(name)))
        return tuple(inbox[:neighbours])

    def receive(self, lane: Lane) -> Inbox:
        """What came in the bucket's exchange, waited for.

        Raises:
            PeerTimeout, ExchangeError: it did not come.
        """
        assert lane.message is not None
        self.wait(lane.message)
        lane.message = None
        if lane.edits():
            self._report_torn(lane)
        return lane.inbox

    def wait(self, message: Message) -> None:
        """Wait for a message, counting the time that the host is blocked."""
        begin = time.perf_counter()
        try:
            message.wait()
        finally:
            self.figures.blocked_s += time.perf_counter() - begin
            if message in self.in_flight:
                self.in_flight.remove(message)

    def drain(self, lanes: Sequence[Lane], *, keep_failures: bool = False) -> None:
        """Wait for all messages; what came is kept. With `keep_failures`, only the step that needs one raises."""
        for lane in lanes:
            if lane.message is not None:
                try:
                    self.wait(lane.message)
                except RuntimeError:
                    if not keep_failures:
                        raise

    def _report_torn(self, lane: Lane) -> None:
        self.figures.torn_messages += 1
        if not self._warned_torn:
            self._warned_torn = True
            warnings.warn(
                f"rank {self.link.world.rank}: parameters of bucket {lane.number} were edited in place while they were being "
                f"sent, so neighbours may have mixed a torn or outdated value; wrap such edits in `with opt.paused():`",
                TornMessageWarning,
                stacklevel=2,
            )


def abandon(link: Link, in_flight: list[Message]) -> None:
    """What becomes of the messages of an optimizer that is gone: the link keeps them until they have completed."""
    for message in in_flight:
        link.keep(message)
