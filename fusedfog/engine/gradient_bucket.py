"""The mean gradient of one bucket over ranks: packed into one buffer, all-reduced, and written to where gradients are.

Ranks of one host have their buffers in memory that they share, and add them up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.finite import make_mean, take_part
from fusedfog.comm.shared_buffers import SharedBuffers
from fusedfog.comm.shared_reduce import SharedTransfer, add_up
from fusedfog.comm.transfer import Transfer
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import Bucket

_MEMORY = 0.9
"""What of the sums of squared norms remains at the next measurement: they are of the last ten or so."""


class GradientBucket:
    """Parameters `[layout.first, layout.last)` of a segment, and the mean of their gradients.

    Behind the gradients the buffer carries one flag a parameter (does any rank have a gradient?), so that all ranks update, or
    skip, the same parameters. A rank without a gradient contributes zero, as under DistributedDataParallel.

    With a quarantine, a rank whose gradients of the bucket (or, where it heals, parameters) are not finite contributes zeros, and
    one more flag a rank says who has taken part, so that the mean is that of the others.

    Args:
        members: what the quarantine calls the communicator's ranks.
        parts: what the gradients of each of these are multiplied by in the mean; their sum is how many they are. None for 1.
        shared: where these ranks can share memory.
        frees: gradients are freed once they are packed, and then windows of the buffer.

    Attributes:
        place: its number, in the order of averages.
        ready: how many of its gradients have come in this backward.
        averaged: whether this step's gradients have been averaged.
        squares: float64, `[2, parameters]`: sums of squared norms, of this rank's gradients and of the means, of the latest
            steps that measured.
        left_out: whether somebody's gradients were not in a mean of this step; on a GPU a tensor.
    """

    def __init__(
        self,
        segment: FlatSegment,
        layout: Bucket,
        communicator: Communicator,
        quarantine: Quarantine | None,
        members: Sequence[int],
        parts: Sequence[float] | None = None,
        *,
        shared: SharedBuffers | None,
        frees: bool,
    ) -> None:
        self._members, place = members, segment.param.device
        self.segment, self.layout, self.communicator = segment, layout, communicator
        # Divided before they are summed, as DistributedDataParallel does: the sum of fp16 gradients may overflow.
        own, size = parts[communicator.view.rank] if parts is not None else 1.0, communicator.view.size
        self._share = own / size
        self._parts = torch.tensor(parts, dtype=torch.float64, device=place) if parts is not None else None
        self._quarantine, self._frees = quarantine, frees
        self._slots = segment.layout.slots[layout.first : layout.last]
        self._length = layout.stop - layout.start
        self.place = self.ready = 0
        self._expected = sum(param.requires_grad for param in segment.params[layout.first : layout.last])
        self.averaged = False
        self.left_out: bool | Tensor = False
        self.squares = torch.zeros(2, len(self._slots), dtype=torch.float64, device=place)
        self._transfer: Transfer | None = None
        self._found: list[Tensor | None] = []
        self._present: list[bool] = []
        self._buffer = segment.param.new_empty(0)
        # Gradients are packed to where the other ranks read them.
        self._packed = shared.buffer() if shared is not None else None

    @property
    def complete(self) -> bool:
        """Whether all gradients have come that backward can bring."""
        return self.ready >= self._expected

    @property
    def in_flight(self) -> bool:
        """Whether its average has been started and not been waited for."""
        return self._transfer is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self._buffer.nbytes

    def _make_buffer(self, dtype: torch.dtype) -> None:
        ranks = self.communicator.view.size if self._quarantine is not None else 0
        flags = self._length + len(self._slots)
        if self._packed is not None:
            buffer = self._packed.room(flags + ranks, dtype).zero_()
        else:
            buffer = self.segment.param.new_zeros(flags + ranks, dtype=dtype)
        self._buffer = buffer
        self._flags, self._fine = buffer[self._length : flags], buffer[flags:]
        self._places = [
            buffer[slot.start - self.layout.start : slot.stop - self.layout.start].as_strided(
                slot.spec.shape, slot.spec.stride
            )
            for slot in self._slots
        ]
        self._present = []

    def start(self, *, contain: bool, measure: bool) -> None:
        """Pack this rank's gradients and start the all-reduce.

        Args:
            contain: leave this rank out if its gradients are not finite; not if a GradScaler's scale is in them, which expects
                all ranks to see what overflows.
            measure: note squared norms.
        """
        segment, layout = self.segment, self.layout
        found, dtype = segment.found_gradients(layout.first, layout.last)
        if dtype != self._buffer.dtype or not self._buffer.numel():
            self._make_buffer(dtype)
        present = [grad is not None for grad in found]
        if present != self._present:
            self._present = present
            self._here = torch.zeros_like(self._flags)
            device.upload([float(here) for here in present], self._here)
        self._pack([(place, grad) for place, grad in zip(self._places, found, strict=True) if grad is not None])
        if not all(present):
            torch._foreach_zero_([place for place, here in zip(self._places, present, strict=True) if not here])
        self._flags.copy_(self._here)
        self._measures = measure
        if measure:
            self._own = self._squares() / self._share**2
        self._leave_out(contain)
        self._found = found
        if self._frees:
            self._found = []
            for param in segment.params[layout.first : layout.last]:
                param.grad = None
        self._transfer = self._sum()

    def _sum(self) -> Transfer:
        _ = self.communicator.group  # Raises why the communicator has ended, if it has.
        if self._packed is not None:
            operation = add_up(self._packed, self._buffer.numel(), self._buffer.dtype)
            return SharedTransfer(self.communicator, "gradients", operation)
        transfer = Transfer(self.communicator, "gradients")
        transfer.add(partial(dist.all_reduce, self._buffer, async_op=True), "averaging with all ranks")
        return transfer

    def _pack(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not device.on_gpu(self._buffer):
            for place, grad in pairs:
                torch.mul(grad, self._share, out=place)
        elif pairs:
            # Two launches a bucket instead of one a parameter; there is no fused kernel that copies and scales.
            torch._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])
            self._buffer[: self._length].mul_(self._share)

    def _leave_out(self, contain: bool) -> None:
        """Take part in the sum only with what is finite, and say so."""
        if self._quarantine is None:
            return
        mine = self._fine.zero_()[self.communicator.view.rank]
        if not contain:
            mine.fill_(1.0)
            return
        # Parameters do not travel, so a rank that is to be healed has to say that its own need it.
        kept = self.segment.param[self.layout.start : self.layout.stop] if self._quarantine.heals else None
        take_part(self._buffer[: self._length], mine, kept)

    def _squares(self) -> Tensor:
        """Squared norms of what the buffer holds, `[parameters]`; 0 where they are not finite."""
        norms = torch.stack(torch._foreach_norm(self._places)).double()
        return torch.nan_to_num(norms.square(), 0.0, 0.0, 0.0)

    def finish(self, *, write: bool = True) -> None:
        """Wait for the mean, and have `.grad` be it; without `write` forget it."""
        assert self._transfer is not None
        transfer, self._transfer = self._transfer, None
        transfer.wait()
        if not write:
            return
        if self._quarantine is not None:
            absent = make_mean(self._buffer[: self._length], self._fine, 0.0, self._parts)
            self._quarantine.refuse(self._members[rank] for rank in absent)
            nobody_is_missing = (self._fine != 0).all()
            if device.on_gpu(self._buffer):
                self._quarantine.refuse_late(self._fine.view(1, -1), self._members)
                self.left_out = ~nobody_is_missing | self.left_out
            else:
                self.left_out |= not nobody_is_missing
        if self._measures:
            self.squares.mul_(_MEMORY).add_(torch.stack([self._own, self._squares()]))
        self._write()
        self.averaged = True

    def _write(self) -> None:
        params = self.segment.params[self.layout.first : self.layout.last]
        # All ranks see the same flags. A GPU's are only read, which makes the host wait, where this rank lacks a gradient.
        somewhere = self._present if all(self._present) else [flag > 0 for flag in self._flags.tolist()]
        if self._frees:
            for param, place, here in zip(params, self._places, somewhere, strict=True):
                if here:
                    param.grad = place.to(getattr(param, "grad_dtype", None) or param.dtype)
            return
        targets, sources = [], []
        for position, (grad, here) in enumerate(zip(self._found, somewhere, strict=True)):
            if grad is not None and self.segment.holds_gradient(self.layout.first + position, grad):
                targets.append(grad)
                sources.append(self._places[position])
            elif here:
                self.segment.set_gradient(self.layout.first + position, self._places[position])
        if targets:
            torch._foreach_copy_(targets, sources)
        self._found = []
