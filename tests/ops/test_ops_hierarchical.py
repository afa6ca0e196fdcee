"""`hierarchical_neighbor_allreduce` against its dense formula, and the bytes it was designed to move."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusedfog import topology as topologies
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.transfer import PeerTensor
from fusedfog.ops import hierarchical_neighbor_allreduce, neighbor_allreduce

SHAPES: tuple[tuple[int, ...], ...] = ((4, 6), (7,), (3,), (), (0, 2), (5, 13))


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(rank))


def dense(machine_weights: np.ndarray, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(W_machine (x) J/L) X, with the ranks of X in the order of the mesh; back in rank order."""
    local = places.shape[1]
    full = np.kron(machine_weights, np.full((local, local), 1 / local))
    order = places.reshape(-1)
    y = np.empty_like(x)
    y[order] = np.tensordot(full, x[order], axes=1)
    return y


def check_mesh(mesh: DeviceMesh, tolerance: float = 1e-13) -> None:
    n, me, places = dist.get_world_size(), dist.get_rank(), mesh.mesh.numpy()
    machines = len(places)
    graphs: list[topologies.Topology] = [topologies.ring(machines), topologies.one_peer_exponential(machines)]
    if machines > 2:
        graphs += [topologies.star(machines), topologies.ring(machines, "right")]
    for graph in graphs:
        for shape in SHAPES:
            x = value(me, shape, torch.float64)
            kept, every = x.clone(), np.stack([value(r, shape, torch.float64).numpy() for r in range(n)])
            for step in range(graph.period or 1):
                y = hierarchical_neighbor_allreduce(x, graph, step, mesh=mesh)
                expected = dense(graph.matrix(step), every, places)[me]
                np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=tolerance, err_msg=f"{graph!r} {shape}")
            assert torch.equal(x, kept) and y.shape == x.shape


def everything(machines: int, local: int) -> None:
    me, n = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (machines, local), mesh_dim_names=("machines", "local"))
    check_mesh(mesh)
    # Coordinates are the mesh's, also where they are not in the order of ranks.
    shuffled = torch.arange(n).reshape(machines, local)
    shuffled = torch.stack([row.flip(0) if a % 2 else row for a, row in enumerate(shuffled)]).flip(0)
    shuffled[:, 0] = shuffled[:, 0].flip(0)
    check_mesh(DeviceMesh("cpu", shuffled))
    every = np.stack([value(r, (9,), torch.float32).double().numpy() for r in range(n)])
    ring = topologies.ring(machines)
    expected = torch.from_numpy(dense(ring.matrix(), every, mesh.mesh.numpy())[me])
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.complex64, 1e-6)):
        y = hierarchical_neighbor_allreduce(value(me, (9,), torch.float32).to(dtype), ring, mesh=mesh)
        assert y.dtype == dtype
        torch.testing.assert_close(y.real.double() if dtype.is_complex else y.double(), expected, rtol=0, atol=bound)
        peers: list[Any] = [None] * n
        dist.all_gather_object(peers, y)
        assert all(torch.equal(y, peers[r]) for r in mesh.mesh[mesh.get_coordinate()[0]].tolist())
    # A strided input, out=, and consensus kept bit for bit.
    x = value(me, (9, 2), torch.float32)[:, 1]
    out = torch.zeros(2, 9).T[:, 0]
    assert hierarchical_neighbor_allreduce(x, ring, mesh=mesh, out=out) is out
    same = torch.full((77,), 0.1, dtype=torch.bfloat16)
    assert torch.equal(hierarchical_neighbor_allreduce(same, mesh=mesh), same)
    # Several in flight, beside other operations; waited for or polled in the same order everywhere.
    works = [hierarchical_neighbor_allreduce(x + k, ring, mesh=mesh, async_op=True) for k in range(3)]
    neighbor_allreduce(x)
    deadline = time.monotonic() + 20
    while not works[0].is_completed():
        assert time.monotonic() < deadline
    for k, work in enumerate(works):
        torch.testing.assert_close(work.wait(), out + k, rtol=0, atol=1e-5)
        assert work.wait() is work.wait()
    refusals(mesh)


