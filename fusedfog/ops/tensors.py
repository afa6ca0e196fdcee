"""Tensors on their way in and out of an operation: flat and real inside, the caller's shape and dtype outside."""

from __future__ import annotations

import torch
from torch import Tensor

_MIXABLE = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.complex32,
)


def check_dense(x: Tensor, operation: str) -> Tensor:
    """x without its autograd history.

    Raises:
        TypeError: if it is not a dense tensor on a CPU or CUDA device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{operation} takes a torch.Tensor, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_quantized or x.device.type not in ("cpu", "cuda"):
        raise TypeError(
            f"{operation} takes dense tensors on cpu or cuda, not a {x.dtype} tensor with layout {x.layout} on {x.device}"
        )
    return x.detach()


def check_mixable(x: Tensor, out: Tensor | None) -> None:
    """What averaging asks of its input and `out`.

    Raises:
        TypeError: for a dtype that has no averages.
        ValueError: if `out` is not like x.
    """
    if x.dtype not in _MIXABLE:
        raise TypeError(
            f"a {x.dtype} tensor cannot be averaged: convert it to a floating-point dtype (x.float()); neighbor_allgather "
            f"takes every dtype"
        )
    if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out is {describe(out)} on {out.device}, but must be {describe(x)} on {x.device} like the input"
        )


def describe(x: Tensor, shape: str | None = None) -> str:
    """Dtype and shape, in a reader's words."""
    return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {shape or tuple(x.shape)}"


def flat_view(x: Tensor) -> Tensor:
    """All elements of x in row-major order, complex ones as (real, imaginary); a view of x if it lies so in memory."""
    # A conjugated view is contiguous but its memory is not conjugated, and memory is what travels.
    flat = x.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def deliver(flat: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """The result in x's dtype and shape, in `out` if given."""
    if x.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    result = flat.view(x.shape)
    return result if out is None else out.copy_(result)
