"""Device functions for what is kept or sent in fewer bits; the twins of `rounding` and `wire`, which explain them."""

import triton
import triton.language as tl

from .rounding import SHORT
from .wire import FORMATS, GROUP, SPOILT

_SHORT = tl.constexpr(SHORT)
_GROUP = tl.constexpr(GROUP)
_SPOILT = tl.constexpr(SPOILT)
_FP8_TOP, _FP8_LARGEST = (tl.constexpr(value) for value in next(form for form in FORMATS.values() if form))
_INT8_TOP, _INT8_LARGEST = (tl.constexpr(value) for value in list(FORMATS.values())[-1])
# Adding it leaves no bits for fractions, so the sum is rounded to the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def hash32(value):
    """`rounding.hash32` of uint32 blocks."""
    value = ((value >> 16) ^ value) * 0x7FEB352D
    value = ((value >> 15) ^ value) * 0x846CA68B
    return (value >> 16) ^ value


@triton.jit
def noise(seed, STREAM: tl.constexpr, at):
    """`rounding.noise` at int64 places; uint32."""
    key = hash32(seed.to(tl.uint32) + STREAM * 16777216)
    return hash32((at.to(tl.uint32) + (at >> 32).to(tl.uint32) * 0x9E3779B9) ^ key)


@triton.jit
def stochastic(value, DTYPE: tl.constexpr, seed, STREAM: tl.constexpr, at):
    """`rounding.stochastic`: fp32 values that DTYPE, bf16 or fp16, holds exactly."""
    DROPPED: tl.constexpr = 16 if DTYPE.is_bf16() else 13
    SCALE: tl.constexpr = 1.0 if DTYPE.is_bf16() else 1.925929944387236e-34
    added = (noise(seed, STREAM, at) & ((1 << DROPPED) - 1)).to(tl.int32)
    bits = ((value * SCALE).to(tl.int32, bitcast=True) + added) & -(1 << DROPPED)
    return tl.where(tl.abs(value) < float("inf"), bits.to(tl.float32, bitcast=True) * (1.0 / SCALE), value)


@triton.jit
def nearest(value, DTYPE: tl.constexpr):
    """fp32 values rounded to the nearest that DTYPE holds, ties to even."""
    if DTYPE.is_bf16():
        # By hand: the interpreter truncates, and x is compared with what was stored.
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def restored(stored, remainder, at, inside):
    """`rounding.restored`: x from what the parameters hold, and what they lack of it."""
    x = stored.to(tl.float32)
    if remainder is not None:
        kept = tl.load(remainder + at, mask=inside)
        if kept.dtype == tl.float32:
            x = tl.where(nearest(kept, stored.dtype) == x, kept, x)
        else:
            kept = kept.to(tl.float32)
            x = tl.where(nearest(x + kept * _SHORT, stored.dtype) == x, x + kept, x)
    return x


