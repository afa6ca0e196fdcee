"""What the compiler makes of the GPU pass, for three generations of GPUs and with none of them present.

The launcher itself runs, on CPU tensors, against a driver that claims a GPU and launches nothing. So the variants
judged here are those that a GPU would run: their alignments, warps and compile keys are the launcher's.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from fusedfog.kernels import BLOCK, Gradients, Region, adam_hyper, fused_pass, sgd_hyper  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(fused_pass.fused_pass, triton.JITFunction), reason="decorated for the interpreter"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "maximize": False, "nesterov": True}
ADAM = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
HYPER = {"mix": (), "sgd": sgd_hyper(SGD), "adam": adam_hyper({**ADAM, "decoupled_weight_decay": True})}
# (rule, states)
RULES = {"mix": ("mix", 0), "sgd": ("sgd", 0), "momentum": ("sgd", 1), "adam": ("adam", 2), "amsgrad": ("adam", 3)}
NEIGHBOURS, DTYPES, CAPABILITIES = (0, 1, 2, 4), (torch.float32, torch.bfloat16), (80, 90, 100)

PRODUCT = [
    pytest.param(rule, k, dtype, capability, id=f"{rule}-{k}-{str(dtype)[6:]}-sm{capability}")
    for rule in RULES
    for k in NEIGHBOURS
    for dtype in DTYPES
    for capability in CAPABILITIES
]
# Dtype and capability by one diagonal index: any two of the four parameters meet in every combination.
PAIRWISE = [
    pytest.param(rule, k, DTYPES[(r + i) % 2], CAPABILITIES[(r + i) % 3], id=f"{rule}-{k}-diagonal{r + i}")
    for r, rule in enumerate(RULES)
    for i, k in enumerate(NEIGHBOURS)
]


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory):
    """Kernels compiled here, and only those, whatever earlier runs left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


class Compiler:
    """A Triton driver for a GPU that is not there, and the kernels that launches have compiled for it."""

    def __init__(self, capability: int) -> None:
        self.device, self.target = f"sm_{capability}, absent", GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 2**16},
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        for kernel in (fused_pass.fused_pass, fused_pass.advance):
            kernel.device_caches.pop(self.device, None)

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def compiled(self, kernel=fused_pass.fused_pass) -> list:
        return list(kernel.device_caches[self.device][0].values())


@pytest.fixture
def compiler(request, monkeypatch):
    driver = Compiler(getattr(request, "param", 90))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return driver


