"""Can this machine run the GPU pass: its Triton, its torch and its GPU."""

from __future__ import annotations

import functools
import importlib
import re

import torch

from fusedfog.errors import UnsupportedEnvironment
from fusedfog.kernels import device

_OLDEST_TRITON = (3, 5)
_BF16_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)


def check_kernel(place: torch.device) -> None:
    """Raise UnsupportedEnvironment if tensors on `place` need the Triton kernel and there is none that can compile it."""
    if device.on_gpu(place):
        found = triton_version()
        if found is None or tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST_TRITON:
            what = "Triton is not installed" if found is None else f"Triton {found} is too old"
            oldest = ".".join(map(str, _OLDEST_TRITON))
            raise UnsupportedEnvironment(
                f"{what}, and tensors on {place} take a Triton kernel that needs {oldest} or later: pip install "
                f"'triton>={oldest}' (torch 2.9 and later bring one), or keep the model on the CPU"
            )


@functools.cache
def triton_version() -> str | None:
    """The installed Triton's version; None if it cannot be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def missing_instructions(place: torch.device, dtypes: dict[str, torch.dtype | None]) -> tuple[str, str, str] | None:
    """What of {use: dtype} the GPU has no instructions for: (dtype and use, why, what to use instead)."""
    if place.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(place)
    for use, dtype in dtypes.items():
        if dtype == torch.bfloat16 and capability < _BF16_CAPABILITY:
            takes, instead = _BF16_CAPABILITY, "fp32 (model.float()) or fp16"
        elif dtype == torch.float8_e4m3fn and capability < _FP8_CAPABILITY:
            takes, instead = _FP8_CAPABILITY, "wire_dtype='int8', as many bits, or 'bf16'"
        else:
            continue
        kind = "bf16" if dtype == torch.bfloat16 else "fp8 (e4m3)"
        has = f"{place} has compute capability {capability[0]}.{capability[1]} and cannot make {kind} {use}"
        return f"{kind} {use}", f"{has}, which takes {takes[0]}.{takes[1]}", instead
    return None


def check_dtypes(place: torch.device, dtypes: dict[str, torch.dtype | None]) -> None:
    """Raise ValueError if the GPU has no instructions for one of these, {what it is for: dtype}."""
    found = missing_instructions(place, dtypes)
    if found is not None:
        _, why, instead = found
        raise ValueError(f"{why}: use {instead}")
