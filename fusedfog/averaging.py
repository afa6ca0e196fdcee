"""The mean gradient over all ranks, bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.transfer import Transfer
from fusedfog.flat import FlatSegment, addresses_of
from fusedfog.kernels import Gradients, device
from fusedfog.layout import Bucket


class GradientAverage:
    """The mean gradient of one bucket over all ranks: packed into one buffer, all-reduced, read from there.

    Behind the gradients the buffer carries one flag a parameter (does any rank have a gradient?) and one for non-finite
    gradients found by a GradScaler on any rank, so that all ranks update, or skip, the same parameters. A rank without a
    gradient contributes zero, as under DistributedDataParallel.
    """

    def __init__(self, segment: FlatSegment, bucket: Bucket, link: Communicator) -> None:
        self.segment, self.bucket, self.link = segment, bucket, link
        self.slots = segment.layout.slots[bucket.first : bucket.last]
        self.length = bucket.stop - bucket.start
        self.buffer = segment.param.new_zeros(self.length + len(self.slots) + 1)
        self._message: Transfer | None = None
        self._places = [self.buffer[slot.start - bucket.start : slot.stop - bucket.start] for slot in self.slots]
        self._homes = torch.tensor(addresses_of(self._places), device=self.buffer.device)
        self._flags = self.buffer[self.length : -1]
        self._present: list[bool] = []

    def start(self, grads: Gradients, found_inf: Tensor | None) -> None:
        """Pack this rank's gradients and start the all-reduce; the gradients may be freed afterwards."""
        found = grads.tensors[self.bucket.first : self.bucket.last]
        present = [grad is not None for grad in found]
        if present != self._present:
            self._present = present
            self._shares = torch.zeros_like(self._flags)
            device.upload([1.0 / self.link.world.size if here else 0.0 for here in present], self._shares)
        self._pack([(place, grad) for place, grad in zip(self._places, found, strict=True) if grad is not None])
        if not all(present):
            torch._foreach_zero_([place for place, here in zip(self._places, present, strict=True) if not here])
        self._flags.copy_(self._shares)
        if found_inf is not None:
            torch.mul(found_inf.reshape(()), 1.0 / self.link.world.size, out=self.buffer[-1])
        else:
            self.buffer[-1].zero_()
        self._message = Transfer(self.link, "gradients")
        work = dist.all_reduce(self.buffer, group=self.link.group, async_op=True)
        self._message.pending.append((work, "averaging with all ranks"))

    def _pack(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        # Divided before they are summed, as DistributedDataParallel does: the sum of fp16 gradients may overflow.
        share = 1.0 / self.link.world.size
        if not device.on_gpu(self.buffer):
            for place, grad in pairs:
                torch.mul(grad, share, out=place)
        elif pairs:
            # Two launches a bucket instead of one a parameter; there is no fused kernel that copies and scales.
            torch._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])
            self.buffer[: self.length].mul_(share)

    def finish(self) -> tuple[Gradients, Tensor]:
        """Wait for the mean; returns it with the flag (0-d, fp32) that is positive if any rank found a non-finite one."""
        assert self._message is not None
        self._message.wait()
        self._message = None
        first, last = self.bucket.first, self.bucket.last
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
        return Gradients(tensors, table, self.buffer.dtype), self.buffer[-1].float()

    def tensors(self) -> Tensor:
        """The reduced gradients of the bucket, padding (zero) included."""
        return self.buffer[: self.length]
