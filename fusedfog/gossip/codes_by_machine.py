"""Compressed messages across machines whose ranks average gradients, and so have the same to say.

All ranks of a machine make the same codes from the same parameters and replicas, each by its own passes. Each sends its shard of
them to its counterparts, and hands round what it got from theirs: codes, not values. So the same codes arrive everywhere in
the machine, every rank keeps the same replicas, and a machine is to its neighbours what a rank is on a flat graph: to the
last bit, in checkpoints too. Handing round codes of K machines costs K bytes an element in the place of four.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import Transfer
from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.gossip.delivery import ROUNDS_AHEAD, ExchangeStats, InboxTensors, Rounds
from fusedfog.gossip.neighbors import most_neighbours
from fusedfog.kernels import wire
from fusedfog.topology import Topology


class CodesByMachine:
    """See `Delivery`; neighbours are machines.

    Args:
        channels: this rank's ends of the messages, as those of its whole machine.
    """

    def __init__(
        self,
        communicator: Communicator,
        hierarchy: Hierarchy,
        inboxes: InboxTensors,
        stats: ExchangeStats,
        channels: CompressedChannels,
    ) -> None:
        self.communicator, self.hierarchy, self.inboxes, self.stats = communicator, hierarchy, inboxes, stats
        self.channels = channels
        self._rounds = Rounds(hierarchy.machine)
        self._most = 0

    def use_topology(self, topology: Topology | None) -> None:
        """See `Delivery`."""
        self._rounds.use(topology)
        self._most = most_neighbours(topology, self._rounds.node) if topology is not None else 0

    def lay_out(self, buckets: object) -> None:
        """See `Delivery`; nothing of the buckets is kept."""

    def inbox_counts(self) -> set[int]:
        """How many neighbours rounds have, those of weight 0 too."""
        return {len(round_.recv) for round_ in islice(self._rounds.ahead(), ROUNDS_AHEAD)}

    def most_inboxes(self) -> int:
        """See `most_neighbours`."""
        return self._most

    def open_connections(self) -> None:
        """See `Delivery`."""
        self.hierarchy.warm_up(self._rounds.ahead())

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer:
        """Send this rank's shard of the bucket's codes across, and hand round what has come."""
        self.channels.encode(bucket, exchange)
        round_, segment = self._rounds.of(exchange), bucket.segment
        ends = self.channels.of(segment, exchange)
        inbox = self.inboxes.inbox(segment, len(round_.recv), ends)
        bucket.inbox = replace(inbox, weights=tuple(round_.recv.values()))
        bucket.sources = [f"machine {machine}" for machine in round_.recv]
        sent: list[Tensor] = []
        received: dict[int, list[Tensor]] = {machine: [] for machine in round_.recv}
        for codes, scales, end in zip(inbox.tensors, inbox.scales, ends, strict=True):
            _add(sent, bucket, end.codes, end.scales)
            for machine, came, came_scales in zip(round_.recv, codes, scales, strict=True):
                _add(received[machine], bucket, came, came_scales)
        # A number for each tensor that goes to one rank.
        number = (2 * bucket.number + exchange % 2) * 2 * len(ends) * max(self._most, 1)
        groups = (bucket.layout.stop - bucket.layout.start) // wire.GROUP
        before = self.hierarchy.bytes_inside + self.hierarchy.bytes_across
        with span("exchange", (bucket.number,), to=(f"machine {m}" for m in round_.send), sources=bucket.sources):
            transfer = self.hierarchy.pass_on(self.communicator, sent, received, groups, round_, number, label)
        moved = self.hierarchy.bytes_inside + self.hierarchy.bytes_across - before
        self.stats.bytes_sent += moved
        self.stats.bytes_received += moved
        self.stats.bytes_across = self.hierarchy.bytes_across
        return transfer


def _add(tensors: list[Tensor], bucket: BucketState, codes: Tensor, scales: Tensor | None) -> None:
    """Add a bucket's codes, and their scales if the format has some."""
    start, stop = bucket.layout.start, bucket.layout.stop
    tensors.append(codes[start:stop])
    if scales is not None:
        tensors.append(scales[start // wire.ELEMENTS_PER_SCALE : stop // wire.ELEMENTS_PER_SCALE])
