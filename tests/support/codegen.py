"""What the compiler makes of launches with no GPU present: its kernels, their global accesses and what they take.

The launcher itself runs, on CPU tensors, against a driver that claims a GPU and launches nothing. Test modules take the
fixtures under their own names:

    _fresh_cache, compiler = codegen._fresh_cache, codegen.compiler
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedfog.kernels import BLOCK, Gradients, Region, fused_pass, samples
from support.kernel_rules import ROWS
from support.passes import make_pass

compiled_only = pytest.mark.skipif(
    not isinstance(fused_pass.fused_pass, triton.JITFunction), reason="decorated for the interpreter"
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NEIGHBOURS, CAPABILITIES = (0, 1, 2, 4), (80, 90, 100)


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
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None
        fused_pass.fused_pass.device_caches.pop(self.device, None)
        for launcher in (fused_pass.LAUNCHER, samples.LAUNCHER):
            launcher.forget()

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
    name: str,
    neighbours: int,
    dtype: torch.dtype,
    *,
    grad_dtype: torch.dtype | None = None,
    messages: bool = False,
    hyper: tuple[float, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    first_step: float = 0.0,
    blocks: int = 2,
    **options: object,
) -> None:
    def flat(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(2 * BLOCK, dtype=dtype)

    row, param = ROWS[name], flat(dtype)
    states = tuple(flat(torch.float32) for _ in range(row.states))
    named = {"x": param, "message": flat(dtype)}
    sent = tuple(named[part] if part in named else states[int(part)] for part in row.sent)
    arguments = {
        "region": Region(0, ((0, 2 * BLOCK),), torch.zeros(blocks, 4, dtype=torch.int64)),
        "grads": Gradients((None,), torch.zeros(1, dtype=torch.int64), grad_dtype or dtype) if row.grads else None,
        "steps": torch.full((blocks,), first_step),
        "sent": sent,
        "inbox": tuple(tuple(flat(base.dtype) for _ in range(neighbours)) for base in sent or (param,)),
        "weights": (0.1,) * neighbours if weights is None else weights,
        "row_sum": 1.0,
        "alarm": torch.zeros(16 // dtype.itemsize, dtype=dtype) if neighbours else None,
        "messages": tuple(flat(dtype) for _ in range(row.messages)) if messages else (),
        "grad_scale": torch.ones(()),
        "found_inf": torch.zeros(()),
        "missing": "skip",
        "extra": None if row.extra is None else torch.tensor(row.extra),
        **options,
    }
    fused_pass.launch(make_pass(row.rule, param, states, row.hyper if hyper is None else hyper, **arguments))


def accesses(kernel) -> Counter[str]:
    """How often each kind of global access stands in the PTX, as 'ld v4.b32' or 'st b16'."""
    found = re.findall(r"\b(ld|st)\.global((?:\.\w+)*)\s", kernel.asm["ptx"])
    return Counter(f"{kind} {width.strip('.')}" for kind, width in found)


def resources(kernel, folder: Path) -> dict[str, int]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def full_block(ptx: str) -> list[tuple[str, str]]:
    """The global accesses, as ("ld", ".v4.b32"), that a thread of a full block makes, whose parameter has a gradient.

    Predicates are followed as the hardware would: `n != 1024` is false, nothing is NaN, and every other comparison (a lane is
    inside, there is a gradient, no overflow was found) is true. So the padding that last blocks read again does not count, and
    neither does their masked gradient.
    """
    truth: dict[str, bool] = {}
    accesses: list[tuple[str, str]] = []
    skipping: str | None = None
    for line in ptx.splitlines():
        if skipping is not None:
            skipping = None if line.startswith(f"{skipping}:") else skipping
            continue
        parsed = re.match(r"\s*(?:@(!?)(%p\d+) )?([\w.]+)\s*(.*?);", line)
        if parsed is None:
            continue
        negated, guard, name, operands = parsed.groups()
        if guard is not None and truth[guard] == bool(negated):
            continue
        target, *sources = [operand.strip() for operand in operands.split(",")]
        if name.startswith("setp"):
            # Only the alarm asks for NaNs, by comparing values with themselves.
            nan = name.startswith("setp.nan") or (name.startswith("setp.neu") and sources[0] == sources[1])
            truth[target] = not nan and not (name.startswith("setp.ne.") and sources[-1] == str(BLOCK))
        elif name in ("and.pred", "or.pred"):
            truth[target] = (all if name == "and.pred" else any)(truth[source] for source in sources)
        elif name == "not.pred":
            truth[target] = not truth[sources[0]]
        elif name in ("bra", "bra.uni"):
            skipping = target
        elif access := re.match(r"(ld|st)\.global((?:\.\w+)+)", name):
            accesses.append(access.groups())
    return accesses
