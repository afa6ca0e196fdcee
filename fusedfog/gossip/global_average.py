"""Delivery by a global average: the inbox is the mean over all ranks, with weight one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import Transfer, unrecorded
from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.delivery import ExchangeStats, InboxTensors
from fusedfog.topology import Topology


class GlobalAverage:
    """See `Delivery`; whatever the topology, all ranks take part."""

    def __init__(self, communicator: Communicator, inboxes: InboxTensors, stats: ExchangeStats) -> None:
        self.communicator, self.inboxes, self.stats = communicator, inboxes, stats

    def use_topology(self, topology: Topology | None) -> None:
        """Nothing changes."""

    def forget_buckets(self) -> None:
        """Nothing is kept."""

    def inbox_counts(self) -> set[int]:
        """A mean counts as one neighbour."""
        return {1}

    def most_inboxes(self) -> int:
        """A mean counts as one neighbour."""
        return 1

    def open_connections(self) -> None:
        """The communicator's first operation has opened them."""

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer:
        """Start a full average of a bucket."""
        transfer = Transfer(self.communicator, label)
        size, here = self.communicator.view.size, bucket.whole
        inbox = self.inboxes.inbox(bucket.segment, 1)
        with span("exchange", (bucket.number,), to=("all",), sources=("all",)):
            for name, (mean,) in zip(self.inboxes.messages, inbox.tensors, strict=True):
                buffer = mean[here]
                torch.mul(bucket.segment.tensor(name)[here], 1.0 / size, out=buffer)
                with unrecorded():
                    transfer.add(partial(dist.all_reduce, buffer, async_op=True), "averaging with all ranks")
                transfer.keep_alive.append(buffer)
                self.stats.bytes_sent += 2 * buffer.nbytes * (size - 1) // size
                self.stats.bytes_received += 2 * buffer.nbytes * (size - 1) // size
        bucket.inbox, bucket.sources = replace(inbox, weights=(1.0,)), ("all",)
        return transfer
