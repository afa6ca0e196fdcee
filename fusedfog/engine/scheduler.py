"""The order of things: hooks -> pass -> exchange -> wait. The only file that knows about time.

One step of rank i, for every bucket in backward order:

    awc and kin   wait for the inbox -> fused pass -> send the new parameters   (travels until the next step's wait)
    atc and kin   pass before -> send -> ... all buckets ... -> wait -> pass after
    allreduce     pack and reduce gradients -> ... all buckets ... -> wait -> fused pass

What stands before the dots runs in `step`, or with `fused_backward` in autograd hooks as each bucket's last gradient
arrives; what stands behind them always runs in `step`. A hook never makes the host wait: on CPUs
a bucket whose message has not come yet, and all behind it (the order is the same on every rank), are left to `step`; on GPUs
the stream waits in its place.

In step mode, awc and kin, and all steps without an exchange, pass the buckets of a segment at once: their messages have had
the whole iteration to come, and nothing else uses the cores or the GPU's launch queue in between. (Two gloo ranks, five
buckets, 2.4 MB: 3.7 ms of CPU a step; bucket by bucket, with gloo's threads at work between passes, 7.3.) Elsewhere buckets
are passed one by one, so that passes overlap with messages.

The t-th step (t from 0) exchanges if (t + 1) % communicate_every == 0, and the k-th exchange uses `topology.round(rank, k)`;
it averages over all ranks instead if (t + 1) % global_average_every == 0. Only `step` moves these counters, so extra
forwards, accumulation and skipped updates cannot de-phase ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedfog.algorithms import Algorithm, Stage
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.gradient_scale import measured_norms, multiplier
from fusedfog.engine.hooks import BackwardHooks
from fusedfog.engine.passes import StepInputs, pass_of, passes_to_warm
from fusedfog.gossip.buckets import EMPTY, BucketState, Inbox, PassGroup, buckets_of
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.gossip.mailbox import ExchangeStats, Mailbox, abandon
from fusedfog.gossip.push_sum import PushSum, Shares
from fusedfog.kernels import CompressedChannel, Gradients, device, run_pass, warm_pass
from fusedfog.params.flat import FlatSegment
from fusedfog.params.shards import Sharding
from fusedfog.topology import Topology

_WARM_ROUNDS = 64
"""Of an endless topology."""


class Scheduler:
    """Runs one optimizer's passes and exchanges over its flat segments.

    Args:
        groups: the optimizer's param groups, read at every step (learning-rate schedules).
        communicator: the ranks' communicator; None for a rank that is alone.
        channel: this optimizer's channel on the communicator.
        hierarchy: this rank's place on a mesh, where `topology` is between machines.
        codes: dtype of compressed messages; None sends the flat tensors themselves.
        sharding: how the parameters are sharded, if they are.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        segments: list[FlatSegment],
        algorithm: Algorithm,
        topology: Topology | None,
        communicator: Communicator | None,
        channel: int,
        schedule: StepSchedule,
        hierarchy: Hierarchy | None = None,
        codes: torch.dtype | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.groups, self.segments = groups, segments
        self.algorithm, self.topology, self.communicator, self.schedule = algorithm, topology, communicator, schedule
        self.clock, self.stats, self.sharding = Clock(), ExchangeStats(), sharding
        self.blocked_by: str | None = None
        # Not with fused_backward: how many buckets the hooks have passed differs by rank, and with it the order of pass groups,
        # in which messages are started and NCCL matches them.
        self._by_segment = not schedule.fused_backward
        self._buckets: list[BucketState] = []
        self._singles: list[PassGroup] = []
        self._wholes: list[PassGroup] = []
        self.hooks = BackwardHooks(self, clips=schedule.max_grad_norm is not None)
        self.inputs = StepInputs()
        self._mailbox: Mailbox | None = None
        self._push_sum: PushSum | None = None
        self.channels: CompressedChannels | None = None
        if communicator is not None:
            if codes is not None and algorithm.exchanges == "parameters":
                self.channels = CompressedChannels(
                    segments, codes, algorithm.messages, communicator, ahead=algorithm.before is None
                )
            self._mailbox = Mailbox(communicator, channel, algorithm.messages, self.stats, hierarchy, self.channels)
            # The finalizer must not hold the scheduler, so it holds the one list of what is in flight.
            weakref.finalize(self, abandon, communicator, self._mailbox.in_flight)
        self.rebuild_buckets()
        self.use_topology(topology)
        self.warm_up()

    @property
    def rank(self) -> int:
        """This rank, 0 where it is alone."""
        return self.communicator.view.rank if self.communicator is not None else 0

    # -- construction and change -------------------------------------------------------------------------------------

    def rebuild_buckets(self) -> None:
        """Order all buckets of all segments, and hook their parameters; call again after adding segments."""
        self.discard()
        if self.channels is not None:
            self.channels.forget()
        if self._mailbox is not None:
            self._mailbox.forget_postings()
        self._buckets, self._singles, self._wholes = buckets_of(self.segments)
        self.hooks.attach(self._buckets if self.schedule.fused_backward else ())
        for segment in self.segments if self.algorithm.outer else ():
            if "outer_param" not in segment.states:
                segment.state("outer_param").copy_(segment.param)

    def use_topology(self, topology: Topology | None) -> None:
        """Exchange along `topology` from the next exchange on; push-sum's scalars start anew from what they are."""
        self.topology = topology
        if self.channels is not None:
            self.channels.use_topology(topology)
        if self.algorithm.weighs and topology is not None and self.communicator is not None:
            old = self._push_sum
            self._push_sum = PushSum(topology, self.communicator.view.rank)
            if old is not None:
                self._push_sum.scalars, self._push_sum.exchanges = old.scalars, old.exchanges

    def read_clock(self) -> dict[str, Any]:
        """The clock as plain data."""
        if self._push_sum is not None:
            self.clock.push_sum = self._push_sum.scalars.tolist()
        if self.channels is not None:
            self.clock.encoded = self.channels.pending(self.clock.exchanges)
        return {**vars(self.clock), "previous_lr": dict(self.clock.previous_lr)}

    def set_clock(self, saved: dict[str, Any]) -> None:
        """Resume from `read_clock`'s data; missing entries count from zero."""
        self.clock = Clock(**saved)
        if self._push_sum is not None and self.topology is not None:
            fresh = PushSum(self.topology, self._push_sum.rank)
            if self.clock.push_sum is not None:
                fresh.scalars[:] = self.clock.push_sum
            fresh.exchanges = self.clock.exchanges
            self._push_sum = fresh

    def discard(self) -> None:
        """Wait for what is in flight and forget it: the next step starts its own exchange."""
        self.drain(keep_failures=True)
        for bucket in self._buckets:
            bucket.transfer = None

    def drain(self, *, keep_failures: bool = False) -> None:
        """Wait for all sends and receives; what arrived is kept for the next step. Local; see `Mailbox.drain`."""
        if self._mailbox is not None:
            self._mailbox.drain(self._buckets, keep_failures=keep_failures)

    def count_edits(self) -> list[int]:
        """How many in-place edits each bucket has seen since it was sent."""
        return [bucket.edits() for bucket in self._buckets]

    def forget_edits(self, counts: Sequence[int]) -> None:
        """Set `count_edits` back, after edits that undid themselves."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.versions += bucket.edits() - count

    def check_storage(self) -> None:
        """Raise `StorageReplacedError` if a parameter has left the flat buffers."""
        for segment in self.segments:
            segment.check_storage()

    def bump_versions(self) -> None:
        """Tell autograd that all parameters were written through the flat buffers."""
        for pass_group in self._wholes:
            pass_group.bump_versions()

    @contextmanager
    def block_steps(self, where: str) -> Iterator[None]:
        """Inside, no step may be made and hooks do nothing; `where` names the with-block in the error."""
        previous, self.blocked_by = self.blocked_by, where
        try:
            yield
        finally:
            self.blocked_by = previous

    # -- stepping ----------------------------------------------------------------------------------------------------

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Finish this step: all passes, the exchange they need and, for AWC and kin, the start of the next one."""
        self._begin()
        if self.hooks.passed and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "the gradients were scaled by a GradScaler that was created after the first backward, so fused_backward "
                "has already applied them unscaled: build the GradScaler before training, or use fused_backward=False"
            )
        self._touch()
        self.inputs.found_inf = found_inf
        self._passes_around_exchange(grad_scale)
        self._tick()

    def _passes_around_exchange(self, grad_scale: Tensor | None) -> None:
        self.inputs.grad_scale = self._multiplier(grad_scale)
        self._before_exchange_all()
        if self.algorithm.before is not None:
            self._after_exchange()

    def _begin(self) -> None:
        if self.blocked_by is not None:
            raise RuntimeError(f"step() inside {self.blocked_by}: leave the with-block first")
        if self.communicator is not None and self.communicator.ended is not None:
            raise self.communicator.ended
        for segment in self.segments:
            segment.check_storage(self.clock.steps)

    def _touch(self) -> None:
        for segment in self.segments:
            if not self.algorithm.plain or self.own_names(segment):
                segment.touch_all()

    def _tick(self) -> None:
        rates = [float(group.get("lr") or 0.0) for group in self.groups]
        self.clock.tick(self.schedule, self._exchanging(self.clock.steps), rates)
        self.inputs = StepInputs()
        self.hooks.begin_step()
        for bucket in self._buckets:
            bucket.counted = False
        if self.channels is not None:
            self.channels.report()

    def _exchanging(self, step: int) -> bool:
        return self.topology is not None and self.communicator is not None and self.schedule.exchanges(step)

    def _pass_groups(self, first: int) -> list[PassGroup]:
        """The passes that cover all buckets from number `first` on, in the order of passes and messages."""
        overlaps = self.algorithm.before is not None and self._exchanging(self.clock.steps)
        return self._wholes if self._by_segment and not overlaps else self._singles[first:]

    def _before_exchange_all(self) -> None:
        if self.algorithm.before is None and self._exchanging(self.clock.steps):
            self._send_missing()
        for pass_group in self._pass_groups(self.hooks.passed):
            self._before_exchange(pass_group)
        self.hooks.passed = len(self._buckets)

    def state_names(self, segment: FlatSegment) -> tuple[str, ...]:
        """All states of a segment's parameters that a checkpoint has to hold."""
        return (*self.algorithm.state_names(self.groups[segment.layout.group]), *self.own_names(segment))

    def own_names(self, segment: FlatSegment) -> tuple[str, ...]:
        """Those that are neither the algorithm's nor the inner optimizer's, and that parameters without gradients have too."""
        remainder = () if segment.remainder_name is None else (segment.remainder_name,)
        return (*remainder, *self.channels.names()) if self.channels is not None and segment.layout.mix else remainder

    def adopt_channels(self, known: bool) -> None:
        """Take up compressed messages from loaded states and clock, or forget them if any rank's do not know them. Collective."""
        if self.channels is None:
            return
        if self.channels.all_ranks(known):
            self.channels.resume(self._buckets, self.clock.exchanges, self.clock.encoded)
        else:
            self.channels.forget()

    def _send_missing(self) -> None:
        """Start this step's exchange of buckets for which none was started ahead."""
        for bucket in self._buckets[self.hooks.passed :]:
            if bucket.transfer is None:
                self._send(bucket, self.clock.steps, self.clock.exchanges)

    def _before_exchange(self, pass_group: PassGroup) -> None:
        grads = pass_group.segment.gradients(pass_group.first, pass_group.last)
        step, exchanging = self.clock.steps, self._exchanging(self.clock.steps)
        if self.algorithm.before is not None:
            pushes = self._push_sum is not None and pass_group.segment.layout.mix
            inbox = Inbox(row_sum=self._shares().scale) if pushes else EMPTY
            self._pass(
                pass_group, self.algorithm.before, grads, inbox, (step, self.clock.exchanges) if exchanging else None
            )
            if exchanging:
                self._send_all(pass_group, step, self.clock.exchanges)
        else:
            inbox = self._receive(pass_group) if exchanging else EMPTY
            done = self.clock.exchanges + (exchanging and self.schedule.is_gossip_step(step))
            following = (step + 1, done) if self._exchanging(step + 1) else None
            self._pass(pass_group, self.algorithm.after, grads, inbox, following)
            if following is not None:
                self._send_all(pass_group, *following)
        self._release(pass_group)

    def _release(self, pass_group: PassGroup) -> None:
        if self.schedule.fused_backward:
            for param in pass_group.segment.params[pass_group.first : pass_group.last]:
                param.grad = None

    def _after_exchange(self) -> None:
        exchanging = self._exchanging(self.clock.steps)
        if not self.algorithm.passes_after_exchange(exchanging):
            return
        for pass_group in self._pass_groups(0):
            inbox = self._receive(pass_group) if exchanging else EMPTY
            if self._push_sum is not None and pass_group.segment.layout.mix:
                inbox = Inbox(inbox.tensors, tuple(self._shares().recv.values()), self._shares().row_sum)
            if self.algorithm.passes_after_exchange(exchanging and pass_group.segment.layout.mix):
                self._pass(pass_group, self.algorithm.after, None, inbox)

    def _pass(
        self,
        pass_group: PassGroup,
        stage: Stage,
        grads: Gradients | None,
        inbox: Inbox,
        following: tuple[int, int] | None = None,
    ) -> None:
        """Make a stage's pass over a pass group; see `passes.pass_of`."""
        with span("pass", pass_group.numbers, stage.rule):
            work = pass_of(self, pass_group, stage, grads, inbox, following)
            run_pass(work)
        pass_group.bump_versions()
        if self.channels is not None and following is not None and work.compression.given:
            self.channels.encoded(pass_group.buckets, following[1])

    def warm_up(self) -> None:
        """On GPUs, compile the kernels of all rounds, so that none is compiled in mid-training."""
        if not device.on_gpu(self.segments[0].param):
            return
        neighbours = self._numbers_of_neighbours()
        for pass_group in self._wholes:
            for work in passes_to_warm(self, pass_group, neighbours):
                warm_pass(work)

    def _numbers_of_neighbours(self) -> set[int]:
        """How many neighbours rounds have, those of weight 0 too; full averages, and machines, count as one."""
        if self._mailbox is None or self.topology is None:
            return {0}
        pauses = self.schedule.communicate_every > 1
        found = {0} if pauses else set()
        if self._mailbox.hierarchy is not None:
            return found | {1}
        if self.schedule.global_average_every is not None:
            found.add(1)
        rounds = min(self.topology.period or _WARM_ROUNDS, _WARM_ROUNDS)
        return found | {len(self.topology.round(self.rank, step).recv) for step in range(rounds)}

    def codes_for(self, pass_group: PassGroup, following: tuple[int, int] | None) -> tuple[CompressedChannel, ...]:
        """Where a pass writes the codes of its messages; nowhere if they travel as they are, or not at all."""
        if self.channels is None or following is None or not pass_group.segment.layout.mix:
            return ()
        step, exchange = following
        return () if self.schedule.is_global_average_step(step) else self.channels.of(pass_group.segment, exchange)

    def measured(self) -> dict[str, float]:
        """What the last step's passes have measured; waits for the device."""
        return measured_norms(self.segments, self.algorithm.before is not None) if self.schedule.measure else {}

    # -- exchanging --------------------------------------------------------------------------------------------------

    def _send(self, bucket: BucketState, step: int, exchange: int) -> None:
        """Start the exchange of a bucket that step `step` will consume."""
        assert self._mailbox is not None and self.topology is not None
        if not bucket.segment.layout.mix:
            return
        label = f"step {step}, bucket {bucket.number}"
        if self.schedule.is_global_average_step(step):
            self._mailbox.send_to_all(bucket, label)
        else:
            if self.channels is not None:
                self.channels.encode(bucket, exchange)
            self._mailbox.send(bucket, self.topology, exchange, label)

    def _send_all(self, pass_group: PassGroup, step: int, exchange: int) -> None:
        for bucket in pass_group.buckets:
            self._send(bucket, step, exchange)

    def _receive(self, pass_group: PassGroup) -> Inbox:
        if not pass_group.segment.layout.mix:
            return EMPTY
        assert self._mailbox is not None
        inboxes = [self._mailbox.receive(bucket) for bucket in pass_group.buckets]
        # Buckets of a segment travel in the same round, into the same flat buffers.
        assert all(inbox.weights == inboxes[0].weights for inbox in inboxes)
        return inboxes[0]

    def _shares(self) -> Shares:
        assert self._push_sum is not None
        if self.inputs.shares is None:
            exchanging = self._exchanging(self.clock.steps)
            self.inputs.shares = self._push_sum.exchange(self.clock.exchanges) if exchanging else self._push_sum.idle()
        return self.inputs.shares

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _multiplier(self, grad_scale: Tensor | None) -> Tensor | None:
        """Of this rank's own gradients; see `gradient_scale.multiplier`."""
        clips = self.schedule.max_grad_norm is not None
        return multiplier(self._gradients() if clips else [], grad_scale, self.schedule.max_grad_norm, self.sharding)

    def _gradients(self) -> list[Tensor]:
        found = [grad for segment in self.segments for grad in segment.own_gradients(0, len(segment.params))]
        return [grad for grad in found if grad is not None]

    def before_exchange(self, number: int) -> None:
        """See `hooks.PassMaker`."""
        self._before_exchange(self._singles[number])

    def may_pass(self, bucket: BucketState) -> bool:
        """See `hooks.PassMaker`."""
        if self.algorithm.before is not None or not self._exchanging(self.clock.steps) or not bucket.segment.layout.mix:
            return True
        if bucket.transfer is None:
            return False
        # A wait on a GPU orders streams and never holds the host, which runs ahead of the device: there, asking whether the
        # message is over would leave nearly every bucket to `step`.
        return device.on_gpu(bucket.segment.param) or bucket.transfer.done()
