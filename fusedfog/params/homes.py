"""Where parameters live: each is a window of its slot in a flat buffer, and is taken back if somebody moves it.

Adopting a parameter keeps its object, value, shape and strides; only its storage becomes a window of the flat buffer. The
window is a storage of its own (through DLPack) over the same memory, so `torch.save` of one parameter or one state writes that
tensor, not the whole buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedfog.kernels import device
from fusedfog.params.gradients import TURNS, GradientReader, same_order, storage_replaced
from fusedfog.params.layout import Bucket, Segment, Slot
from fusedfog.params.pages import zeros

# Looking at 300 version counters takes 12 us of a step's 150.
MANY, PARTS = 256, 4
"""Of so many parameters, what only has to be noticed is looked for in one of so many parts at a time."""

_version_of, _stride_of = attrgetter("_version"), torch._C.TensorBase.stride


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides `tensor` has once it is dense: its own dimension order, without gaps or overlaps."""
    return torch.empty_like(tensor, device="meta").stride()


def window(flat: Tensor, slot: Slot) -> Tensor:
    """The slot's part of `flat` in its parameter's shape and strides, as a tensor whose storage is just that part."""
    return from_dlpack(flat[slot.start : slot.stop]).as_strided(slot.spec.shape, slot.spec.stride)


class Homes(GradientReader):
    """The parameters of one segment in their flat buffer.

    Attributes:
        param: `[N]`, the parameters; read by neighbours while a message is in flight.
        owners: the parameters as the optimizer's user knows them; `params`, unless these are `shards`.
    """

    def __init__(self, layout: Segment, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(layout, params)
        self.owners = self.params
        self.param = zeros(layout.numel, layout.dtype, params[0].device)
        with torch.no_grad():
            for param, slot in zip(self.params, layout.slots, strict=True):
                if slot.spec.numel:
                    view = window(self.param, slot)
                    view.copy_(param)
                    param.data = view
        base, size = self.param.data_ptr(), layout.dtype.itemsize
        self._homes = [base + slot.start * size if slot.spec.numel else 0 for slot in layout.slots]
        self._strides = [slot.spec.stride for slot in layout.slots]
        self._looked = 0
        self.row_major = 0 not in self._homes and all(param.is_contiguous() for param in params)

    def located(self, first: int, last: int) -> Sequence[Tensor]:
        """The tensors that have to lie in the flat buffer, of parameters `[first, last)`."""
        return self.between(first, last)

    def moved(self, first: int = 0, last: int | None = None) -> list[int]:
        """Positions of parameters among `[first, last)` that lie elsewhere than in their slots, so that passes would miss them.

        Addresses are compared all, at every call: whatever went unseen would be an update that is lost. A parameter that was
        only turned around in its place (`p.data = p.data.t()`) is seen on CPUs at once, on GPUs within `TURNS` calls.
        """
        last = len(self.params) if last is None else last
        located, expected, strides = self.located(first, last), self._homes, self._strides
        if last - first < len(expected):
            expected, strides = expected[first:last], strides[first:last]
        # torch's own helper, `_tensors_data_ptrs_at_indices_equal`, takes twice as long, and CPU builds have none.
        homes = list(map(Tensor.data_ptr, located))
        if homes == expected:
            self._looked = (self._looked + 1) % TURNS if device.on_gpu(self.param) else 0
            if self._looked or list(map(_stride_of, located)) == strides:
                return []
        return [
            position
            for position, tensor, home in zip(range(first, last), located, homes, strict=True)
            if home != self._homes[position] or not self._lies_right(position, tensor)
        ]

    def _lies_right(self, position: int, tensor: Tensor) -> bool:
        spec = self.layout.slots[position].spec
        return tensor.shape == spec.shape and same_order(tensor, spec.stride)

    def take_back(self, positions: Sequence[int]) -> list[int]:
        """Move parameters that lie elsewhere back into the flat buffer, with the values that they have now.

        Returns:
            Those whose values are others than the buffer's, as far as the host knows: on GPUs, all.

        Raises:
            StorageReplacedError: one has another shape, dtype or device than when the optimizer was built, or no memory;
                none has been moved then.
        """
        for position in positions:
            self._check_alike(position)
        changed = [position for position in positions if self._move_home(position)]
        torch.autograd.graph.increment_version([self.owners[position] for position in positions])
        return changed

    def _check_alike(self, position: int) -> None:
        slot, (now,) = self.layout.slots[position], self.located(position, position + 1)
        found = (tuple(now.shape), now.dtype, now.device)
        if found != (slot.spec.shape, self.layout.dtype, self.param.device) or (now.numel() and not now.data_ptr()):
            raise storage_replaced(slot, now, self.param.device)

    def _move_home(self, position: int) -> bool:
        """Copy a parameter's values into its slot and make it the slot's window; whether that changes the slot, or may."""
        param, slot = self.params[position], self.layout.slots[position]
        with torch.no_grad():
            view, value = window(self.param, slot), param.detach()
            if value.untyped_storage().data_ptr() == view.untyped_storage().data_ptr():
                value = value.clone()  # It overlaps with its slot.
            changed = device.on_gpu(view) or not torch.equal(view, value)
            if changed:
                view.copy_(value)
            param.data = view
        return changed

    def give_back(self) -> None:
        """Give every parameter a storage of its own, as before the optimizer was built, with the values that it has now."""
        with torch.no_grad():
            for param, home in zip(self.params, self._homes, strict=True):
                if home and param.data_ptr() == home:
                    param.data = param.detach().clone()

    def versions(self, bucket: Bucket, part: int = 0, parts: int = 1) -> int:
        """Sum of autograd's version counters over one of `parts` parts of a bucket; it grows with every in-place edit."""
        params = self.between(bucket.first, bucket.last)
        return sum(map(_version_of, params if parts == 1 else params[part::parts]))

    def bump_versions(self, first: int, last: int) -> None:
        """Tell autograd that a pass wrote parameters `[first, last)`, so that it still catches use of stale values."""
        torch.autograd.graph.increment_version(self.between(first, last))
