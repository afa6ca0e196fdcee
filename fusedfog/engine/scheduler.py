"""The order of things: hooks -> pass -> exchange -> wait. The only file that knows about time.

One step of rank i, for every bucket in backward order:

    awc and kin   wait for the inbox -> fused pass -> send the new parameters   (travels until the next step's wait)
    atc and kin   pass before -> send -> ... all buckets ... -> wait -> pass after
    allreduce     pack and reduce gradients -> ... all buckets ... -> wait -> fused pass

The part before the dots is the bucket's *lead*, the rest its *follow*. Leads run in `step`, or with `fused_backward` in
autograd hooks as each bucket's last gradient arrives; follows always run in `step`. A hook never makes the host wait: on CPUs
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
from fusedfog.engine.clock import Clock, Rhythm
from fusedfog.engine.gradient_scale import measured_norms, multiplier
from fusedfog.engine.hooks import BackwardHooks
from fusedfog.engine.passes import StepInputs, pass_of, passes_to_warm
from fusedfog.gossip.buckets import EMPTY, Inbox, Lane, Sweep, lanes_of
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import Wires
from fusedfog.gossip.mailbox import Figures, Mailbox, abandon
from fusedfog.gossip.push_sum import PushSum, Shares
from fusedfog.kernels import Gradients, Wire, device, run_pass, warm_pass
from fusedfog.params.flat import FlatSegment
from fusedfog.params.shards import Sharding
from fusedfog.topology import Topology

_WARM_ROUNDS = 64
"""Of an endless topology."""


class Scheduler:
    """Runs one optimizer's passes and exchanges over its flat segments.

    Args:
        groups: the optimizer's param groups, read at every step (learning-rate schedules).
        link: the ranks' link; None for a rank that is alone.
        channel: this optimizer's channel on the link.
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
        link: Communicator | None,
        channel: int,
        rhythm: Rhythm,
        hierarchy: Hierarchy | None = None,
        codes: torch.dtype | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.groups, self.segments = groups, segments
        self.algorithm, self.topology, self.link, self.rhythm = algorithm, topology, link, rhythm
        self.clock, self.figures, self.sharding = Clock(), Figures(), sharding
        self.held: str | None = None
        # Not with fused_backward: how many buckets the hooks have led differs by rank, and with it the order of sweeps,
        # in which messages are started and NCCL matches them.
        self._by_segment = not rhythm.fused_backward
        self._lanes: list[Lane] = []
        self._singles: list[Sweep] = []
        self._wholes: list[Sweep] = []
        self.hooks = BackwardHooks(self, clips=rhythm.max_grad_norm is not None)
        self.inputs = StepInputs()
        self._mailbox: Mailbox | None = None
        self._push_sum: PushSum | None = None
        self.wires: Wires | None = None
        if link is not None:
            if codes is not None and algorithm.exchanges == "parameters":
                self.wires = Wires(segments, codes, algorithm.messages, link, ahead=algorithm.before is None)
            self._mailbox = Mailbox(link, channel, algorithm.messages, self.figures, hierarchy, self.wires)
            # The finalizer must not hold the scheduler, so it holds the one list of what is in flight.
            weakref.finalize(self, abandon, link, self._mailbox.in_flight)
        self.lay_lanes()
        self.follow_topology(topology)
        self.warm_up()

    @property
    def rank(self) -> int:
        """This rank, 0 where it is alone."""
        return self.link.world.rank if self.link is not None else 0

    # -- construction and change -------------------------------------------------------------------------------------

    def lay_lanes(self) -> None:
        """Order all buckets of all segments, and hook their parameters; call again after adding segments."""
        self.discard()
        if self.wires is not None:
            self.wires.forget()
        if self._mailbox is not None:
            self._mailbox.forget_postings()
        self._lanes, self._singles, self._wholes = lanes_of(self.segments)
        self.hooks.attach(self._lanes if self.rhythm.fused_backward else ())
        for segment in self.segments if self.algorithm.outer else ():
            if "outer_param" not in segment.states:
                segment.state("outer_param").copy_(segment.param)

    def follow_topology(self, topology: Topology | None) -> None:
        """Exchange along `topology` from the next exchange on; push-sum's scalars start anew from what they are."""
        self.topology = topology
        if self.wires is not None:
            self.wires.follow_topology(topology)
        if self.algorithm.weighs and topology is not None and self.link is not None:
            old = self._push_sum
            self._push_sum = PushSum(topology, self.link.world.rank)
            if old is not None:
                self._push_sum.scalars, self._push_sum.exchanges = old.scalars, old.exchanges

    def read_clock(self) -> dict[str, Any]:
        """The clock as plain data."""
        if self._push_sum is not None:
            self.clock.push_sum = self._push_sum.scalars.tolist()
        if self.wires is not None:
            self.clock.said = self.wires.pending(self.clock.exchanges)
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
        for lane in self._lanes:
            lane.message = None

    def drain(self, *, keep_failures: bool = False) -> None:
        """Wait for all sends and receives; what arrived is kept for the next step. Local; see `Mailbox.drain`."""
        if self._mailbox is not None:
            self._mailbox.drain(self._lanes, keep_failures=keep_failures)

    def count_edits(self) -> list[int]:
        """How many in-place edits each bucket has seen since it was sent."""
        return [lane.edits() for lane in self._lanes]

    def forget_edits(self, counts: Sequence[int]) -> None:
        """Set `count_edits` back, after edits that undid themselves."""
        for lane, count in zip(self._lanes, counts, strict=True):
            lane.versions += lane.edits() - count

    def check_storage(self) -> None:
        """Raise `StorageReplacedError` if a parameter has left the flat buffers."""
        for segment in self.segments:
            segment.check_storage()

    def bump_versions(self) -> None:
        """Tell autograd that all parameters were written through the flat buffers."""
        for sweep in self._wholes:
            sweep.bump_versions()

    @contextmanager
    def hold(self, where: str) -> Iterator[None]:
        """Inside, no step may be made and hooks do nothing; `where` names the with-block in the error."""
        previous, self.held = self.held, where
        try:
            yield
        finally:
            self.held = previous

    # -- stepping ----------------------------------------------------------------------------------------------------

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Finish this step: all passes, the exchange they need and, for AWC and kin, the start of the next one."""
        self._begin()
        if self.hooks.led and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "the gradients were scaled by a GradScaler that was created after the first backward, so fused_backward "
                "has already applied them unscaled: build the GradScaler before training, or use fused_backward=False"
            )
        self._touch()
        self.inputs.found_inf = found_inf
        self._lead_and_follow(grad_scale)
        self._tick()

    def _lead_and_follow(self, grad_scale: Tensor | None) -> None:
        self.inputs.grad_scale = self._multiplier(grad_scale)
        self._lead_all()
        if self.algorithm.before is not None:
            self._follow_all()

    def _begin(self) -> None:
        if self.held is not None:
            raise RuntimeError(f"step() inside {self.held}: leave the with-block first")
        if self.link is not None and self.link.ended is not None:
            raise self.link.ended
        for segment in self.segments:
            segment.check_storage(self.clock.steps)

    def _touch(self) -> None:
        for segment in self.segments:
            if not self.algorithm.plain or self.own_names(segment):
                segment.touch_all()

    def _tick(self) -> None:
        rates = [float(group.get("lr") or 0.0) for group in self.groups]
        self.clock.tick(self.rhythm, self._exchanging(self.clock.steps), rates)
        self.inputs = StepInputs()
        self.hooks.begin_step()
        for lane in self._lanes:
            lane.counted = False
        if self.wires is not None:
            self.wires.report()

    def _exchanging(self, step: int) -> bool:
        return self.topology is not None and self.link is not None and self.rhythm.exchanges(step)

    def _sweeps(self, first: int) -> list[Sweep]:
        """The passes that cover all buckets from number `first` on, in the order of passes and messages."""
        overlaps = self.algorithm.before is not None and self._exchanging(self.clock.steps)
        return self._wholes if self._by_segment and not overlaps else self._singles[first:]

    def _lead_all(self) -> None:
        if self.algorithm.before is None and self._exchanging(self.clock.steps):
            self._send_missing()
        for sweep in self._sweeps(self.hooks.led):
            self._lead(sweep)
        self.hooks.led = len(self._lanes)

    def state_names(self, segment: FlatSegment) -> tuple[str, ...]:
        """All states of a segment's parameters that a checkpoint has to hold."""
        return (*self.algorithm.state_names(self.groups[segment.layout.group]), *self.own_names(segment))

    def own_names(self, segment: FlatSegment) -> tuple[str, ...]:
        """Those that are neither the algorithm's nor the inner optimizer's, and that parameters without gradients have too."""
        rest = () if segment.rest_name is None else (segment.rest_name,)
        return (*rest, *self.wires.names()) if self.wires is not None and segment.layout.mix else rest

    def adopt_wires(self, known: bool) -> None:
        """Take up compressed messages from loaded states and clock, or forget them if any rank's do not know them. Collective."""
        if self.wires is None:
            return
        if self.wires.all_ranks(known):
            self.wires.resume(self._lanes, self.clock.exchanges, self.clock.said)
        else:
            self.wires.forget()

    def _send_missing(self) -> None:
        """Start this step's exchange of buckets for which none was started ahead."""
        for lane in self._lanes[self.hooks.led :]:
            if lane.message is None:
                self._send(lane, self.clock.steps, self.clock.exchanges)

    def _lead(self, sweep: Sweep) -> None:
        grads = sweep.segment.gradients(sweep.first, sweep.last)
        step, exchanging = self.clock.steps, self._exchanging(self.clock.steps)
        if self.algorithm.before is not None:
            pushes = self._push_sum is not None and sweep.segment.layout.mix
            inbox = Inbox(row_sum=self._shares().scale) if pushes else EMPTY
            self._pass(sweep, self.algorithm.before, grads, inbox, (step, self.clock.exchanges) if exchanging else None)
            if exchanging:
                self._send_all(sweep, step, self.clock.exchanges)
        else:
            inbox = self._receive(sweep) if exchanging else EMPTY
            done = self.clock.exchanges + (exchanging and self.rhythm.turns(step))
            following = (step + 1, done) if self._exchanging(step + 1) else None
            self._pass(sweep, self.algorithm.after, grads, inbox, following)
            if following is not None:
                self._send_all(sweep, *following)
        self._release(sweep)

    def _release(self, sweep: Sweep) -> None:
        if self.rhythm.fused_backward:
            for param in sweep.segment.params[sweep.first : sweep.last]:
                param.grad = None

    def _follow_all(self) -> None:
        exchanging = self._exchanging(self.clock.steps)
        if not self.algorithm.follows(exchanging):
            return
        for sweep in self._sweeps(0):
            inbox = self._receive(sweep) if exchanging else EMPTY
            if self._push_sum is not None and sweep.segment.layout.mix:
                inbox = Inbox(inbox.tensors, tuple(self._shares().recv.values()), self._shares().row_sum)
            if self.algorithm.follows(exchanging and sweep.segment.layout.mix):
                self._pass(sweep, self.algorithm.after, None, inbox)

    def _pass(
        self,
        sweep: Sweep,
        stage: Stage,
        grads: Gradients | None,
        inbox: Inbox,
        following: tuple[int, int] | None = None,
    ) -> None:
        """Make a stage's pass over a sweep; see `passes.pass_of`."""
        with span("pass", sweep.numbers, stage.rule):
            work = pass_of(self, sweep, stage, grads, inbox, following)
            run_pass(work)
        sweep.bump_versions()
        if self.wires is not None and following is not None and work.given:
            self.wires.said(sweep.lanes, following[1])

    def warm_up(self) -> None:
        """On GPUs, compile the kernels of all rounds, so that none is compiled in mid-training."""
        if not device.on_gpu(self.segments[0].param):
            return
        neighbours = self._numbers_of_neighbours()
        for sweep in self._wholes:
            for work in passes_to_warm(self, sweep, neighbours):
                warm_pass(work)

    def _numbers_of_neighbours(self) -> set[int]:
        """How many neighbours rounds have, those of weight 0 too; full averages, and machines, count as one."""
        if self._mailbox is None or self.topology is None:
            return {0}
        pauses = self.rhythm.communicate_every > 1
        found = {0} if pauses else set()
        if self._mailbox.hierarchy is not None:
            return found | {1}
        if self.rhythm.global_average_every is not None:
            found.add(1)
        rounds = min(self.topology.period or _WARM_ROUNDS, _WARM_ROUNDS)
        return found | {len(self.topology.round(self.rank, step).recv) for step in range(rounds)}

    def codes_for(self, sweep: Sweep, following: tuple[int, int] | None) -> tuple[Wire, ...]:
        """Where a pass writes the codes of its messages; nowhere if they travel as they are, or not at all."""
        if self.wires is None or following is None or not sweep.segment.layout.mix:
            return ()
        step, exchange = following
        return () if self.rhythm.averages(step) else self.wires.of(sweep.segment, exchange)

    def measured(self) -> dict[str, float]:
        """What the last step's passes have measured; waits for the device."""
        return measured_norms(self.segments, self.algorithm.before is not None) if self.rhythm.measure else {}

    # -- exchanging --------------------------------------------------------------------------------------------------

    def _send(self, lane: Lane, step: int, exchange: int) -> None:
        """Start the exchange of a bucket that step `step` will consume."""
        assert self._mailbox is not None and self.topology is not None
        if not lane.segment.layout.mix:
            return
        label = f"step {step}, bucket {lane.number}"
        if self.rhythm.averages(step):
            self._mailbox.send_to_all(lane, label)
        else:
            if self.wires is not None:
                self.wires.say(lane, exchange)
            self._mailbox.send(lane, self.topology, exchange, label)

    def _send_all(self, sweep: Sweep, step: int, exchange: int) -> None:
        for lane in sweep.lanes:
            self._send(lane, step, exchange)

    def _receive(self, sweep: Sweep) -> Inbox:
        if not sweep.segment.layout.mix:
            return EMPTY
        assert self._mailbox is not None
        inboxes = [self._mailbox.receive(lane) for lane in sweep.lanes]
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
        """Of this rank's own gradients; see `gradients.multiplier`."""
        clips = self.rhythm.max_grad_norm is not None
        return multiplier(self._gradients() if clips else [], grad_scale, self.rhythm.max_grad_norm, self.sharding)

    def _gradients(self) -> list[Tensor]:
        found = [grad for segment in self.segments for grad in segment.own_gradients(0, len(segment.params))]
        return [grad for grad in found if grad is not None]

    def lead(self, number: int) -> None:
        """See `hooks.Leader`."""
        self._lead(self._singles[number])

    def may_lead(self, lane: Lane) -> bool:
        """See `hooks.Leader`."""
        if self.algorithm.before is not None or not self._exchanging(self.clock.steps) or not lane.segment.layout.mix:
            return True
        if lane.message is None:
            return False
        # A wait on a GPU orders streams and never holds the host, which runs ahead of the device: there, asking whether the
        # message is over would leave nearly every bucket to `step`.
        return device.on_gpu(lane.segment.param) or lane.message.done()
