"""Message formats of fewer bits, and what makes lossy messages exact in the limit: neighbours' replicas.

What travels is not the value but its difference from what the neighbours know already (CHOCO-SGD, Koloskova et al. 2019):

    difference = value - replica;  codes = encode(difference);  replica += decode(codes)        sender
    neighbor_delta += sum_k w_k*(decode(codes_k) - decode(own codes));  mixed = value + s*neighbor_delta                receiver

Every rank so carries its own replica, and in `neighbor_delta` the weighted sum of its neighbours' replicas less its own. What the
format cannot hold stays in the difference and is sent later: that is the error feedback. As the ranks agree, differences
and with them all errors vanish, and the limit is that of exact messages. In doubly stochastic rounds neighbor_deltas sum to zero
over the ranks, so that the mean of the values is as without compression. s, CHOCO's consensus step size, is 1 by default, which
formats as fine as these allow. The sum is free of it, so it may change from step to step.

Eight-bit codes share a scale, a power of two, so that scaling is exact. Sixteen elements share one: of every 64 elements
at a multiple of 64, those of equal place modulo 4. Four scales in a row belong to 64 elements: a GPU thread that holds
four consecutive elements reads and writes them at once, and finds their maxima without shared memory. A group with
values that are not finite has scale 255, which means no difference: they are not spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
"""Elements at a multiple of this share four scales."""

ELEMENTS_PER_SCALE = GROUP // 4
"""How many elements share one scale."""

SPOILT = 255
"""The scale of a group with values that are not finite."""

FORMATS: dict[torch.dtype, tuple[int, float] | None] = {
    torch.bfloat16: None,
    torch.float8_e4m3fn: (8, 448.0),
    torch.int8: (6, 127.0),
}
"""dtype of codes -> (exponent of the largest power of two among them, largest code); None for formats without scales."""

_BF16_EXPONENT = 0x7F80

_FP8_PLACES = (0x87F00000 ^ 1 << 31) - (1 << 31)
"""Where the sign and the seven other bits of an fp8 code lie in an fp32 whose exponent is 120 too small; as int32."""

_NAMES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def wire_format(given: torch.dtype | str | None) -> torch.dtype | None:
    """dtype of compressed messages by name or dtype; None for messages as they are. ValueError for others."""
    found = _NAMES.get(given.lower()) if isinstance(given, str) else given
    if given is not None and found not in _NAMES.values():
        raise ValueError(f"wire_dtype is 'bf16', 'fp8' (e4m3), 'int8', their torch dtypes, or None; got {given!r}")
    return found


@dataclass(frozen=True, eq=False)
class CompressedChannel:
    """A rank's end of one compressed message.

    Attributes:
        codes: [N], what was last sent, of a dtype in `FORMATS`.
        scales: uint8 [N/16], the codes' exponents, biased as fp32's; None for formats without.
        replica: [N], in the arithmetic dtype, the sum of all that was sent: what the neighbours know of this rank.
        neighbor_delta: [N], in the arithmetic dtype, the weighted sum of what the neighbours' replicas have more than `replica`.
    """

    codes: Tensor
    scales: Tensor | None
    replica: Tensor
    neighbor_delta: Tensor

    @staticmethod
    def zeros(like: Tensor, dtype: torch.dtype) -> CompressedChannel:
        """A wire of codes `dtype` for a flat tensor; nobody knows anything yet."""
        arithmetic = torch.float64 if like.dtype == torch.float64 else torch.float32
        scales = torch.zeros(like.numel() // ELEMENTS_PER_SCALE, dtype=torch.uint8, device=like.device)
        return CompressedChannel(
            torch.zeros_like(like, dtype=dtype),
            None if FORMATS[dtype] is None else scales,
            torch.zeros_like(like, dtype=arithmetic),
            torch.zeros_like(like, dtype=arithmetic),
        )

    def spoilt(self) -> Tensor:
        """bool [], whether the last codes left out values that were not finite."""
        if self.scales is not None:
            return (self.scales == SPOILT).any()
        return ((self.codes.view(torch.int16) & _BF16_EXPONENT) == _BF16_EXPONENT).any()


def encode(difference: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of a flat tensor that starts at a multiple of 64.

    Args:
        difference: [n], in the arithmetic dtype.
        dtype: of the codes, one of `FORMATS`.

    Returns:
        [n] codes and the scales, uint8 [ceil(n/64)*4], or None for formats without.
    """
    form = FORMATS[dtype]
    if form is None:
        return difference.to(dtype), None
    top, largest = form
    count = difference.numel()
    flat = torch.nn.functional.pad(difference, (0, -count % GROUP)) if count % GROUP else difference
    # As bits, sizes are integers of the same order. In halves, because a reduction over 16 places takes a vector for each four.
    sizes = (flat.float().view(torch.int32) & 0x7FFFFFFF).view(-1, GROUP)
    for half in (32, 16, 8, 4):
        sizes = torch.maximum(sizes[:, :half], sizes[:, half:])
    fields = sizes >> 23
    spoilt = fields == SPOILT
    exponents = (fields - top).clamp_(min=1)
    # Times infinity, nothing is finite.
    inverse = (254 - exponents).masked_fill_(spoilt, 255).to(torch.uint8)
    scaled = (flat * _powers(inverse)).nan_to_num_(0.0, 0.0, 0.0).clamp_(-largest, largest)
    codes = (scaled.round_() if dtype == torch.int8 else scaled).to(dtype)
    return codes[:count], exponents.masked_fill_(spoilt, SPOILT).to(torch.uint8).view(-1)


