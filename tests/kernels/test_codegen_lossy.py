"""What the compiler makes of passes on 16-bit parameters and compressed messages: widths, registers and bytes.

AdamW on bf16 parameters moves 30 bytes an element with a master copy, 26 with a compensation, 22 without either, 8 less
with bf16 states, and 2 more for each neighbour. On fp32 parameters whose messages are compressed to 8 bits it moves
46 1/8 and 1 1/16 for each neighbour, to bf16 48 and 2, where uncompressed ones cost 28 and 4: replica and neighbor_delta
are read and written, 16 bytes. What is saved is saved on the network.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.passes import make_pass

triton = pytest.importorskip("triton")

from support import codegen  # noqa: E402
from support.codegen import full_block  # noqa: E402
from support.kernel_rules import ROWS  # noqa: E402

from fusedfog.kernels import BLOCK, CompressedChannel, Gradients, Pass, Region, fused_pass  # noqa: E402

_fresh_cache, compiler = codegen._fresh_cache, codegen.compiler  # pytest finds fixtures by these names
pytestmark = codegen.compiled_only

FP32, BF16, FP16, INT8, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
NAMES, WAYS = ("mix", "sgd-momentum", "adamw"), ("master", "kahan", "stochastic")
HALVES, FORMATS = (BF16, FP16), (BF16, INT8, FP8)
NEIGHBOURS, CAPABILITIES = codegen.NEIGHBOURS, codegen.CAPABILITIES
MOST = (64 if triton.__version__.startswith(("3.6.", "3.7.")) else 72, 80)
"""Registers of torch's rules with up to two neighbours, and with four of them. In bf16 states and rounded stochastically
3.5 needs 72 for momentum, and 3.9 needs 68 for AdamW."""
FLUSHING = {"sqrt.rn.ftz", "div.rn.ftz"} if triton.__version__.startswith("3.5.") else set()
"""What takes subnormals for zero: Triton 3.5 has no other correctly rounded root and quotient of Adam's moments."""


@dataclass(frozen=True)
class Variant:
    """A pass as the compiler tells them apart."""

    name: str
    neighbours: int = 1
    dtype: torch.dtype = FP32
    way: str | None = None
    state_dtype: torch.dtype = FP32
    wire: torch.dtype | None = None
    numbers: bool = False

    def __str__(self) -> str:
        parts = [
            self.name,
            str(self.neighbours),
            *(str(part).split(".")[-1] for part in (self.dtype, self.way, self.wire)),
        ]
        return "-".join(parts) + "-bf16-states" * (self.state_dtype == BF16) + "-numbers" * self.numbers

    def work(self, **changes: Any) -> Pass:
        row, neighbours = ROWS[self.name], self.neighbours
        seeded = self.way == "stochastic" or self.state_dtype == BF16
        taken = self.wire is not None and "x" in row.writes
        param, states = _flat(self.dtype), tuple(_flat(self.state_dtype) for _ in range(row.states))
        named = {"x": param, "message": _flat(self.dtype)}
        sent = tuple(named[part] if part in named else states[int(part)] for part in row.sent)
        remainder = {"master": FP32, "kahan": self.dtype}.get(self.way or "")
        found = {
            "grads": Gradients((None,), torch.zeros(1, dtype=torch.int64), self.dtype) if row.grads else None,
            "steps": torch.zeros(1),
            "sent": sent,
            "inbox": tuple(tuple(_flat(base.dtype) for _ in range(neighbours)) for base in sent or (param,)),
            "weights": (0.1,) * neighbours,
            "grad_scale": torch.ones(()),
            "found_inf": torch.zeros(()),
            "remainder": None if remainder is None else _flat(remainder),
            "seed": 5 if seeded else None,
            "numbers": torch.zeros(1 + neighbours + len(row.hyper) + seeded + taken) if self.numbers else None,
        }
        if self.wire is not None:
            ends = tuple(CompressedChannel.zeros(base, self.wire) for base in sent or (param,))
            found["spoilt"] = torch.zeros(4)
            found["given"] = ends[: row.messages] or tuple(
                CompressedChannel.zeros(param, self.wire) for _ in range(row.messages)
            )
            if taken:
                found["taken"] = ends
                found["inbox"] = tuple(tuple(_flat(self.wire) for _ in range(neighbours)) for _ in ends)
                found["scales"] = tuple((end.scales,) * neighbours for end in ends)
        region = Region(0, ((0, 2 * BLOCK),), torch.zeros(2, 4, dtype=torch.int64))
        return make_pass(row.rule, param, states, region=region, **{**found, "hyper": row.hyper, **changes})

    def accesses(self) -> tuple[Counter[torch.dtype], Counter[torch.dtype], Counter[torch.dtype]]:
        """How many flat tensors of each dtype are read, written, and read again where last blocks keep their padding.

        Scales are uint8. The gradient is not here.
        """
        row, work = ROWS[self.name], self.work()
        whole = {
            "x": work.param,
            **{str(s): state for s, state in enumerate(work.states)},
            "message": _flat(self.dtype),
        }
        remainder = [] if work.precision.remainder is None else [work.precision.remainder]
        stored = [whole[part] for part in row.writes] + (remainder if "x" in row.writes else [])
        sent = (row.sent or ("x",)) if "x" in row.writes else ()
        read = [whole[part] for part in dict.fromkeys([*row.reads.replace("g", ""), *sent])] + remainder
        channels: list[torch.Tensor | None] = []
        for end in work.compression.taken:
            # Its own codes matter only beside the neighbours'.
            channels += [end.neighbor_delta, *((end.codes, end.scales) if self.neighbours else ())]
        for end in work.compression.given:
            channels += [end.replica]
        for message, scales in zip(work.mixing.inbox, work.compression.scales or work.mixing.inbox, strict=True):
            channels += [*message, *(scales if work.compression.taken else ())]
        read += [flat for flat in channels if flat is not None]
        encoded = [
            part for end in work.compression.given for part in (end.codes, end.scales, end.replica) if part is not None
        ]
        encoded += [end.neighbor_delta for end in work.compression.taken]
        return tuple(Counter(flat.dtype for flat in flats) for flats in (read, [*stored, *encoded], stored))


