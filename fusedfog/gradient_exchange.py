"""`algorithm="allreduce"`: gradients are averaged over all ranks, then every rank makes the same pass."""

from __future__ import annotations

import time

from torch import Tensor

from fusedfog.averaging import GradientAverage
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import unrecorded
from fusedfog.gradients import multiplier
from fusedfog.kernels import Gradients
from fusedfog.lanes import EMPTY, Lane, Sweep
from fusedfog.scheduler import Scheduler


class AllReduceScheduler(Scheduler):
    """A scheduler whose buckets lead with an all-reduce of their gradients, and follow with their pass."""

    def lay_lanes(self) -> None:
        """See `Scheduler.lay_lanes`."""
        super().lay_lanes()
        assert self.link is not None
        for lane in self._lanes:
            lane.average = GradientAverage(lane.segment, lane.bucket, self.link)

    def _lead_and_follow(self, grad_scale: Tensor | None) -> None:
        self._lead_all()
        self._follow_averages(grad_scale)

    def _sweeps(self, first: int) -> list[Sweep]:
        return self._singles[first:]

    def _lead(self, sweep: Sweep) -> None:
        self._start_average(sweep.lanes[0], sweep.segment.gradients(sweep.first, sweep.last))
        self._release(sweep)

    def _start_average(self, lane: Lane, grads: Gradients) -> None:
        average = lane.average
        assert average is not None
        tensors = [None if grad is None else grad.as_strided((grad.numel(),), (1,)) for grad in grads.tensors]
        with span("exchange", (lane.number,), to=("all",), sources=("all",)), unrecorded():
            average.start(Gradients(tensors, grads.addresses, grads.dtype), self.inputs.found_inf)
        world = average.link.world.size
        size = 2 * average.buffer.nbytes * (world - 1) // world
        self.figures.bytes_sent += size
        self.figures.bytes_received += size

    def _follow_averages(self, grad_scale: Tensor | None) -> None:
        begin = time.perf_counter()
        averages = [lane.average for lane in self._lanes if lane.average is not None]
        reduced = []
        for number, average in enumerate(averages):
            with span("wait", (number,), sources=("all",)):
                reduced.append(average.finish())
        self.figures.blocked_s += time.perf_counter() - begin
        self.inputs.grad_scale = multiplier(
            [average.tensors() for average in averages], grad_scale, self.rhythm.max_grad_norm, self.sharding
        )
        scaled = self.inputs.found_inf is not None
        for sweep, (grads, found_inf) in zip(self._singles, reduced, strict=True):
            self.inputs.found_inf = found_inf if scaled else None
            self._pass(sweep, self.algorithm.after, grads, EMPTY)
