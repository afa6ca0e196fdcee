"""The order of things: hooks -> pass -> exchange -> wait. The only file that knows about time.

One step of rank i, for every bucket in backward order:

    awc         wait for the inbox -> fused pass -> send the new parameters   (travels until the next step's wait)
    atc         fused pass -> send -> ... all buckets ... -> wait -> mix
    allreduce   pack and reduce gradients -> ... all buckets ... -> wait -> fused pass

The part before the dots is the bucket's *lead*, the rest its *follow*. Leads run in `step`, or with `fused_backward` in
autograd hooks as each bucket's last gradient arrives; follows always run in `step`. A hook never waits: a bucket whose
message has not come yet, and all behind it (the order is the same on every rank), are left to `step`.

The t-th step (t from 0) exchanges if (t + 1) % communicate_every == 0, and the k-th exchange uses `topology.round(rank, k)`.
Only `step` moves these counters, so extra forwards, accumulation and skipped updates cannot de-phase ranks.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedfog.algorithms import Algorithm, Stage
from fusedfog.averaging import GradientAverage
from fusedfog.errors import TornMessageWarning
from fusedfog.exchange import Link, Message
from fusedfog.flat import FlatSegment
from fusedfog.kernels import Gradients, advance_steps, run_pass
from fusedfog.layout import Bucket, backward_order
from fusedfog.topology import Round, Topology

_ALONE = Round(1.0, {}, {})
_MAX_TAG = 1 << 31


@dataclass
class Lane:
    """One bucket on its way through steps."""

    number: int
    segment: FlatSegment
    bucket: Bucket
    region_index: int
    expected: int
    message: Message | None = None
    round: Round = _ALONE
    versions: int = 0
    ready: int = 0
    average: GradientAverage | None = None


@dataclass
class Figures:
    """Running totals of one rank, for `stats()`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    blocked_s: float = 0.0
    torn_messages: int = 0


@dataclass
class Clock:
    """Steps made, and exchanges consumed; what a checkpoint must restore to keep ranks in phase."""

    steps: int = 0
    exchanges: int = 0


