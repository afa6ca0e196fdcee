"""Where gradients lie: the tensors and addresses that passes read, without a copy as a rule."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedfog.errors import StorageReplacedError
from fusedfog.kernels import Gradients, Region, device
from fusedfog.kernels.region import ACCESS_BYTES, TABLE_ALIGNMENT
from fusedfog.kernels.region import align as align_table
from fusedfog.params.layout import Segment, Slot

_TABLES = 64
"""How many captures there may be without a step or replay in between."""

# Looping over parameters is most of what a step costs the host: `map` halves it.
_grad_of, _dtype_of = attrgetter("grad"), attrgetter("dtype")
_is_negated = torch._C.TensorBase.is_neg

TURNS = 8
"""On GPUs, what can hardly be is looked for in one of so many steps."""


def storage_replaced(slot: Slot, now: Tensor, place: torch.device) -> StorageReplacedError:
    """The error for a parameter that has left the flat buffer on device `place` and cannot come back as it is `now`."""

    def words(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> str:
        return f"{str(dtype).removeprefix('torch.')} of shape {shape} on {where}"

    was, found = words(slot.spec.shape, slot.spec.dtype, place), words(tuple(now.shape), now.dtype, now.device)
    return StorageReplacedError(
        f"parameter {slot.spec.name} was given a new storage (p.data = ..., model.to(...)) after the optimizer "
        f"was built: {found if found != was else 'none at all'}, where it was {was}, so updates cannot reach it. Move the "
        f"model first and build the optimizer last (after opt.release(), where there is one); a new storage of the same "
        f"shape, dtype and device is no error"
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
        listed: how often each was given to the optimizer, if any was more than once.
        whole: what a pass over all of them needs to know of it.
        gradient_table: int64 `[P]` on GPUs, the gradients' addresses; see `kernels.Gradients`.
    """

    whole: Region

    def __init__(self, layout: Segment, params: Sequence[torch.nn.Parameter]) -> None:
        self.layout, self.params = layout, list(params)
        self.touched = [False] * len(params)
        self.listed: list[int] = []
        self.row_major = False
        self.gradient_table: Tensor | None = None
        self._grad_homes = [0] * len(params)
        # As they were found, where `_grad_homes` has those of copies.
        self._seen_homes = [-1] * len(params)
        self._homes_now: list[int] | None = None
        self._numels = [slot.spec.numel for slot in layout.slots]
        self._place = {params[0].get_device()}
        self._turn, self._odd, self._untouched = 0, False, True

    def between(self, first: int, last: int) -> list[torch.nn.Parameter]:
        """The parameters `[first, last)`; no copy, if these are all."""
        return self.params if last - first == len(self.params) else self.params[first:last]

    def own_gradients(self, first: int, last: int) -> list[Tensor | None]:
        """The gradients of parameters `[first, last)` as they are."""
        return list(map(_grad_of, self.between(first, last)))

    def holds_gradient(self, position: int, found: Tensor) -> bool:
        """Whether `found`, of `found_gradients`, is the gradient that users see, and no copy of it."""
        return self.params[position].grad is found

    def set_gradient(self, position: int, value: Tensor) -> None:
        """Have users see this value as the gradient of parameter number `position`, in the dtype that its gradients have."""
        param = self.params[position]
        dtype = param.grad.dtype if param.grad is not None else getattr(param, "grad_dtype", None) or param.dtype
        param.grad = value.to(dtype, copy=True)

    def gradients(self, first: int, last: int) -> Gradients:
        """The gradients of parameters `[first, last)` where autograd left them.

        They are of one dtype: the parameters', or a wider one if a gradient has that (`param.grad_dtype`). A gradient of
        another dtype or memory order, or one that is a negated or overlapping view (all rare), is copied first. Entries of
        other parameters are None.

        Raises:
            RuntimeError: a gradient is sparse, or has another shape or device than its parameter.
        """
        found, dtype = self.found_gradients(first, last)
        if self.gradient_table is not None:
            self._show_addresses(self.gradient_table, found, first, last)
        if len(found) < len(self.params):
            elsewhere: list[Tensor | None] = [None]
            found = elsewhere * first + found + elsewhere * (len(self.params) - last)
        return Gradients(found, self.gradient_table, dtype)

    def repeated(self, grads: Gradients) -> Iterator[Gradients]:
        """The gradients of parameters that were listed more than once, once more for each further time."""
        for times in range(1, max(self.listed, default=1)):
            tensors = [grad if count > times else None for grad, count in zip(grads.tensors, self.listed, strict=True)]
            table = grads.addresses
            if table is not None:
                table = torch.zeros_like(table)
                device.upload(
                    [home if grad is not None else 0 for home, grad in zip(self._grad_homes, tensors, strict=True)],
                    table,
                )
            yield Gradients(tensors, table, grads.dtype)

    def found_gradients(self, first: int, last: int) -> tuple[list[Tensor | None], torch.dtype]:
        """The gradients of parameters `[first, last)` alone, which count as touched from now on, and their dtype."""
        found = self.own_gradients(first, last)
        dtype, self._homes_now = self.layout.dtype, None
        if not self._lie_in_order(found, first, last):
            dtype, self._homes_now = _common_dtype(dtype, found), None
            found = [self._in_order(p, grad, dtype) for p, grad in enumerate(found, first)]
        if self._untouched and False in self.touched[first:last]:
            self.touched[first:last] = [
                touched or grad is not None for touched, grad in zip(self.touched[first:last], found, strict=True)
            ]
        self._untouched = self._untouched and False in self.touched
        return found, dtype

    def _lie_in_order(self, gradients: Sequence[Any], first: int, last: int) -> bool:
        """Whether passes can read all of these as they are; the usual case, in loops that stay inside C.

        That they have their parameters' dtype, size and device autograd and `p.grad = ...` see to, but not
        `p.grad.data = ...`, and they might be negated views. On GPUs, where a loop is a tenth of a step, this is looked at in
        every eighth step, and whenever a gradient lies elsewhere than in the last one.
        """
        if not self.row_major:
            return False
        try:
            if not all(map(Tensor.is_contiguous, gradients)):
                return False
        except TypeError:  # None
            if not all(grad.is_contiguous() for grad in gradients if grad is not None):
                return False
        if self.gradient_table is not None:
            homes = addresses_of(gradients)
            seen = self._seen_homes if len(homes) == len(self._seen_homes) else self._seen_homes[first:last]
            if homes != seen:
                self._seen_homes[first:last] = self._homes_now = homes
            else:
                # The same numbers, but as objects that `_grad_homes` has too, with which they are compared next.
                self._homes_now = seen
            if self._homes_now is seen and not self._odd:
                self._turn = (self._turn + 1) % TURNS
                if self._turn:
                    return True
        return self._are_plain(gradients, self._numels[first:last])

    def _are_plain(self, gradients: Sequence[Any], numels: Sequence[int]) -> bool:
        """Whether none is a negated view, or of another dtype, size or device than its parameter."""
        try:
            found = list(map(Tensor.numel, gradients))
        except TypeError:  # None
            numels = [numel for grad, numel in zip(gradients, numels, strict=True) if grad is not None]
            gradients = [grad for grad in gradients if grad is not None]
            found = list(map(Tensor.numel, gradients))
        self._odd = any(map(_is_negated, gradients))
        self._odd = self._odd or torch.overrides.has_torch_function(gradients)
        alike = set(map(_dtype_of, gradients)) <= {self.layout.dtype} and found == numels
        return alike and not self._odd and set(map(Tensor.get_device, gradients)) <= self._place

    def _show_addresses(self, table: Tensor, found: list[Tensor | None], first: int, last: int) -> None:
        """Write the gradients' addresses into the device's table, if they are not those of the last step."""
        homes = addresses_of(found) if self._homes_now is None else self._homes_now
        # The caching allocator hands out the same addresses step after step.
        if homes == (self._grad_homes if len(homes) == len(self._grad_homes) else self._grad_homes[first:last]):
            return
        homes = list(homes)
        align(found, homes)
        self._grad_homes[first:last] = homes
        device.upload(homes, table[first:last])

    def _in_order(self, position: int, grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A gradient of `dtype` in its parameter's memory order: itself, as a rule; None if it has no elements."""
        slot = self.layout.slots[position]
        if grad is None or not slot.spec.numel:
            return None
        if grad.layout != torch.strided:
            raise RuntimeError(f"parameter {slot.spec.name} has a sparse gradient; build its layer with sparse=False")
        if torch.overrides.has_torch_function((grad,)):
            if is_traceable_wrapper_subclass(grad):
                raise RuntimeError(
                    f"parameter {slot.spec.name} has a gradient of type {type(grad).__name__}; it must be plain"
                )
            grad = grad.as_subclass(Tensor)
        place = self.params[position].device
        if grad.shape != slot.spec.shape or grad.device != place:
            raise RuntimeError(
                f"parameter {slot.spec.name} has shape {slot.spec.shape} on {place}, but its gradient has shape "
                f"{tuple(grad.shape)} on {grad.device}: was p.grad.data replaced?"
            )
        if grad.dtype == dtype and same_order(grad, slot.spec.stride) and not grad.is_neg():
            return grad
        dense = torch.empty_strided(slot.spec.shape, slot.spec.stride, dtype=dtype, device=grad.device)
        return dense.copy_(grad)


def _common_dtype(own: torch.dtype, gradients: Sequence[Tensor | None]) -> torch.dtype:
    """A dtype that holds all gradients of parameters of dtype `own` exactly, if passes can read that one."""
    dtypes = {grad.dtype for grad in gradients if grad is not None}
    common = functools.reduce(torch.promote_types, dtypes, own)
    # Passes over fp64 parameters alone compute in fp64.
    return torch.float32 if common == torch.float64 != own else common


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
        found, dtype = segment.found_gradients(0, count)
        homes, table = addresses_of(found), self._spare.pop()
        align(found, homes)
        self._taken.append(table)
        self._unfilled.append((table, homes))
        return Gradients(found, table, dtype)

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


def same_order(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether a tensor of this stride would have its elements in the same order in memory."""
    # The stride of a dimension of size one addresses nothing; autograd and channels_last set it freely.
    own = tensor.stride()
    return own == stride or all(a == b for a, b, size in zip(own, stride, tensor.shape, strict=True) if size > 1)
