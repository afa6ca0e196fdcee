"""`algorithm="allreduce"`: gradients are averaged over all ranks, then every rank makes the same pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.averaging import average_in_place
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.finite import make_mean, take_part
from fusedfog.comm.profiling import span
from fusedfog.comm.transfer import Transfer, unrecorded
from fusedfog.engine.gradient_scale import gradients_of, multiplier
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.buckets import EMPTY, BucketState, PassGroup
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.kernels import Gradients, device
from fusedfog.params.flat import FlatSegment
from fusedfog.params.gradients import addresses_of
from fusedfog.params.layout import Bucket


class GradientAverage:
    """The mean gradient of one bucket over all ranks: packed into one buffer, all-reduced, read from there.

    Behind the gradients the buffer carries one flag a parameter (does any rank have a gradient?) and one for non-finite
    gradients found by a GradScaler on any rank, so that all ranks update, or skip, the same parameters. A rank without a
    gradient contributes zero, as under DistributedDataParallel.

    With a quarantine, a rank whose gradients of the bucket (or, where it heals, parameters) are not finite contributes zeros, and
    one more flag a rank says who has taken part, so that the mean is that of the others.
    """

    def __init__(
        self, segment: FlatSegment, bucket: Bucket, communicator: Communicator, quarantine: Quarantine | None
    ) -> None:
        self.quarantine = quarantine
        self.segment, self.layout, self.communicator = segment, bucket, communicator
        self.slots = segment.layout.slots[bucket.first : bucket.last]
        self.length = bucket.stop - bucket.start
        ranks = communicator.view.size if quarantine is not None else 0
        self.buffer = segment.param.new_zeros(self.length + len(self.slots) + 1 + ranks)
        self._found_inf = self.buffer[self.length + len(self.slots)]
        self._fine = self.buffer[len(self.buffer) - ranks :]
        self._fine_ranks = self._fine.view(1, -1)
        self._transfer: Transfer | None = None
        self._places = [self.buffer[slot.start - bucket.start : slot.stop - bucket.start] for slot in self.slots]
        self._homes = torch.tensor(addresses_of(self._places), device=self.buffer.device)
        self._flags = self.buffer[self.length : self.length + len(self.slots)]
        self._present: list[bool] = []

    def start(self, grads: Gradients, found_inf: Tensor | None, *, scaled: bool) -> None:
        """Pack this rank's gradients and start the all-reduce; the gradients may be freed afterwards.

        `scaled`: a GradScaler's scale is in them, so that those which overflow are nobody's fault.
        """
        self._blames = not scaled
        found = grads.tensors[self.layout.first : self.layout.last]
        present = [grad is not None for grad in found]
        if present != self._present:
            self._present = present
            self._shares = torch.zeros_like(self._flags)
            device.upload([1.0 / self.communicator.view.size if here else 0.0 for here in present], self._shares)
        self._pack([(place, grad) for place, grad in zip(self._places, found, strict=True) if grad is not None])
        if not all(present):
            torch._foreach_zero_([place for place, here in zip(self._places, present, strict=True) if not here])
        self._flags.copy_(self._shares)
        if found_inf is not None:
            torch.mul(found_inf.reshape(()), 1.0 / self.communicator.view.size, out=self._found_inf)
        else:
            self._found_inf.zero_()
        self._leave_out()
        self._transfer = Transfer(self.communicator, "gradients")
        self._transfer.add(partial(dist.all_reduce, self.buffer, async_op=True), "averaging with all ranks")

    def _pack(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        # Divided before they are summed, as DistributedDataParallel does: the sum of fp16 gradients may overflow.
        share = 1.0 / self.communicator.view.size
        if not device.on_gpu(self.buffer):
            for place, grad in pairs:
                torch.mul(grad, share, out=place)
        elif pairs:
            # Two launches a bucket instead of one a parameter; there is no fused kernel that copies and scales.
            torch._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])
            self.buffer[: self.length].mul_(share)

    def _leave_out(self) -> None:
        """Take part in the sum only with what is finite, and say so."""
        if self.quarantine is None:
            return
        # Parameters do not travel, so a rank that is to be healed has to say that its own need it.
        kept = self.segment.param[self.layout.start : self.layout.stop] if self.quarantine.heals else None
        self._fine.zero_()
        take_part(self.tensors(), self._fine[self.communicator.view.rank], kept)

    def _make_mean(self) -> None:
        """Of the sum over those that have taken part."""
        if self.quarantine is None:
            return
        refused = make_mean(self.tensors(), self._fine, 0.0)
        if self._blames:
            self.quarantine.refuse(refused)
            if device.on_gpu(self.buffer):
                self.quarantine.refuse_late(self._fine_ranks)

    @property
    def somebody_left_out(self) -> bool:
        """Whether the last mean is not one of all ranks; all ranks see it alike. On a GPU the host waits."""
        return self.quarantine is not None and bool((self._fine == 0).any())

    def finish(self) -> tuple[Gradients, Tensor]:
        """Wait for the mean; returns it with the flag (0-d, fp32) that is positive if any rank found a non-finite one."""
        assert self._transfer is not None
        self._transfer.wait()
        self._transfer = None
        first, last = self.layout.first, self.layout.last
        tensors: list[Tensor | None] = [None] * len(self.segment.params)
        table = None
        if device.on_gpu(self.buffer):
            # Which parameters have a gradient is only known on the device: no host sync to find out.
            table = torch.zeros(len(tensors), dtype=torch.int64, device=self.buffer.device)
            table[first:last] = torch.where(self._flags > 0, self._homes, 0)
        else:
            for i, flag in enumerate(self._flags.tolist()):
                if flag > 0:
                    tensors[first + i] = self._places[i]
                    self.segment.touched[first + i] = True
        self._make_mean()
        return Gradients(tensors, table, self.buffer.dtype), self._found_inf.float()

    def tensors(self) -> Tensor:
        """The reduced gradients of the bucket, padding (zero) included."""
        return self.buffer[: self.length]


class AllReduceScheduler(Scheduler):
    """A scheduler that all-reduces the gradients of each bucket before the bucket's pass."""

    def rebuild_buckets(self, *, local: bool = False) -> None:
        """See `Scheduler.rebuild_buckets`."""
        super().rebuild_buckets(local=local)
        assert self.communicator is not None
        self._averages = {
            bucket.number: GradientAverage(bucket.segment, bucket.layout, self.communicator, self.exchanges.quarantine)
            for bucket in self.buckets.all
            if bucket.segment.layout.mix
        }

    def passes_around_exchange(self, grad_scale: Tensor | None) -> None:
        """Wait for all averages first: the factor of the gradients is that of their means."""
        self.before_exchange_all()
        self._after_averages(grad_scale)

    def pass_groups(self, first: int) -> Sequence[PassGroup]:
        """Bucket by bucket: packing the next one overlaps with the all-reduce of the last."""
        return self.buckets.singles[first:]

    def before_exchange(self, pass_group: PassGroup) -> None:
        """Start the average of a bucket's gradients, if others have it too; no pass is made."""
        if not pass_group.segment.layout.mix:
            return
        self._start_average(pass_group.buckets[0], pass_group.segment.gradients(pass_group.first, pass_group.last))
        if self.schedule.fused_backward:
            pass_group.drop_gradients()

    def _start_average(self, bucket: BucketState, grads: Gradients) -> None:
        average = self._averages[bucket.number]
        tensors = [None if grad is None else grad.as_strided((grad.numel(),), (1,)) for grad in grads.tensors]
        with span("exchange", (bucket.number,), to=("all",), sources=("all",)), unrecorded():
            average.start(
                Gradients(tensors, grads.addresses, grads.dtype), self.inputs.found_inf, scaled=self.inputs.scaled
            )
        view = average.communicator.view.size
        size = 2 * average.buffer.nbytes * (view - 1) // view
        self.stats.bytes_sent += size
        self.stats.bytes_received += size

    def _after_averages(self, grad_scale: Tensor | None) -> None:
        begin = time.perf_counter()
        reduced = {}
        for number, average in self._averages.items():
            with span("wait", (number,), sources=("all",)):
                reduced[number] = average.finish()
        self.stats.blocked_s += time.perf_counter() - begin
        limit, inputs = self.schedule.max_grad_norm, self.inputs
        inputs.grad_scale = multiplier(
            [average.tensors() for average in self._averages.values()], grad_scale, limit, self.sharding
        )
        if self.schedule.nonfinite == "heal" and any([one.somebody_left_out for one in self._averages.values()]):
            self._heal()
        own_flag = inputs.found_inf
        for pass_group in self.buckets.singles:
            (number,) = pass_group.numbers
            if number in reduced:
                grads, found_inf = reduced[number]
                inputs.found_inf = found_inf if own_flag is not None else None
                self.make_pass(pass_group, self.algorithm.after, grads, EMPTY)
        self._pass_unmixed(grad_scale, own_flag, [found_inf for _, found_inf in reduced.values()])

    def _heal(self) -> None:
        """Where this rank's parameters and states are not finite, take the mean of the ranks that have finite ones. Collective.

        All ranks have the same ones, so zeros for states would have this rank drift away from them.
        """
        for segment in self.segments:
            if not segment.layout.mix:
                continue
            for tensor in (segment.param, *(segment.states[name] for name in sorted(segment.states))):
                mean = tensor.clone()
                average_in_place([mean], self.communicator, finite=True)
                sick = ~tensor.isfinite()
                if sick.any():
                    tensor.copy_(torch.where(sick, mean, tensor))
                    self.stats.healed += tensor is segment.param

    def _pass_unmixed(self, grad_scale: Tensor | None, own_flag: Tensor | None, flags: Sequence[Tensor]) -> None:
        """The passes over what other ranks do not have, with this rank's gradients as they are.

        Clipped by their own norm: what is shared would otherwise be clipped differently on every rank, and no longer be equal.
        A step that any rank skips is skipped for them too.
        """
        unmixed = [segment for segment in self.segments if not segment.layout.mix]
        if not unmixed:
            return
        limit, inputs = self.schedule.max_grad_norm, self.inputs
        own = gradients_of(unmixed) if limit is not None else []
        inputs.grad_scale = multiplier(own, grad_scale, limit, self.sharding)
        inputs.found_inf = own_flag if own_flag is None or not flags else flags[0]
        for pass_group in self.buckets.singles:
            segment = pass_group.segment
            if not segment.layout.mix:
                grads = segment.gradients(pass_group.first, pass_group.last)
                self.make_pass(pass_group, self.algorithm.after, grads, EMPTY)
                if self.schedule.fused_backward:
                    pass_group.drop_gradients()
