"""Optimizers on a mesh: W_machine (x) J_local, one model a machine across the slow links."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import oracle, problems
from support.pool import Pool
from support.training import train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog


def train_on_mesh(shape: tuple[int, int], *args: Any, **keywords: Any) -> Any:
    return train(*args, mesh=init_device_mesh("cpu", shape), inside="parameters", **keywords)


def dense(w: Any, machines: int, local: int) -> Any:
    """W_machine (x) J_local, as matrix or sequence."""
    averaging = np.full((local, local), 1 / local)
    return (lambda t: np.kron(w(t), averaging)) if callable(w) else np.kron(w, averaging)


@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 4), (4, 2), (4, 1), (1, 4)))]
)
def test_awc_and_atc_equal_the_dense_formula(ranks: Pool, shape: tuple[int, int], fused_backward: bool) -> None:
    machines, local = shape
    n = machines * local
    problem = problems.least_squares(n, 13, 26, seed=n)
    x0 = problems.start(n, 13)
    w = dense(oracle.one_peer_exponential(machines) if machines > 1 else np.eye(1), machines, local)
    for algorithm in ("awc", "atc"):
        got = ranks.run(
            n, train_on_mesh, shape, "SGD", problem.hessians, problem.linear, x0, [0.05] * 30,
            algorithm=algorithm, topology="one_peer_exponential", momentum=0.9, fused_backward=fused_backward,
        )  # fmt: skip
        want = getattr(oracle, algorithm)(problem, w, x0, 0.05, 30, oracle.SGD(momentum=0.9))
        np.testing.assert_allclose(np.stack(got, axis=1), want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gradient_tracking", "exact_diffusion"])
def test_exact_methods_stay_exact_on_a_mesh(ranks: Pool, algorithm: str) -> None:
    problem = problems.least_squares(8, 13, 26, seed=8)
    x0 = problems.start(8, 13)
    got = ranks.run(
        8, train_on_mesh, (4, 2), "SGD", problem.hessians, problem.linear, x0, [0.1] * 700,
        algorithm=algorithm, topology="ring", record=False, bucket_mb=1,
    )  # fmt: skip
    np.testing.assert_allclose([path[-1] for path in got], np.tile(problem.x_star, (8, 1)), atol=1e-8)


def count_bytes(shape: tuple[int, int], inside: Any) -> tuple[int, int]:
    model = nn.Linear(64, 64, bias=False)
    opt = fusedfog.SGD(
        model.parameters(),
        lr=0.0,
        algorithm="atc",
        topology="ring",
        mesh=init_device_mesh("cpu", shape),
        inside=inside,
    )
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
    stats = opt.stats()
    return stats["bytes_across"], stats["bytes_sent"] - stats["bytes_across"]


def test_a_machine_sends_one_model_to_each_neighbour_machine(ranks: Pool) -> None:
    model = 64 * 64 * 4
    found = ranks.run(8, count_bytes, (2, 4), "parameters")
    for across, inside in found:
        assert across == 3 * model // 4
        assert inside == 3 * 2 * model * 3 // 4
    assert sum(across for across, _ in found) == 3 * 2 * model
    # Gradients are reduced inside, of which a bucket has a few numbers more, and shards handed round.
    for across, inside in ranks.run(8, count_bytes, (2, 4), "gradients"):
        assert across == 3 * model // 4
        assert 3 * 3 * model * 3 // 4 <= inside < 3.03 * 3 * model * 3 // 4


def bad_mesh(kind: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2, 1) if kind == "three" else (2, 2))
    group = dist.new_group([0, 1, 2]) if kind == "group" else None
    if kind == "group" and dist.get_rank() == 3:
        raise ValueError("mesh covers ranks: not a member")
    algorithm = "push_sum" if kind == "push_sum" else "awc"
    topology = "ring" if kind != "size" else fusedfog.topology.ring(4)
    fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, mesh=mesh, group=group, algorithm=algorithm, topology=topology)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("three", "two dimensions"),
        ("group", "mesh covers ranks"),
        ("push_sum", "not on a mesh"),
        ("size", "is for 4 ranks"),
    ],
)
def test_bad_meshes(ranks: Pool, kind: str, message: str) -> None:
    for outcome in ranks.outcomes(4, bad_mesh, kind):
        assert outcome.error_type == "ValueError"
        assert message in outcome.message
