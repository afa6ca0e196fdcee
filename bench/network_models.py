"""The kinds of compute of the network bench, and the methods that train them.

device-like: each layer's forward and backward waits a fixed time with the CPU free, as it is while a GPU computes. Once with a
model of 2.4 MB in buckets of two layers, and once with one of 9.4 MB and every method's own default buckets.
real: a convolutional network, computed by the cores that also carry the messages. Its many operations per parameter keep
the share of the messages small, as in a ResNet.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fusedfog

_LR, _MOMENTUM = 1e-4, 0.9

UNGRADED = "all buckets of 25 MB"
"""In names of methods, for kinds with default buckets."""


@dataclass(frozen=True)
class Kind:
    """One kind of compute.

    Attributes:
        build: makes the layers, each with one weight, and a batch.
        waits: seconds that each layer's forward and backward wait, beside what the CPU computes.
        bucket_mb: size of an exchanged bucket, for every method: two layers. With None each method has its default.
    """

    build: Callable[[], tuple[list[nn.Module], Tensor]]
    waits: tuple[float, float]
    bucket_mb: float | None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the optimizers."""
        return {} if self.bucket_mb is None else {"bucket_mb": self.bucket_mb}


def _squares(width: int) -> tuple[list[nn.Module], Tensor]:
    return [nn.Linear(width, width, bias=False) for _ in range(12)], torch.randn(2, width)


def _convolutions() -> tuple[list[nn.Module], Tensor]:
    channels = [3, *[96] * 9]
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(channels)]
    return list(layers), torch.randn(12, 3, 12, 12)


