"""Sampled words of parameters on a GPU: kept as they are sent, and compared before the next pass. One launch each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .launcher import Constants, Launcher

BLOCK = 256
"""Words of one program."""


@triton.jit
def sample_words(addresses, seen, edits, COMPARE: tl.constexpr, BLOCK: tl.constexpr):
    """Keep the 16-bit words at `addresses` [N] in `seen` [N], or count in `edits` [N / BLOCK] the programs that find others.

    As integers, so that a NaN equals itself.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(tl.load(addresses + at).to(tl.pointer_type(tl.int16)))
    if COMPARE:
        differ = tl.max((word != tl.load(seen + at)).to(tl.int32), 0)
        own = edits + tl.program_id(0)
        tl.store(own, tl.load(own) + differ.to(tl.float32))
    else:
        tl.store(seen + at, word)


LAUNCHER = Launcher(sample_words)
_CONSTANTS = {compare: Constants({"COMPARE": compare, "BLOCK": BLOCK}, {}) for compare in (False, True)}


def launch_of(
    addresses: torch.Tensor, seen: torch.Tensor, edits: torch.Tensor, compare: bool
) -> Callable[[], None]:
    """One launch on the current stream of the tensors' device, made whenever it is called; its kernel is compiled now.

    Args:
        addresses: int64 [N], N a multiple of `BLOCK`; seen: int16 [N]; edits: fp32 [N / BLOCK], counts that only grow.
        compare: count words that are no longer what they were; else keep them.
    """
    LAUNCHER.warm((addresses, seen, edits), _CONSTANTS[compare])
    return LAUNCHER.bound(edits.shape[0], (addresses, seen, edits), _CONSTANTS[compare])
