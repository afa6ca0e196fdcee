"""Delivery from neighbours: each rank sends its bucket to some ranks, and has an inbox for each that it receives from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import PeerTensor, Transfer
from fusedfog.gossip.buckets import EMPTY, BucketState, Inbox
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.gossip.delivery import ROUNDS_AHEAD, ExchangeStats, InboxTensors, Rounds
from fusedfog.gossip.packs import Pack, packs_of
from fusedfog.kernels.wire import ELEMENTS_PER_SCALE
from fusedfog.topology import Round, Topology


def most_neighbours(topology: Topology, rank: int) -> int:
    """The most neighbours that `rank` receives from in any round; for endless sequences, what these promise.

    Raises:
        ValueError: an endless sequence promises nothing; `compatibility` refuses it before.
    """
    if topology.period is None:
        return topology.max_degree
    return max(len(topology.round(rank, step).recv) for step in range(topology.period))


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


class Neighbors:
    """See `Delivery`.

    Args:
        channel: this optimizer's channel on the communicator.
        channels: this rank's ends of compressed messages, if they are to be compressed.
    """

    def __init__(
        self,
        communicator: Communicator,
        channel: int,
        inboxes: InboxTensors,
        stats: ExchangeStats,
        channels: CompressedChannels | None,
    ) -> None:
        self.communicator, self.channel, self.inboxes, self.stats = communicator, channel, inboxes, stats
        self.channels = channels
        self._rounds = Rounds(communicator.view.rank)
        self._period: int | None = None
        self._era = 0
        self._postings: dict[tuple[BucketState | Pack, int], Posting] = {}
        self._packs: dict[BucketState, Pack] = {}

    def use_topology(self, topology: Topology | None) -> None:
        """See `Delivery`."""
        self._rounds.use(topology)
        self._period = topology.period if topology is not None else None
        self._postings.clear()

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """See `Delivery`."""
        self._postings.clear()
        # Codes and scales are small already, and there are more of them.
        packs = packs_of(buckets) if self.channels is None else []
        self._packs = {bucket: pack for pack in packs for bucket in pack.buckets}
        self.inboxes.lay_together([pack.segments for pack in packs])

    def inbox_counts(self) -> set[int]:
        """How many neighbours rounds have, those of weight 0 too."""
        return {len(round_.recv) for round_ in islice(self._rounds.ahead(), ROUNDS_AHEAD)}

    def most_inboxes(self) -> int:
        """See `most_neighbours`."""
        topology = self._rounds.topology
        return most_neighbours(topology, self._rounds.node) if topology is not None else 0

    def open_connections(self) -> None:
        """See `Delivery`."""
        self.communicator.warm_up((round_.send, round_.recv) for round_ in self._rounds.ahead())

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer | None:
        """Send to this rank's neighbours of the round, and receive from them; a pack is sent with its last bucket."""
        pack = self._packs.get(bucket)
        if self.channels is not None:
            self.channels.encode(bucket, exchange)
        posting = self._posting(bucket, exchange)
        bucket.inbox, bucket.sources = posting.inbox, posting.round_.recv
        # Two exchanges of one bucket are never in flight together; parity keeps neighbouring ones apart all the same. A
        # message is one tensor to a peer, or codes and their scales.
        number = (2 * bucket.number + exchange % 2) * 2 * len(self.inboxes.messages)
        if pack is not None:
            if not pack.hold(bucket, exchange):
                return None
            pack.load(self.inboxes.messages)
            posting = self._posting(pack, exchange)
        with span("exchange", (bucket.number,), to=posting.round_.send, sources=posting.round_.recv):
            transfer = self.communicator.start(
                posting.sends, posting.recvs, tag=self.communicator.tag(self.channel, number), label=label
            )
        self.stats.bytes_sent += posting.bytes_sent
        self.stats.bytes_received += posting.bytes_received
        for other in pack.buckets if pack is not None else ():
            other.transfer = transfer
        return transfer

    def _posting(self, what: BucketState | Pack, exchange: int) -> Posting:
        """What an exchange of a bucket, or pack, posts; worked out once for each round of a periodic topology."""
        if self.channels is not None and self._era != self.channels.era:
            self._era = self.channels.era
            self._postings.clear()
        if self.channels is not None and isinstance(what, BucketState) and self.channels.begins(what, exchange):
            return self._of_replicas(what, exchange)
        if self._period is None:
            return self._make_posting(what, exchange)
        key = (what, exchange % self._period)
        posting = self._postings.get(key)
        if posting is None:
            posting = self._postings[key] = self._make_posting(what, exchange)
        return posting

    def _make_posting(self, what: BucketState | Pack, exchange: int) -> Posting:
        return self._of_pack(what, exchange) if isinstance(what, Pack) else self._of_bucket(what, exchange)

    def _of_pack(self, pack: Pack, exchange: int) -> Posting:
        round_ = self._rounds.of(exchange)
        sends: list[PeerTensor] = []
        recvs: list[PeerTensor] = []
        for name in self.inboxes.messages:
            got = self.inboxes.wholes(pack.segments, name, len(round_.recv))
            _post(sends, recvs, round_, pack.buffer(name), got, slice(None))
        return Posting(round_, sends, recvs, EMPTY)

    def _of_bucket(self, bucket: BucketState, exchange: int) -> Posting:
        round_, segment, here = self._rounds.of(exchange), bucket.segment, bucket.whole
        ends = self.channels.of(segment, exchange) if self.channels is not None else ()
        inbox = replace(self.inboxes.inbox(segment, len(round_.recv), ends), weights=tuple(round_.recv.values()))
        inbox = replace(inbox, ranks=tuple(round_.recv))
        sends: list[PeerTensor] = []
        recvs: list[PeerTensor] = []
        for m, name in enumerate(self.inboxes.messages):
            _post(sends, recvs, round_, ends[m].codes if ends else segment.tensor(name), inbox.tensors[m], here)
            own = ends[m].scales if ends else None
            if own is not None:
                part = slice(here.start // ELEMENTS_PER_SCALE, here.stop // ELEMENTS_PER_SCALE)
                _post(sends, recvs, round_, own, inbox.scales[m], part)
        return Posting(round_, sends, recvs, inbox)

    def _of_replicas(self, bucket: BucketState, exchange: int) -> Posting:
        """The replicas that later codes of a bucket build on, as they are."""
        assert self.channels is not None
        usual, here = self._of_bucket(bucket, exchange), bucket.whole
        replicas = self.channels.await_replicas(bucket, exchange, usual.inbox, len(usual.round_.recv))
        ends = self.channels.of(bucket.segment, exchange)
        sends = [(peer, end.replica[here]) for end in ends for peer in usual.round_.send]
        recvs = [(peer, tensor) for tensors in replicas for peer, tensor in zip(usual.round_.recv, tensors, strict=True)]
        return replace(usual, sends=sends, recvs=recvs)


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
