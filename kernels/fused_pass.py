"""The GPU pass: one kernel that loads, mixes, calls a rule and stores, and its launcher.

Every access to a flat tensor is as wide as its layout allows: 128 bits a thread, or 64 where four 2-byte elements meet
four 4-byte ones. Three things make it so. Parameters start at multiples of 64 elements. The last block of a parameter
is masked at the next multiple of 64 instead of at its length: lanes between the two are padding, which is stored back
bit for bit as loaded. And a full block reads its gradient, which has no padding, without a mask.

Scalars arrive as floats, which never become part of the compile key; the rule, the number of neighbours, states and
messages, and the dtypes do. Passes that are recorded read them from the device. No autotuning: passes work in place.

No tuple holds a None, neither among arguments nor among results: Triton before 3.7 doesn't compile that. What is absent
in one place of a tuple is a bit of a constexpr instead, or follows from a dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import rules
from .launcher import Constants, Launcher
from .lossy import give, mix_wired, nearest, restored, stochastic
from .passes import Pass
from .region import ALIGNMENT, BLOCK
from .warps import num_warps
from .wire import CompressedChannel

Tensors = tuple[torch.Tensor, ...]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Off: contraction into fused multiply-adds differs between compiler versions and with it the bits of a run. The pass is
# bound by memory traffic, not by arithmetic.
FP_FUSION = False

_ALIGNMENT = tl.constexpr(ALIGNMENT)

# Pointers to single numbers and to rows of tables, which callers cut at any row. Whether they are aligned to 16 bytes says
# nothing about the code, and must not make another kernel of it.
_UNALIGNED = ["blocks", "steps", "addresses", "grad_scale", "found_inf", "extra", "norm_sums", "numbers"]


@triton.jit
def load_gradient(address, offset, lanes, n, present, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient block, from the table's address; zeros behind its end and where there is none."""
    # The offset is added to the pointer, not to the integer: only so does the compiler see that both are aligned.
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + offset
    if present & (n == BLOCK):  # noqa: SIM108 (a branch, not a select of two loads)
        g = tl.load(pointer + lanes)
    else:
        g = tl.load(pointer + lanes, mask=(lanes < n) & present, other=0.0)
    return g.to(tl.float32)


@triton.jit
def mix_one(
    base, sent, inbox, weights, row_sum, alarm, FIRST: tl.constexpr, at, lanes, real, inside, BLOCK: tl.constexpr
):
    """`row_sum*base + sum_k weights[k]*(inbox[FIRST + k] - sent)` without neighbours of weight 0; see `Mixing.alarm`."""
    mixed = row_sum * base
    tainted = 0.0
    for k in tl.static_range(len(weights)):
        received = tl.load(inbox[FIRST + k] + at, mask=inside).to(tl.float32)
        difference = tl.where(weights[k] != 0.0, received - sent, 0.0)
        if alarm is not None:
            # NaN from the first difference on that is not finite: one store at the end, as one between loads would hold up
            # those behind it, and one for each neighbour costs registers (AdamW in bf16 with two neighbours 62 for 48).
            tainted += difference * 0.0
            difference = tl.where(tl.abs(difference) < float("inf"), difference, 0.0)
        mixed += weights[k] * difference
    if alarm is not None:
        # As wide as the parameters' own accesses, or the mask would go through shared memory.
        WIDTH: tl.constexpr = 128 // alarm.dtype.element_ty.primitive_bitwidth
        ones = tl.full([BLOCK], 1.0, tl.float32).to(alarm.dtype.element_ty)
        tl.store(alarm + lanes % WIDTH, ones, mask=real & (tainted != tainted))
    return mixed


