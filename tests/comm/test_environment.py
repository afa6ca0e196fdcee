"""Machines that cannot do what was asked say so, with the way out, before anything begins."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedfog
from fusedfog import environment
from fusedfog.comm import mixing
from fusedfog.kernels import device

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("version", "says"),
    [(None, "Triton is not installed"), ("3.4.0", "Triton 3.4.0 is too old"), ("2.1.0+cu", "too old")],
)
def test_gpu_parameters_need_triton(version: str | None, says: str) -> None:
    param = nn.Parameter(torch.ones(3))
    kept = param.data_ptr()
    with (
        mock.patch.object(device, "on_gpu", lambda where: True),
        mock.patch.object(environment, "triton_version", lambda: version),
        pytest.raises(fusedfog.UnsupportedEnvironment, match=says) as error,
    ):
        fusedfog.SGD([param], lr=0.1)
    assert "triton>=3.5" in str(error.value)
    assert param.data_ptr() == kept


@pytest.mark.parametrize("version", ["3.5.0", "3.10.1", "4.0.0+git1234"])
def test_newer_tritons_will_do(version: str) -> None:
    with (
        mock.patch.object(device, "on_gpu", lambda where: True),
        mock.patch.object(environment, "triton_version", lambda: version),
    ):
        environment.check_kernel(GPU)


def test_cpu_parameters_need_no_triton() -> None:
    with mock.patch.object(environment, "triton_version", lambda: None):
        fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1).step()


@pytest.mark.parametrize(
    ("capability", "dtype", "says"),
    [
        ((7, 5), torch.bfloat16, r"7\.5 and cannot make bf16 parameters \(weight\), which takes 8\.0: use fp32"),
        ((8, 0), torch.bfloat16, None),
        ((7, 5), torch.float16, None),
        ((8, 6), torch.float8_e4m3fn, r"8\.6 and cannot make fp8 .* takes 8\.9: use wire_dtype='int8'"),
        ((9, 0), torch.float8_e4m3fn, None),
    ],
)
def test_gpus_without_the_instructions(capability: tuple[int, int], dtype: torch.dtype, says: str | None) -> None:
    with mock.patch.object(torch.cuda, "get_device_capability", lambda place: capability):
        if says is None:
            environment.check_dtypes(GPU, {"parameters (weight)": dtype})
            return
        with pytest.raises(ValueError, match=says):
            environment.check_dtypes(GPU, {"states": torch.float32, "parameters (weight)": dtype})


@pytest.mark.parametrize(
    "keywords", [{"state_dtype": torch.bfloat16}, {"wire_dtype": "bf16"}, {}], ids=["states", "messages", "parameters"]
)
def test_construction_asks_for_what_it_will_use(keywords: dict[str, Any]) -> None:
    asked: dict[str, Any] = {}
    dtype = torch.float32 if keywords else torch.bfloat16
    with mock.patch("fusedfog.optim.build.missing_instructions", lambda place, dtypes: asked.update(dtypes)):
        fusedfog.AdamW([("weight", nn.Parameter(torch.ones(3, dtype=dtype)))], topology="ring", **keywords)
    assert torch.bfloat16 in asked.values()
    assert "parameters (weight)" in asked


def test_operations_do_without_triton() -> None:
    """They have no kernel of their own to lose: torch's, one after another, give the same numbers."""
    own, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    with (
        mock.patch.object(device, "on_gpu", lambda where: True),
        mock.patch.object(environment, "triton_version", lambda: None),
        mock.patch("fusedfog.comm.mixing.run_pass", side_effect=AssertionError),
    ):
        mixing.mix(own, [other], 0.5, [0.5], 0)
    assert own.tolist() == [2.0, 4.0]


def test_a_torch_without_nccl_cannot_join_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    moved: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", moved.append)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(fusedfog.UnsupportedEnvironment, match=r"rank 1: .* without it.* fusedfog.init\('gloo'\)"):
        fusedfog.init()
    assert moved == []
    assert not dist.is_initialized()