KINDS = {
    "device-like": Kind(partial(_squares, 224), waits=(0.010, 0.020), bucket_mb=0.38),
    "device-like, 9.4 MB": Kind(partial(_squares, 443), waits=(0.0155, 0.031), bucket_mb=None),
    "real": Kind(_convolutions, waits=(0.0, 0.0), bucket_mb=0.6),
}


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, waits: tuple[float, float]) -> Tensor:
        ctx.backward_s = waits[1]
        time.sleep(waits[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.backward_s)
        return grad, None


class Model(nn.Module):
    """Layers with ReLU between them, each followed, and in backward preceded, by its kind's wait."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers, self.batch = kind.build()
        self.layers, self.waits = nn.ModuleList(layers), kind.waits

    def forward(self, x: Tensor) -> Tensor:
        """The loss, a scalar."""
        for layer in self.layers:
            x = torch.relu(layer(x))
            if any(self.waits):
                x = _Wait.apply(x, self.waits)
        return x.square().mean()

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's weight, in forward order."""
        return [p.nbytes for p in self.parameters()]


@dataclass
class Trainer:
    """One method with a model and optimizer of its own.

    Attributes:
        step: one whole training step.
        settle: waits for what is still in flight, so that the next method has the network to itself.
        blocked: seconds so far that the host waited for messages, as the optimizer itself counts; 0 where it does not.
    """

    step: Callable[[], object]
    settle: Callable[[], object] = lambda: None
    blocked: Callable[[], float] = lambda: 0.0


def _start(kind: Kind) -> tuple[Model, Tensor]:
    model = Model(kind)
    torch.manual_seed(1 + dist.get_rank())
    return model, torch.randn_like(model.batch)


def _loop(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _torch_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=_LR, momentum=_MOMENTUM, fused=True)


def _local(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    model, batch = _start(kind)
    return Trainer(_loop(model, batch, _torch_sgd(model.parameters())))


def _ddp(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    model, batch = _start(kind)
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        bucket_cap_mb=kind.bucket_mb,  # type: ignore[arg-type]  # a fraction works
        gradient_as_bucket_view=True,
    )
    return Trainer(_loop(wrapped, batch, _torch_sgd(wrapped.parameters())))


def time_phases(kind: Kind, steps: int) -> dict[str, float]:
    """Mean seconds of forward, backward and update of a local step."""
    model, batch = _start(kind)
    optimizer = _torch_sgd(model.parameters())
    seconds = dict.fromkeys(("forward_s", "backward_s", "update_s"), 0.0)
    for _ in range(steps):
        times = [time.perf_counter()]
        loss = model(batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        for phase, (begin, end) in zip(seconds, pairwise(times), strict=True):
            seconds[phase] += (end - begin) / steps
    return seconds


def _fusedfog(hierarchical: bool = False, **keywords: Any) -> Callable[[Kind, DeviceMesh | None], Trainer]:
    def build(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
        model, batch = _start(kind)
        optimizer = fusedfog.SGD(
            model.parameters(),
            lr=_LR,
            momentum=_MOMENTUM,
            mesh=mesh if hierarchical else None,
            **kind.options,
            **keywords,
        )
        return Trainer(_loop(model, batch, optimizer), optimizer.drain, lambda: optimizer.stats()["blocked_s"])

    return build


def _automatic(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    """The default, told which hosts are a machine: all of them have one name and one kernel here."""
    place = mesh.get_coordinate() if mesh is not None else None
    machine = f"machine {place[0]}" if place is not None else f"host {dist.get_rank()}"
    with mock.patch("fusedfog.optim.automatic.this_machine", lambda: machine):
        return _fusedfog()(kind, mesh)


def _four_neighbours(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    """Two to either side: 1.06 bytes of an element to each, about as many in all as one exact message has."""
    size = dist.get_world_size()
    shifts = [np.roll(np.eye(size), hop, axis=1) for hop in (0, 1, -1, 2, -2)]
    return _fusedfog(topology=fusedfog.topology.from_matrix(sum(shifts) / 5), wire_dtype="int8")(kind, mesh)


def _weighted(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    """Ranks of different weight."""
    return _fusedfog(topology="one_peer_exponential", weight=1.0 + dist.get_rank())(kind, mesh)


def _ungraded(**keywords: Any) -> Callable[[Kind, DeviceMesh | None], Trainer]:
    """The same with buckets of the largest size alone."""

    def build(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
        with mock.patch("fusedfog.params.layout.graded_bytes", lambda done, total, bucket_bytes: bucket_bytes):
            return _fusedfog(**keywords)(kind, mesh)

    return build


def _decent_dp(kind: Kind, mesh: DeviceMesh | None) -> Trainer:
    from decent_dp.ddp import DecentralizedDataParallel
    from loguru import logger

    logger.remove()
    model, batch = _start(kind)
    wrapped = DecentralizedDataParallel(
        model,
        lambda named: _torch_sgd([p for _, p in named]),
        topology="one-peer-exp",
        bucket_size_in_mb=25 if kind.bucket_mb is None else kind.bucket_mb,
        _local_world_size=1,
    )

    def settle() -> None:
        for work in wrapped._comm_ops:
            while work is not None and not work.is_completed():
                time.sleep(0.001)

    return Trainer(lambda: wrapped(batch).backward(), settle)


METHODS: dict[str, Callable[[Kind, DeviceMesh | None], Trainer]] = {
    "local": _local,
    "DDP": _ddp,
    "allreduce": _fusedfog(algorithm="allreduce"),
    "allreduce, fused_backward": _fusedfog(algorithm="allreduce", fused_backward=True),
    "AWC auto": _automatic,
    "AWC one-peer": _fusedfog(topology="one_peer_exponential"),
    "AWC one-peer pairs": _fusedfog(topology="one_peer_hypercube"),
    "AWC one-peer pairs, fused_backward": _fusedfog(topology="one_peer_hypercube", fused_backward=True),
    "AWC exponential": _fusedfog(topology="exponential"),
    "AWC exponential, int8": _fusedfog(topology="exponential", wire_dtype="int8"),
    "AWC four neighbours, int8": _four_neighbours,
    "AWC ring": _fusedfog(topology="ring"),
    "AWC adapt": _fusedfog(topology="one_peer_exponential", adapt=8),
    "AWC weights": _weighted,
    "ATC one-peer, fused_backward": _fusedfog(algorithm="atc", topology="one_peer_exponential", fused_backward=True),
    f"ATC one-peer, fused_backward, {UNGRADED}": _ungraded(
        algorithm="atc", topology="one_peer_exponential", fused_backward=True
    ),
    "AWC hierarchical": _fusedfog(hierarchical=True, topology="one_peer_exponential"),
    "decent-dp one-peer": _decent_dp,
}
"""How each method's trainer is built, by the name that tables give it. Collective: in the same order on every host.

"AWC auto" is what a user gets who says nothing: "AWC hierarchical" with several hosts a machine, else "AWC one-peer".
decent-dp's one-peer graph is that of the rows "pairs", where a rank waits for one other, bucket by bucket in backward, as
fused_backward does. On "AWC one-peer", the default graph, it waits for the rank it receives from and for the one it sends to.
"""


def installed(method: str) -> bool:
    """Whether a method's package can be imported."""
    return not method.startswith("decent-dp") or importlib.util.find_spec("decent_dp") is not None
