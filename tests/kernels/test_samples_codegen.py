"""The kernel that samples words compiles for GPUs, and moves no more than it has to."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from support import codegen  # noqa: E402

from fusedfog.kernels import samples  # noqa: E402

_fresh_cache, compiler = codegen._fresh_cache, codegen.compiler  # pytest finds fixtures by these names
pytestmark = codegen.compiled_only


@pytest.mark.parametrize("compiler", [80, 90], indirect=True)
def test_it_compiles(compiler: codegen.Compiler) -> None:
    addresses, seen = torch.zeros(512, dtype=torch.int64), torch.zeros(512, dtype=torch.int16)
    for compare in (False, True):
        samples.launch_of(addresses, seen, torch.zeros(2), compare)()
    keeping, comparing = compiler.compiled(samples.sample_words)
    assert (
        codegen.accesses(keeping)["st b16"] + codegen.accesses(keeping)["st v2.b16"] > 0
        or "st.global" in keeping.asm["ptx"]
    )
    assert comparing.asm["ptx"].count("st.global") == 1  # the count of the block alone