def launch(
    rule: str,
    states: int,
    neighbours: int,
    dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    sent: int = 0,
    messages: int = 0,
    hyper: tuple[float, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    row_sum: float = 1.0,
    first_step: float = 0.0,
    blocks: int = 2,
    **options: object,
) -> None:
    def flat(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(2 * BLOCK, dtype=dtype)

    arguments = {
        "region": Region(0, ((0, 2 * BLOCK),), torch.zeros(blocks, 4, dtype=torch.int64)),
        "grads": Gradients((None,), torch.zeros(1, dtype=torch.int64), grad_dtype or dtype),
        "steps": torch.full((1,), first_step),
        "sent": tuple(flat(dtype) for _ in range(sent)),
        "inbox": tuple(tuple(flat(dtype) for _ in range(neighbours)) for _ in range(max(sent, 1))),
        "weights": (0.1,) * neighbours if weights is None else weights,
        "row_sum": row_sum,
        "messages": tuple(flat(dtype) for _ in range(messages)),
        "grad_scale": torch.ones(()),
        "found_inf": torch.zeros(()),
        **options,
    }
    hyper = HYPER[rule] if hyper is None else hyper
    fused_pass.launch(rule, flat(dtype), tuple(flat(torch.float32) for _ in range(states)), hyper, **arguments)


def accesses(kernel) -> Counter[str]:
    """How often each kind of global access stands in the PTX, as 'ld v4.b32' or 'st b16'."""
    found = re.findall(r"\b(ld|st)\.global((?:\.\w+)*)\s", kernel.asm["ptx"])
    return Counter(f"{kind} {width.strip('.')}" for kind, width in found)


def resources(kernel, folder: Path) -> dict[str, int]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def wide(width: int, dtype: torch.dtype) -> Counter[str]:
    """The accesses with which a thread covers its `width` elements of one tensor."""
    size = width * dtype.itemsize
    return Counter({"v2.b32": 1} if size == 8 else {"v4.b32": size // 16})


def check(kernel, folder: Path, loads: list[torch.dtype], stores: list[torch.dtype], grad: torch.dtype | None) -> None:
    """Asserts resources and that flat tensors of these dtypes, and nothing else, are loaded and stored, widely."""
    usage, width = resources(kernel, folder), BLOCK // (32 * kernel.metadata.num_warps)
    assert usage["REG"] <= 64, usage
    assert (usage["STACK"], usage["LOCAL"], kernel.metadata.shared) == (0, 0, 0), usage
    expected: Counter[str] = Counter()
    for kind, dtypes in (("ld", loads + ([grad] if grad else [])), ("st", stores)):
        for dtype in dtypes:
            expected.update({f"{kind} {access}": count for access, count in wide(width, dtype).items()})
    if grad:
        # The gradient of a last block, which ends where it ends.
        expected["ld b32" if grad == torch.float32 else "ld b16"] += width
    found = accesses(kernel)
    # The block's row, the address, found_inf, the scale and the step.
    scalars = found - expected
    assert not expected - found, (found, expected)
    assert set(scalars) <= {"ld b64", "ld b32"}, (found, expected)
    assert scalars["ld b64"] <= 5 and scalars["ld b32"] <= 3, (found, expected)


def check_pass(name: str, neighbours: int, dtype: torch.dtype, compiler: Compiler, folder: Path) -> None:
    rule, states = RULES[name]
    launch(rule, states, neighbours, dtype)
    (kernel,) = compiler.compiled()
    written = [dtype] + [torch.float32] * states
    # What is stored is read twice: once to be used, once, in last blocks, for the padding behind the values.
    check(kernel, folder, 2 * written + [dtype] * neighbours, written, None if rule == "mix" else dtype)


@pytest.mark.parametrize(("name", "neighbours", "dtype", "compiler"), PAIRWISE, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers(name, neighbours, dtype, compiler, tmp_path):
    check_pass(name, neighbours, dtype, compiler, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "neighbours", "dtype", "compiler"), PRODUCT, indirect=["compiler"])
def test_accesses_are_wide_and_stay_in_registers_in_full(name, neighbours, dtype, compiler, tmp_path):
    check_pass(name, neighbours, dtype, compiler, tmp_path)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_and_sent_tensors_are_wide_too(name, dtype, compiler, tmp_path):
    rule, states = RULES[name]
    launch(rule, states, 2, dtype, sent=1, messages=1)
    (kernel,) = compiler.compiled()
    written = [dtype] * 2 + [torch.float32] * states
    # Averaging what was sent does not look at the parameter, but for its padding.
    read = written + [dtype] * 3 + [torch.float32] * states + [dtype] * (rule != "mix")
    check(kernel, tmp_path, read, written, None if rule == "mix" else dtype)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2]
)
def test_other_dtypes_are_wide_too(dtype, grad_dtype, compiler, tmp_path):
    launch("sgd", 0, 1, dtype, grad_dtype=grad_dtype)
    (kernel,) = compiler.compiled()
    check(kernel, tmp_path, [dtype] * 3, [dtype], grad_dtype)


def test_eight_neighbours_need_no_local_memory(compiler, tmp_path):
    for name, (rule, states) in RULES.items():
        for dtype in DTYPES:
            compiler.__init__(90)
            launch(rule, states, 8, dtype)
            usage = resources(compiler.compiled()[0], tmp_path)
            assert usage["LOCAL"] == 0 and usage["REG"] <= 80, (name, dtype, usage)


def test_scalars_never_recompile(compiler):
    for value in (0.0, 1.0, 0.5, 16.0, 1, 0, 1e-30):
        weights, hyper = (value, 0.25), (value,) * len(HYPER["adam"])
        launch("adam", 2, 2, torch.float32, hyper=hyper, weights=weights, row_sum=value, first_step=float(value))
        launch("adam", 2, 2, torch.float32, blocks=int(value) + 3)
    assert len(compiler.compiled()) == 1


def test_structure_does_recompile(compiler):
    for neighbours in (0, 1):
        for options in ({}, {"found_inf": None}, {"messages": 1}, {"grads": None}):
            launch("sgd", 1, neighbours, torch.float32, **options)
    assert len(compiler.compiled()) == 8


def test_steps_advance_by_one_kernel_for_all_sizes(compiler):
    for count in (1, 2, 16, 1000, 5000):
        addresses = torch.zeros(count, dtype=torch.int64)
        fused_pass.launch_advance(torch.zeros(count), Gradients((), addresses, torch.float32), torch.zeros(()))
    assert len(compiler.compiled(fused_pass.advance)) == 1


def test_bits_do_not_depend_on_contraction(compiler):
    launch("adam", 3, 2, torch.float32)
    (kernel,) = compiler.compiled()
    fused = [line for line in kernel.asm["ptx"].splitlines() if re.search(r"\bfma\.rn(\.ftz)?\.f32", line)]
    assert fused == []