def _flat(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(2 * BLOCK, dtype=dtype)


def wide(width: int, dtype: torch.dtype) -> Counter[str]:
    """The accesses with which a thread covers its `width` elements of one tensor; four scales serve four elements."""
    size = width * dtype.itemsize
    return Counter({"b32": 1} if size == 4 else {"v2.b32": 1} if size == 8 else {"v4.b32": size // 16})


def compiled(variant: Variant, compiler: codegen.Compiler, **changes: Any) -> Any:
    fused_pass.launch(variant.work(**changes))
    return compiler.compiled()[-1]


def check(variant: Variant, compiler: codegen.Compiler, folder: Path, most: int | None = None) -> int:
    """Asserts resources, widths and the bytes that a full block moves; the registers."""
    kernel = compiled(variant, compiler)
    usage, width = codegen.resources(kernel, folder), BLOCK // (32 * kernel.metadata.num_warps)
    assert (usage["STACK"], usage["LOCAL"], kernel.metadata.shared) == (0, 0, 0), usage
    assert "convert_layout" not in kernel.asm["ttgir"]
    flushing = set(re.findall(r"[\w.]+\.ftz\b", kernel.asm["ptx"]))
    assert flushing <= FLUSHING, "subnormals carry what fp16 rounds away"
    assert variant.wire != FP8 or "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]
    assert usage["REG"] <= (most or MOST[variant.neighbours > 2]), usage
    read, stored, padding = variant.accesses()
    grad = Counter([variant.dtype] if ROWS[variant.name].grads else [])
    expected: Counter[str] = Counter()
    for kind, dtypes in (("ld", read + padding + grad), ("st", stored)):
        for dtype, count in dtypes.items():
            expected.update({f"{kind} {access}": count * n for access, n in wide(width, dtype).items()})
    for dtype in grad:
        expected["ld b32" if dtype == FP32 else "ld b16"] += width  # The gradient of a last block.
    found = codegen.accesses(kernel)
    scalars = found - expected
    assert not expected - found, (found, expected)
    assert set(scalars) <= {"ld b64", "ld b32", "st b32"}, (found, expected)
    # The count of updates, and a store that only lanes with values that are not finite make.
    assert scalars["st b32"] <= 1 + width * len(variant.work().compression.given), (found, expected)
    numbers = 0 if not variant.numbers else len(variant.work().numbers)
    assert scalars["ld b64"] <= 5 and scalars["ld b32"] <= 4 + numbers, (found, expected)
    return usage["REG"]


def variants() -> tuple[list, list]:
    """All of them, and a part in which every way and every format meets every rule and most numbers of neighbours."""
    every, part = [], []

    def add(variant: Variant, chosen: bool, turn: int) -> None:
        able = [c for c in CAPABILITIES if variant.wire != FP8 or c >= 90]
        params = [pytest.param(variant, c, id=f"{variant}-sm{c}") for c in able]
        every.extend(params)
        part.extend([params[turn % len(able)]] * chosen)

    for r, name in enumerate(NAMES):
        for i, k in enumerate(NEIGHBOURS):
            for w, (way, wire) in enumerate(zip(WAYS, FORMATS, strict=True)):
                chosen = (r + i + w) % 3 == 0
                add(Variant(name, k, wire=wire), chosen, i)
                for d, dtype in enumerate(HALVES):
                    for s in range(1 + bool(ROWS[name].states)):
                        found = Variant(name, k, dtype, way, (FP32, BF16)[s])
                        add(found, chosen and d == (r + i // 2) % 2 and s == (i % 2 if ROWS[name].states else 0), i)
    return every, part


PRODUCT, PART = variants()


@pytest.mark.parametrize(("variant", "compiler"), PART, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers(variant, compiler, tmp_path):
    check(variant, compiler, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "compiler"), PRODUCT, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers_in_full(variant, compiler, tmp_path):
    check(variant, compiler, tmp_path)


@pytest.mark.parametrize(
    ("variant", "most"),
    [
        (Variant("adamw", 2, BF16, "master", wire=INT8), 64),
        (Variant("adamw", 2, BF16, "stochastic", BF16, wire=FP8), 72),
        (Variant("tracking", 2, wire=INT8), 64),
        (Variant("descend", 0, wire=INT8), 64),
        (Variant("adamw-tracking-amsgrad", 4, BF16, "kahan", BF16, wire=FP8), 104),
        (Variant("adamw", 2, BF16, "stochastic", BF16, numbers=True), 72),
        (Variant("adamw", 2, wire=FP8, numbers=True), 64),
    ],
    ids=str,
)
def test_both_at_once_and_numbers_on_the_device_need_no_memory_either(variant, most, compiler, tmp_path):
    check(variant, compiler, tmp_path, most)


# -- bytes ---------------------------------------------------------------------------------------------------------------


def bytes_per_element(variant: Variant, compiler: codegen.Compiler) -> float:
    kernel = compiled(variant, compiler)
    width = BLOCK // (32 * kernel.metadata.num_warps)
    found = Counter(full_block(kernel.asm["ptx"]))
    moved = (
        sum({".v2.b32": 8, ".v4.b32": 16}[kind] * count for (_, kind), count in found.items() if ".v" in kind) / width
    )
    narrow = 0.0
    if variant.wire is not None and variant.wire.itemsize == 1:
        # One access for four codes, and one for four scales, which sixteen threads share. Nothing is noted as a rule.
        assert width == 4 and found["st", ".b32"] == 2 + 1 + width
        scalars = 3  # found_inf, the gradient's scale and the step, which alone is written too
        pairs, odd = divmod(found["ld", ".b32"] - scalars, 2)
        assert (pairs, odd) == (1 + variant.neighbours, 0)
        narrow = (pairs + 1) * (1 + 1 / 16)
    return moved + narrow


@pytest.mark.parametrize(
    ("way", "state_dtype", "own"),
    [
        ("master", FP32, 30),  # g 2, p in and out 4, master 8, m 8, v 8
        ("kahan", FP32, 26),
        ("stochastic", FP32, 22),
        ("master", BF16, 22),
        ("kahan", BF16, 18),
        ("stochastic", BF16, 14),
    ],
)
def test_adamw_on_bf16_moves_what_it_needs(way, state_dtype, own, compiler):
    assert bytes_per_element(Variant("adamw", 2, BF16, way, state_dtype), compiler) == own + 2 * 2


@pytest.mark.parametrize(
    ("wire", "own", "each"),
    [
        # 28 for AdamW, neighbor_delta and replica in and out 16, codes in and out 2 or 4, their scales 1/8.
        (BF16, 28 + 16 + 4, 2),
        (INT8, 28 + 16 + 2 + 1 / 8, 1 + 1 / 16),
        (FP8, 28 + 16 + 2 + 1 / 8, 1 + 1 / 16),
    ],
    ids=str,
)
def test_adamw_with_compressed_messages_moves_what_it_needs(wire, own, each, compiler):
    assert bytes_per_element(Variant("adamw", 2, wire=wire), compiler) == own + 2 * each


# -- the compile key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [False, True])
def test_seeds_and_scalars_never_recompile(numbers, compiler):
    variant = Variant("adamw", 2, BF16, "stochastic", BF16, wire=INT8, numbers=numbers)
    hyper = len(ROWS["adamw"].hyper)
    for seed in (0, 1, 16, 17, 2**23, 2**24 - 1):
        scalars = {"hyper": (seed,) * hyper, "weights": (seed, 0.25), "row_sum": seed, "strength": seed}
        fused_pass.launch(variant.work(seed=seed, **scalars))
    assert len(compiler.compiled()) == 1


def test_structure_does_recompile(compiler):
    every = [Variant("mix", 1, BF16, way) for way in (None, *WAYS)]
    every += [Variant("mix", k, BF16, wire=INT8) for k in (1, 2)] + [Variant("mix", 1, BF16, numbers=True)]
    for variant in every:
        fused_pass.launch(variant.work())
    assert len(compiler.compiled()) == len(every)
