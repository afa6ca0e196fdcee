"""Where gradients lie: the tensors and addresses that passes read, without a copy as a rule."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fusedfog.errors import StorageReplacedError
from fusedfog.kernels import Gradients, Region, device
from fusedfog.kernels.region import ACCESS_BYTES, TABLE_ALIGNMENT
from fusedfog.kernels.region import align as align_table
from fusedfog.params.layout import Segment, Slot

_TABLES = 64
"""How many captures there may be without a step or replay in between."""

# Looping over parameters is most of what a step costs the host: `map` halves it.
_grad_of, _dtype_of = attrgetter("grad"), attrgetter("dtype")


def storage_replaced(slot: Slot) -> StorageReplacedError:
    """The error for a parameter that has left the flat buffer."""
    return StorageReplacedError(
        f"parameter {slot.spec.name} was given a new storage (p.data = ..., model.to(...)) after the optimizer "
        f"was built, so updates would not reach it. Move the model first and build the optimizer last; "
        f"write values with p.data.copy_(...) inside `with opt.paused():`"
    )


def addresses_of(gradients: Sequence[Tensor | None]) -> list[int]:
    """The gradients' addresses, 0 for None."""
    try:
        return list(map(Tensor.data_ptr, gradients))  # type: ignore[arg-type]  # None is a TypeError
    except TypeError:
        return [grad.data_ptr() if grad is not None else 0 for grad in gradients]


def align(gradients: list[Tensor | None], homes: list[int]) -> None:
    """Replace gradients that a pass could not read where they lie by copies, and their addresses."""
    for i, grad in enumerate(gradients):
        # 128-bit loads need 16-byte alignment; only a gradient that is a view into something else lacks it.
        if grad is not None and homes[i] % ACCESS_BYTES:
            gradients[i] = aligned = grad.clone()
            homes[i] = aligned.data_ptr()


class GradientReader:
    """The parameters of one segment, as far as their gradients are concerned.

    Attributes:
        params: the parameters.
        touched: whether each has ever had a gradient; torch.optim keeps no state for the others.
        row_major: all of them are contiguous, and none is empty.
        whole: what a pass over all of them needs to know of it.
        gradient_table: int64 `[P]` on GPUs, the gradients' addresses; see `kernels.Gradients`.
    """

    whole: Region

    def __init__(self, layout: Segment, params: Sequence[torch.nn.Parameter]) -> None:
        self.layout, self.params = layout, list(params)
        self.touched = [False] * len(params)
        self.row_major = False
        self.gradient_table: Tensor | None = None
        self._grad_homes = [0] * len(params)

    def between(self, first: int, last: int) -> list[torch.nn.Parameter]:
        """The parameters `[first, last)`; no copy, if these are all."""
        return self.params if last - first == len(self.params) else self.params[first:last]

    def own_gradients(self, first: int, last: int) -> list[Tensor | None]:
        """The gradients of parameters `[first, last)` as they are."""
        return list(map(_grad_of, self.between(first, last)))

    def gradients(self, first: int, last: int) -> Gradients:
        """The gradients of parameters `[first, last)` where autograd left them.

        A gradient whose dtype or memory order differs from its parameter's (rare) is copied first. Entries of other
        parameters are None.
        """
        found = self.found_gradients(first, last)
        if self.gradient_table is not None:
            self._show_addresses(self.gradient_table, found, first, last)
        if len(found) < len(self.params):
            elsewhere: list[Tensor | None] = [None]
            found = elsewhere * first + found + elsewhere * (len(self.params) - last)
        return Gradients(found, self.gradient_table, self.layout.dtype)

    def found_gradients(self, first: int, last: int) -> list[Tensor | None]:
        """The gradients of parameters `[first, last)` alone, which count as touched from now on."""
        found = self.own_gradients(first, last)
        if not self._lie_in_order(found):
            found = [self._in_order(self.params[p], grad, self.layout.slots[p]) for p, grad in enumerate(found, first)]
        if False in self.touched[first:last]:
            self.touched[first:last] = [
                touched or grad is not None for touched, grad in zip(self.touched[first:last], found, strict=True)
            ]
        return found

    def _lie_in_order(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether passes can read all of these as they are; the usual case, in two loops that stay inside C."""
        if not self.row_major:
            return False
        try:
            dtypes = set(map(_dtype_of, gradients))
        except AttributeError:  # None has no dtype
            return self._lie_in_order([grad for grad in gradients if grad is not None])
        return dtypes <= {self.layout.dtype} and all(map(Tensor.is_contiguous, gradients))  # type: ignore[arg-type]

    def _show_addresses(self, table: Tensor, found: list[Tensor | None], first: int, last: int) -> None:
        """Write the gradients' addresses into the device's table, if they are not those of the last step."""
        homes = addresses_of(found)
        # The caching allocator hands out the same addresses step after step.
        if homes == self._grad_homes[first:last]:
            return
        align(found, homes)
        self._grad_homes[first:last] = homes
        device.upload(homes, table[first:last])

    def _in_order(self, param: Tensor, grad: Tensor | None, slot: Slot) -> Tensor | None:
        """A gradient in its parameter's dtype and memory order: itself, as a rule; None if it has no elements."""
        if param.dtype != self.layout.dtype:
            raise storage_replaced(slot)
        if grad is None or not slot.spec.numel:
            return None
        if grad.layout != torch.strided:
            raise RuntimeError(f"parameter {slot.spec.name} has a sparse gradient; build its layer with sparse=False")
        if grad.dtype == self.layout.dtype and _same_order(grad, slot.spec.stride):
            return grad
        dense = torch.empty_strided(slot.spec.shape, slot.spec.stride, dtype=self.layout.dtype, device=grad.device)
        return dense.copy_(grad)


class AddressTables:
    """Where recorded passes over a segment read their gradients' addresses: each recording has a table of its own.

    A copy inside a capture would be repeated by every replay, out of host memory that may be another's by then. So tables
    are made ahead, and filled once the capture is over. The gradients' memory is the graph's, which keeps its address.
    """

    def __init__(self, segment: GradientReader) -> None:
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


def _same_order(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    # The stride of a dimension of size one addresses nothing; autograd and channels_last set it freely.
    own = tensor.stride()
    return own == stride or all(a == b for a, b, size in zip(own, stride, tensor.shape, strict=True) if size > 1)
