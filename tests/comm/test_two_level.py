"""The two-level exchange, by operation and by optimizer, against its dense formula in mesh coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fusedfog
from fusedfog import topology as topologies
from fusedfog.ops import hierarchical_neighbor_allreduce

UNEVEN = np.array([[0.5, 0.5, 0.0], [0.125, 0.375, 0.5], [0.375, 0.125, 0.5]])
"""Doubly stochastic, and no renumbering of the machines leaves it as it is."""

MESHES: list[tuple[list[list[int]], Any]] = [
    ([[1], [0], [2]], topologies.ring(3, "right")),
    ([[2], [0], [1]], topologies.from_matrix(UNEVEN)),
    ([[3, 1], [0, 2]], topologies.from_matrix(np.array([[0.75, 0.25], [0.25, 0.75]]))),
    ([[0, 1], [2, 3]], topologies.ring(2)),
    ([[2, 0, 1]], topologies.ring(1)),
    ([[3], [2], [0], [1]], topologies.one_peer_exponential(4)),
    ([[1, 0], [2, 3]], topologies.one_peer_exponential(2)),
    ([[5, 0], [1, 4], [3, 2]], topologies.from_matrix(UNEVEN)),
    ([[4, 2, 0], [1, 5, 3]], topologies.star(2)),
]


def values(rank: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(rank))


def dense(places: np.ndarray, machine_weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(W_machine (x) J_local) X: row r is rank r's, wherever the mesh puts it."""
    local = places.shape[1]
    order = places.reshape(-1)
    y = np.empty_like(x)
    y[order] = np.kron(machine_weights, np.full((local, local), 1 / local)) @ x[order]
    return y


def by_operation(mesh: DeviceMesh, graph: Any, count: int) -> Tensor:
    return hierarchical_neighbor_allreduce(values(dist.get_rank(), count), graph, mesh=mesh)


def by_optimizer(mesh: DeviceMesh, graph: Any, count: int) -> Tensor:
    """What one step of AWC with lr = 0 leaves: the mixed parameters. Two of them, in buckets of their own."""
    x = values(dist.get_rank(), count)
    params = [nn.Parameter(part.clone()) for part in x.tensor_split([count // 3])]
    opt = fusedfog.SGD(params, lr=0.0, topology=graph, mesh=mesh, inside="parameters", sync_init=False, bucket_mb=1e-4)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    return torch.cat([param.detach() for param in params])


def both(places: list[list[int]], graph: Any, count: int) -> tuple[Tensor, Tensor]:
    mesh = DeviceMesh("cpu", torch.tensor(places))
    return by_operation(mesh, graph, count), by_optimizer(mesh, graph, count)


@pytest.mark.parametrize("count", [13, 200])
@pytest.mark.parametrize(("places", "graph"), MESHES, ids=[str(places) for places, _ in MESHES])
def test_ranks_stand_where_the_mesh_puts_them(ranks: Pool, places: list[list[int]], graph: Any, count: int) -> None:
    n = sum(map(len, places))
    x = np.stack([values(rank, count).numpy() for rank in range(n)])
    want = dense(np.array(places), graph.matrix(), x)
    for rank, (operation, optimizer) in enumerate(ranks.run(n, both, places, graph, count)):
        np.testing.assert_allclose(operation.numpy(), want[rank], rtol=0, atol=1e-13)
        np.testing.assert_allclose(optimizer.numpy(), want[rank], rtol=0, atol=1e-13)
