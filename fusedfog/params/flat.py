"""Parameters and optimizer states in flat storage, with each parameter a view of its slot.

`FlatSegment` realises one `layout.Segment`. Adopting a parameter keeps its object, value, shape and strides; only its
storage becomes a window of the flat buffer. The window is a storage of its own (through DLPack) over the same memory, so
`torch.save` of one parameter or one state writes that tensor, not the whole buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedfog.kernels import Region, device
from fusedfog.kernels.rounding import restored
from fusedfog.params.gradients import GradientReader, storage_replaced
from fusedfog.params.layout import Bucket, Segment, Slot, block_table
from fusedfog.params.pages import zeros
from fusedfog.params.precision import COMPENSATION, EXACT, MASTER, MOMENTS, Storage

# Looking at 300 storages, or version counters, takes 12 us of a step's 150.
MANY, PARTS = 256, 4
"""Of so many parameters, what only has to be noticed is looked for in one of so many parts at a time."""

_version_of = attrgetter("_version")


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides `tensor` has once it is dense: its own dimension order, without gaps or overlaps."""
    return torch.empty_like(tensor, device="meta").stride()


def window(flat: Tensor, slot: Slot) -> Tensor:
    """The slot's part of `flat` in its parameter's shape and strides, as a tensor whose storage is just that part."""
    return from_dlpack(flat[slot.start : slot.stop]).as_strided(slot.spec.shape, slot.spec.stride)


