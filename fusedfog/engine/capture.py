"""`capturable=True`: steps whose passes a CUDA graph records once and replays in every later step.

A graph repeats the same kernels with the same arguments. So all that changes from step to step is data at fixed addresses:

    before   wait for the messages; write row_sum, weights, hyper-parameters and seeds to the device     host
    passes   over K inbox tensors, those that no neighbour has filled in this round with weight 0      device, recorded
    after    start the next exchange; the clock ticks                                                    host

K is the most neighbours that this rank has in any round. `step` does all three, on every device; inside a capture it makes
the passes alone, and `replaying` does the host's part around a replay. Which steps exchange, and with whom, so stays
outside of the graph, and one graph serves all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from fusedfog.engine.gradient_scale import flag_of, gradients_of, own_multipliers
from fusedfog.engine.passes import StepInputs, hyper_of, seed_of_pass, strength_of, weights_of
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.buckets import EMPTY, BucketState, Inbox, PassGroup
from fusedfog.kernels import CompressedChannel, device
from fusedfog.kernels.region import TABLE_ALIGNMENT
from fusedfog.kernels.region import align as align_table
from fusedfog.params.flat import FlatSegment
from fusedfog.params.gradients import AddressTables, storage_replaced
from fusedfog.topology import Topology

Layout: TypeAlias = tuple[object, ...]


def recording() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class CapturableScheduler(Scheduler):
    """A scheduler whose passes take their numbers from memory and have the same tensors in every step."""

    slots = 0
    """How many inbox tensors a pass over mixed parameters has; it never falls, so that graphs stay valid."""
    _numbers: Tensor | None = None
    _written: Sequence[float] = ()
    _places: Sequence[slice] = ()
    _counts: dict[tuple[int, str], int] | None = None
    _tables: dict[FlatSegment, AddressTables] | None = None
    _warm: tuple[Layout, bool, bool] | None = None
    _recorded: Layout | None = None

    def warm_up(self) -> None:
        """Nothing: every step makes the same passes, whose kernels are compiled in the first one."""

    def use_topology(self, topology: Topology | None) -> None:
        """See `Scheduler`."""
        super().use_topology(topology)
        if topology is not None and self.exchanges.mailbox is not None:
            self.slots = max(self.slots, self.exchanges.mailbox.most_inboxes())

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See `Scheduler.step`; inside a capture, the passes alone.

        Raises:
            RuntimeError: a capture without a step like this one before it, or without gradients.
        """
        if recording():
            self._record(grad_scale, found_inf)
            return
        with self._around_passes():
            self._make_passes(grad_scale, found_inf)
        self._warm = (self._layout(), grad_scale is None, found_inf is None)

    def _record(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.begin_step()
        layout = self._layout()
        fresh = self._warm != (layout, grad_scale is None, found_inf is None) or self._counts is None
        if fresh or self.has_unfrozen():
            raise RuntimeError(
                "step() in a CUDA graph's capture, but no step like it was made before: states and connections would have to be "
                "made, and kernels loaded, inside the capture. Make a few eager steps first, on a side stream (with a "
                "GradScaler, if the captured step has one), also after add_param_group or set_topology"
            )
        if not gradients_of(self.segments):
            raise RuntimeError(
                "step() in a CUDA graph's capture without any gradient: capture backward() too, or keep gradients that stay "
                "where they are (zero_grad(set_to_none=False))"
            )
        # Nobody may read these: they are not the replay's.
        self.inputs.numbers = {key: (math.nan,) * count for key, count in (self._counts or {}).items()}
        try:
            self._make_passes(grad_scale, found_inf, record=True)
        finally:
            self.inputs = StepInputs()
            self.hooks.unfrozen = None
        self._recorded = layout

    def take_back_moved(self, only: BucketState | None = None) -> None:
        """See `Scheduler`; a capture has recorded reads of the place where a parameter lies.

        Raises:
            StorageReplacedError: also if one has left its place inside a capture.
        """
        if recording():
            for segment in self.segments:
                for position in segment.moved():
                    slot, now = segment.layout.slots[position], segment.params[position]
                    raise storage_replaced(slot, now, segment.param.device)
        super().take_back_moved(only)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """What the host does before and after the passes that the with-block replays.

        Raises:
            RuntimeError: nothing was captured, or what was is no longer this optimizer's step; and as `step`.
        """
        if self._recorded is None:
            raise RuntimeError(
                "replaying() before any step() was captured: call step() inside torch.cuda.graph(...) first"
            )
        if self._recorded != self._layout() or self.has_unfrozen():
            raise RuntimeError(
                "the captured step is out of date: param groups, momentum or amsgrad, or the topology's number of neighbours "
                "have changed since, or a frozen parameter is to be trained. Make an eager step and capture again"
            )
        with self._around_passes():
            yield
            for pass_group in self.buckets.wholes:
                pass_group.bump_versions()

    def _layout(self) -> Layout:
        """What passes are made of, beside the addresses that never change."""
        era = self.channels.era if self.channels is not None else 0
        stage = self.algorithm.after
        states = (
            (id(pass_group.segment), stage.states(self.groups[pass_group.segment.layout.group]))
            for pass_group in self.buckets.wholes
        )
        return (self.slots, era, self.weight, *states)

    @contextmanager
    def _around_passes(self) -> Iterator[None]:
        with torch.no_grad():
            self.begin_step()
            if self.exchanges.due(self.clock.steps):
                self.exchanges.start_missing(self.buckets.all)
            self.exchanges.find_edits()
            inboxes = [self.exchanges.receive(pass_group) for pass_group in self.buckets.wholes]
            for pass_group, inbox in zip(self.buckets.wholes, inboxes, strict=True):
                self._before_pass(pass_group, inbox)
            self._write([self._numbers_of(*pair) for pair in zip(self.buckets.wholes, inboxes, strict=True)])
            for tables in self._tables_of().values():
                tables.fill_tables()
        yield
        with torch.no_grad():
            for pass_group, inbox in zip(self.buckets.wholes, inboxes, strict=True):
                self._after_pass(pass_group, inbox)
            target = self.exchanges.following()
            if target is not None:
                self._start(*target)
            self.end_step()

    def _start(self, step: int, exchange: int) -> None:
        for pass_group in self.buckets.wholes:
            if self.channels is not None and pass_group.segment.layout.mix:
                self.channels.encoded(pass_group.buckets, exchange)
            self.exchanges.start(pass_group.buckets, step, exchange)

    def _make_passes(self, grad_scale: Tensor | None, found_inf: Tensor | None, *, record: bool = False) -> None:
        """What is recorded: device work alone, the same in every step."""
        assert self._numbers is not None
        self.inputs.found_inf = flag_of(self, found_inf)
        self.inputs.grad_scale, self.inputs.unmixed_scale = own_multipliers(self, grad_scale)
        for pass_group, place in zip(self.buckets.wholes, self._places, strict=True):
            segment = pass_group.segment
            grads = (
                self._tables_of()[segment].record() if record else segment.gradients(pass_group.first, pass_group.last)
            )
            self.make_pass(pass_group, self.algorithm.after, grads, self._slots(pass_group, self._numbers[place]))

    def _slots(self, pass_group: PassGroup, numbers: Tensor) -> Inbox:
        """All inbox tensors that any round fills, whoever has filled them, with numbers that are elsewhere."""
        inbox = EMPTY
        mailbox = self.exchanges.mailbox
        if mailbox is not None and pass_group.segment.layout.mix:
            inbox = mailbox.inboxes.inbox(pass_group.segment, self.slots, self.codes_for(pass_group, None))
        neighbours = len(inbox.tensors[0]) if inbox.tensors else 0
        return replace(inbox, weights=(math.nan,) * neighbours, row_sum=math.nan, numbers=numbers)

    def codes_for(self, pass_group: PassGroup, following: tuple[int, int] | None) -> tuple[CompressedChannel, ...]:
        """Of a static graph's exchanges, one in every step, each pass takes and gives codes in the same place."""
        return (
            self.channels.of(pass_group.segment, 0)
            if self.channels is not None and pass_group.segment.layout.mix
            else ()
        )

    def _numbers_of(self, pass_group: PassGroup, inbox: Inbox) -> list[float]:
        """The numbers of this step's pass over a pass group, as `kernels.Pass.numbers` wants them."""
        segment, stage = pass_group.segment, self.algorithm.after
        slots = self.slots if self.exchanges.mailbox is not None and segment.layout.mix else 0
        weights = [*weights_of(self, inbox), *[0.0] * (slots - len(inbox.weights))]
        seed = [float(seed_of_pass(self, segment, False))] if segment.rounds_stochastically else []
        strength = [strength_of(self)] if inbox.channels else []
        row_sum = 0.0 if stage.differences else inbox.row_sum
        return [row_sum, *weights, *hyper_of(self, segment.layout.group, stage), *seed, *strength]

    def _write(self, passes: Sequence[Sequence[float]]) -> None:
        """Have the device read these numbers in the passes that follow on its current stream."""
        self._counts = {key: len(hyper) for key, hyper in self.inputs.numbers.items()}
        on_gpu = any(segment.whole.blocks is not None for segment in self.segments)
        starts = list(accumulate((align_table(len(numbers), TABLE_ALIGNMENT) for numbers in passes), initial=0))
        values = [0.0] * starts[-1]
        self._places = [slice(start, start + len(numbers)) for start, numbers in zip(starts, passes, strict=False)]
        for place, numbers in zip(self._places, passes, strict=True):
            values[place] = numbers
        if self._numbers is None or len(self._numbers) != len(values):
            dtype = torch.float32 if on_gpu else torch.float64
            self._numbers = torch.zeros(len(values), dtype=dtype, device=self.place)
            self._written = ()
        if values != self._written:
            device.upload(values, self._numbers)
            self._written = values

    def _tables_of(self) -> dict[FlatSegment, AddressTables]:
        if self._tables is None:
            self._tables = {}
        for segment in self.segments:
            if segment not in self._tables:
                self._tables[segment] = AddressTables(segment)
        return self._tables
