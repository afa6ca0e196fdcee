"""How x is kept in 16-bit parameters and states: the specification of the device functions in `lossy`.

Stochastic rounding adds uniform noise below the last kept bit and cuts: a value comes out as one of its two neighbours,
right on average, so that updates far smaller than the spacing of bf16 are not lost. The noise is a hash of seed, stream
and place in the flat buffer: it does not depend on the device, on how a pass is cut up, or on the order of threads, and
a resumed run makes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORT = 1 - 2**-8
"""What a Kahan compensation is multiplied by before it is asked whether param + remainder rounds to param.

A compensation is rounded itself, at most up to half a unit of `param`: a tie, which must not count as the next value.
"""

_MASK = 0xFFFFFFFF


def hash32(value: int) -> int:
    """Wellons' `lowbias32`, a permutation of the 32-bit integers in which every bit of the input moves all bits."""
    value = ((value >> 16) ^ value) * 0x7FEB352D & _MASK
    value = ((value >> 15) ^ value) * 0x846CA68B & _MASK
    return (value >> 16) ^ value


def seed_of(*parts: int) -> int:
    """A seed for `noise`, in [0, 2^24), that depends on all of `parts`."""
    seed = 0
    for part in parts:
        seed = hash32((seed + part) & _MASK)
    return seed & 0xFFFFFF


def noise(seed: int, stream: int, first: int, count: int) -> Tensor:
    """32 random bits for each of `count` places of a flat buffer from `first` on.

    `hash32((place mod 2^32 + 0x9E3779B9*(place div 2^32)) xor hash32(seed + 2^24*stream))`

    Args:
        seed: in [0, 2^24); stream: in [0, 256), tells the tensors of a pass apart.

    Returns:
        int64 [count], in [0, 2^32).
    """
    place = torch.arange(first, first + count)
    bits = (place + (place >> 32) * 0x9E3779B9) & _MASK ^ hash32(seed + (stream << 24))
    # Products wrap around in 64 bits, which leaves their lower halves right.
    bits = ((bits >> 16) ^ bits) * 0x7FEB352D & _MASK
    bits = ((bits >> 15) ^ bits) * 0x846CA68B & _MASK
    return (bits >> 16) ^ bits


def stochastic(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """fp32 values rounded to bf16 or fp16, up with the probability that keeps the mean; infinities and NaNs stay.

    Args:
        values: fp32; bits: as `noise` makes them, of the same shape.

    Returns:
        fp32 values that `dtype` holds exactly.
    """
    # fp16 keeps 10 bits and fp32 23. Scaled by 2^-112, fp16's subnormals are fp32's, and lose their bits at the same place.
    dropped, scale = (16, 1.0) if dtype == torch.bfloat16 else (13, 2.0**-112)
    scaled = (values * scale).view(torch.int32)
    rounded = (scaled + (bits & ((1 << dropped) - 1)).int()) & -(1 << dropped)
    return torch.where(values.isfinite(), rounded.view(torch.float32) * (1.0 / scale), values)


def restored(stored: Tensor, remainder: Tensor | None) -> Tensor:
    """x in the arithmetic dtype, of which 16-bit parameters hold what they can; see `Precision.remainder`."""
    if remainder is None:
        return stored.double() if stored.dtype == torch.float64 else stored.float()
    wide = stored.float()
    master = remainder.dtype == torch.float32
    near = remainder if master else wide + remainder.float() * SHORT
    return torch.where(near.to(stored.dtype) == stored, remainder if master else wide + remainder, wide)


def keep(value: Tensor, stored: Tensor, remainder: Tensor | None, bits: Tensor | None) -> None:
    """Write x to `stored` and what it lacks to `remainder`; without one, round stochastically if there are random bits."""
    if remainder is None:
        stored.copy_(value if bits is None else stochastic(value, stored.dtype, bits))
        return
    stored.copy_(value)
    remainder.copy_(value if remainder.dtype == torch.float32 else value - stored)
