"""Which steps exchange what: rounds, full averages, compressed messages and push-sum's shares, by the clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fusedfog.comm.communicator import Communicator
from fusedfog.engine.clock import Clock
from fusedfog.engine.phases import Phase
from fusedfog.engine.rhythm import pauses
from fusedfog.errors import ExchangeError, PeerTimeout
from fusedfog.gossip.buckets import EMPTY, BucketState, Inbox, PassGroup
from fusedfog.gossip.by_machine import ByMachine
from fusedfog.gossip.codes_by_machine import CodesByMachine
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.gossip.delivery import Delivery, ExchangeStats, InboxTensors
from fusedfog.gossip.global_average import GlobalAverage
from fusedfog.gossip.mailbox import Mailbox
from fusedfog.gossip.neighbors import Neighbors
from fusedfog.gossip.push_sum import PushSum, Shares
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.gossip.samples import Samples
from fusedfog.gossip.window_delivery import WindowDelivery, WindowMailbox, rate
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.topology import Topology
from fusedfog.topology.admission import Admission

APART = 1 << 20
"""Bytes of a bucket from which one by one is worth it: five of 0.5 MB take twice the CPU of one pass over all (`scheduler`)."""


LOST = Inbox()
"""What an exchange brings that has failed: nothing, W = I."""


class Exchanges:
    """The exchanges of one optimizer; none for a rank that is alone.

    Attributes:
        topology: where exchanges go; see `use_topology`.
        hierarchy: this rank's place on a mesh, if there is one.
        mailbox, channels: how they go, and this rank's ends of compressed messages; None where there are none.
        quarantine: what becomes of values that are not finite; None where they spread.
        windows: of an asynchronous optimizer.
        rate: a factor on learning rates, of asynchronous push-sum.
        on_loss: in an elastic run, called with the failure of an exchange, instead of which the step mixes nothing.
        skipped: a step that mixes nothing, since the other members have made it already.
    """

    def __init__(
        self,
        segments: list[FlatSegment],
        phase: Phase,
        communicator: Communicator | None,
        channel: int,
        clock: Clock,
        stats: ExchangeStats,
    ) -> None:
        algorithm, schedule, hierarchy = phase.algorithm, phase.schedule, phase.hierarchy
        self.communicator, self.schedule, self._algorithm = communicator, schedule, algorithm
        self.hierarchy, self.clock, self.stats, self._segments = hierarchy, clock, stats, segments
        self.topology: Topology | None = None
        self.mailbox: Mailbox | None = None
        self.channels: CompressedChannels | None = None
        self.quarantine: Quarantine | None = None
        self.windows: WindowDelivery | None = None
        self.rate = 1.0
        self.on_loss: Callable[[Exception], None] | None = None
        self.skipped: int | None = None
        self._admission: Admission | None = None
        self._push_sum: PushSum | None = None
        self._shares: Shares | None = None
        if communicator is None:
            return
        if schedule.nonfinite != "propagate":
            self.quarantine = Quarantine(
                communicator,
                segments[0].param.device if segments else communicator.device,
                algorithm.messages,
                self.stats,
                heals=schedule.nonfinite == "heal",
                conserves=algorithm.name if algorithm.conserves else None,
            )
        if schedule.asynchronous:
            # Ranks tell each other how many exchanges they have made.
            every = 1 if callable(schedule.communicate_every) else schedule.communicate_every
            lag = schedule.max_lag / every if schedule.max_lag is not None else None
            self.windows = WindowDelivery(communicator, self.stats, deposits=algorithm.deposits, max_lag=lag)
            self.mailbox = WindowMailbox(communicator, self.windows, self.stats)
            return
        self.mailbox = self._mailbox(communicator, channel, phase, segments)

    def _mailbox(self, communicator: Communicator, channel: int, phase: Phase, segments: list[FlatSegment]) -> Mailbox:
        """How messages of synchronous steps go."""
        algorithm, schedule, hierarchy, codes = phase.algorithm, phase.schedule, phase.hierarchy, phase.codes
        inboxes = InboxTensors(algorithm.messages)
        if codes is not None and algorithm.exchanges == "parameters":
            ahead = algorithm.before is None
            self.channels = CompressedChannels(segments, codes, algorithm.messages, communicator, ahead=ahead)
        gossip: Delivery = Neighbors(communicator, channel, inboxes, self.stats, self.channels)
        if hierarchy is not None and self.channels is not None:
            gossip = CodesByMachine(communicator, hierarchy, inboxes, self.stats, self.channels)
        elif hierarchy is not None:
            gossip = ByMachine(communicator, hierarchy, inboxes, self.stats, self.quarantine)
        averages = schedule.global_average_every is not None
        average = GlobalAverage(communicator, inboxes, self.stats, self.quarantine) if averages else None
        # Only parameters that are sent a step ahead can be edited on their way by more than a pass; codes are no part of them.
        ahead = algorithm.before is None and "param" in algorithm.messages and algorithm.exchanges == "parameters"
        return Mailbox(
            communicator,
            inboxes,
            self.stats,
            gossip,
            average,
            Samples() if ahead and self.channels is None else None,
            # Shares that are thrown away would be missing from push-sum's sums.
            keeps_edits="param" in algorithm.messages and not algorithm.weighs,
        )

    def survive(self, on_loss: Callable[[Exception], None]) -> None:
        """Go on when an exchange has failed, of which `on_loss` is told; and have compressed messages begin without a call.

        Called before the first exchange.
        """
        self.on_loss = on_loss
        if self.channels is not None:
            self.channels.exactly = True

    def go_on_from(self, before: Exchanges) -> None:
        """Do not say again what an earlier phase's exchanges have said once."""
        if self.quarantine is not None and before.quarantine is not None:
            self.quarantine.warned = before.quarantine.warned
        if self.mailbox is not None and before.mailbox is not None:
            self.mailbox.warned_torn = before.mailbox.warned_torn

    def use_topology(self, topology: Topology | None) -> None:
        """Exchange along `topology` from the next exchange on; push-sum's scalars start anew from what they are."""
        self.topology = topology
        if self._algorithm.deposits and topology is not None and self.communicator is not None:
            self.rate = rate(topology, self.communicator.view.rank)
        if self.mailbox is not None:
            self.mailbox.use_topology(topology)
        if self.channels is not None:
            self.channels.use_topology(topology)
        if self._algorithm.weighs and topology is not None and self.communicator is not None:
            old = self._push_sum
            self._push_sum = PushSum(topology, self.communicator.view.rank)
            self._push_sum.exchanges = self.clock.exchanges
            if old is not None:
                self._push_sum.scalars, self._push_sum.exchanges = old.scalars, old.exchanges

    def admit(self, fresh: Collection[int], exchange: int) -> None:
        """Have these ranks take their neighbours' mean in the exchange of this number, and the others nothing of theirs.

        Asynchronous ones take it in the first exchange in which they have something of others; see `WindowDelivery.admit`.
        """
        assert self.topology is not None
        if self.windows is not None:
            self.windows.admit(fresh)
            return
        if self._push_sum is not None:
            self._push_sum.exchanges = exchange
        if fresh:
            self._admission = Admission(self.topology, fresh, exchange)
            self.use_topology(self._admission)

    def _end_admission(self, admission: Admission) -> None:
        self._admission = None
        self.use_topology(admission.inner)
        # Its matrix is not doubly stochastic, so what was added up of differences to neighbours does not sum to zero. Sums that
        # travel were zero in it, and remain exact.
        if not set(self._algorithm.restarts) & set(self._algorithm.messages):
            self.restart()

    def restart(self) -> None:
        """Have states that carry sums over the ranks begin with zero."""
        for segment in self._segments:
            for name in self._algorithm.restarts:
                if name in segment.states:
                    segment.states[name].zero_()

    @property
    def samples(self) -> Samples | None:
        """See `Mailbox`."""
        return self.mailbox.samples if self.mailbox is not None else None

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """Exchange these buckets from now on."""
        if self.channels is not None:
            self.channels.forget()
        if self.mailbox is not None:
            self.mailbox.lay_out(buckets)

    def open_connections(self) -> None:
        """See `Delivery`; collective."""
        if self.mailbox is not None:
            self.mailbox.open_connections()

    def inbox_counts(self) -> set[int]:
        """How many tensors the inbox of a pass may have for each message."""
        if self.mailbox is None or self.topology is None:
            return {0}
        return self.mailbox.inbox_counts() | ({0} if pauses(self.schedule.communicate_every) else set())

    # -- the clock ---------------------------------------------------------------------------------------------------

    def read_clock(self) -> dict[str, Any]:
        """The clock as plain data."""
        if self._push_sum is not None:
            self.clock.push_sum = self._push_sum.scalars.tolist()
        if self._algorithm.deposits and self.windows is not None:
            self.clock.masses = self.windows.masses()
        if self.channels is not None:
            self.clock.encoded = self.channels.pending(self.clock.exchanges)
        return {**vars(self.clock), "previous_lr": dict(self.clock.previous_lr)}

    def set_clock(self, saved: dict[str, Any]) -> None:
        """Resume from `read_clock`'s data; missing entries count from zero."""
        self.clock.restore(saved)
        if self.windows is not None:
            self.windows.set_masses(self.clock.masses or ())
        if self._push_sum is not None and self.topology is not None:
            fresh = PushSum(self.topology, self._push_sum.rank)
            if self.clock.push_sum is not None:
                fresh.scalars[:] = self.clock.push_sum
            fresh.exchanges = self.clock.exchanges
            self._push_sum = fresh

    def adopt_channels(self, buckets: list[BucketState], known: bool) -> None:
        """Take up compressed messages from loaded states and clock, or forget them if any rank's do not know them. Collective.

        Where they begin exactly, nobody's states know them.
        """
        if self.channels is None or not self.channels.segments:
            return
        if not self.channels.exactly and self.channels.all_ranks(known):
            self.channels.resume(buckets, self.clock.exchanges, self.clock.encoded)
        else:
            self.channels.forget()

    def due(self, step: int) -> bool:
        """Whether anything is exchanged for this step."""
        if self.topology is None or self.communicator is None or step == self.skipped:
            return False
        return self.schedule.exchanges(step)

    def following(self) -> tuple[int, int] | None:
        """The next step and the number of its exchange, if it has one."""
        step = self.clock.steps
        if not self.due(step + 1) or step == self.skipped:
            return None
        return step + 1, self.clock.exchanges + self.schedule.is_gossip_step(step)

    def end_step(self, rates: list[float], mixed: int) -> None:
        """The step is over, at these learning rates of the groups, of which number `mixed` is the first that is mixed."""
        if self.samples is not None:
            self.samples.keep()
        self._shares_of_step()  # Push-sum's scalars move on where this rank has nothing to pass over, too.
        self.clock.tick(self.schedule, self.due(self.clock.steps), rates, mixed)
        self._shares = None
        if self.skipped is not None:
            # What the others begin with is zero: a sum of what they do not know would be mixed by weights that do not keep it.
            self.skipped = None
            self.restart()
        if self._admission is not None and self.clock.exchanges > self._admission.at:
            self._end_admission(self._admission)
        if self.channels is not None and self.channels.segments:
            self.channels.report()

    # -- messages ----------------------------------------------------------------------------------------------------

    def start(self, buckets: Iterable[BucketState], step: int, exchange: int) -> None:
        """Start the exchange of buckets that step `step` will use."""
        assert self.mailbox is not None and self.communicator is not None
        if self.on_loss is not None and self.communicator.ended is not None:
            return  # The epoch is over, and the next step begins another one.
        to_all = self.schedule.is_global_average_step(step)
        try:
            for bucket in buckets:
                if bucket.segment.layout.mix:
                    self.mailbox.send(bucket, exchange, f"step {step}, bucket {bucket.number}", to_all=to_all)
        except (PeerTimeout, ExchangeError) as error:
            if self.on_loss is None:
                raise
            self.on_loss(error)  # The epoch has ended just now.

    def find_edits(self) -> None:
        """See `Mailbox.find_edits`."""
        if self.mailbox is not None:
            self.mailbox.find_edits()

    def start_missing(self, buckets: Iterable[BucketState]) -> None:
        """Start this step's exchange of buckets for which none was started ahead."""
        self.start([bucket for bucket in buckets if bucket.transfer is None], self.clock.steps, self.clock.exchanges)

    def receive(self, pass_group: PassGroup, *, passes_alone_write: bool = False) -> Inbox:
        """What has come for this step's pass over a pass group, waited for; with push-sum, and its weights.

        `passes_alone_write` is as for `Mailbox.receive`.
        """
        if not pass_group.segment.layout.mix:
            return EMPTY
        inbox = EMPTY
        if self.due(self.clock.steps):
            inbox = self._received(pass_group, passes_alone_write)
        shares = self._shares_of_step()
        if shares is None:
            return inbox
        if inbox is LOST:
            return replace(inbox, row_sum=shares.alone)
        return replace(inbox, weights=tuple(shares.recv.values()), row_sum=shares.row_sum)

    def _received(self, pass_group: PassGroup, passes_alone_write: bool) -> Inbox:
        assert self.mailbox is not None
        if self._never_left(pass_group):
            self._tell_of_end()
            return LOST
        try:
            inbox, *others = [
                self.mailbox.receive(bucket, passes_alone_write=passes_alone_write) for bucket in pass_group.buckets
            ]
        except (PeerTimeout, ExchangeError) as error:
            if self.on_loss is None:
                raise
            self.on_loss(error)
            return LOST
        if self.channels is not None:
            for bucket in pass_group.buckets:
                self.channels.arrive(bucket, self.clock.exchanges)
        # Buckets of a segment travel in the same round, into the same flat buffers.
        assert all(other.weights == inbox.weights for other in others)
        return inbox

    def _never_left(self, pass_group: PassGroup) -> bool:
        """Whether the epoch was over before a message of these buckets could be sent; see `start`."""
        return self.on_loss is not None and any(bucket.transfer is None for bucket in pass_group.buckets)

    def _tell_of_end(self) -> None:
        ended = self.communicator.ended if self.communicator is not None else None
        if self.on_loss is not None and ended is not None:
            self.on_loss(ended)

    def come_together(self, pass_group: PassGroup) -> bool:
        """Wait for the first message of a pass group of several buckets; whether the others have come by then.

        Always so on GPUs, where the stream waits, where nothing is waited for, and with buckets that are too small to gain.
        """
        segment, count = pass_group.segment, len(pass_group.buckets)
        asks = segment.layout.mix and not device.on_gpu(segment.param) and segment.param.nbytes >= APART * count
        if not asks or self.windows is not None or self.mailbox is None or self._never_left(pass_group):
            return True
        try:
            return self.mailbox.come_together(pass_group.buckets)
        except (PeerTimeout, ExchangeError):
            if self.on_loss is None:
                raise
            return True  # `receive` meets the same failure.

    def own_share(self, pass_group: PassGroup) -> Inbox:
        """What the pass before the exchange mixes: with push-sum this rank's own values, by its scalar, and else nothing."""
        shares = self._shares_of_step() if pass_group.segment.layout.mix else None
        return EMPTY if shares is None else Inbox(row_sum=shares.scale)

    def _shares_of_step(self) -> Shares | None:
        if self._push_sum is not None and self._shares is None:
            due = self.due(self.clock.steps)
            self._shares = self._push_sum.exchange(self.clock.exchanges) if due else self._push_sum.idle()
        return self._shares
