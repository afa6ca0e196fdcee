"""Parameters and optimizer states in flat storage: `FlatSegment` realises one `layout.Segment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedfog.kernels import Region, device
from fusedfog.kernels.rounding import restored
from fusedfog.params.homes import Homes, window
from fusedfog.params.layout import Segment, block_table
from fusedfog.params.pages import zeros
from fusedfog.params.precision import COMPENSATION, EXACT, MASTER, MOMENTS, Storage


class FlatSegment(Homes):
    """The flat parameters (see `Homes`), states and per-parameter step counts of one segment.

    Attributes:
        states: name -> `[N]`, float32 (float64 beside float64 parameters, bfloat16 where `storage` says so), zero until
            first used.
        steps: float32, how often each parameter was updated, as torch.optim counts: `[P]`, or where there are block tables one
            for each row of `whole.blocks`; see `kernels.Pass`.
        views, view_versions: of each parameter, the states that its user is shown, and what the version counters of some of
            them add up to.
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
        place = self.param.device
        self.states: dict[str, Tensor] = {}
        self._message: Tensor | None = None
        self._norm_sums: dict[bool, Tensor] = {}
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=place)
        self._shown = [False] * len(params)
        self._shown_names: tuple[str, ...] = ()
        self.views: list[dict[str, Tensor]] = [{} for _ in params]
        self.view_versions = [0] * len(params)
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

    def level_steps(self) -> None:
        """Have all blocks of a parameter count as its first one does, which is shown to users and may have been edited."""
        if self.whole.blocks is not None and len(self.steps):
            rows = self.whole.blocks[:, 0].contiguous()
            firsts = torch.searchsorted(rows, rows)
            self.steps.copy_(self.steps[firsts])

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

    def shows(self, name: str, position: int, views: Mapping[str, Tensor]) -> bool:
        """Whether what users are shown of a state still lies in the flat one; `share_memory_` and `set_` move it elsewhere."""
        view, slot = views[name], self.layout.slots[position]
        if not slot.spec.numel:
            return True
        if name == "step":
            return view.data_ptr() == self.step_of(position).data_ptr()
        flat = self.state(name)
        return view.data_ptr() == flat.data_ptr() + slot.start * flat.element_size()

    def write_state(self, name: str, position: int, value: Tensor | None) -> None:
        """Copy a parameter's state in, of any dtype; None begins anew."""
        view = self.state_view(name, position)
        if value is not None:
            view.copy_(value)
        elif name in ("outer_param", MASTER):
            view.copy_(self.owners[position].detach())  # a run that had none yet
        else:
            view.zero_()

    def forget_shown(self, position: int) -> None:
        """A parameter's states are to be shown anew, once it has had a gradient."""
        self._shown[position], self.views[position], self._untouched = False, {}, True

    def keeps_touched(self, position: int) -> bool:
        """Whether a parameter has states from the beginning."""
        return False

    def load_states(self, names: tuple[str, ...], saved: Sequence[Mapping[str, Any]]) -> None:
        """Copy per-parameter states in torch.optim's format in; what a parameter does not have becomes zero."""
        for position, state in enumerate(saved):
            present = [name for name in names if state.get(name) is not None]
            for name in names:
                self.write_state(name, position, state.get(name))
            # torch's SGD stores no count; what matters is whether its momentum buffer has begun.
            self.set_step(position, float(state.get("step", 1.0 if present else 0.0)))
            self.touched[position] = bool(present) or "step" in state
        self._shown, self._untouched = [False] * len(self.params), True
        self.views = [{} for _ in self.params]