@triton.jit
def loaded(numbers, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of consecutive numbers."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(numbers + (FIRST + i)),)  # noqa: RUF005
    return values


@triton.jit
def store(pointer, at, value, lanes, n, inside, BLOCK: tl.constexpr):
    """Stores the first n values and leaves the padding behind them bit for bit as it is."""
    # Padding may hold anything, NaNs too. It is read again here, by last blocks only (elsewhere the mask switches the
    # load off), because keeping every block's old values to the end costs registers: AdamW at 8 a thread 96, not 72.
    old = tl.load(pointer + at, mask=inside & (n != BLOCK))
    tl.store(pointer + at, tl.where(lanes < n, value.to(old.dtype), old), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def fused_pass(
    # What the pass goes over, its own tensors and numbers.
    param,
    states,
    messages,
    blocks,
    hyper,
    extra,
    norm_sums,
    # `Mixing`.
    sent,
    inbox,
    weights,
    row_sum,
    alarm,
    # `GradientInputs`.
    addresses,
    grad_scale,
    found_inf,
    steps,
    advance,
    # `Precision`.
    remainder,
    seed,
    # `Compression`.
    taken,
    neighbor_deltas,
    inbox_scales,
    strength,
    given,
    replicas,
    spoilt,
    # Numbers of a recorded pass, in the place of row_sum, weights, hyper, seed and strength.
    numbers,
    # What makes another kernel.
    RULE: tl.constexpr,
    NAMES: tl.constexpr,
    LEFT: tl.constexpr,
    OWN: tl.constexpr,
    ZERO_MISSING: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one parameter. Arguments come in the groups of a `Pass`, in its order.

    They are no tuples, one for each group, because of the Nones among them. `inbox` holds the K buffers of message 0, then
    those of message 1, and so on.

    `taken` and `given` hold codes and scales in turn. Formats without scales have their codes in the scales' places, here and
    in `inbox_scales`. Bit m of OWN says that sent[m] is `param`, which is read but once; bit 0 of LEFT that the rule leaves
    x as it was, and bit 1 + s that it leaves state s, which are then not stored.
    """
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    # ptxas would rather spill than keep fewer blocks on a multiprocessor. Triton 3.7.1 spills 8 bytes: on sm_100 of tracking if
    # the offset is read here, and if the index is not, with int8; there of AdamW on fp16 with a master copy if `padded` is made
    # by `//`; and on sm_80 of tracking with amsgrad and no alarm if it is made by `&`.
    index, n = tl.load(row), tl.load(row + 2).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    at = tl.multiple_of(tl.load(row + 3), _ALIGNMENT) + lanes
    above = n + (_ALIGNMENT - 1)
    padded = above // _ALIGNMENT * _ALIGNMENT if remainder is None else above & -_ALIGNMENT
    inside, real = lanes < tl.multiple_of(padded, _ALIGNMENT), lanes < n
    K: tl.constexpr = len(weights)
    HYPER: tl.constexpr = len(hyper)
    if numbers is not None:
        row_sum = tl.load(numbers)
        weights, hyper = loaded(numbers, 1, K), loaded(numbers, 1 + K, HYPER)
        SEEDS: tl.constexpr = 0 if seed is None else 1
        if strength is not None:
            strength = tl.load(numbers + (1 + K + HYPER + SEEDS))
        if seed is not None:
            seed = tl.load(numbers + (1 + K + HYPER))
    if seed is not None:
        seed = tl.cast(seed, tl.int32)

    stored = tl.load(param + at, mask=inside)
    x = restored(stored, remainder, at, inside)
    first = x
    # Device code has no `(*mixed, ...)`.
    mixed = ()
    for m in tl.static_range(len(sent)):
        base = x if OWN >> m & 1 else tl.load(sent[m] + at, mask=inside).to(tl.float32)
        if m == 0:
            first = base
        if len(neighbor_deltas) != 0:
            one = mix_wired(
                base,
                taken[2 * m],
                taken[2 * m + 1],
                neighbor_deltas[m],
                inbox,
                inbox_scales,
                weights,
                row_sum,
                strength,
                m * K,
                at,
                real,
                inside,
            )
        else:
            got = stored.to(tl.float32) if OWN >> m & 1 else base
            one = mix_one(base, got, inbox, weights, row_sum, alarm, m * K, at, lanes, real, inside, BLOCK)
        mixed = mixed + (one,)  # noqa: RUF005
    old_states = ()
    for s in tl.static_range(len(states)):
        old_states = old_states + (tl.load(states[s] + at, mask=inside).to(tl.float32),)  # noqa: RUF005

    update = True
    g = tl.zeros([BLOCK], tl.float32)
    if addresses is not None:
        address = tl.load(addresses + index)
        offset = tl.multiple_of(tl.load(row + 1), 16)
        present = address != 0
        if found_inf is not None:
            present = present & (tl.load(found_inf) == 0.0)
        g = load_gradient(address, offset, lanes, n, present, GRAD_DTYPE, BLOCK)
        if grad_scale is not None:
            # The scale of gradients that overflowed may be NaN.
            g *= tl.where(present, tl.load(grad_scale), 0.0)
        if not ZERO_MISSING:
            update = present
    if norm_sums is not None:
        # Sums over a block go through shared memory, a few hundred bytes: only passes that were asked for them do that.
        apart = tl.where(real, mixed[0] - row_sum * first, 0.0)
        place = norm_sums + tl.program_id(0).to(tl.int64) * 2
        tl.store(place, tl.sum(apart * apart))
        tl.store(place + 1, tl.sum(g * g))
    step = 1.0
    if steps is not None:
        step = tl.load(steps + tl.program_id(0)) + 1.0
        # Every warp reads the count and one thread writes it: not before all have read it. Here, not at the end, so that
        # nothing of it takes registers meanwhile.
        tl.debug_barrier()
        tl.store(steps + tl.program_id(0), step + tl.where(update, advance - 1.0, -1.0))
    if extra is not None:
        hyper = hyper + (tl.load(extra).to(tl.float32),)  # noqa: RUF005

    if NAMES is not None:
        hyper = NAMES(*hyper)
    x_new, new_states, made = RULE(x, mixed, g, old_states, step, hyper)
    if not LEFT & 1:
        x_new = tl.where(update, x_new, mixed[0])
        if remainder is not None:
            kept = nearest(x_new, stored.dtype)
            store(param, at, kept, lanes, n, inside, BLOCK)
            if remainder.dtype.element_ty == tl.float32:
                store(remainder, at, x_new, lanes, n, inside, BLOCK)
            else:
                store(remainder, at, nearest(x_new - kept, stored.dtype), lanes, n, inside, BLOCK)
        elif seed is not None and stored.dtype != tl.float32:
            store(param, at, stochastic(x_new, stored.dtype, seed, 0, at), lanes, n, inside, BLOCK)
        else:
            store(param, at, x_new, lanes, n, inside, BLOCK)
    for s in tl.static_range(len(states)):
        if not LEFT >> (1 + s) & 1:
            state = new_states[s]
            if seed is not None and states[s].dtype.element_ty != tl.float32:
                state = stochastic(state, states[s].dtype.element_ty, seed, 1 + s, at)
            store(states[s], at, state, lanes, n, inside & update, BLOCK)
    tl.static_assert(len(messages) == 0 or len(messages) == len(made), "one buffer per message of the rule, or none")
    tl.static_assert(len(replicas) == 0 or len(replicas) == len(made), "one wire per message of the rule, or none")
    for m in tl.static_range(len(messages)):
        unmade = mixed[m] if m < len(mixed) else mixed[0]
        store(messages[m], at, tl.where(update, made[m], unmade), lanes, n, inside, BLOCK)
    for m in tl.static_range(len(replicas)):
        unmade = mixed[m] if m < len(mixed) else mixed[0]
        value = tl.where(update, made[m], unmade)
        give(value, given[2 * m], given[2 * m + 1], replicas[m], spoilt, at, lanes, real, inside, BLOCK)


LAUNCHER = Launcher(fused_pass)


def launch(work: Pass) -> None:
    """`fusedfog.kernels.run_pass` on the GPU: one launch, on the current stream of param's device; raises as `arguments_of`."""
    arguments, constants = arguments_of(work)
    LAUNCHER.launch(work.region.blocks.shape[0], arguments, constants)  # type: ignore[union-attr]  # seen to


def warm(work: Pass) -> None:
    """Compile the kernel that `launch` would launch, and launch nothing. Only dtypes and what there is of a pass count."""
    LAUNCHER.warm(*arguments_of(work))


def arguments_of(work: Pass) -> tuple[tuple[Any, ...], Constants]:
    """A pass as the kernel's arguments, and its constants.

    Raises:
        ValueError: for parameters or gradients that are not fp32, bf16 or fp16, or a missing block or address table.
    """
    param, grads, region = work.param, work.gradient.grads, work.region
    if param.dtype not in DTYPES or (grads is not None and grads.dtype not in DTYPES):
        grad_dtype = param.dtype if grads is None else grads.dtype
        raise ValueError(f"the GPU pass takes fp32, bf16 and fp16, not {param.dtype} with {grad_dtype} gradients")
    if region.blocks is None or (grads is not None and grads.addresses is None):
        raise ValueError("the GPU pass needs the region's block table and the gradients' address table")
    sent = tuple(work.mixing.sent) or (param,)
    received = tuple([tensor for message in work.mixing.inbox for tensor in message])
    return _arguments(work, sent, received), _constants(work, sent, received)


def _arguments(work: Pass, sent: Tensors, received: Tensors) -> tuple[Any, ...]:
    """The kernel's arguments, in its order; float(), because an int would be part of the compile key."""
    mixing, gradient, precision, compression = work.mixing, work.gradient, work.precision, work.compression
    taken, given = compression.taken, compression.given
    return (
        work.param,
        tuple(work.states),
        tuple(work.messages),
        work.region.blocks,
        tuple(map(float, work.hyper)),
        work.extra,
        work.norm_sums,
        # Mixing
        sent,
        received,
        tuple(map(float, mixing.weights)),
        float(mixing.row_sum),
        mixing.alarm if received and not taken else None,
        # GradientInputs
        None if gradient.grads is None else gradient.grads.addresses,
        gradient.grad_scale,
        gradient.found_inf,
        gradient.steps,
        float(gradient.advance),
        # Precision
        precision.remainder,
        None if precision.seed is None else float(precision.seed),
        # Compression
        _ends(taken),
        tuple([wire.neighbor_delta for wire in taken]),
        _scales(work) if compression.scales else (),
        float(compression.strength) if taken else None,
        _ends(given),
        tuple([wire.replica for wire in given]),
        compression.spoilt if given else None,
        work.numbers,
    )


def _constants(work: Pass, sent: Tensors, received: Tensors) -> Constants:
    """What makes another kernel, and how it is compiled."""
    param, grads, remainder, compression = work.param, work.gradient.grads, work.precision.remainder, work.compression
    others = [one.dtype for one in (*work.states, *work.mixing.sent, *received, *work.messages)]
    if remainder is not None:
        others.append(remainder.dtype)
    for wire in (*compression.taken, *compression.given):
        others += [wire.codes.dtype, wire.replica.dtype]
    return _constants_of(
        work.rule,
        sum([1 << m for m, tensor in enumerate(sent) if tensor is param]),
        work.gradient.missing,
        param.dtype,
        param.dtype if grads is None else grads.dtype,
        tuple(others),
        len(work.states) + (remainder is not None),
    )


@functools.cache
def _constants_of(
    rule: str,
    own: int,
    missing: str,
    param: torch.dtype,
    grad: torch.dtype,
    others: tuple[torch.dtype, ...],
    states: int,
) -> Constants:
    """The same of what it depends on; dtypes as `num_warps` has them."""
    compiled = {
        "RULE": getattr(rules, rule),
        "NAMES": rules.names_of(rule),
        "LEFT": rules.left_by(rule),
        "OWN": own,
        "ZERO_MISSING": missing == "zero",
        "GRAD_DTYPE": DTYPES[grad],
        "BLOCK": BLOCK,
    }
    return Constants(compiled, {"num_warps": num_warps(param, grad, others, states), "enable_fp_fusion": FP_FUSION})


def _scales(work: Pass) -> tuple[torch.Tensor, ...]:
    """The scales of what came, and codes in their place where there are none."""
    return tuple(
        codes if scales is None else scales
        for message in zip(work.mixing.inbox, work.compression.scales, strict=True)
        for codes, scales in zip(*message, strict=True)
    )


def _ends(channels: Sequence[CompressedChannel]) -> tuple[torch.Tensor, ...]:
    """Codes and scales of wires in turn; codes twice where there are no scales."""
    return tuple(
        tensor for wire in channels for tensor in (wire.codes, wire.codes if wire.scales is None else wire.scales)
    )
