"""Flat tensors lie in huge pages where the kernel has them, and nowhere else than `torch.zeros` would put them otherwise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import fusedfog
from fusedfog.params.pages import zeros

CPU = torch.device("cpu")
POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """The flags of the mapping that holds an address, as Linux shows them; "hg" says that huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("numel", [0, 1, 1000, 3 << 20])
def test_zeros(numel: int, dtype: torch.dtype):
    flat = zeros(numel, dtype, CPU)
    assert flat.shape == (numel,) and flat.dtype == dtype and flat.device == CPU
    assert not flat.view(torch.uint8).any()


@pytest.mark.skipif(sys.platform != "linux" or not POLICY.exists(), reason="this kernel has no huge pages to ask for")
def test_large_flat_tensors_ask_for_huge_pages():
    model = torch.nn.Linear(1500, 1500)
    optimizer = fusedfog.Adam(model.parameters())
    model(torch.randn(2, 1500)).sum().backward()
    optimizer.step()
    for tensor in (model.weight, optimizer.state[model.weight]["exp_avg"]):
        assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    assert "hg" not in flags_at(torch.zeros(8 << 20).data_ptr() + (16 << 20))