@dataclass
class StepInputs:
    """What GradScaler and clipping add to a step: a gradient multiplier and a non-finite flag, both on the device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    numbers: dict[tuple[int, str], tuple[float, ...]] = field(default_factory=dict)


class Scheduler:
    """Runs one optimizer's passes and exchanges over its flat segments.

    Args:
        groups: the optimizer's param groups, read at every step (learning-rate schedules).
        link: the ranks' link; None for a rank that is alone.
        channel: this optimizer's channel on the link.
        max_grad_norm: clip the gradient over all parameters to this 2-norm; None does not.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        segments: list[FlatSegment],
        algorithm: Algorithm,
        topology: Topology | None,
        link: Link | None,
        channel: int,
        *,
        communicate_every: int,
        fused_backward: bool,
        max_grad_norm: float | None,
    ) -> None:
        self.groups, self.segments = groups, segments
        self.algorithm, self.topology, self.link, self.channel = algorithm, topology, link, channel
        self.communicate_every = communicate_every
        self.fused_backward, self.max_grad_norm = fused_backward, max_grad_norm
        self.clock, self.figures = Clock(), Figures()
        self.accumulating = False
        self.held: str | None = None
        self._lanes: list[Lane] = []
        self._led = 0
        self._inputs = StepInputs()
        self._inboxes: dict[int, list[Tensor]] = {}
        self._hold_in_hooks: bool | None = None
        self._warned_torn = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # The finalizer must not hold the scheduler, so it holds the one list of what is in flight.
        self._in_flight: list[Message] = []
        if link is not None:
            weakref.finalize(self, _abandon, link, self._in_flight)
        self.lay_lanes()

    # -- construction and change -------------------------------------------------------------------------------------

    def lay_lanes(self) -> None:
        """Order all buckets of all segments, and hook their parameters; call again after adding segments."""
        self.discard()
        self._lanes = []
        for number, (s, b) in enumerate(backward_order([segment.layout for segment in self.segments])):
            segment = self.segments[s]
            bucket = segment.layout.buckets[b]
            lane = Lane(number, segment, bucket, b, expected=bucket.last - bucket.first)
            if self.algorithm.exchanges == "gradients" and self.link is not None:
                lane.average = GradientAverage(segment, bucket, self.link)
            self._lanes.append(lane)
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            param.register_post_accumulate_grad_hook(_Hook(self, lane))
            for lane in (self._lanes if self.fused_backward else ())
            for param in lane.segment.params[lane.bucket.first : lane.bucket.last]
            if param.requires_grad
        ]

    def discard(self) -> None:
        """Wait for what is in flight and forget it: the next step starts its own exchange."""
        self.drain(keep_failures=True)
        for lane in self._lanes:
            lane.message = None

    def drain(self, *, keep_failures: bool = False) -> None:
        """Wait for all sends and receives; what arrived is kept for the next step. Local.

        Raises:
            PeerTimeout, ExchangeError: unless `keep_failures`, when only the step that needs the message raises.
        """
        for lane in self._lanes:
            if lane.message is not None:
                try:
                    self._wait(lane.message)
                except RuntimeError:
                    if not keep_failures:
                        raise

    def note_versions(self, *, keeping: Sequence[int] | None = None) -> list[int]:
        """How many edits each bucket has seen since it was sent; with `keeping`, set these counts instead.

        For edits that undo themselves (`averaged`): count before, and restore the counts after.
        """
        edits = []
        for i, lane in enumerate(self._lanes):
            now = lane.segment.versions(lane.bucket)
            if keeping is not None:
                lane.versions = now - keeping[i]
            edits.append(now - lane.versions)
        return edits

    def bump_versions(self) -> None:
        """Tell autograd that all parameters were written through the flat buffers."""
        for lane in self._lanes:
            lane.segment.bump_versions(lane.bucket)

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
        """Finish this step: all passes, the exchange they need and, for AWC, the start of the next one."""
        if self.held is not None:
            raise RuntimeError(f"step() inside {self.held}: leave the with-block first")
        if self._led and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "the gradients were scaled by a GradScaler that was created after the first backward, so fused_backward "
                "has already applied them unscaled: build the GradScaler before training, or use fused_backward=False"
            )
        for segment in self.segments:
            segment.check_storage()
        self._inputs.found_inf = found_inf
        late_clip = self.algorithm.exchanges == "gradients" and self.link is not None
        if not late_clip:
            self._inputs.grad_scale = self._multiplier(self._own_gradients(), grad_scale)
        self._lead_all()
        if late_clip:
            averages = [lane.average for lane in self._lanes if lane.average is not None]
            reduced = [self._finish_average(average) for average in averages]
            self._inputs.grad_scale = self._multiplier([average.tensors() for average in averages], grad_scale)
            for lane, (grads, inf) in zip(self._lanes, reduced, strict=True):
                self._inputs.found_inf = inf if found_inf is not None else None
                self._pass(lane, self.algorithm.after, grads)
        elif self.algorithm.before is not None and self._exchanging(self.clock.steps):
            for lane in self._lanes:
                if lane.segment.layout.mix:
                    self._pass(lane, self.algorithm.after, None, self._receive(lane), lane.round)
        self._tick()

    def _tick(self) -> None:
        if self._exchanging(self.clock.steps):
            self.clock.exchanges += 1
        self.clock.steps += 1
        self._led = 0
        self._inputs = StepInputs()
        for lane in self._lanes:
            lane.ready = 0

    def _exchanging(self, step: int) -> bool:
        return self.topology is not None and self.link is not None and (step + 1) % self.communicate_every == 0

    def _lead_all(self) -> None:
        step = self.clock.steps
        if self.algorithm.before is None and self._exchanging(step):
            for lane in self._lanes[self._led :]:
                if lane.message is None:
                    self._send(lane, self.clock.exchanges, step)
        for lane in self._lanes[self._led :]:
            self._lead(lane)
        self._led = len(self._lanes)

    def _lead(self, lane: Lane) -> None:
        grads = lane.segment.gradients(lane.bucket)
        step, exchanging = self.clock.steps, self._exchanging(self.clock.steps)
        if lane.average is not None:
            lane.average.start(grads, self._inputs.found_inf)
            size = lane.average.buffer.numel() * lane.average.buffer.element_size()
            world = lane.average.link.world.size
            self.figures.bytes_sent += 2 * size * (world - 1) // world
            self.figures.bytes_received += 2 * size * (world - 1) // world
        elif self.algorithm.before is not None:
            self._pass(lane, self.algorithm.before, grads)
            if exchanging:
                self._send(lane, self.clock.exchanges, step)
        else:
            inbox = self._receive(lane) if exchanging and lane.segment.layout.mix else ()
            self._pass(lane, self.algorithm.after, grads, inbox, lane.round if exchanging else _ALONE)
            if self._exchanging(step + 1):
                self._send(lane, self.clock.exchanges + exchanging, step + 1)
        if self.fused_backward:
            for param in lane.segment.params[lane.bucket.first : lane.bucket.last]:
                param.grad = None

    def _pass(
        self,
        lane: Lane,
        stage: Stage,
        grads: Gradients | None,
        inbox: Sequence[Tensor] = (),
        round: Round = _ALONE,
    ) -> None:
        segment, bucket = lane.segment, lane.bucket
        group = self.groups[segment.layout.group]
        key = (segment.layout.group, stage.rule)
        if key not in self._inputs.numbers:
            self._inputs.numbers[key] = stage.hyper(group)
        names = stage.states(group)
        run_pass(
            stage.rule,
            segment.param,
            tuple(segment.state(name) for name in names),
            self._inputs.numbers[key],
            region=segment.regions[lane.region_index],
            grads=grads,
            steps=segment.steps,
            inbox=(tuple(inbox),) if inbox else (),
            weights=tuple(round.recv.values()) if inbox else (),
            grad_scale=self._inputs.grad_scale,
            found_inf=self._inputs.found_inf,
        )
        if grads is not None and names:
            own = slice(bucket.first, bucket.last)
            table = grads.addresses[own] if grads.addresses is not None else None
            advance_steps(segment.steps[own], Gradients(grads.tensors[own], table, grads.dtype), self._inputs.found_inf)
        segment.bump_versions(bucket)

    # -- exchanging --------------------------------------------------------------------------------------------------

    def _send(self, lane: Lane, exchange: int, step: int) -> None:
        """Start exchange number `exchange` of a bucket, which step `step` will consume."""
        assert self.topology is not None and self.link is not None
        segment, bucket = lane.segment, lane.bucket
        if not segment.layout.mix:
            return
        lane.round = self.topology.round(self.link.world.rank, exchange)
        outgoing = segment.param[bucket.start : bucket.stop]
        inbox = self._inbox(segment, len(lane.round.recv))
        recvs = [(peer, flat[bucket.start : bucket.stop]) for peer, flat in zip(lane.round.recv, inbox, strict=False)]
        lane.message = self.link.start(
            [(peer, outgoing) for peer in lane.round.send],
            recvs,
            tag=self._tag(exchange, lane),
            label=f"step {step}, bucket {lane.number}",
        )
        self._in_flight.append(lane.message)
        lane.versions = segment.versions(bucket)
        size = outgoing.numel() * outgoing.element_size()
        self.figures.bytes_sent += size * len(lane.round.send)
        self.figures.bytes_received += size * len(recvs)

    def _tag(self, exchange: int, lane: Lane) -> int:
        # Two exchanges of one bucket are never in flight together; parity keeps neighbouring ones apart all the same.
        return ((self.channel * 2 + exchange % 2) * len(self._lanes) + lane.number + 1) % _MAX_TAG

    def _inbox(self, segment: FlatSegment, neighbours: int) -> list[Tensor]:
        inbox = self._inboxes.setdefault(id(segment), [])
        while len(inbox) < neighbours:
            inbox.append(torch.zeros_like(segment.param))
        return inbox[:neighbours]

    def _receive(self, lane: Lane) -> list[Tensor]:
        """This exchange's inbox of a bucket, waited for."""
        assert lane.message is not None
        self._wait(lane.message)
        lane.message = None
        if lane.segment.versions(lane.bucket) != lane.versions:
            self._report_torn(lane)
        return self._inbox(lane.segment, len(lane.round.recv))

    def _wait(self, message: Message) -> None:
        begin = time.perf_counter()
        try:
            message.wait()
        finally:
            self.figures.blocked_s += time.perf_counter() - begin
            if message in self._in_flight:
                self._in_flight.remove(message)

    def _report_torn(self, lane: Lane) -> None:
        self.figures.torn_messages += 1
        if not self._warned_torn:
            self._warned_torn = True
            warnings.warn(
                f"rank {self._rank()}: parameters of bucket {lane.number} were edited in place while they were being sent, so "
                f"neighbours may have mixed a torn or outdated value; wrap such edits in `with opt.paused():`",
                TornMessageWarning,
                stacklevel=5,
            )

    def _rank(self) -> int:
        return self.link.world.rank if self.link is not None else 0

    def _finish_average(self, average: GradientAverage) -> tuple[Gradients, Tensor]:
        begin = time.perf_counter()
        result = average.finish()
        self.figures.blocked_s += time.perf_counter() - begin
        return result

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _own_gradients(self) -> list[Tensor]:
        if self.max_grad_norm is None:
            return []
        return [param.grad for segment in self.segments for param in segment.params if param.grad is not None]

    def _multiplier(self, gradients: list[Tensor], grad_scale: Tensor | None) -> Tensor | None:
        """What gradients are multiplied by: GradScaler's unscaling and clipping to `max_grad_norm`, without a host sync."""
        unscale = None if grad_scale is None else grad_scale.reshape(()).float().reciprocal()
        if self.max_grad_norm is None or not gradients:
            return unscale
        norm = torch.nn.utils.get_total_norm(gradients).float()
        if unscale is not None:
            norm = norm * unscale
        # As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps a zero norm from dividing by zero.
        clip = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        return clip if unscale is None else clip * unscale

    def gradient_ready(self, lane: Lane, name: str) -> None:
        """A parameter of `lane` has its gradient: lead every bucket that can go, in order, without waiting."""
        if self.accumulating or self._holds():
            return
        if lane.number < self._led:
            raise RuntimeError(
                f"a second gradient arrived for {name} after fused_backward had already applied its bucket. Wrap all but the "
                f"last backward of a step in `with opt.no_sync():`, and use non-reentrant checkpointing; or "
                f"fused_backward=False"
            )
        lane.ready += 1
        while self._led < len(self._lanes):
            lane = self._lanes[self._led]
            if lane.ready < lane.expected or not self._may_lead(lane):
                return
            self._lead(lane)
            self._led += 1

    def _may_lead(self, lane: Lane) -> bool:
        if self.algorithm.before is not None or not self._exchanging(self.clock.steps) or not lane.segment.layout.mix:
            return True
        return lane.message is not None and lane.message.done()

    def _holds(self) -> bool:
        """Whether passes must wait for `step`: clipping needs all gradients, a GradScaler's factor comes with `step`."""
        if self._hold_in_hooks is None:
            self._hold_in_hooks = self.max_grad_norm is not None or _grad_scaler_exists()
        return self._hold_in_hooks or self.held is not None


class _Hook:
    """Calls the scheduler, if it still lives, when a parameter's gradient is complete."""

    def __init__(self, scheduler: Scheduler, lane: Lane) -> None:
        self._scheduler = weakref.ref(scheduler)
        self._lane = weakref.ref(lane)

    def __call__(self, param: Tensor) -> None:
        scheduler, lane = self._scheduler(), self._lane()
        if scheduler is not None and lane is not None:
            scheduler.gradient_ready(lane, f"a parameter of shape {tuple(param.shape)}")


def _grad_scaler_exists() -> bool:
    # Autograd hooks cannot see whether the loss was scaled, and torch keeps no list of its scalers. Holding passes back
    # is always right, applying scaled gradients never: so one look through live objects, at the first backward.
    import gc

    return any(issubclass(type(thing), torch.amp.GradScaler) and thing.is_enabled() for thing in gc.get_objects())


def _abandon(link: Link, in_flight: list[Message]) -> None:
    for message in in_flight:
        link.keep(message)
