"""The order of things: hooks -> pass -> exchange -> wait. The only file that knows about time.

One step of rank i, for every bucket in backward order:

    awc and kin   wait for the inbox -> fused pass -> send the new parameters   (travels until the next step's wait)
    atc and kin   pass before -> send -> ... all buckets ... -> wait -> pass after
    allreduce     fused pass, of gradients that backward has averaged (`gradient_means`)

What stands before the dots runs in `step`, or with `fused_backward` in autograd hooks as each bucket's last gradient
arrives; what stands behind them always runs in `step`. A hook never makes the host wait: on CPUs
a bucket whose message has not come yet, and all behind it (the order is the same on every rank), are left to `step`; on GPUs
the stream waits in its place.

In step mode, awc and kin, and all steps without an exchange, pass the buckets of a segment at once: their messages have had
the whole iteration to come, and nothing else uses the cores or the GPU's launch queue in between. (Two gloo ranks, five
buckets, 2.4 MB: 3.7 ms of CPU a step; bucket by bucket, with gloo's threads at work between passes, 7.3.) On CPUs, a segment
whose first message has come and whose others have not is passed bucket by bucket: each waits as late as its own pass needs it,
and is sent again while later ones still come. Elsewhere buckets are passed one by one, so that passes overlap with messages.
Results are the same to the last bit, however buckets are grouped, and so is the order of messages.

The t-th step (t from 0) exchanges as `communicate_every` says (`rhythm`), and the k-th exchange uses `topology.round(rank, k)`;
it averages over all ranks instead if (t + 1) % global_average_every == 0. Only `step` moves these counters, so extra
forwards, accumulation and skipped updates cannot de-phase ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedfog.algorithm import Stage
from fusedfog.comm.calls import Call
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.profiling import span
from fusedfog.engine.adapt import Adaptation
from fusedfog.engine.between_phases import BetweenPhases
from fusedfog.engine.clock import Clock
from fusedfog.engine.gradient_scale import flag_of, own_multipliers
from fusedfog.engine.mix_strength import first_mixed
from fusedfog.engine.passes import StepInputs, pass_of, passes_to_warm, strength_of
from fusedfog.engine.phases import Phases
from fusedfog.gossip.buckets import EMPTY, Buckets, BucketState, Inbox, PassGroup
from fusedfog.gossip.compression import CompressedChannels, own_states
from fusedfog.gossip.delivery import ExchangeStats
from fusedfog.kernels import CompressedChannel, Gradients, Pass, device, run_pass, warm_pass
from fusedfog.params.flat import FlatSegment
from fusedfog.params.shards import Sharding
from fusedfog.topology import Topology


class Scheduler(BetweenPhases):
    """Runs one optimizer's passes and exchanges over its flat segments.

    A subclass makes steps in another order. These methods are there to be overridden, and are called in this order:

        rebuild_buckets()                        at construction, and after segments were added
        use_topology(topology)                   at construction, and for another topology
        warm_up()                                after each of them
        step(grad_scale, found_inf)              the whole step:
            begin_step()                             check that a step may be made
            passes_around_exchange(grad_scale)       all passes and messages:
                before_exchange_all()                    `before_exchange` of all `pass_groups` that the hooks have left
                after_exchange()                         the passes that follow the exchange
            end_step()                               the clock ticks

    They build on `buckets`, `exchanges`, `inputs` and `make_pass`.

    Args:
        groups: the optimizer's param groups, read at every step (learning-rate schedules).
        phases: what it does, from which step on.
        communicator: the ranks' communicator; None for a rank that is alone.
        channel: this optimizer's channel on the communicator.
        mean_bytes: the size of buckets in which gradients are averaged.
        sharding: how the parameters are sharded, if they are.
        frozen: the groups' parameters that have no place in segments, since nothing trains them.
        place: the device of all segments, for when there are none yet.

    Attributes:
        phase: the one that the next step belongs to; `algorithm` and `schedule` are its.
        buckets: in their order, with what is in flight.
        exchanges: which steps exchange what.
        adaptation: of the topology's rounds to what they cost, with `adapt`.
        means: the averages of gradients over ranks, in a phase that has them.
        inputs: what holds for the step that is being made.
        weight: n p of this rank, or of its machine, and as a tensor `weight_of_gradients`; see `rank_weights`.
        clock, stats: how far it has come, in all phases together.
        adopt_edits: a weak method that is called before passes, for whoever shows states to a user.
        announce: another one, called before backward averages gradients over ranks.
        members: who the other ranks are, in an elastic run.
    """

    channels: CompressedChannels | None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        segments: list[FlatSegment],
        phases: Phases,
        communicator: Communicator | None,
        channel: int,
        mean_bytes: int,
        sharding: Sharding | None = None,
        frozen: Sequence[Tensor] = (),
        place: torch.device | None = None,
    ) -> None:
        self.groups, self.segments = groups, segments
        self.frozen = list(frozen)
        self.place = segments[0].param.device if segments else place or torch.device("cpu")
        self.phases, self.communicator, self._channel, self._mean_bytes = phases, communicator, channel, mean_bytes
        self.sharding = sharding
        self.blocked_by: str | None = None
        self.warned_of_buffers = False
        self.inputs, self.clock, self.stats = StepInputs(), Clock(), ExchangeStats()
        self.compare_numbers()
        self.buckets, self._adaptations = Buckets(()), 0
        self.enter(phases.at(0))

    @property
    def rank(self) -> int:
        """This rank, 0 where it is alone."""
        return self.communicator.view.rank if self.communicator is not None else 0

    # -- construction and change -------------------------------------------------------------------------------------

    def rebuild_buckets(self, *, local: bool = False) -> None:
        """Order all buckets of all segments, and hook their parameters; call again after adding segments.

        Args:
            local: only segments that are not mixed were added, perhaps on this rank alone: what is in flight stays so.
        """
        if not local:
            self.discard()
        self.buckets = Buckets(self.segments, self.buckets if local else None)
        if not local:
            self.exchanges.lay_out(self.buckets.all)
        if self.exchanges.samples is not None:
            self.exchanges.samples.lay_out(self.buckets.all)
        if self.means is not None:
            self.means.lay_out(self.segments)
        self.hooks.attach(self.buckets.all if self.schedule.fused_backward else ())
        for segment in self.segments if self.algorithm.outer else ():
            if "outer_param" not in segment.states:
                segment.state("outer_param").copy_(segment.param)

    def use_topology(self, topology: Topology | None) -> None:
        """Exchange along `topology` from the next exchange on; with `adapt`, along its rounds in the order that was agreed."""
        self.adaptation = self._adapts(topology)
        self.exchanges.use_topology(topology if self.adaptation is None else self.adaptation.topology())

    def _adapts(self, topology: Topology | None) -> Adaptation | None:
        every, communicator = self.schedule.adapt, self.communicator
        if every is None or communicator is None or topology is None or topology.is_static:
            return None
        self._adaptations += 1
        prefix = f"{communicator.name}/adapt/{self._channel}/{self._adaptations}"
        return Adaptation(communicator, prefix, self.clock, self.stats, every, topology)

    def warm_up(self) -> None:
        """On GPUs, compile the kernels of all rounds, so that none is compiled in mid-training."""
        if not device.on_gpu(self.place):
            return
        counts = self.exchanges.inbox_counts()
        for pass_group in self.buckets.wholes:
            for work in self.passes_to_warm(pass_group, counts):
                warm_pass(work)

    def passes_to_warm(self, pass_group: PassGroup, neighbours: set[int]) -> Iterator[Pass]:
        """See `passes.passes_to_warm`."""
        return passes_to_warm(self, pass_group, neighbours)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Finish this step: all passes, the exchange they need and, for AWC and kin, the start of the next one."""
        self.begin_step()
        if self.hooks.passed and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "the gradients were scaled by a GradScaler that was created after the first backward, so fused_backward "
                "has already applied them unscaled: build the GradScaler before training, or use fused_backward=False"
            )
        self.inputs.found_inf = self.averaged_flag(found_inf)
        self.passes_around_exchange(grad_scale)
        self.end_step()

    def begin_step(self) -> None:
        """Raise if no step may be made; states of algorithms that go on without gradients count as begun."""
        if self.blocked_by is not None:
            raise RuntimeError(f"step() inside {self.blocked_by}: leave the with-block first")
        if self.members is not None:
            self.members.before_step()
        elif self.communicator is not None and self.communicator.ended is not None:
            raise self.communicator.ended
        self._ask_functions()
        self.take_back_moved()
        self.take_edits()
        for segment in self.segments:
            if not self.algorithm.plain or own_states(segment, self.channels):
                segment.touch_all()

    def _ask_functions(self) -> None:
        """If functions say whether, and how strongly, this step mixes, ask them before anything is changed."""
        if callable(self.schedule.communicate_every):
            for step in (self.clock.steps, self.clock.steps + 1):  # The next one's messages are started by this one.
                self.exchanges.due(step)
        if self.schedule.mix_strength.constant is None and self.exchanges.due(self.clock.steps):
            strength_of(self)

    def averaged_flag(self, found_inf: Tensor | None) -> Tensor | None:
        """The step's non-finite flag, once all gradients are averaged that are to be."""
        if self.means is not None:
            self.means.average(scaled=found_inf is not None)
            if self.schedule.nonfinite == "heal":
                self.means.heal()
        return flag_of(self, found_inf)

    def passes_around_exchange(self, grad_scale: Tensor | None) -> None:
        """Make all passes of this step and start the messages that they make; GradScaler's factor is `grad_scale`."""
        self.inputs.grad_scale, self.inputs.unmixed_scale = own_multipliers(self, grad_scale)
        self.before_exchange_all()
        if self.algorithm.before is not None:
            self.after_exchange()

    def end_step(self) -> None:
        """The clock ticks."""
        rates = [float(group.get("lr") or 0.0) * self.phase.lr_scale for group in self.groups]
        exchanges = self.clock.exchanges
        self.exchanges.end_step(rates, first_mixed(self.groups))
        if self.adaptation is not None and self.clock.exchanges > exchanges:
            topology = self.adaptation.end_exchange()
            if topology is not None:
                self.exchanges.use_topology(topology)
        if self._same_numbers is not None:
            clock = self.clock
            count = clock.steps if self.exchanges.topology is None else clock.exchanges
            own = self.means is None and self.sharding is None
            self._same_numbers.look(self.groups, count, self.inputs.strength, own=own)
        self.inputs = StepInputs()
        self.hooks.begin_step()
        self.buckets.begin_step()
        if self.exchanges.quarantine is not None:
            self.exchanges.quarantine.end_step(self.clock.steps - 1)
        if self.means is not None:
            self.means.end_step()
        phase = self.phases.at(self.clock.steps)
        if phase is not self.phase:
            self.change_phase(phase)

    def pass_groups(self, first: int) -> Sequence[PassGroup]:
        """The passes that cover all buckets from number `first` on, in the order of passes and messages."""
        overlaps = self.algorithm.before is not None and self.exchanges.due(self.clock.steps)
        return self.buckets.wholes if self._by_segment and not overlaps else self.buckets.singles[first:]

    def before_exchange_all(self) -> None:
        """Make `before_exchange` of all pass groups that the hooks have left."""
        passed = self.hooks.passed
        waits = self.algorithm.before is None and self.exchanges.due(self.clock.steps)
        if waits:
            self.exchanges.start_missing(self.buckets.all[passed:])
        for pass_group in self.pass_groups(passed):
            apart = waits and len(pass_group.buckets) > 1 and not self.exchanges.come_together(pass_group)
            for part in self.buckets.parts(pass_group) if apart else (pass_group,):
                self.before_exchange(part)
        self.hooks.passed = len(self.buckets.all)

    def before_exchange(self, pass_group: PassGroup) -> None:
        """Make a pass group's pass before the exchange, or the only one, and start what follows it."""
        grads = pass_group.segment.gradients(pass_group.first, pass_group.last)
        if self.algorithm.before is not None:
            step = self.clock.steps
            target = (step, self.clock.exchanges) if self.exchanges.due(step) else None
            self.make_pass(pass_group, self.algorithm.before, grads, self.exchanges.own_share(pass_group), target)
        else:
            target = self.exchanges.following()
            self.exchanges.find_edits()
            inbox = self.exchanges.receive(pass_group, passes_alone_write=target is not None)
            self.make_pass(pass_group, self.algorithm.after, grads, inbox, target)
            for again in pass_group.segment.repeated(grads) if pass_group.segment.listed else ():
                self.make_pass(pass_group, self.algorithm.after, again, EMPTY)
        if target is not None:
            self.exchanges.start(pass_group.buckets, *target)
        if self.schedule.fused_backward:
            pass_group.drop_gradients()

    def after_exchange(self) -> None:
        """Wait for the messages, and make the passes that use them."""
        due = self.exchanges.due(self.clock.steps)
        if not self.algorithm.passes_after_exchange(due):
            return
        for pass_group in self.pass_groups(0):
            inbox = self.exchanges.receive(pass_group)
            if self.algorithm.passes_after_exchange(due and pass_group.segment.layout.mix):
                self.make_pass(pass_group, self.algorithm.after, None, inbox)

    def make_pass(
        self,
        pass_group: PassGroup,
        stage: Stage,
        grads: Gradients | None,
        inbox: Inbox,
        target: tuple[int, int] | None = None,
    ) -> None:
        """Make a stage's pass over a pass group; `target` is the step and exchange of the messages it makes."""
        with span("pass", pass_group.numbers, stage.rule):
            self._before_pass(pass_group, inbox)
            work = pass_of(self, pass_group, stage, grads, inbox, target)
            run_pass(work)
            self._after_pass(pass_group, inbox)
        pass_group.bump_versions()
        if self.channels is not None and target is not None and work.compression.given:
            self.channels.encoded(pass_group.buckets, target[1])

    def _before_pass(self, pass_group: PassGroup, inbox: Inbox) -> bool:
        """Heal this rank, if it is to be; whether it may have been."""
        quarantine = self.exchanges.quarantine
        return quarantine is not None and quarantine.before_pass(pass_group, inbox)

    def _after_pass(self, pass_group: PassGroup, inbox: Inbox) -> None:
        if self.exchanges.quarantine is not None:
            self.exchanges.quarantine.after_pass(pass_group, inbox)

    def codes_for(self, pass_group: PassGroup, following: tuple[int, int] | None) -> tuple[CompressedChannel, ...]:
        """Where a pass writes the codes of its messages; nowhere if they travel as they are, or not at all."""
        if self.channels is None or following is None or not pass_group.segment.layout.mix:
            return ()
        step, exchange = following
        exact = self.schedule.is_global_average_step(step) or any(
            self.channels.begins(bucket, exchange) for bucket in pass_group.buckets
        )
        return () if exact else self.channels.of(pass_group.segment, exchange)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def pass_bucket(self, place: int) -> None:
        """See `hooks.PassMaker`."""
        self._ask_functions()
        self.take_back_moved(self.buckets.all[place])
        self.take_edits()
        view = self.communicator.view if self.communicator is not None else None
        with Call("backward()", view, self.clock.steps):  # No step() is around it that would say who is where.
            self.before_exchange(self.buckets.singles[place])

    def may_pass(self, bucket: BucketState) -> bool:
        """See `hooks.PassMaker`."""
        due = self.exchanges.due(self.clock.steps)
        if self.algorithm.before is not None or not due or not bucket.segment.layout.mix:
            return True
        if bucket.transfer is None:
            return False
        # A wait on a GPU orders streams and never holds the host, which runs ahead of the device: there, asking whether the
        # message is over would leave nearly every bucket to `step`.
        return device.on_gpu(bucket.segment.param) or bucket.transfer.done()
