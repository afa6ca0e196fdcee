"""Sampled words of parameters on a GPU: kept as they are sent, and compared before the next pass. One launch each."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

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


def launch(addresses: torch.Tensor, seen: torch.Tensor, edits: torch.Tensor, compare: bool) -> None:
    """One launch on the current stream of the tensors' device.

    Args:
        addresses: int64 [N], N a multiple of `BLOCK`; seen: int16 [N]; edits: fp32 [N / BLOCK], counts that only grow.
        compare: count words that are no longer what they were; else keep them.
    """
    elsewhere = addresses.is_cuda and addresses.get_device() != torch.cuda.current_device()
    with torch.cuda.device(addresses.device) if elsewhere else nullcontext():
        sample_words[(len(edits),)](addresses, seen, edits, COMPARE=compare, BLOCK=BLOCK)
