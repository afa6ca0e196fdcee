"""Delivery by a global average: the inbox is the mean over all ranks, with weight one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.finite import make_mean, take_part
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import Transfer, unrecorded
from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.delivery import ExchangeStats, InboxTensors, OneMean
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.kernels import device
from fusedfog.topology import Topology


class FiniteMean(Transfer):
    """A mean of those ranks' buckets that have nothing but finite values; the others add zeros.

    Beside the sums, one flag for each message and rank says who has taken part, which makes a mean of them.
    """

    def __init__(self, communicator: Communicator, label: str, messages: int, quarantine: Quarantine) -> None:
        super().__init__(communicator, label)
        self.flags = torch.zeros(messages, communicator.view.size, device=communicator.device)
        self._rank, self._quarantine = communicator.view.rank, quarantine
        self._sums: list[Tensor] = []

    def contribute(self, buffer: Tensor) -> None:
        """Take a message's part, if it is finite, in the sums of which the mean will be made, in place."""
        take_part(buffer, self.flags[len(self._sums), self._rank])
        self._sums.append(buffer)

    @torch.no_grad()
    def wait(self) -> None:
        """See `Transfer`; the first one makes means of sums."""
        super().wait()
        sums, self._sums = self._sums, []
        for one, flags in zip(sums, self.flags if sums else (), strict=True):
            self._quarantine.refuse(make_mean(one, flags, math.nan))
        if sums and device.on_gpu(self.flags):
            self._quarantine.refuse_late(self.flags, range(self.flags.shape[1]))


class GlobalAverage(OneMean):
    """See `Delivery`; whatever the topology, all ranks take part."""

    def __init__(
        self,
        communicator: Communicator,
        inboxes: InboxTensors,
        stats: ExchangeStats,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.communicator, self.inboxes, self.stats, self.quarantine = communicator, inboxes, stats, quarantine

    def use_topology(self, topology: Topology | None) -> None:
        """Nothing changes."""

    def open_connections(self) -> None:
        """The communicator's first operation has opened them."""

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer:
        """Start a full average of a bucket."""
        transfer = Transfer(self.communicator, label)
        if self.quarantine is not None:
            transfer = FiniteMean(self.communicator, label, len(self.inboxes.messages), self.quarantine)
        size, here = self.communicator.view.size, bucket.whole
        inbox = self.inboxes.inbox(bucket.segment, 1)
        with span("exchange", (bucket.number,), to=("all",), sources=("all",)):
            for name, (mean,) in zip(self.inboxes.messages, inbox.tensors, strict=True):
                buffer = mean[here]
                torch.mul(bucket.segment.tensor(name)[here], 1.0 / size, out=buffer)
                if isinstance(transfer, FiniteMean):
                    transfer.contribute(buffer)
                with unrecorded():
                    transfer.add(partial(dist.all_reduce, buffer, async_op=True), "averaging with all ranks")
                transfer.keep_alive.append(buffer)
                self.stats.bytes_sent += 2 * buffer.nbytes * (size - 1) // size
                self.stats.bytes_received += 2 * buffer.nbytes * (size - 1) // size
            if isinstance(transfer, FiniteMean):
                with unrecorded():
                    transfer.add(partial(dist.all_reduce, transfer.flags, async_op=True), "averaging with all ranks")
        bucket.inbox, bucket.sources = replace(inbox, weights=(1.0,)), ("all",)
        return transfer
