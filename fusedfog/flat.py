"""Parameters and optimizer states in flat storage, with each parameter a view of its slot.

`FlatSegment` realises one `layout.Segment`. Adopting a parameter keeps its object, value, shape and strides; only its
storage becomes a window of the flat buffer. The window is a storage of its own (through DLPack) over the same memory, so
`torch.save` of one parameter or one state writes that tensor, not the whole buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedfog.errors import StorageReplacedError
from fusedfog.kernels import Gradients, Region
from fusedfog.layout import Bucket, Segment, Slot, block_table


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides `tensor` has once it is dense: its own dimension order, without gaps or overlaps."""
    return torch.empty_like(tensor, device="meta").stride()


def window(flat: Tensor, slot: Slot) -> Tensor:
    """The slot's part of `flat` in its parameter's shape and strides, as a tensor whose storage is just that part."""
    return from_dlpack(flat[slot.start : slot.stop]).as_strided(slot.spec.shape, slot.spec.stride)


def _same_order(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    # The stride of a dimension of size one addresses nothing; autograd and channels_last set it freely.
    own = tensor.stride()
    return own == stride or all(a == b for a, b, size in zip(own, stride, tensor.shape, strict=True) if size > 1)


class FlatSegment:
    """The flat parameters, states and per-parameter step counts of one segment.

    Attributes:
        param: `[N]`, the parameters; read by neighbours while a message is in flight.
        states: name -> `[N]`, float32 (float64 beside float64 parameters), zero until first used.
        steps: float32 `[P]`, how often each parameter was updated, as torch.optim counts.
        touched: whether each parameter has ever had a gradient; torch.optim keeps no state for the others.
        regions: what a kernel pass over each bucket needs to know of it.
    """

    def __init__(self, layout: Segment, params: Sequence[torch.nn.Parameter]) -> None:
        self.layout = layout
        self.params = list(params)
        device = params[0].device
        on_gpu = device.type == "cuda"
        self.param = torch.zeros(layout.numel, dtype=layout.dtype, device=device)
        self.states: dict[str, Tensor] = {}
        self._message: Tensor | None = None
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=device)
        self.touched = [False] * len(params)
        self._shown = [False] * len(params)
        self._shown_names: tuple[str, ...] = ()
        with torch.no_grad():
            for param, slot in zip(self.params, layout.slots, strict=True):
                if slot.spec.numel:
                    view = window(self.param, slot)
                    view.copy_(param)
                    param.data = view
        base = self.param.data_ptr()
        self._homes = [base + slot.start * layout.dtype.itemsize for slot in layout.slots]
        self._home_of_grad = [0] * len(params)
        self._grad_table = torch.zeros(len(params), dtype=torch.int64, device=device) if on_gpu else None
        self.regions = tuple(
            Region(
                first=bucket.first,
                spans=tuple((slot.start, slot.spec.numel) for slot in layout.slots[bucket.first : bucket.last]),
                blocks=torch.from_numpy(block_table(layout, bucket)).to(device) if on_gpu else None,
            )
            for bucket in layout.buckets
        )

    def state(self, name: str) -> Tensor:
        """The flat state `name`, made (zero) at its first use."""
        if name not in self.states:
            dtype = torch.float64 if self.layout.dtype == torch.float64 else torch.float32
            self.states[name] = torch.zeros(self.layout.numel, dtype=dtype, device=self.param.device)
        return self.states[name]

    def tensor(self, name: str) -> Tensor:
        """A flat tensor by the name the algorithms' table has for it: "param", "message" (a buffer), or a state."""
        if name == "param":
            return self.param
        if name != "message":
            return self.state(name)
        if self._message is None:
            self._message = torch.zeros_like(self.param)
        return self._message

    def touch_all(self) -> None:
        """Count every parameter as having state: methods whose correction goes on without a gradient."""
        self.touched = [True] * len(self.params)

    def state_view(self, name: str, position: int) -> Tensor:
        """The part of a state that belongs to parameter number `position`, in that parameter's shape."""
        slot = self.layout.slots[position]
        return window(self.state(name), slot) if slot.spec.numel else self.state(name).new_empty(slot.spec.shape)

    def unshown(self, names: tuple[str, ...]) -> list[tuple[int, torch.nn.Parameter]]:
        """Parameters that have had a gradient but whose states `names` were not returned by an earlier call."""
        if names != self._shown_names:
            self._shown_names, self._shown = names, [False] * len(self.params)
        if self._shown == self.touched:
            return []
        fresh = [p for p, (touched, shown) in enumerate(zip(self.touched, self._shown, strict=True)) if touched > shown]
        self._shown = list(self.touched)
        return [(p, self.params[p]) for p in fresh]

    def load_states(self, names: tuple[str, ...], saved: Sequence[Mapping[str, Any]]) -> None:
        """Copy per-parameter states in torch.optim's format in; what a parameter does not have becomes zero."""
        for position, state in enumerate(saved):
            present = [name for name in names if state.get(name) is not None]
            for name in names:
                view = self.state_view(name, position)
                if name in present:
                    view.copy_(state[name])
                elif name == "outer_param":
                    view.copy_(self.params[position].detach())  # the anchor of a run that had not begun
                else:
                    view.zero_()
            # torch's SGD stores no count; what matters is whether its momentum buffer has begun.
            self.steps[position] = float(state.get("step", 1.0 if present else 0.0))
            self.touched[position] = bool(present) or "step" in state
        self._shown = [False] * len(self.params)

    def check_storage(self) -> None:
        """Raise `StorageReplacedError` if a parameter has left the flat buffer, so that an update would miss it."""
        for param, home, slot in zip(self.params, self._homes, self.layout.slots, strict=True):
            if slot.spec.numel and (param.data_ptr() != home or param.dtype != self.layout.dtype):
                raise StorageReplacedError(
                    f"parameter {slot.spec.name} was given a new storage (p.data = ..., model.to(...)) after the optimizer "
                    f"was built, so updates would not reach it. Move the model first and build the optimizer last; "
                    f"write values with p.data.copy_(...) inside `with opt.paused():`"
                )

    def versions(self, bucket: Bucket) -> int:
        """Sum of autograd's version counters over a bucket; it grows with every in-place edit."""
        return sum(param._version for param in self.params[bucket.first : bucket.last])

    def bump_versions(self, bucket: Bucket) -> None:
        """Tell autograd that a pass wrote these parameters, so that it still catches use of stale values."""
        torch.autograd.graph.increment_version(self.params[bucket.first : bucket.last])

    def gradients(self, bucket: Bucket) -> Gradients:
        """This bucket's gradients where autograd left them, flat in their parameter's memory order.

        A gradient whose dtype or memory order differs from its parameter's (rare) is copied first. Entries outside the
        bucket are None.
        """
        found: list[Tensor | None] = [None] * len(self.params)
        for p in range(bucket.first, bucket.last):
            grad = self.params[p].grad
            if grad is not None and grad.numel():
                found[p] = self._flat_gradient(grad, self.layout.slots[p])
                self.touched[p] = True
        if self._grad_table is None:
            return Gradients(found, None, self.layout.dtype)
        homes = [0 if g is None else g.data_ptr() for g in found[bucket.first : bucket.last]]
        # The caching allocator hands out the same addresses step after step: the table is uploaded only when they change.
        if homes != self._home_of_grad[bucket.first : bucket.last]:
            self._home_of_grad[bucket.first : bucket.last] = homes
            self._grad_table[bucket.first : bucket.last].copy_(
                torch.tensor(homes, dtype=torch.int64), non_blocking=True
            )
        return Gradients(found, self._grad_table, self.layout.dtype)

    def _flat_gradient(self, grad: Tensor, slot: Slot) -> Tensor:
        if grad.layout != torch.strided:
            raise RuntimeError(f"parameter {slot.spec.name} has a sparse gradient; build its layer with sparse=False")
        if grad.dtype != self.layout.dtype or not _same_order(grad, slot.spec.stride):
            dense = torch.empty_strided(slot.spec.shape, slot.spec.stride, dtype=self.layout.dtype, device=grad.device)
            grad = dense.copy_(grad)
        flat = grad.as_strided((slot.spec.numel,), (1,))
        # 128-bit loads need 16-byte alignment; only a gradient that is a view into something else lacks it.
        return flat.clone() if flat.is_cuda and flat.data_ptr() % 16 else flat
