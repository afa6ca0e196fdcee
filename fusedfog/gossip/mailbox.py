"""What each bucket sent and got: inboxes, and the weights that go with their contents.

`Mailbox.send` starts a bucket's exchange, `Mailbox.receive` hands out what came.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import PeerTensor, Transfer, unrecorded
from fusedfog.errors import TornMessageWarning
from fusedfog.gossip.buckets import Inbox, Lane
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import Wires
from fusedfog.kernels import Wire
from fusedfog.kernels.wire import ELEMENTS_PER_SCALE
from fusedfog.params.flat import FlatSegment
from fusedfog.params.pages import zeros
from fusedfog.topology import Round, Topology


@dataclass
class Figures:
    """Running totals of one rank, for `stats()`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_across: int = 0
    blocked_s: float = 0.0
    torn_messages: int = 0


@dataclass(frozen=True)
class Posting:
    """What one exchange of a bucket sends and receives in a round of the topology."""

    turn: Round
    sends: list[PeerTensor]
    recvs: list[PeerTensor]
    inbox: Inbox

    @cached_property
    def bytes_sent(self) -> int:
        """Bytes to all neighbours together."""
        return sum(tensor.nbytes for _, tensor in self.sends)

    @cached_property
    def bytes_received(self) -> int:
        """Bytes from all neighbours together."""
        return sum(tensor.nbytes for _, tensor in self.recvs)


