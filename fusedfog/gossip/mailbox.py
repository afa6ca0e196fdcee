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
from fusedfog.gossip.buckets import BucketState, Inbox
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.kernels import CompressedChannel
from fusedfog.kernels.wire import ELEMENTS_PER_SCALE
from fusedfog.params.flat import FlatSegment
from fusedfog.params.pages import zeros
from fusedfog.topology import Round, Topology


@dataclass
class ExchangeStats:
    """Running totals of one rank, for `stats()`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_across: int = 0
    blocked_s: float = 0.0
    torn_messages: int = 0


@dataclass(frozen=True)
class Posting:
    """What one exchange of a bucket sends and receives in a round of the topology."""

    round_: Round
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

    communicator: Communicator
    channel: int
    messages: tuple[str, ...]
    stats: ExchangeStats
    hierarchy: Hierarchy | None = None
    channels: CompressedChannels | None = None
    in_flight: list[Transfer] = field(default_factory=list)
    _inboxes: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    _turn: tuple[Topology, int, Round] | None = None
    _postings: dict[tuple[BucketState, int] | None, Posting] = field(default_factory=dict)
    _postings_for: tuple[Topology, int] | None = None
    _warned_torn: bool = False

    def send(self, bucket: BucketState, topology: Topology, exchange: int, label: str) -> None:
        """Start exchange number `exchange` of a bucket with this rank's neighbours in that round."""
        if self.hierarchy is not None:
            self._send_by_machine(bucket, self.hierarchy, topology, exchange, label)
            return
        posting = self._posting(bucket, topology, exchange)
        bucket.inbox, bucket.sources = posting.inbox, posting.round_.recv
        # Two exchanges of one bucket are never in flight together; parity keeps neighbouring ones apart all the same. A
        # message is one parcel to a peer, or codes and their scales.
        number = (2 * bucket.number + exchange % 2) * 2 * len(self.messages)
        with span("exchange", (bucket.number,), to=posting.round_.send, sources=posting.round_.recv):
            transfer = self.communicator.start(
                posting.sends, posting.recvs, tag=self.communicator.tag(self.channel, number), label=label
            )
        self._launch(bucket, transfer)
        self.stats.bytes_sent += posting.bytes_sent
        self.stats.bytes_received += posting.bytes_received

    def _posting(self, bucket: BucketState, topology: Topology, exchange: int) -> Posting:
        """What an exchange of a bucket posts; worked out once for each round of a periodic topology."""
        era = self.channels.era if self.channels is not None else 0
        if self._postings_for != (topology, era):
            self._postings_for = (topology, era)
            self._postings.clear()
        key = (bucket, exchange % topology.period) if topology.period is not None else None
        if key not in self._postings:
            posting = self._make_posting(bucket, topology, exchange)
            if key is None:
                return posting
            self._postings[key] = posting
        return self._postings[key]

    def forget_postings(self) -> None:
        """For when buckets are laid anew."""
        self._postings.clear()

    def _make_posting(self, bucket: BucketState, topology: Topology, exchange: int) -> Posting:
        round_ = self._round(topology, self.communicator.view.rank, exchange)
        ends = self.channels.of(bucket.segment, exchange) if self.channels is not None else ()
        sends: list[PeerTensor] = []
        recvs: list[PeerTensor] = []
        inboxes: list[tuple[Tensor, ...]] = []
        scales: list[tuple[Tensor | None, ...]] = []
        for m, name in enumerate(self.messages):
            if not ends:
                flat = bucket.segment.tensor(name)
                inboxes.append(self._inbox(bucket.segment, name, flat, len(round_.recv)))
                _post(sends, recvs, round_, flat, inboxes[-1], bucket.whole)
                continue
            codes, own = ends[m].codes, ends[m].scales
            inboxes.append(self._inbox(bucket.segment, f"{name} codes", codes, len(round_.recv)))
            _post(sends, recvs, round_, codes, inboxes[-1], bucket.whole)
            scales.append((None,) * len(round_.recv))
            if own is not None:
                scales[-1] = self._inbox(bucket.segment, f"{name} scales", own, len(round_.recv))
                here = slice(bucket.whole.start // ELEMENTS_PER_SCALE, bucket.whole.stop // ELEMENTS_PER_SCALE)
                _post(sends, recvs, round_, own, scales[-1], here)
        inbox = Inbox(tuple(inboxes), tuple(round_.recv.values()), scales=tuple(scales), channels=ends)
        return Posting(round_, sends, recvs, inbox)

    def _send_by_machine(
        self, bucket: BucketState, hierarchy: Hierarchy, topology: Topology, exchange: int, label: str
    ) -> None:
        round_ = self._round(topology, hierarchy.machine, exchange)
        inboxes = tuple(self._inbox(bucket.segment, name, bucket.segment.tensor(name), 1) for name in self.messages)
        sent = [bucket.segment.tensor(name)[bucket.whole] for name in self.messages]
        pairs = list(zip(sent, (inbox[0][bucket.whole] for inbox in inboxes), strict=True))
        number = (2 * bucket.number + exchange % 2) * len(self.messages)
        before = hierarchy.bytes_inside + hierarchy.bytes_across
        bucket.sources = [f"machine {machine}" for machine in round_.recv]
        with span("exchange", (bucket.number,), to=(f"machine {m}" for m in round_.send), sources=bucket.sources):
            self._launch(bucket, hierarchy.start(self.communicator, pairs, round_, number, label))
        moved = hierarchy.bytes_inside + hierarchy.bytes_across - before
        self.stats.bytes_sent += moved
        self.stats.bytes_received += moved
        self.stats.bytes_across = hierarchy.bytes_across
        # What comes is mixed already: mixed = x + 1 (inbox - x).
        bucket.inbox = Inbox(inboxes, (1.0,))

    def send_to_all(self, bucket: BucketState, label: str) -> None:
        """Start a full average of a bucket: the inbox will hold the mean over all ranks, with weight one."""
        transfer = Transfer(self.communicator, label)
        size = self.communicator.view.size
        inboxes = []
        with span("exchange", (bucket.number,), to=("all",), sources=("all",)):
            for name in self.messages:
                inbox = self._inbox(bucket.segment, name, bucket.segment.tensor(name), 1)
                buffer = inbox[0][bucket.whole]
                torch.mul(bucket.segment.tensor(name)[bucket.whole], 1.0 / size, out=buffer)
                with unrecorded():
                    work = dist.all_reduce(buffer, group=self.communicator.group, async_op=True)
                transfer.pending.append((work, "averaging with all ranks"))
                transfer.keep_alive.append(buffer)
                inboxes.append(inbox)
                self.stats.bytes_sent += 2 * buffer.nbytes * (size - 1) // size
                self.stats.bytes_received += 2 * buffer.nbytes * (size - 1) // size
        bucket.inbox, bucket.sources = Inbox(tuple(inboxes), (1.0,)), ("all",)
        self._launch(bucket, transfer)

    def _round(self, topology: Topology, place: int, exchange: int) -> Round:
        """The round that all buckets of an exchange share, worked out for the first of them."""
        if self._turn is None or self._turn[:2] != (topology, exchange):
            self._turn = (topology, exchange, topology.round(place, exchange))
        return self._turn[2]

    def _launch(self, bucket: BucketState, transfer: Transfer) -> None:
        bucket.transfer = transfer
        if not bucket.counted:
            bucket.count_edits()
        self.in_flight.append(transfer)

    def _inbox(self, segment: FlatSegment, name: str, like: Tensor, neighbours: int) -> tuple[Tensor, ...]:
        inbox = self._inboxes.setdefault((id(segment), name), [])
        while len(inbox) < neighbours:
            inbox.append(zeros(like.numel(), like.dtype, like.device))
        return tuple(inbox[:neighbours])

    def slots(self, segment: FlatSegment, neighbours: int, ends: tuple[CompressedChannel, ...] = ()) -> Inbox:
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
        return Inbox(tuple(codes), scales=tuple(scales), channels=ends)

    def receive(self, bucket: BucketState) -> Inbox:
        """What came in the bucket's exchange, waited for.

        Raises:
            PeerTimeout, ExchangeError: it did not come.
        """
        self.wait(bucket)
        bucket.transfer = None
        # Codes are no part of the parameters, so edits of these cannot tear them.
        if bucket.count_edits() and not bucket.inbox.channels:
            self._report_torn(bucket)
        return bucket.inbox

    def wait(self, bucket: BucketState) -> None:
        """Wait for a bucket's message, counting the time that the host is blocked."""
        transfer = bucket.transfer
        assert transfer is not None
        begin = time.perf_counter()
        try:
            with span("wait", (bucket.number,), sources=bucket.sources):
                transfer.wait()
        finally:
            self.stats.blocked_s += time.perf_counter() - begin
            if transfer in self.in_flight:
                self.in_flight.remove(transfer)

    def drain(self, buckets: Sequence[BucketState], *, keep_failures: bool = False) -> None:
        """Wait for all messages; what came is kept. With `keep_failures`, only the step that needs one raises."""
        for bucket in buckets:
            if bucket.transfer is not None:
                try:
                    self.wait(bucket)
                except RuntimeError:
                    if not keep_failures:
                        raise

    def _report_torn(self, bucket: BucketState) -> None:
        self.stats.torn_messages += 1
        if not self._warned_torn:
            self._warned_torn = True
            warnings.warn(
                f"rank {self.communicator.view.rank}: parameters of bucket {bucket.number} were edited in place "
                f"while they were being "
                f"sent, so neighbours may have mixed a torn or outdated value; wrap such edits in `with opt.paused():`",
                TornMessageWarning,
                stacklevel=2,
            )


def _post(
    sends: list[PeerTensor],
    recvs: list[PeerTensor],
    round_: Round,
    flat: Tensor,
    inbox: Sequence[Tensor | None],
    here: slice,
) -> None:
    """Add what a round sends of a flat tensor, and where it receives the same of others."""
    sends += [(peer, _portable(flat[here])) for peer in round_.send]
    recvs += [(peer, _portable(got[here])) for peer, got in zip(round_.recv, inbox, strict=True) if got is not None]


def _portable(tensor: Tensor) -> Tensor:
    """The tensor as a dtype that gloo and NCCL know."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def abandon(communicator: Communicator, in_flight: list[Transfer]) -> None:
    """What becomes of the messages of an optimizer that is gone: the communicator keeps them until they have completed."""
    for transfer in in_flight:
        communicator.keep(transfer)
