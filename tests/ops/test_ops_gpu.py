"""Operations take the GPU's branches: the same numbers as on CPUs to the last bit, and every use of memory in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import fake_cuda, ordered_backend
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


def operations() -> list[torch.Tensor]:
    """Every operation, at once and with `async_op`, two of them in flight together."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2))
    generator = torch.Generator().manual_seed(rank)
    results: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        x = torch.randn(3000, dtype=dtype, generator=generator)
        rows = x[: 2 * (rank + 1)].reshape(rank + 1, 2)
        results += [
            fusedfog.neighbor_allreduce(x, "ring"),
            fusedfog.neighbor_allreduce(x, "exponential", self_weight=0.9, recv_weights={(rank - 1) % 4: 0.7}),
            fusedfog.pair_gossip(x, rank ^ 1),
            fusedfog.neighbor_allgather(rows, "ring"),
            fusedfog.hierarchical_neighbor_allreduce(x, "ring", mesh=mesh),
        ]
        works: list[Any] = [
            fusedfog.neighbor_allreduce(x, "ring", async_op=True),
            fusedfog.hierarchical_neighbor_allreduce(x, "ring", mesh=mesh, async_op=True),
            fusedfog.neighbor_allgather(rows, "ring", async_op=True),
        ]
        if not dtype.is_complex:
            residual = torch.zeros_like(x)
            works.append(
                fusedfog.neighbor_allreduce(x, "ring", wire_dtype="int8", residual=residual, out=x, async_op=True)
            )
            results.append(residual)
        results += [work.wait().clone() for work in works]
        assert all(work.is_completed() for work in works)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.fill_(float(rank))
    fusedfog.allreduce_parameters(model)
    results.append(model.weight.detach())
    return [torch.view_as_real(one) if one.is_complex() else one for one in results]


def operations_on_gpu() -> tuple[list[torch.Tensor], list[str]]:
    ordered_backend.open_world()
    with fake_cuda.pretend() as gpu:
        with gpu.watching():
            results = operations()
        return results, gpu.races


def test_operations_on_gpus_give_the_cpus_numbers_in_order(ranks: Pool) -> None:
    torch_wants = ranks.run(4, operations)
    for wanted, (found, races) in zip(torch_wants, ranks.run(4, operations_on_gpu, init=False), strict=True):
        assert races == []
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def drain_elsewhere(algorithm: str) -> list[str]:
    """A checkpoint's `drain()` on a stream of its own must not order the messages for that stream alone."""
    ordered_backend.open_world()
    with fake_cuda.pretend() as gpu:
        param = nn.Parameter(torch.randn(2000))
        opt = fusedfog.SGD([param], lr=0.1, topology="ring", algorithm=algorithm)
        with gpu.watching():
            for _ in range(3):
                param.grad = torch.ones_like(param)
                opt.step()
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    opt.drain()
        return gpu.races


@pytest.mark.parametrize("algorithm", ["awc", "gradient_tracking"])
def test_a_drain_on_another_stream_loses_no_order(ranks: Pool, algorithm: str) -> None:
    assert ranks.run(3, drain_elsewhere, algorithm, init=False) == [[]] * 3