def refusals(mesh: DeviceMesh) -> None:
    machines, local = mesh.shape
    me, last = dist.get_rank(), dist.get_world_size() - 1
    with pytest.raises(ValueError, match="2-D"):
        hierarchical_neighbor_allreduce(torch.ones(3), mesh=init_device_mesh("cpu", (machines * local,)))
    cases: list[tuple[torch.Tensor, Any, str]] = [
        (torch.ones(3), topologies.ring(machines + 1) if me == last else "ring", f"{machines + 1} ranks"),
        (torch.ones(3, dtype=torch.int64 if me == last else torch.float32), "ring", "int64"),
        (torch.ones(4 if me == last else 3), "ring", r"\(4,\)"),
    ]
    for x, topology, text in cases:
        begin = time.monotonic()
        with pytest.raises((ValueError, TypeError), match=text) as caught:
            hierarchical_neighbor_allreduce(x, topology, mesh=mesh)
        assert f"rank {last}" in str(caught.value) and time.monotonic() - begin < 20
        hierarchical_neighbor_allreduce(torch.ones(3), mesh=mesh)


@pytest.mark.parametrize(("machines", "local"), [(2, 2), (2, 4), (4, 2)])
def test_equals_the_dense_formula(ranks: Pool, machines: int, local: int) -> None:
    ranks.run(machines * local, everything, machines, local)


def counted(machines: int, local: int, numel: int, check: bool) -> tuple[int, int, float]:
    """Bytes that this rank gives to its link inside the machine, and to the others of its machines; and the result."""
    mesh = init_device_mesh("cpu", (machines, local))
    x = torch.full((numel,), float(dist.get_rank()))
    home = mesh.mesh[mesh.get_coordinate()[0]].tolist()
    sent = [0, 0]
    start = Communicator.start

    def counting(communicator: Communicator, sends: list[PeerTensor], recvs: list[PeerTensor], **more: Any) -> Any:
        for peer, tensor in sends:
            sent[communicator.view.ranks[peer] not in home] += tensor.numel() * tensor.element_size()
        return start(communicator, sends, recvs, **more)

    Communicator.start = counting  # type: ignore[method-assign,assignment]
    try:
        y = hierarchical_neighbor_allreduce(x, "ring", mesh=mesh, check=check)
    finally:
        Communicator.start = start  # type: ignore[method-assign]
    return sent[0], sent[1], y.sum().item()


@pytest.mark.parametrize(("machines", "local"), [(2, 2), (2, 4), (4, 2)])
def test_bytes_per_rank(ranks: Pool, machines: int, local: int) -> None:
    size, degree = 4 * 800, 1 if machines == 2 else 2
    for inside, across, _ in ranks.run(machines * local, counted, machines, local, 800, check=machines == 2):
        assert inside == 2 * size * (local - 1) // local
        assert across == degree * size // local


def flat_meshes() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    for shape in ((1, n), (n, 1)):
        check_mesh(init_device_mesh("cpu", shape)) if shape[0] > 1 else None
    y = hierarchical_neighbor_allreduce(torch.tensor([float(me)]), mesh=init_device_mesh("cpu", (1, n)))
    assert y.item() == pytest.approx((n - 1) / 2)
    # A mesh over some of the ranks: the others need not call.
    half = DeviceMesh("cpu", torch.tensor([[3], [1]]))
    if me in (1, 3):
        assert hierarchical_neighbor_allreduce(torch.tensor(float(me)), mesh=half).item() == 2.0
    else:
        with pytest.raises(ValueError, match="not in the mesh"):
            hierarchical_neighbor_allreduce(torch.tensor(float(me)), mesh=half)


def test_one_machine_one_rank_a_machine_and_a_part_of_the_ranks(ranks: Pool) -> None:
    ranks.run(4, flat_meshes)