@dataclass
class Mailbox:
    """Sends and receives the buckets of one optimizer.

    Attributes:
        messages: names of the flat tensors that travel.
        hierarchy: this rank's place on a mesh; rounds are then between machines.
        wires: this rank's ends of compressed messages, if they are to be compressed.
        in_flight: every message not yet waited for, for whoever must finish them.
    """

    link: Communicator
    channel: int
    messages: tuple[str, ...]
    figures: Figures
    hierarchy: Hierarchy | None = None
    wires: Wires | None = None
    in_flight: list[Transfer] = field(default_factory=list)
    _inboxes: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    _turn: tuple[Topology, int, Round] | None = None
    _postings: dict[tuple[Lane, int] | None, Posting] = field(default_factory=dict)
    _postings_for: tuple[Topology, int] | None = None
    _warned_torn: bool = False

    def send(self, lane: Lane, topology: Topology, exchange: int, label: str) -> None:
        """Start exchange number `exchange` of a bucket with this rank's neighbours in that round."""
        if self.hierarchy is not None:
            self._send_by_machine(lane, self.hierarchy, topology, exchange, label)
            return
        posting = self._posting(lane, topology, exchange)
        lane.inbox, lane.sources = posting.inbox, posting.turn.recv
        # Two exchanges of one bucket are never in flight together; parity keeps neighbouring ones apart all the same. A
        # message is one parcel to a peer, or codes and their scales.
        number = (2 * lane.number + exchange % 2) * 2 * len(self.messages)
        with span("exchange", (lane.number,), to=posting.turn.send, sources=posting.turn.recv):
            message = self.link.start(
                posting.sends, posting.recvs, tag=self.link.tag(self.channel, number), label=label
            )
        self._launch(lane, message)
        self.figures.bytes_sent += posting.bytes_sent
        self.figures.bytes_received += posting.bytes_received

    def _posting(self, lane: Lane, topology: Topology, exchange: int) -> Posting:
        """What an exchange of a bucket posts; worked out once for each round of a periodic topology."""
        era = self.wires.era if self.wires is not None else 0
        if self._postings_for != (topology, era):
            self._postings_for = (topology, era)
            self._postings.clear()
        key = (lane, exchange % topology.period) if topology.period is not None else None
        if key not in self._postings:
            posting = self._make_posting(lane, topology, exchange)
            if key is None:
                return posting
            self._postings[key] = posting
        return self._postings[key]

    def forget_postings(self) -> None:
        """For when buckets are laid anew."""
        self._postings.clear()

    def _make_posting(self, lane: Lane, topology: Topology, exchange: int) -> Posting:
        turn = self._round(topology, self.link.world.rank, exchange)
        ends = self.wires.of(lane.segment, exchange) if self.wires is not None else ()
        sends: list[PeerTensor] = []
        recvs: list[PeerTensor] = []
        inboxes: list[tuple[Tensor, ...]] = []
        scales: list[tuple[Tensor | None, ...]] = []
        for m, name in enumerate(self.messages):
            if not ends:
                flat = lane.segment.tensor(name)
                inboxes.append(self._inbox(lane.segment, name, flat, len(turn.recv)))
                _post(sends, recvs, turn, flat, inboxes[-1], lane.whole)
                continue
            codes, own = ends[m].codes, ends[m].scales
            inboxes.append(self._inbox(lane.segment, f"{name} codes", codes, len(turn.recv)))
            _post(sends, recvs, turn, codes, inboxes[-1], lane.whole)
            scales.append((None,) * len(turn.recv))
            if own is not None:
                scales[-1] = self._inbox(lane.segment, f"{name} scales", own, len(turn.recv))
                here = slice(lane.whole.start // ELEMENTS_PER_SCALE, lane.whole.stop // ELEMENTS_PER_SCALE)
                _post(sends, recvs, turn, own, scales[-1], here)
        inbox = Inbox(tuple(inboxes), tuple(turn.recv.values()), scales=tuple(scales), wires=ends)
        return Posting(turn, sends, recvs, inbox)

    def _send_by_machine(self, lane: Lane, hierarchy: Hierarchy, topology: Topology, exchange: int, label: str) -> None:
        turn = self._round(topology, hierarchy.machine, exchange)
        inboxes = tuple(self._inbox(lane.segment, name, lane.segment.tensor(name), 1) for name in self.messages)
        sent = [lane.segment.tensor(name)[lane.whole] for name in self.messages]
        pairs = list(zip(sent, (inbox[0][lane.whole] for inbox in inboxes), strict=True))
        number = (2 * lane.number + exchange % 2) * len(self.messages)
        before = hierarchy.bytes_inside + hierarchy.bytes_across
        lane.sources = [f"machine {machine}" for machine in turn.recv]
        with span("exchange", (lane.number,), to=(f"machine {m}" for m in turn.send), sources=lane.sources):
            self._launch(lane, hierarchy.start(self.link, pairs, turn, number, label))
        moved = hierarchy.bytes_inside + hierarchy.bytes_across - before
        self.figures.bytes_sent += moved
        self.figures.bytes_received += moved
        self.figures.bytes_across = hierarchy.bytes_across
        # What comes is mixed already: mixed = x + 1 (inbox - x).
        lane.inbox = Inbox(inboxes, (1.0,))

    def send_to_all(self, lane: Lane, label: str) -> None:
        """Start a full average of a bucket: the inbox will hold the mean over all ranks, with weight one."""
        message = Transfer(self.link, label)
        size = self.link.world.size
        inboxes = []
        with span("exchange", (lane.number,), to=("all",), sources=("all",)):
            for name in self.messages:
                inbox = self._inbox(lane.segment, name, lane.segment.tensor(name), 1)
                buffer = inbox[0][lane.whole]
                torch.mul(lane.segment.tensor(name)[lane.whole], 1.0 / size, out=buffer)
                with unrecorded():
                    work = dist.all_reduce(buffer, group=self.link.group, async_op=True)
                message.pending.append((work, "averaging with all ranks"))
                message.keep_alive.append(buffer)
                inboxes.append(inbox)
                self.figures.bytes_sent += 2 * buffer.nbytes * (size - 1) // size
                self.figures.bytes_received += 2 * buffer.nbytes * (size - 1) // size
        lane.inbox, lane.sources = Inbox(tuple(inboxes), (1.0,)), ("all",)
        self._launch(lane, message)

    def _round(self, topology: Topology, place: int, exchange: int) -> Round:
        """The round that all buckets of an exchange share, worked out for the first of them."""
        if self._turn is None or self._turn[:2] != (topology, exchange):
            self._turn = (topology, exchange, topology.round(place, exchange))
        return self._turn[2]

    def _launch(self, lane: Lane, message: Transfer) -> None:
        lane.message = message
        if not lane.counted:
            lane.count_edits()
        self.in_flight.append(message)

    def _inbox(self, segment: FlatSegment, name: str, like: Tensor, neighbours: int) -> tuple[Tensor, ...]:
        inbox = self._inboxes.setdefault((id(segment), name), [])
        while len(inbox) < neighbours:
            inbox.append(zeros(like.numel(), like.dtype, like.device))
        return tuple(inbox[:neighbours])

    def slots(self, segment: FlatSegment, neighbours: int, ends: tuple[Wire, ...] = ()) -> Inbox:
        """Where messages of up to that many neighbours are received, the same tensors in every step; without weights."""
        if not ends:
            messages = [self._inbox(segment, name, segment.tensor(name), neighbours) for name in self.messages]
            return Inbox(tuple(messages))
        pairs = list(zip(self.messages, ends, strict=True))
        codes = [self._inbox(segment, f"{name} codes", end.codes, neighbours) for name, end in pairs]
        scales: list[tuple[Tensor | None, ...]] = [
            (None,) * neighbours
            if end.scales is None
            else self._inbox(segment, f"{name} scales", end.scales, neighbours)
            for name, end in pairs
        ]
        return Inbox(tuple(codes), scales=tuple(scales), wires=ends)

    def receive(self, lane: Lane) -> Inbox:
        """What came in the bucket's exchange, waited for.

        Raises:
            PeerTimeout, ExchangeError: it did not come.
        """
        self.wait(lane)
        lane.message = None
        # Codes are no part of the parameters, so edits of these cannot tear them.
        if lane.count_edits() and not lane.inbox.wires:
            self._report_torn(lane)
        return lane.inbox

    def wait(self, lane: Lane) -> None:
        """Wait for a bucket's message, counting the time that the host is blocked."""
        message = lane.message
        assert message is not None
        begin = time.perf_counter()
        try:
            with span("wait", (lane.number,), sources=lane.sources):
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
                    self.wait(lane)
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


def _post(
    sends: list[PeerTensor],
    recvs: list[PeerTensor],
    turn: Round,
    flat: Tensor,
    inbox: Sequence[Tensor | None],
    here: slice,
) -> None:
    """Add what a round sends of a flat tensor, and where it receives the same of others."""
    sends += [(peer, _portable(flat[here])) for peer in turn.send]
    recvs += [(peer, _portable(got[here])) for peer, got in zip(turn.recv, inbox, strict=True) if got is not None]


def _portable(tensor: Tensor) -> Tensor:
    """The tensor as a dtype that gloo and NCCL know."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def abandon(link: Communicator, in_flight: list[Transfer]) -> None:
    """What becomes of the messages of an optimizer that is gone: the link keeps them until they have completed."""
    for message in in_flight:
        link.keep(message)
