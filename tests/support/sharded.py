"""A model that FSDP2 shards, on machines of which each is one node of the topology; what its tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fusedfog
from fusedfog.topology import from_matrix

TINY = 2e-4
"""MB; a parameter or two is a bucket."""
UNEVEN = from_matrix([[0.7, 0.3], [0.3, 0.7]])
"""Two machines that do not reach consensus in one step."""

Trajectory = list[dict[str, Tensor]]
"""The whole model at several steps."""


class Network(nn.Module):
    """Shapes that two shards split evenly, unevenly, and so that the second is empty; one parameter is never used."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second, self.last = nn.Linear(6, 11), nn.Linear(11, 8), nn.Linear(8, 1)
        self.scale, self.unused = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(3, 2))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * torch.tanh(self.second(torch.tanh(self.first(x)))))


def mesh_of(machines: int, local: int) -> DeviceMesh:
    return init_device_mesh("cpu", (machines, local), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in list(model.children())[:2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: nn.Module, step: int, member: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + member)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return (model(x.to(dtype)) - (x.sum(1, keepdim=True) * (1 + member)).to(dtype)).square().mean()


def iterate(model: nn.Module, opt: Any, first: int, last: int, dtype: torch.dtype = torch.float64) -> None:
    for step in range(first, last):
        opt.zero_grad()
        loss_of(model, step, dist.get_rank(), dtype).backward()
        opt.step()


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(value.detach()).clone() for name, value in model.state_dict().items()}


def furthest(one: Trajectory, other: Trajectory) -> float:
    pairs = zip(one, other, strict=True)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a)


def make(kind: str, model: nn.Module, **keywords: Any) -> Any:
    options = {"lr": 0.05, "topology": UNEVEN, "bucket_mb": TINY, **keywords}
    return getattr(fusedfog, kind)(model.parameters(), **options)


def build(kind: str, mesh: DeviceMesh | None = None, **keywords: Any) -> tuple[nn.Module, Any]:
    mesh = mesh or mesh_of(2, dist.get_world_size() // 2)
    model = shard(Network(keywords.pop("dtype", torch.float64)), mesh["shard"])
    return model, make(kind, model, mesh=mesh, **keywords)
