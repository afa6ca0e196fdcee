"""The GPU's branches on CPU memory: over the stand-ins for NCCL and torch.cuda, with the CPU's passes for the kernel.

Their numbers are the gloo path's bit for bit, and nothing they do to memory that travels is left to chance.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from support import fake_cuda, ordered_backend
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import exchange

STEPS = 5
TINY = 2e-4
"""MB: several buckets."""

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    # One-peer graphs have two rounds on four ranks, and with them inboxes that not every step fills.
    "sgd awc": ("SGD", {"momentum": 0.9, "nesterov": True, "topology": "one_peer_exponential"}),
    "sgd awc static": ("SGD", {"topology": "exponential", "communicate_every": 2}),
    "sgd awc hooks": ("SGD", {"momentum": 0.9, "fused_backward": True}),
    "sgd atc": ("SGD", {"momentum": 0.9, "algorithm": "atc"}),
    "sgd atc hooks": ("SGD", {"algorithm": "atc", "fused_backward": True, "topology": "ring"}),
    "sgd tracking": ("SGD", {"momentum": 0.9, "algorithm": "momentum_tracking", "topology": "ring"}),
    "sgd push-sum": ("SGD", {"algorithm": "push_sum"}),
    "sgd averaging": ("SGD", {"global_average_every": 3}),
    "sgd int8": ("SGD", {"wire_dtype": "int8", "topology": "ring"}),
    "sgd mesh": ("SGD", {"mesh": True, "topology": "ring"}),
    "sgd allreduce": ("SGD", {"algorithm": "allreduce", "momentum": 0.9}),
    "sgd measured": ("SGD", {"measure": True, "max_grad_norm": 1.0}),
    "adamw awc": ("AdamW", {"weight_decay": 0.1}),
    "adamw awc hooks": ("AdamW", {"fused_backward": True, "topology": "exponential"}),
    # Numbers that fp32 holds: on a GPU recorded passes read them in fp32, on the CPU in fp64.
    "sgd capturable": ("SGD", {"momentum": 0.5, "capturable": True}),
    "sgd recorded": ("SGD", {"momentum": 0.5, "capturable": True, "recorded": True}),
}


class Model(nn.Module):
    """With a parameter that never has a gradient, and one that isn't row-major."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.idle = nn.Parameter(torch.randn(5))
        self.across = nn.Parameter(torch.randn(4, 9).t())
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.across)


def train(kind: str, options: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """A few steps of a rank on data of its own, the last ones with other learning rates, across a pause and a drain."""
    options = {"bucket_mb": TINY} | options
    recorded = options.pop("recorded", False)
    if options.pop("mesh", False):
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    torch.manual_seed(0)
    model = Model()
    opt = getattr(fusedfog, kind)(model.parameters(), lr=0.125, **options)
    data = torch.Generator().manual_seed(1 + dist.get_rank())
    graph = None
    for step in range(STEPS):
        inputs, wanted = (torch.randn(8, size, generator=data) for size in (6, 3))
        opt.param_groups[0]["lr"] = 0.125 / (1 + step // 3)
        opt.zero_grad(set_to_none=not recorded)
        (model(inputs) - wanted).square().mean().backward()
        if graph is None:
            opt.step()
        else:
            with opt.replaying():
                graph.replay()
        if recorded and step == 1 and torch.cuda.is_initialized():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
        if step == 2:
            opt.drain()
        elif step == 3:
            with opt.paused():
                model.last.bias.data.mul_(0.5)
    opt.drain()
    return [param.detach().clone() for param in model.parameters()], opt


def train_all(names: list[str]) -> dict[str, Any]:
    """Each by name, in one world; its parameters as bytes, or what went wrong."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            params, _ = train(*TRAINED[name])
            found[name] = [param.numpy().tobytes() for param in params]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@contextlib.contextmanager
def gpu_world(timeout: float = 20.0, **options: Any) -> Iterator[fake_cuda.Gpu]:
    ordered_backend.open_world(timeout, **options)
    with fake_cuda.pretend() as gpu:
        yield gpu


def train_all_on_gpu(names: list[str]) -> tuple[dict[str, Any], list[str], int]:
    with gpu_world() as gpu, gpu.watching():
        return train_all(names), gpu.races, len(gpu.passes)


@pytest.fixture(scope="module")
def trained(ranks: Pool) -> tuple[list[dict[str, Any]], list[Any]]:
    ordered_backend.build()
    names = list(TRAINED)
    return ranks.run(4, train_all, names), ranks.run(4, train_all_on_gpu, names, init=False)


@pytest.mark.parametrize("name", TRAINED)
def test_gpu_branches_train_as_the_gloo_path_does(trained: Any, name: str) -> None:
    for expected, (found, _, _) in zip(*trained, strict=True):
        assert not isinstance(expected[name], str), expected[name]
        assert not isinstance(found[name], str), found[name]
        assert found[name] == expected[name]
    assert len({bytes().join(found[name]) for found in trained[0]}) > 1 or "allreduce" in name


def test_nothing_is_left_to_chance(trained: Any) -> None:
    """Every use of memory that travels, on whatever stream, is ordered after the uses that it must not meet."""
    for _, races, passes in trained[1]:
        assert races == []
        assert passes > STEPS * len(TRAINED)