@triton.jit
def decode(codes, scales, at, inside):
    """`wire.decode` of the codes at `at`; bf16 has no scales."""
    value = tl.load(codes + at, mask=inside).to(tl.float32)
    # Not an early return: the compiler would go on behind it, without scales.
    if codes.dtype.element_ty == tl.bfloat16:
        difference = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    else:
        exponent = tl.load(scales + at // _GROUP * 4 + at % 4, mask=inside).to(tl.int32)
        difference = tl.where(exponent == _SPOILT, 0.0, value * (exponent << 23).to(tl.float32, bitcast=True))
    return difference


@triton.jit
def mix_wired(
    base,
    codes,
    scales,
    neighbor_delta,
    inbox,
    inbox_scales,
    weights,
    row_sum,
    strength,
    FIRST: tl.constexpr,
    at,
    real,
    inside,
):
    """`row_sum*base + strength*neighbor_delta`, after `wire.take`."""
    own = decode(codes, scales, at, inside)
    pull = tl.load(neighbor_delta + at, mask=inside)
    for k in tl.static_range(len(weights)):
        received = decode(inbox[FIRST + k], inbox_scales[FIRST + k], at, inside)
        pull += tl.where(weights[k] != 0.0, weights[k] * (received - own), 0.0)
    pull = tl.where(real, pull, 0.0)
    tl.store(neighbor_delta + at, pull, mask=inside)
    return row_sum * base + strength * pull


@triton.jit
def note(spoilt, flag, lanes, BLOCK: tl.constexpr):
    """Ones in `flag`, if there is one, where `spoilt`."""
    if flag is not None:
        # Every lane that sees one writes the same one: no sum, and nothing at all as a rule. To four places, so that a
        # thread's four elements go side by side as everywhere: with one place, the mask would go through shared memory.
        tl.store(flag + lanes % 4, tl.full([BLOCK], 1.0, tl.float32), mask=spoilt)


@triton.jit
def give(value, codes, scales, replica, flag, at, lanes, real, inside, BLOCK: tl.constexpr):
    """`wire.give`; zeros go into the padding, and a one to `flag`, if there is one, where values are left out.

    Codes and scales are mostly those that `decode` has read in the same pass. A thread writes the codes that it has read
    itself. A scale is read by sixteen threads and written by one of them, without a barrier between: none is needed,
    because what is written is a maximum over those sixteen threads, taken by shuffles, of values for which each of them
    had to have read it. A grouping of other threads than those of one maximum would need `tl.debug_barrier()` here.
    """
    known = tl.load(replica + at, mask=inside)
    difference = tl.where(real, value - known, 0.0)
    if codes.dtype.element_ty == tl.bfloat16:
        code = nearest(difference, tl.bfloat16)
        tl.store(codes + at, code.to(tl.bfloat16), mask=inside)
        spoilt = ~(tl.abs(code) < float("inf"))
        note(spoilt & inside, flag, lanes, BLOCK)
        decoded = tl.where(spoilt, 0.0, code)
    else:
        FP8: tl.constexpr = codes.dtype.element_ty == tl.float8e4nv
        size = tl.where(tl.abs(difference) < float("inf"), tl.abs(difference), float("inf"))
        # Four maxima a thread, of sixteen threads: shuffles within a warp. Any other grouping takes shared memory.
        size = tl.max(tl.reshape(size, (BLOCK // _GROUP, _GROUP // 4, 4)), axis=1, keep_dims=True)
        size = tl.reshape(tl.broadcast_to(size, (BLOCK // _GROUP, _GROUP // 4, 4)), (BLOCK,))
        TOP: tl.constexpr = _FP8_TOP if FP8 else _INT8_TOP
        LARGEST: tl.constexpr = _FP8_LARGEST if FP8 else _INT8_LARGEST
        field = size.to(tl.int32, bitcast=True) >> 23
        spoilt = field == _SPOILT
        note(spoilt & inside, flag, lanes, BLOCK)
        exponent = tl.where(spoilt, _SPOILT, tl.maximum(field - TOP, 1))
        scaled = tl.where(spoilt, 0.0, difference * ((254 - exponent) << 23).to(tl.float32, bitcast=True))
        if FP8:
            code = tl.clamp(scaled, -LARGEST, LARGEST).to(tl.float8e4nv)
            tl.store(codes + at, code, mask=inside)
            decoded = code.to(tl.float32)
        else:
            decoded = tl.clamp(scaled + _TO_INTEGER - _TO_INTEGER, -LARGEST, LARGEST)
            tl.store(codes + at, decoded.to(tl.int8), mask=inside)
        decoded = tl.where(spoilt, 0.0, decoded * (exponent << 23).to(tl.float32, bitcast=True))
        # One thread in sixteen stores four scales, the same for all of them.
        tl.store(scales + at // _GROUP * 4 + at % 4, exponent.to(tl.uint8), mask=inside & (lanes % _GROUP < 4))
    tl.store(replica + at, tl.where(real, known + decoded, 0.0), mask=inside)
