"""What the compiler makes of the GPU pass, for three generations of GPUs and with none of them present.

The launcher itself runs, on CPU tensors, against a driver that claims a GPU and launches nothing. So the variants
judged here are those that a GPU would run: their alignments, warps and compile keys are the launcher's.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from support import codegen  # noqa: E402
from support.codegen import CAPABILITIES, NEIGHBOURS, Compiler, accesses, launch, resources  # noqa: E402
from support.kernel_rules import ROWS, SHAPES, Row  # noqa: E402

from fusedfog.kernels import BLOCK, Gradients, Region, rules  # noqa: E402

pytestmark = codegen.compiled_only
_fresh_cache, compiler = codegen._fresh_cache, codegen.compiler  # pytest finds fixtures by these names

DTYPES = (torch.float32, torch.bfloat16)
# Where 64 registers a thread do not do, what up to two neighbours and four of them take: measured, rounded up to 8, on the
# Triton that takes most, 3.8 or 3.9 (accum-adam with two neighbours takes 68 there, and 63 on 3.7; dag-amsgrad 73 and 62;
# adam-tracking 73, adamw-tracking-amsgrad 83, of which leaving out what is not finite takes the last few). Tracking with four
# neighbours in bf16 takes 74 on 3.5.0 and 3.9.0, and 72 or fewer between them.
REGISTERS = {
    "adamw-amsgrad": (64, 72),
    "accum-adam": (72, 80),
    "tracking": (64, 80),
    "adam-tracking": (80, 96),
    "adamw-tracking-amsgrad": (88, 104),
    "dag-amsgrad": (80, 80),
}


def neighbours_of(row: Row) -> tuple[int, ...]:
    """How many neighbours a rule is tried with; those that leave x alone come before an exchange."""
    return NEIGHBOURS if "x" in row.writes else (0,)


PRODUCT = [
    pytest.param(name, k, dtype, capability, id=f"{name}-{k}-{str(dtype)[6:]}-sm{capability}")
    for name in SHAPES
    for k in neighbours_of(ROWS[name])
    for dtype in DTYPES
    for capability in CAPABILITIES
]
AVERAGED = [parameters for parameters in PRODUCT if parameters.values[1]]
# Dtype and capability by one diagonal index: any two of the four parameters meet in every combination for torch's own
# rules, and in half of them for the others, whose averaging is the same.
PAIRWISE = [
    pytest.param(name, k, DTYPES[(r + i) % 2], CAPABILITIES[(r + i) % 3], id=f"{name}-{k}-diagonal{r + i}")
    for r, name in enumerate(SHAPES)
    for i, k in enumerate(neighbours_of(ROWS[name]))
    if ROWS[name].rule in ("mix", "sgd", "adam") or (r // 2 + i) % 2 == 0
]


def wide(width: int, dtype: torch.dtype) -> Counter[str]:
    """The accesses with which a thread covers its `width` elements of one tensor."""
    size = width * dtype.itemsize
    return Counter({"v2.b32": 1} if size == 8 else {"v4.b32": size // 16})


def check(
    kernel,
    folder: Path,
    loads: list[torch.dtype],
    stores: list[torch.dtype],
    grad: torch.dtype | None,
    most: int = 64,
    alarms: Sequence[torch.dtype] = (),
) -> None:
    """Asserts resources and that flat tensors of these dtypes, and nothing else, are loaded and stored, widely."""
    usage, width = resources(kernel, folder), BLOCK // (32 * kernel.metadata.num_warps)
    assert usage["REG"] <= most, usage
    assert (usage["STACK"], usage["LOCAL"], kernel.metadata.shared) == (0, 0, 0), usage
    expected: Counter[str] = Counter()
    for kind, dtypes in (("ld", loads + ([grad] if grad else [])), ("st", stores)):
        for dtype in dtypes:
            expected.update({f"{kind} {access}": count for access, count in wide(width, dtype).items()})
    if grad:
        # The gradient of a last block, which ends where it ends.
        expected["ld b32" if grad == torch.float32 else "ld b16"] += width
    for dtype in alarms:
        # One for each message and element, which no healthy thread makes.
        expected[f"st b{8 * dtype.itemsize}"] += width
    found = accesses(kernel)
    # The block's row, the address, found_inf, the scale, the step, read and counted, and the extra number.
    scalars = found - expected
    assert not expected - found, (found, expected)
    assert set(scalars) <= {"ld b64", "ld b32", "st b32"}, (found, expected)
    assert scalars["ld b64"] <= 5 and scalars["ld b32"] <= 4 and scalars["st b32"] <= 1, (found, expected)


def check_pass(
    name: str, neighbours: int, dtype: torch.dtype, compiler: Compiler, folder: Path, messages: bool = False, **options
) -> None:
    row = ROWS[name]
    launch(name, neighbours, dtype, messages=messages, **options)
    (kernel,) = compiler.compiled()

    def dtypes(parts) -> list[torch.dtype]:
        return [torch.float32 if part.isdigit() else dtype for part in parts]

    written = dtypes(row.writes) + [dtype] * row.messages * messages
    sent = (row.sent or ("x",)) if "x" in row.writes else ()
    averaged = dtypes(sent)
    # x is read once, even if it was sent too.
    read = dtypes(dict.fromkeys([*row.reads.replace("g", ""), *sent]))
    # What is stored is read a second time, in last blocks, for the padding behind the values.
    loads = read + neighbours * averaged + written
    most = REGISTERS.get(name, (64, 64))[neighbours > 2]
    alarms = [dtype] * len(averaged) * (neighbours > 0 and "alarm" not in options)
    check(kernel, folder, loads, written, dtype if row.grads else None, most, alarms)


@pytest.mark.parametrize(("name", "neighbours", "dtype", "compiler"), PAIRWISE, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers(name, neighbours, dtype, compiler, tmp_path):
    check_pass(name, neighbours, dtype, compiler, tmp_path, messages="x" not in ROWS[name].writes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "neighbours", "dtype", "compiler"), PRODUCT, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers_in_full(name, neighbours, dtype, compiler, tmp_path):
    check_pass(name, neighbours, dtype, compiler, tmp_path, messages="x" not in ROWS[name].writes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "neighbours", "dtype", "compiler"), AVERAGED, indirect=["compiler"])
def test_accesses_are_wide_where_what_is_not_finite_propagates(name, neighbours, dtype, compiler, tmp_path):
    check_pass(name, neighbours, dtype, compiler, tmp_path, alarm=None)


@pytest.mark.parametrize("name", [name for name in SHAPES if ROWS[name].messages and "x" in ROWS[name].writes])
def test_messages_are_wide_too(name, compiler, tmp_path):
    check_pass(name, 2, DTYPES[SHAPES.index(name) % 2], compiler, tmp_path, messages=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sent_tensors_are_wide_too(dtype, compiler, tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "mix", dataclasses.replace(ROWS["mix"], sent=("message",)))
    check_pass("mix", 2, dtype, compiler, tmp_path, messages=True)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2]
)
def test_other_dtypes_are_wide_too(dtype, grad_dtype, compiler, tmp_path):
    launch("sgd", 1, dtype, grad_dtype=grad_dtype)
    (kernel,) = compiler.compiled()
    check(kernel, tmp_path, [dtype] * 3, [dtype], grad_dtype, alarms=[dtype])


@pytest.mark.parametrize("missing", ["skip", "zero"])
def test_gradients_that_count_as_zero_cost_nothing(missing, compiler, tmp_path):
    launch("tracking", 1, torch.float32, missing=missing)
    (kernel,) = compiler.compiled()
    loads, stores = [torch.float32] * 8, [torch.float32] * 3
    check(kernel, tmp_path, loads, stores, torch.float32, alarms=[torch.float32] * 2)


@pytest.mark.parametrize(
    ("name", "most"),
    [("mix", 80), ("sgd-momentum", 80), ("adamw-amsgrad", 88), ("accum-adam", 96), ("adamw-tracking-amsgrad", 128)],
)
def test_eight_neighbours_need_no_local_memory(name, most, compiler, tmp_path):
    for dtype in DTYPES:
        compiler.__init__(90)
        launch(name, 8, dtype)
        usage = resources(compiler.compiled()[0], tmp_path)
        assert usage["LOCAL"] == 0 and usage["REG"] <= most, (dtype, usage)


@pytest.mark.parametrize("name", ["adamw", "adam-tracking", "quasi-global-adam-before", "accum-adam"])
def test_scalars_never_recompile(name, compiler):
    for value in (0.0, 1.0, 0.5, 16.0, 1, 0, 1e-30):
        weights, hyper = (value, 0.25), (value,) * len(ROWS[name].hyper)
        launch(name, 2, torch.float32, hyper=hyper, weights=weights, row_sum=value, first_step=float(value))
        launch(name, 2, torch.float32, blocks=int(value) + 3)
    assert len(compiler.compiled()) == 1


def test_a_kernel_kept_on_disk_is_another_one_once_its_numbers_change_places(compiler, monkeypatch):
    launch("sgd", 1, torch.float32)
    (kernel,) = compiler.compiled()
    names, before = rules.names_of("sgd"), kernel.src.hash()
    assert names.cache_key == "lr momentum undamped decay sign nesterov"
    monkeypatch.setattr(names, "cache_key", "momentum lr undamped decay sign nesterov")
    assert kernel.src.hash() != before


def test_structure_does_recompile(compiler):
    for neighbours in (0, 1):
        for options in ({}, {"found_inf": None}, {"messages": True}, {"grads": None}, {"missing": "zero"}):
            launch("sgd-momentum", neighbours, torch.float32, **options)
    assert len(compiler.compiled()) == 10


def test_counting_steps_or_not_is_one_kernel_and_every_warp_reads_before_one_thread_writes(compiler):
    for advance in (False, True):
        launch("sgd-momentum", 1, torch.float32, advance=advance, alarm=None)
    (kernel,) = compiler.compiled()
    text = kernel.asm["ptx"]
    assert text.index("bar.sync") < re.search(r"@%p\d+ st\.global\.b32", text).start()


@pytest.mark.parametrize("name", ["adamw-amsgrad", "dag-amsgrad", "adamw-tracking-amsgrad"])
def test_amsgrads_maximum_keeps_what_is_not_a_number(name, compiler):
    launch(name, 0, torch.float32)
    (kernel,) = compiler.compiled()
    assert set(re.findall(r"\bmax[.\w]*f32", kernel.asm["ptx"])) - {"max.f32"} == {"max.NaN.f32"}


@pytest.mark.parametrize("name", ["sgd-momentum", "quasi-global-adam-before"])
def test_tables_and_numbers_that_begin_anywhere_never_recompile(name, compiler):
    """Buckets cut figures, steps, addresses and block tables at any row; single numbers are places of larger tensors."""
    row, hyper = ROWS[name], len(ROWS[name].hyper)
    for first in range(5):
        offset = {  # In elements; figures have two a row, blocks four.
            "norm_sums": torch.zeros(16, 2)[first : first + 2],
            "steps": torch.zeros(16)[first : first + 2],
            "grads": Gradients((None,), torch.zeros(16, dtype=torch.int64)[first : first + 1], torch.float32),
            "region": Region(0, ((0, 2 * BLOCK),), torch.zeros(16, 4, dtype=torch.int64)[first : first + 2]),
            "numbers": torch.zeros(64)[first : first + 2 + hyper],
            **{key: torch.zeros(16)[first] for key in ("grad_scale", "found_inf")},
            "extra": None if row.extra is None else torch.zeros(16)[first],
        }
        launch(name, 1 if "x" in row.writes else 0, torch.float32, **offset)
    assert len(compiler.compiled()) == 1


def test_bits_do_not_depend_on_contraction(compiler):
    launch("adamw-amsgrad", 2, torch.float32)
    (kernel,) = compiler.compiled()
    fused = [line for line in kernel.asm["ptx"].splitlines() if re.search(r"\bfma\.rn(\.ftz)?\.f32", line)]
    assert fused == []


@pytest.mark.parametrize("compiler", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_figures_cost_a_little_shared_memory_and_two_stores(name, compiler, tmp_path):
    plain, measured = [], []
    for found, options in ((plain, {}), (measured, {"norm_sums": torch.zeros(2, 2)})):
        launch(name, 1, torch.float32, **options)
        found.append(compiler.compiled()[-1])
    usage = resources(measured[0], tmp_path)
    assert (usage["STACK"], usage["LOCAL"]) == (0, 0) and usage["REG"] <= 80
    assert 0 < measured[0].metadata.shared <= 256
    before, after = accesses(plain[0]), accesses(measured[0])
    assert after - before == Counter({"st b32": 2}) and not before - after
