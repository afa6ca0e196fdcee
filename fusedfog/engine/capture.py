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

from fusedfog.engine.passes import StepInputs, hyper_of, seed_of_pass
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.buckets import EMPTY, Inbox, PassGroup
from fusedfog.kernels import CompressedChannel, Gradients, device
from fusedfog.kernels.region import TABLE_ALIGNMENT
from fusedfog.kernels.region import align as align_table
from fusedfog.params.flat import FlatSegment, addresses_of, align
from fusedfog.topology import Topology

Layout: TypeAlias = tuple[object, ...]

_TABLES = 64
"""How many captures there may be without a step or replay in between."""


def recording() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def most_neighbours(topology: Topology, rank: int) -> int:
    """The most neighbours that `rank` receives from in any round; for endless sequences, what these promise.

    Raises:
        ValueError: an endless sequence promises nothing; `compatibility` refuses it before.
    """
    if topology.period is None:
        return topology.max_degree
    return max(len(topology.round(rank, step).recv) for step in range(topology.period))


class AddressTables:
    """Where recorded passes over a segment read their gradients' addresses: each recording has a table of its own.

    A copy inside a capture would be repeated by every replay, out of host memory that may be another's by then. So tables
    are made ahead, and filled once the capture is over. The gradients' memory is the graph's, which keeps its address.
    """

    def __init__(self, segment: FlatSegment) -> None:
        self._segment = segment
        self._spare: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._unfilled: list[tuple[Tensor, list[int]]] = []

    def record(self) -> Gradients:
        """The gradients of all parameters, for a pass that is being recorded."""
        segment, count = self._segment, len(self._segment.params)
        if segment.whole.blocks is None:
            return segment.gradients(0, count)
        if not self._spare:
            raise RuntimeError(f"{_TABLES} captures in a row: make an eager step(), or a replay, before the next one")
        found = segment.found_gradients(0, count)
        homes, table = addresses_of(found), self._spare.pop()
        align(found, homes)
        self._taken.append(table)
        self._unfilled.append((table, homes))
        return Gradients(found, table, segment.layout.dtype)

    def fill_tables(self) -> None:
        """Outside of captures: fill the tables of recorded passes, and have some for further ones."""
        blocks, count = self._segment.whole.blocks, len(self._segment.params)
        if blocks is None:
            return
        for table, homes in self._unfilled:
            device.upload(homes, table)
        self._unfilled.clear()
        if not self._spare:
            # Rows at multiples of 128 bytes: an address table's alignment is part of the kernel's compile key.
            rows = torch.zeros(_TABLES, align_table(count, TABLE_ALIGNMENT), dtype=torch.int64, device=blocks.device)
            self._spare = list(rows[:, :count].unbind())


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
        """See `Scheduler.follow_topology`."""
        super().use_topology(topology)
        if topology is None or self.communicator is None or self._mailbox is None:
            return
        by_machine = self._mailbox.hierarchy is not None
        most = 1 if by_machine else most_neighbours(topology, self.communicator.view.rank)
        self.slots = max(self.slots, most, int(self.schedule.global_average_every is not None))

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
        self._begin()
        layout = self._layout()
        if self._warm != (layout, grad_scale is None, found_inf is None) or self._counts is None:
            raise RuntimeError(
                "step() in a CUDA graph's capture, but no step like it was made before: states and connections would have to be "
                "made, and kernels loaded, inside the capture. Make a few eager steps first, on a side stream (with a "
                "GradScaler, if the captured step has one), also after add_param_group or set_topology"
            )
        if not self._gradients():
            raise RuntimeError(
                "step() in a CUDA graph's capture without any gradient: capture backward() too, or keep gradients that stay "
                "where they are (zero_grad(set_to_none=False))"
            )
        # Nobody may read these: they are not the replay's.
        self.inputs.numbers = {key: (math.nan,) * count for key, count in self._counts.items()}
        try:
            self._make_passes(grad_scale, found_inf, record=True)
        finally:
            self.inputs = StepInputs()
        self._recorded = layout

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
        if self._recorded != self._layout():
            raise RuntimeError(
                "the captured step is out of date: param groups, momentum or amsgrad, or the topology's number of neighbours "
                "have changed since. Make an eager step and capture again"
            )
        with self._around_passes():
            yield
            for pass_group in self._wholes:
                pass_group.bump_versions()

    def _layout(self) -> Layout:
        """What passes are made of, beside the addresses that never change."""
        era = self.channels.era if self.channels is not None else 0
        stage = self.algorithm.after
        states = (
            (id(pass_group.segment), stage.states(self.groups[pass_group.segment.layout.group]))
            for pass_group in self._wholes
        )
        return (self.slots, era, *states)

    @contextmanager
    def _around_passes(self) -> Iterator[None]:
        with torch.no_grad():
            self._begin()
            self._touch()
            exchanging = self._exchanging(self.clock.steps)
            if exchanging:
                self._send_missing()
            inboxes = [self._receive(pass_group) if exchanging else EMPTY for pass_group in self._wholes]
            self._write([self._numbers_of(*pair) for pair in zip(self._wholes, inboxes, strict=True)])
            for tables in self._tables_of().values():
                tables.fill_tables()
        yield
        with torch.no_grad():
            step = self.clock.steps
            done = self.clock.exchanges + (exchanging and self.schedule.is_gossip_step(step))
            for pass_group in self._wholes if self._exchanging(step + 1) else ():
                if self.channels is not None and pass_group.segment.layout.mix:
                    self.channels.encoded(pass_group.buckets, done)
                self._send_all(pass_group, step + 1, done)
            self._tick()

    def _make_passes(self, grad_scale: Tensor | None, found_inf: Tensor | None, *, record: bool = False) -> None:
        """What is recorded: device work alone, the same in every step."""
        assert self._numbers is not None
        self.inputs.found_inf = found_inf
        self.inputs.grad_scale = self._multiplier(grad_scale)
        for pass_group, place in zip(self._wholes, self._places, strict=True):
            segment = pass_group.segment
            grads = (
                self._tables_of()[segment].record() if record else segment.gradients(pass_group.first, pass_group.last)
            )
            self._pass(pass_group, self.algorithm.after, grads, self._slots(pass_group, self._numbers[place]))

    def _slots(self, pass_group: PassGroup, numbers: Tensor) -> Inbox:
        """All inbox tensors that any round fills, whoever has filled them, with numbers that are elsewhere."""
        inbox = EMPTY
        if self._mailbox is not None and pass_group.segment.layout.mix:
            inbox = self._mailbox.slots(pass_group.segment, self.slots, self.codes_for(pass_group, None))
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
        """(row_sum, *weights, *hyper, seed) of this step's pass over a pass group, as `kernels.Pass.numbers` wants them."""
        segment, stage = pass_group.segment, self.algorithm.after
        slots = self.slots if self._mailbox is not None and segment.layout.mix else 0
        weights = [*inbox.weights, *[0.0] * (slots - len(inbox.weights))]
        seed = [float(seed_of_pass(self, segment, False))] if segment.rounds_stochastically else []
        row_sum = 0.0 if stage.differences else inbox.row_sum
        return [row_sum, *weights, *hyper_of(self, segment.layout.group, stage), *seed]

    def _write(self, passes: Sequence[Sequence[float]]) -> None:
        """Have the device read these numbers in the passes that follow on its current stream."""
        self._counts = {key: len(hyper) for key, hyper in self.inputs.numbers.items()}
        blocks = self.segments[0].whole.blocks
        starts = list(accumulate((align_table(len(numbers), TABLE_ALIGNMENT) for numbers in passes), initial=0))
        values = [0.0] * starts[-1]
        self._places = [slice(start, start + len(numbers)) for start, numbers in zip(starts, passes, strict=False)]
        for place, numbers in zip(self._places, passes, strict=True):
            values[place] = numbers
        if self._numbers is None or len(self._numbers) != len(values):
            dtype = torch.float64 if blocks is None else torch.float32
            self._numbers = torch.zeros(len(values), dtype=dtype, device=self.segments[0].param.device)
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