class FlatSegment(GradientReader):
    """The flat parameters, states and per-parameter step counts of one segment.

    Attributes:
        param: `[N]`, the parameters; read by neighbours while a message is in flight.
        states: name -> `[N]`, float32 (float64 beside float64 parameters, bfloat16 where `storage` says so), zero until
            first used.
        owners: the parameters as the optimizer's user knows them; `params`, unless these are `shards`.
        steps: float32, how often each parameter was updated, as torch.optim counts: `[P]`, or where there are block tables one
            for each row of `whole.blocks`; see `kernels.Pass`.
        regions: what a kernel pass over each bucket needs to know of it.
        whole: the same for a pass over all buckets at once.

    Args:
        compiled: whether passes over it on the CPU are to be compiled.
        storage: how 16-bit parameters, and states, are kept.
    """

    sharded = False

    def __init__(
        self,
        layout: Segment,
        params: Sequence[torch.nn.Parameter],
        *,
        compiled: bool = False,
        storage: Storage = EXACT,
    ) -> None:
        super().__init__(layout, params)
        self.storage, self._compiled = storage, compiled
        self.owners = self.params
        place = params[0].device
        self.param = zeros(layout.numel, layout.dtype, place)
        self.states: dict[str, Tensor] = {}
        self._message: Tensor | None = None
        self._norm_sums: dict[bool, Tensor] = {}
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=place)
        self._shown = [False] * len(params)
        self._shown_names: tuple[str, ...] = ()
        with torch.no_grad():
            for param, slot in zip(self.params, layout.slots, strict=True):
                if slot.spec.numel:
                    view = window(self.param, slot)
                    view.copy_(param)
                    param.data = view
        base = self.param.data_ptr()
        filled = [(param, slot) for param, slot in zip(self.params, layout.slots, strict=True) if slot.spec.numel]
        self._placed = [param for param, _ in filled]
        self._homes = [base + slot.start * layout.dtype.itemsize for _, slot in filled]
        self.row_major = len(filled) == len(params) and all(param.is_contiguous() for param in params)
        self.regions, self.whole = self._regions()
        self.narrow = layout.dtype in (torch.bfloat16, torch.float16)
        self.remainder_name = storage.remainder if self.narrow else None
        if self.remainder_name == MASTER:
            self.state(MASTER).copy_(self.param)
        if device.on_gpu(place):
            self._make_tables()

    def _make_tables(self) -> None:
        """Put on the device what a GPU pass reads beside the flat tensors: block rows and gradient addresses."""
        tables = [torch.from_numpy(block_table(self.layout, bucket)) for bucket in self.layout.buckets]
        table = torch.cat(tables)
        rows = table.to(self.param.device)
        self._first_rows = torch.searchsorted(table[:, 0].contiguous(), torch.arange(len(self.params))).tolist()
        self._first_rows.append(len(table))
        self.steps = self.steps[rows[:, 0]]
        # Buckets cut the segment in order, so their rows are consecutive pieces of the segment's.
        self.regions, self.whole = self._regions(rows, rows.split([len(table) for table in tables]))
        self.gradient_table = torch.zeros(len(self.params), dtype=torch.int64, device=self.param.device)

    def _regions(
        self, rows: Tensor | None = None, pieces: Sequence[Tensor] | None = None
    ) -> tuple[tuple[Region, ...], Region]:
        spans = tuple((slot.start, slot.spec.numel) for slot in self.layout.slots)
        regions = tuple(
            Region(
                bucket.first,
                spans[bucket.first : bucket.last],
                pieces[b] if pieces is not None else None,
                self._compiled,
            )
            for b, bucket in enumerate(self.layout.buckets)
        )
        return regions, Region(0, spans, rows, self._compiled)

    def state(self, name: str) -> Tensor:
        """The flat state `name`, made (zero) at its first use."""
        if name not in self.states:
            dtype = torch.float64 if self.layout.dtype == torch.float64 else torch.float32
            if name == COMPENSATION:
                dtype = self.layout.dtype
            elif name in MOMENTS and dtype == torch.float32:
                dtype = self.storage.states
            self.states[name] = zeros(self.layout.numel, dtype, self.param.device)
        return self.states[name]

    def tensor(self, name: str) -> Tensor:
        """A flat tensor by the name the algorithms' table has for it: "param", "message" (a buffer), or a state."""
        if name == "param":
            return self.param
        if name != "message":
            return self.state(name)
        if self._message is None:
            # Rounded to 16 bits, the message would lose the update that the parameters' rest keeps.
            precise = self.narrow and self.storage.way is not None
            self._message = zeros(self.layout.numel, torch.float32 if precise else self.param.dtype, self.param.device)
        return self._message

    @property
    def remainder(self) -> Tensor | None:
        """What 16-bit parameters lack of the values they stand for; see `kernels.Precision.remainder`."""
        return None if self.remainder_name is None else self.state(self.remainder_name)

    @property
    def rounds_stochastically(self) -> bool:
        """Whether passes need a seed."""
        return (self.narrow and self.storage.way == "stochastic") or self.storage.states != torch.float32

    def value(self, name: str) -> Tensor:
        """`tensor(name)`, and for "param" the values that the parameters stand for."""
        return restored(self.param, self.remainder) if name == "param" else self.tensor(name)

    def norm_sums(self, before: bool, region: Region | None = None) -> Tensor:
        """Where passes over a region (None: over all) write their norm sums, those before an exchange apart."""
        blocks = self.whole.blocks
        if before not in self._norm_sums:
            shape = (len(self.params), 2) if blocks is None else (len(blocks), 2)
            dtype = torch.float64 if blocks is None else torch.float32
            self._norm_sums[before] = torch.zeros(shape, dtype=dtype, device=self.param.device)
        norm_sums = self._norm_sums[before]
        if region is None:
            return norm_sums
        if region.blocks is None:
            return norm_sums[region.first : region.first + len(region.spans)]
        return self._rows_of(region, norm_sums)

    def steps_of(self, region: Region) -> Tensor:
        """The counts that a pass over a region reads, as `kernels.GradientInputs.steps`."""
        return self.steps if region.blocks is None else self._rows_of(region, self.steps)

    def step_of(self, position: int) -> Tensor:
        """How often parameter number `position` was updated, 0-d; shown to users as its state "step"."""
        if self.whole.blocks is None:
            return self.steps[position]
        first = self._first_rows[position]
        # A parameter without elements has no blocks, and nobody counts its updates.
        return self.steps[first] if first < self._first_rows[position + 1] else self.steps.new_zeros(())

    def set_step(self, position: int, count: float) -> None:
        """Have parameter number `position` count on from `count`."""
        rows = slice(position, position + 1)
        if self.whole.blocks is not None:
            rows = slice(self._first_rows[position], self._first_rows[position + 1])
        self.steps[rows] = count

    def _rows_of(self, region: Region, rows: Tensor) -> Tensor:
        """A region's part of a tensor with one row for each of the segment's blocks."""
        if region is self.whole or region.blocks is None:
            return rows
        # A bucket's rows are a piece of the segment's table.
        first = region.blocks.storage_offset() // region.blocks.shape[1]
        return rows[first : first + len(region.blocks)]

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
        return [(p, self.owners[p]) for p in fresh]

    def load_states(self, names: tuple[str, ...], saved: Sequence[Mapping[str, Any]]) -> None:
        """Copy per-parameter states in torch.optim's format in; what a parameter does not have becomes zero."""
        for position, state in enumerate(saved):
            present = [name for name in names if state.get(name) is not None]
            for name in names:
                view = self.state_view(name, position)
                if name in present:
                    view.copy_(state[name])
                elif name in ("outer_param", MASTER):
                    view.copy_(self.owners[position].detach())  # a run that had none yet
                else:
                    view.zero_()
            # torch's SGD stores no count; what matters is whether its momentum buffer has begun.
            self.set_step(position, float(state.get("step", 1.0 if present else 0.0)))
            self.touched[position] = bool(present) or "step" in state
        self._shown = [False] * len(self.params)

    def check_storage(self, step: int | None = None) -> None:
        """Raise `StorageReplacedError` if a parameter has left the flat buffer, so that an update would miss it.

        Args:
            step: look at a part of many parameters only, another one in each of four steps in a row; None at all of them.
        """
        part = slice(None)
        if step is not None and len(self._placed) >= MANY:
            part = slice(step % PARTS, None, PARTS)
        homes = list(map(Tensor.data_ptr, self._placed[part]))
        if homes != self._homes[part]:
            slots = [slot for slot in self.layout.slots if slot.spec.numel][part]
            pairs = zip(homes, self._homes[part], slots, strict=True)
            raise storage_replaced(next(slot for at, home, slot in pairs if at != home))

    def versions(self, bucket: Bucket, part: int = 0, parts: int = 1) -> int:
        """Sum of autograd's version counters over one of `parts` parts of a bucket; it grows with every in-place edit."""
        params = self.between(bucket.first, bucket.last)
        return sum(map(_version_of, params if parts == 1 else params[part::parts]))

    def bump_versions(self, first: int, last: int) -> None:
        """Tell autograd that a pass wrote parameters `[first, last)`, so that it still catches use of stale values."""
        torch.autograd.graph.increment_version(self.between(first, last))
