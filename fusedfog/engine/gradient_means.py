"""Gradients averaged over ranks while backward runs: when it returns `.grad` is the mean, as under DistributedDataParallel.

    a bucket's last gradient has come   pack -> all-reduce starts                             in backward, bucket by bucket
    backward ends                       the other buckets start -> wait -> means into .grad
    step                                the same for gradients that no backward has brought (`p.grad = ...`, FSDP2)

So clipping, a GradScaler and whatever looks at gradients see what they would see there; and `step` is one rank's own. Buckets are
not those that passes are made over: where they travel they are graded (`params.layout.cut`), so that the first one leaves early
and the last one is small.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fusedfog.comm.averaging import average_in_place, broadcast
from fusedfog.comm.calls import Call
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import GroupView
from fusedfog.comm.profiling import span
from fusedfog.comm.registry import leave
from fusedfog.comm.transfer import unrecorded
from fusedfog.engine.clock import Clock
from fusedfog.engine.gradient_bucket import GradientBucket
from fusedfog.engine.hooks import GradientHooks, Hooked, grad_scaler_exists
from fusedfog.engine.same_parameters import SameParameters
from fusedfog.errors import DivergedError
from fusedfog.gossip.delivery import ExchangeStats
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import Bucket, cut

_SHARED_BYTES = 4 << 20
"""Of a bucket that ranks of one host add up in memory: records and wake-ups cost as much as half a megabyte does, and with
cores that compute there is less to gain from beginning early."""


class Trainer(Protocol):
    """What the averages need of a scheduler."""

    blocked_by: str | None
    clock: Clock
    communicator: Communicator | None
    stats: ExchangeStats
    segments: list[FlatSegment]

    def announce_average(self, again: bool) -> None:
        """Called before backward averages gradients; `again` if it has done so in this step already."""


def _everyone(trainer: Trainer) -> GroupView | None:
    """All ranks that train, not only those that average: a failure between others ends this rank's training, too."""
    return trainer.communicator.view if trainer.communicator is not None else None


