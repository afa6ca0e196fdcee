"""What a pass goes over: the parameters of a region of a flat segment, and where their gradients lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK = 1024
"""Elements per GPU program. One value for every rule and dtype, so that a block table is built once and serves all."""

ALIGNMENT = 64
"""Every parameter starts at a multiple of this many elements, and every flat segment is padded to one: a start that is not
16-byte aligned turns each 128-bit access of the kernel into four scalar ones."""

ACCESS_BYTES = 16
"""Width of the kernel's accesses: a gradient's address is a multiple of it."""

TABLE_ALIGNMENT = 16
"""Where several tables of numbers or addresses share a tensor, each starts at a multiple of this many entries, so that all
pointers to them are aligned alike."""


def align(count: int, to: int = ALIGNMENT) -> int:
    """`count` rounded up to a multiple of `to`."""
    return -(-count // to) * to


@dataclass(frozen=True, eq=False)
class Region:
    """A contiguous run of parameters of one flat segment that one pass covers (for instance one bucket).

    Attributes:
        first: index in the segment of the region's first parameter.
        spans: (flat start, numel) of each parameter of the region; starts are multiples of 64.
        blocks: int64 [B, 4] on the device, one row per GPU program: parameter index in the segment, offset in the
            parameter (a multiple of 1,024), valid length (at most 1,024), flat start. None on the CPU.
        compiled: whether passes over it on the CPU are to be compiled.
    """

    first: int
    spans: tuple[tuple[int, int], ...]
    blocks: torch.Tensor | None
    compiled: bool = False


@dataclass(frozen=True, eq=False)
class Gradients:
    """Where this step's gradients lie; indexed by the parameter's index in its segment.

    A gradient must be dense and in the memory order of its parameter in the flat buffer, and 16-byte aligned on CUDA.

    Attributes:
        tensors: one gradient, or None, per parameter of the segment.
        addresses: int64 [P] on CUDA: each gradient's `data_ptr()`, or 0 for none. None on the CPU.
        dtype: the gradients' common dtype.
    """

    tensors: Sequence[torch.Tensor | None]
    addresses: torch.Tensor | None
    dtype: torch.dtype
