"""What each bucket sent and got, by whatever delivery: messages in flight, waits for them, and edits that tore them.

`Mailbox.send` starts a bucket's exchange, `Mailbox.receive` hands out what came.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import Peers, Transfer
from fusedfog.errors import TornMessageWarning
from fusedfog.gossip.buckets import BucketState, Inbox
from fusedfog.gossip.delivery import Delivery, ExchangeStats, InboxTensors
from fusedfog.gossip.samples import Samples
from fusedfog.log import warn_user
from fusedfog.topology import Topology

_AT_ONCE = 1e-3
"""Seconds in which a thread has noticed messages that had come when it was told to wait for them."""


class Mailbox:
    """Sends and receives the buckets of one optimizer.

    Args:
        keeps_edits: parameters that are edited while they are being sent are not mixed with what neighbours sent before:
            half of the old values would come back.

    Attributes:
        gossip: how exchanges along the topology are delivered.
        average: how averages over all ranks are, if there are to be some.
        inboxes: where all of them deliver.
        samples: of what is sent at the end of a step, where that are the parameters.
        warned_torn: somebody has been told of edits.
        in_flight: every message not yet waited for, for whoever must finish them.
    """

    def __init__(
        self,
        communicator: Communicator,
        inboxes: InboxTensors,
        stats: ExchangeStats,
        gossip: Delivery,
        average: Delivery | None = None,
        samples: Samples | None = None,
        *,
        keeps_edits: bool = True,
    ) -> None:
        self.communicator, self.inboxes, self.stats = communicator, inboxes, stats
        self.gossip, self.average = gossip, average
        self.in_flight: list[Transfer] = []
        self._deliveries = [gossip] if average is None else [gossip, average]
        self.samples, self._keeps_edits = samples, keeps_edits
        self.warned_torn = False
        # The finalizer must not hold the mailbox, so it holds the one list of what is in flight.
        weakref.finalize(self, abandon, communicator, self.in_flight)

    def use_topology(self, topology: Topology | None) -> None:
        """Exchange along this topology from the next exchange on."""
        for delivery in self._deliveries:
            delivery.use_topology(topology)

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """Deliver these buckets from now on."""
        for delivery in self._deliveries:
            delivery.lay_out(buckets)

    def inbox_counts(self) -> set[int]:
        """How many tensors inboxes have for each message, in any round and with any delivery."""
        return set().union(*[delivery.inbox_counts() for delivery in self._deliveries])

    def most_inboxes(self) -> int:
        """The most of these; for endless topologies what they promise, or a ValueError."""
        return max(delivery.most_inboxes() for delivery in self._deliveries)

    def open_connections(self) -> None:
        """See `Delivery`."""
        for delivery in self._deliveries:
            delivery.open_connections()

    def send(self, bucket: BucketState, exchange: int, label: str, *, to_all: bool = False) -> None:
        """Start exchange number `exchange` of a bucket along the topology, or its average over all ranks."""
        delivery = self.average if to_all else self.gossip
        assert delivery is not None
        bucket.transfer = transfer = delivery.fill(bucket, exchange, label)
        if not bucket.counted:
            bucket.count_edits()
        if transfer is not None:
            self.in_flight.append(transfer)

    def receive(self, bucket: BucketState, *, passes_alone_write: bool = False) -> Inbox:
        """What came in the bucket's exchange, waited for.

        Args:
            passes_alone_write: until the bucket is sent again; edits of many parameters may then be found a little later.

        Raises:
            PeerTimeout, ExchangeError: it did not come.
        """
        self.wait(bucket)
        bucket.transfer = None
        edits = bucket.count_some_edits() if passes_alone_write else bucket.count_edits()
        edited, bucket.altered = bool(edits) or bucket.altered, False
        # Codes are no part of the parameters, so edits of these cannot tear them.
        edited &= not bucket.inbox.channels
        if bucket.refusals.refuse(edited) and self._keeps_edits:
            self._keep_own(bucket)
        if edited:
            bucket.count_edits()  # All of them, or a later look would take the rest for edits of its own.
            bucket.noticed += 1
            self._report_torn(bucket)
        return bucket.inbox

    def come_together(self, buckets: Sequence[BucketState]) -> bool:
        """Wait for the first bucket's message; whether those of the others have come by then.

        Raises:
            PeerTimeout, ExchangeError: the first one did not come.
        """
        transfers = [bucket.transfer for bucket in buckets if bucket.transfer is not None]
        for transfer in transfers:
            transfer.done()  # Has a thread begin to wait.
        self.wait(buckets[0])
        deadline = time.perf_counter() + _AT_ONCE
        while not all(transfer.done() for transfer in transfers):
            if time.perf_counter() > deadline:
                return False
            time.sleep(_AT_ONCE / 10)
        return True

    def find_edits(self) -> None:
        """Before any pass of a step: look for edits since the messages were sent that version counters do not show."""
        for bucket, times in self.samples.find() if self.samples is not None else ():
            self.stats.torn_messages += times
            self._warn_torn(
                bucket,
                "It was noticed on the GPU some steps later, so what neighbours had sent before the edit has been mixed "
                "into the edited values",
            )

    def _keep_own(self, bucket: BucketState) -> None:
        """Have an inbox hold the rank's own parameters, so that mixing leaves them as they are: W = I, whatever the pass."""
        here = bucket.whole
        for tensor in bucket.inbox.tensors[self.inboxes.messages.index("param")]:
            tensor[here].copy_(bucket.segment.param[here])

    def wait(self, bucket: BucketState, *, keep_failure: bool = False) -> None:
        """Wait for a bucket's message, counting the time that the host is blocked; with `keep_failure` nothing is raised."""
        transfer = bucket.transfer
        assert transfer is not None
        begin = time.perf_counter()
        try:
            with span("wait", (bucket.number,), sources=bucket.sources):
                (transfer.finish if keep_failure else transfer.wait)()
        finally:
            blocked = time.perf_counter() - begin
            self.stats.blocked_s += blocked
            if isinstance(transfer.last, Peers):
                for peer in transfer.last.recvs or transfer.last.sends:
                    self.stats.waited_for[peer] = self.stats.waited_for.get(peer, 0.0) + blocked
            if transfer in self.in_flight:
                self.in_flight.remove(transfer)

    def drain(self, buckets: Sequence[BucketState], *, keep_failures: bool = False) -> None:
        """Wait for all messages; what came is kept. With `keep_failures`, only the step that needs one raises."""
        for bucket in buckets:
            if bucket.transfer is not None:
                self.wait(bucket, keep_failure=keep_failures)

    def _report_torn(self, bucket: BucketState) -> None:
        self.stats.torn_messages += 1
        self._warn_torn(
            bucket,
            "This rank keeps the edited values as they are and leaves out what neighbours had sent before (but of edits "
            "again and again only some, so that mixing goes on)"
            if self._keeps_edits
            else "What neighbours had sent before the edit has been mixed into the edited values, as this algorithm's sums need",
        )

    def _warn_torn(self, bucket: BucketState, outcome: str) -> None:
        if not self.warned_torn:
            self.warned_torn = True
            warn_user(
                f"rank {self.communicator.view.rank}: parameters of bucket {bucket.number} were edited in place "
                f"while they were being sent, so neighbours may have mixed a torn or outdated value. {outcome}. Wrap such "
                f"edits in `with opt.paused():` on all ranks, or show other values for a while in `with opt.swapped(values):`",
                TornMessageWarning,
            )


def abandon(communicator: Communicator, in_flight: list[Transfer]) -> None:
    """What becomes of the messages of an optimizer that is gone: the communicator keeps them until they have completed."""
    for transfer in in_flight:
        communicator.keep(transfer)