class GradientMeans(GradientHooks):
    """The gradient averages of one scheduler, over the ranks of a communicator.

    Args:
        trainer: the scheduler; not kept alive.
        communicator: of the ranks that average.
        members: what these are called in the group of all ranks that train.
        parts: what each one's gradients are multiplied by in the mean (`rank_weights.parts`); None for 1.
        bucket_bytes: of the largest bucket.
        frees: see `GradientBucket`.
        compares: whether to look, now and then, that these ranks have the same parameters.
        measures: whether second moments will want to know how much larger one rank's gradient is than the mean.
    """

    def __init__(
        self,
        trainer: Trainer,
        communicator: Communicator,
        members: Sequence[int],
        parts: Sequence[float] | None,
        quarantine: Quarantine | None,
        bucket_bytes: int,
        *,
        frees: bool,
        compares: bool,
        measures: bool,
    ) -> None:
        super().__init__()
        self._trainer = weakref.ref(trainer)
        self.communicator, self.members, self.quarantine = communicator, members, quarantine
        self._parts, self._shared = parts, communicator.shared_buffers()
        self._same = SameParameters(communicator, members) if compares else None
        self._bucket_bytes, self._frees, self._measures = bucket_bytes, frees, measures
        self.buckets: list[GradientBucket] = []
        self._started = 0
        self._task: int | None = None
        self._round = 0
        self._ending = False
        self._scaled: bool | None = None

    def lay_out(self, segments: Sequence[FlatSegment]) -> None:
        """Average the gradients of these segments' mixed parameters; those that it knows already keep their buckets."""
        known = {bucket.segment for bucket in self.buckets}
        self.buckets += [
            GradientBucket(
                segment,
                layout,
                self.communicator,
                self.quarantine,
                self.members,
                self._parts,
                shared=self._shared,
                frees=self._frees,
            )
            for segment in segments
            if segment.layout.mix and segment not in known
            for layout in self._cut(segment)
        ]
        # In the order of backward; sorting is stable, and mixed segments are the same on all ranks.
        self.buckets.sort(key=lambda bucket: -bucket.layout.depth)
        for place, bucket in enumerate(self.buckets):
            bucket.place = place
        # FSDP2 sets gradients of shards itself, where no hook of autograd sees it.
        self.hook([bucket for bucket in self.buckets if not bucket.segment.sharded])

    def _cut(self, segment: FlatSegment) -> Sequence[Bucket]:
        slots, numel = segment.layout.slots, segment.layout.numel
        if self._shared is not None:
            return cut(slots, numel, min(self._bucket_bytes, _SHARED_BYTES), graded=False)
        return cut(slots, numel, self._bucket_bytes, graded=True)

    # -- in backward -------------------------------------------------------------------------------------------------

    def ready(self, bucket: Hooked, name: str, *, final: bool) -> None:
        """See `GradientHooks`."""
        assert isinstance(bucket, GradientBucket)
        trainer = self._trainer()
        if trainer is None or self.accumulating or trainer.blocked_by is not None:
            return
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin_backward(trainer, task)
        # The gradients that came before this one: their parameters' hooks have all been called.
        self._start_complete(trainer)
        bucket.ready += 1
        if final:
            self._start_complete(trainer)

    def _start_complete(self, trainer: Trainer) -> None:
        while self._started < len(self.buckets) and self.buckets[self._started].complete:
            self._start(trainer, self.buckets[self._started])
            self._started += 1

    def _begin_backward(self, trainer: Trainer, task: int) -> None:
        """Also inside another backward (reentrant checkpointing): a mean that is averaged again remains what it is."""
        trainer.announce_average(any(bucket.averaged for bucket in self.buckets))
        for bucket in self.buckets:
            if bucket.in_flight:
                bucket.finish(write=False)
            bucket.ready = 0
        self._task, self._started, self._ending = task, 0, False
        self._round += 1
        self.call_at_the_end(self._round)

    def backward_ends(self, number: int) -> None:
        """See `GradientHooks`; twice, since what DistributedDataParallel writes to gradients at the end comes before means do."""
        trainer = self._trainer()
        if trainer is None or number != self._round or self._task is None:
            return
        if not self._ending:
            self._ending = True
            for bucket in self.buckets[self._started :]:
                self._start(trainer, bucket)
            self.call_at_the_end(number)
            return
        self._task = None
        self._finish(trainer, self.buckets)

    def _start(self, trainer: Trainer, bucket: GradientBucket) -> None:
        if self._scaled is None:
            self._scaled = grad_scaler_exists()
        size, steps = self.communicator.view.size, trainer.clock.steps
        # Often enough at first, and then at the cost of two looks at the gradients in every eighth step.
        measure = self._measures and (steps < 16 or steps % 8 == 0)
        where = span("exchange", (bucket.place,), to=("all",), sources=("all",))
        with Call("backward()", _everyone(trainer), steps), torch.no_grad(), where, unrecorded():
            bucket.start(contain=not self._scaled, measure=measure)
        nbytes = 2 * bucket.nbytes * (size - 1) // size
        trainer.stats.bytes_sent += nbytes
        trainer.stats.bytes_received += nbytes

    def _finish(self, trainer: Trainer, buckets: Sequence[GradientBucket]) -> None:
        begin = time.perf_counter()
        with Call("backward()", _everyone(trainer), trainer.clock.steps), torch.no_grad():
            for bucket in buckets:
                with span("wait", (bucket.place,), sources=("all",)):
                    bucket.finish()
        trainer.stats.blocked_s += time.perf_counter() - begin

    # -- in step -----------------------------------------------------------------------------------------------------

    def average(self, *, scaled: bool) -> None:
        """Average the gradients that no backward has averaged. Collective; before any pass of a step.

        Raises:
            DivergedError: the ranks do not have the same parameters.
        """
        trainer = self._trainer()
        if trainer is None:
            return
        missing = [bucket for bucket in self.buckets if not bucket.averaged]
        if missing:
            self._scaled = scaled or self._scaled
            for bucket in missing:
                self._start(trainer, bucket)
            self._finish(trainer, missing)
        if self._same is not None:
            # After the averages, which other ranks may have made in backward: collectives are matched by order.
            self._compare(self._same, trainer)

    def _compare(self, same: SameParameters, trainer: Trainer) -> None:
        try:
            same.look(trainer.segments, trainer.clock.steps)
        except DivergedError as error:
            if trainer.communicator is not None:
                leave(trainer.communicator, trainer.clock.steps, error)
            raise

    @property
    def overflows_unseen(self) -> bool:
        """Whether means may not be finite although no GradScaler looks at this step: there is one, for another loss."""
        return bool(self._scaled)

    @property
    def somebody_left_out(self) -> Tensor:
        """Whether a mean of this step is not one of all ranks; all see it alike. No host sync on GPUs."""
        found = torch.zeros((), dtype=torch.bool, device=self.communicator.device)
        for bucket in self.buckets:
            found = found | bucket.left_out
        return found

    def agree(self, found_inf: Tensor) -> Tensor:
        """The non-finite flag of a step, fp32 of one element, if any rank has one: all make the update, or none. Collective."""
        flag = found_inf.detach().reshape(1).float().clone()
        average_in_place([flag], self.communicator)
        return flag.reshape(())

    def heal(self) -> None:
        """If somebody was left out of a mean: take others' values where own parameters and states are not finite. Collective.

        They are those of the first rank that has nothing but finite ones, to the last bit: zeros for states, or a rounded mean,
        would have this rank drift away. Where no rank is well, a mean of what is finite.
        """
        trainer = self._trainer()
        if trainer is None or not self.somebody_left_out:
            return
        mixed = [segment for segment in trainer.segments if segment.layout.mix]
        tensors = [t for s in mixed for t in (s.param, *(s.states[name] for name in sorted(s.states)))]
        well = tensors[0].new_zeros(self.communicator.view.size)
        well[self.communicator.view.rank] = float(all(bool(tensor.isfinite().all()) for tensor in tensors))
        average_in_place([well], self.communicator)
        donors = well.nonzero().flatten().tolist()
        for tensor in tensors:
            healthy = tensor.clone()
            if donors:
                broadcast([healthy], self.communicator, donors[0])
            else:
                average_in_place([healthy], self.communicator, finite=True)
            sick = ~tensor.isfinite()
            if sick.any():
                tensor.copy_(torch.where(sick, healthy, tensor))
                trainer.stats.healed += any(tensor is segment.param for segment in mixed)

    def end_step(self) -> None:
        """The next step's gradients are to be averaged."""
        for bucket in self.buckets:
            bucket.averaged = bucket.left_out = False

    # -- second moments ----------------------------------------------------------------------------------------------

    @property
    def squares(self) -> list[list[float]]:
        """`GradientBucket.squares` of all parameters in their own order, for checkpoints."""
        found = [bucket.squares for bucket in self._registered()]
        return torch.cat(found, 1).tolist() if found else [[], []]

    @squares.setter
    def squares(self, saved: Sequence[Sequence[float]]) -> None:
        given, buckets = torch.tensor(saved, dtype=torch.float64), self._registered()
        sizes = [bucket.squares.shape[1] for bucket in buckets]
        if given.shape != (2, sum(sizes)):
            given = torch.zeros(2, sum(sizes))
        for bucket, own in zip(buckets, given.split(sizes, 1), strict=True):
            bucket.squares.copy_(own)

    def _registered(self) -> list[GradientBucket]:
        order: dict[FlatSegment, list[GradientBucket]] = {}
        for bucket in self.buckets:
            order.setdefault(bucket.segment, []).append(bucket)
        trainer = self._trainer()
        segments = trainer.segments if trainer is not None else []
        return [one for s in segments for one in sorted(order.get(s, ()), key=lambda bucket: bucket.layout.first)]

    def ratios(self, together: int) -> list[tuple[FlatSegment, int, Tensor]]:
        """How much larger the squared mean gradient of some ranks is than that of all, for each parameter.

            E_i ||g_i||^2 / ||mean g||^2,  between 1 and n

        for one rank of n: 1 where ranks have the same gradient, n where theirs are noise, and where none was measured. Of L
        ranks together, as of a machine, the noise sigma^2 = (E ||g_i||^2 - ||mean g||^2) n / (n - 1) is an L-th. Collective.

        Args:
            together: L.

        Returns:
            (segment, position, ratio as a 0-d tensor) of each parameter.
        """
        found = []
        size = self.communicator.view.size
        for bucket in self.buckets:
            own, mean = bucket.squares.clone()
            average_in_place([own], self.communicator)
            noise = (own - mean) * size / (size - 1)
            own -= noise * (1 - 1 / together)
            ratio = torch.where(mean > 0, own / mean.clamp(min=1e-300), size / together).clamp(1, size / together)
            found += [(bucket.segment, bucket.layout.first + i, one) for i, one in enumerate(ratio)]
        return found