def decode(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The difference that codes mean, a new tensor [n] in `dtype`; see `encode`."""
    if scales is None:
        return codes.to(dtype).nan_to_num_(0.0, 0.0, 0.0)
    count = codes.numel()
    powers = _powers(scales.masked_fill(scales == SPOILT, 0).view(-1, 4))[:count]
    if codes.dtype == torch.int8:
        return codes.to(dtype).mul_(powers)
    # By its bits: torch takes three nanoseconds for each of these.
    bits = (codes.view(torch.int8).int() << 20) & _FP8_PLACES
    return (bits.view(torch.float32) * 2.0**120).mul_(powers).to(dtype)


def scales_of(scales: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The scales of elements [start, stop); start is a multiple of 64."""
    return None if scales is None else scales[start // ELEMENTS_PER_SCALE : -(-stop // GROUP) * 4]


def take(
    wire: CompressedChannel, inbox: Sequence[Tensor], scales: Sequence[Tensor | None], weights: Sequence[float]
) -> Tensor:
    """Add to a wire's neighbor_delta what an exchange has brought, and return it.

    Args:
        wire: this rank's end, cut to a flat tensor that starts at a multiple of 64.
        inbox, scales: K neighbours' codes and scales, cut likewise; weights: K floats, those of 0 are skipped.
    """
    own = decode(wire.codes, wire.scales, wire.neighbor_delta.dtype)
    for codes, exponents, weight in zip(inbox, scales, weights, strict=True):
        if weight:
            wire.neighbor_delta.add_(decode(codes, exponents, own.dtype).sub_(own).mul_(weight))
    return wire.neighbor_delta


def give(wire: CompressedChannel, value: Tensor, flag: Tensor | None = None) -> None:
    """Write the codes that tell the neighbours `value`, and what they will know then.

    Args:
        wire: this rank's end, cut to a flat tensor that starts at a multiple of 64.
        value: of that size, in the arithmetic dtype.
        flag: fp32 [4], not all of it zero afterwards if values are left out that are not finite.
    """
    codes, scales = encode(value - wire.replica, wire.codes.dtype)
    wire.codes.copy_(codes)
    if wire.scales is not None and scales is not None:
        wire.scales.copy_(scales)
    wire.replica.add_(decode(codes, scales, value.dtype))
    if flag is not None:
        torch.maximum(flag, wire.spoilt().float(), out=flag)


def cut(wire: CompressedChannel, start: int, stop: int) -> CompressedChannel:
    """The part of a wire that belongs to elements [start, stop); start is a multiple of 64."""
    here = slice(start, stop)
    return CompressedChannel(
        wire.codes[here], scales_of(wire.scales, start, stop), wire.replica[here], wire.neighbor_delta[here]
    )


def _powers(biased: Tensor) -> Tensor:
    """2^(biased - 127), but 0 for 0 and infinity for 255, for each of n*64 elements, from uint8 [n, 4]."""
    # Four at a time, as one integer.
    spread = biased.contiguous().view(torch.int32).expand(-1, ELEMENTS_PER_SCALE).contiguous().view(torch.uint8)
    return (spread.view(-1).int() << 23).view(torch.float32)
