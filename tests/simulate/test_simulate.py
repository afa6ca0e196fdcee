"""Simulated ranks are real ranks: bit for bit with gloo processes, and to rounding with the oracle and with autograd."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import oracle, problems
from support.names import named
from support.pool import Pool
from support.training import QuadraticLoss, train
from torch import nn
from torch.nn.functional import cross_entropy

import fusedfog
from fusedfog import Outer, topology
from fusedfog.algorithms import TABLE
from fusedfog.simulate import ModuleProblem, Quadratics, Trajectory, simulate

STEPS = 30
RATES = [0.04 * min(max(t - 1, 0) / 5, 1.0) * (0.1 if t >= 20 else 1.0) for t in range(STEPS)]
"""Two steps of lr = 0, a ramp, and a drop by ten."""


class Autograd:
    """The quadratics of `training`, differentiated as a real rank does, and every X that gradients were taken at."""

    def __init__(self, problem: problems.Quadratics, x0: np.ndarray) -> None:
        self.ranks = [QuadraticLoss(*row) for row in zip(problem.hessians, problem.linear, x0, strict=True)]
        self.sizes = tuple(p.numel() for p in self.ranks[0].parameters())
        self.seen: list[torch.Tensor] = []

    def grad(self, step: int, X: torch.Tensor) -> torch.Tensor:
        self.seen.append(X.clone())
        return torch.stack([self._one(model, x) for model, x in zip(self.ranks, X, strict=True)])

    def _one(self, model: QuadraticLoss, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for part, piece in zip(model.parts, x.split(self.sizes), strict=True):
                part.copy_(piece)
        return torch.cat(torch.autograd.grad(model(), list(model.parts)))


def both(
    ranks: Pool, n: int, kind: str, graph: Any, rates: Sequence[float] = RATES, d: int = 13, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trajectories [steps + 1, n, d] of real and of simulated ranks."""
    data = problems.least_squares(n, d, 2 * d, seed=n)
    x0 = problems.start(n, d)
    real = ranks.run(n, train, kind, data.hessians, data.linear, x0, rates, topology=graph, **keywords)
    problem = Autograd(data, x0)
    path = simulate(problem, n, graph, optimizer=kind, steps=len(rates), lr=rates.__getitem__, x0=x0, **keywords)
    return torch.from_numpy(np.stack(real, axis=1)), torch.stack([*problem.seen, path.X])


def irregular() -> topology.Topology:
    """Strongly connected, with out-degrees 1 to 3."""
    edges = [(i, (i + 1) % 4) for i in range(4)] + [(0, 2), (0, 3), (2, 0)]
    return topology.from_networkx(networkx.DiGraph(edges))


def by_step(step: int) -> float:
    return 0.0 if step % 6 == 3 else 1 / (1 + step)


def by_rate(step: int, rate: float) -> float:
    return rate**0.5


WEIGHTS = [3.0, 1.0, 7.5, 2.0]

# family's optimizer, algorithm, topology, options
ROWS: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("SGD", "awc", "exponential", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", "awc", "base_graph", {"momentum": 0.8, "nesterov": True, "communicate_every": 3}),
    ("SGD", "atc", "star", {"momentum": 0.7, "dampening": 0.3, "weight_decay": 0.05}),
    ("SGD", "atc", "one_peer_exponential", {"maximize": True, "communicate_every": 2}),
    ("SGD", "decentlam", "ring", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", "quasi_global", "one_peer_exponential", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", "exact_diffusion", "ring", {"momentum": 0.5, "weight_decay": 0.1}),
    ("SGD", "extra", "star", {"momentum": 0.5, "weight_decay": 0.1}),
    ("SGD", "gradient_tracking", "exponential", {"weight_decay": 0.1, "communicate_every": 2}),
    ("SGD", "momentum_tracking", "base_graph", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", "push_sum", irregular(), {"momentum": 0.9, "weight_decay": 0.1, "communicate_every": 2}),
    ("SGD", "local", None, {"momentum": 0.9}),
    ("SGD", "local", topology.random_matching(4, 3), {"outer": Outer(every=4, lr=0.7, momentum=0.5)}),
    ("SGD", "local", "fully_connected", {"outer": Outer(every=5, momentum=0.9, nesterov=True)}),
    ("Adam", "awc", "exponential", {"weight_decay": 0.1}),
    ("AdamW", "atc", "ring", {"amsgrad": True}),
    ("AdamW", "dag", "ring", {"weight_decay": 0.1}),
    ("Adam", "dag", "one_peer_exponential", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", "quasi_global", "ring", {"weight_decay": 0.1}),
    ("Adam", "gradient_tracking", "exponential", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", "push_sum", irregular(), {"weight_decay": 0.1}),
    ("Adam", "local", None, {}),
    ("AccumAdamW", "awc", "exponential", {"accum_steps": 4, "weight_decay": 0.1}),
    ("AccumAdamW", "atc", "ring", {"accum_steps": 3}),
    ("AccumAdamW", "local", None, {"accum_steps": 2}),
    ("SGD", "awc", "exponential", {"momentum": 0.9, "mix_strength": 0.3}),
    ("SGD", "atc", "one_peer_exponential", {"communicate_every": 2, "mix_strength": by_rate}),
    ("SGD", "extra", "star", {"momentum": 0.5, "mix_strength": 0.7}),
    ("SGD", "momentum_tracking", "base_graph", {"momentum": 0.9, "mix_strength": by_step}),
    ("SGD", "local", topology.random_matching(4, 3), {"outer": Outer(every=4, lr=0.7), "mix_strength": by_step}),
    ("AdamW", "quasi_global", "ring", {"weight_decay": 0.1, "mix_strength": by_rate}),
    ("SGD", "awc", "exponential", {"momentum": 0.9, "weight_decay": 0.1, "weights": WEIGHTS}),
    ("SGD", "push_sum", irregular(), {"momentum": 0.9, "weights": WEIGHTS}),
    ("SGD", "local", "fully_connected", {"outer": Outer(every=5), "weights": WEIGHTS}),
    ("AdamW", "atc", "ring", {"weight_decay": 0.1, "weights": WEIGHTS}),
    ("AdamW", "quasi_global", "ring", {"weight_decay": 0.1, "weights": WEIGHTS}),
    ("Adam", "gradient_tracking", "exponential", {"weight_decay": 0.1, "weights": WEIGHTS}),
    ("AccumAdamW", "awc", "exponential", {"accum_steps": 4, "weights": WEIGHTS}),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "algorithm", "graph", "options"), ROWS, ids=named)
def test_bits_of_real_ranks(ranks: Pool, kind: str, algorithm: str, graph: Any, options: dict[str, Any]) -> None:
    real, simulated = both(ranks, 4, kind, graph, algorithm=algorithm, **options)
    assert torch.equal(real, simulated), f"largest difference {(real - simulated).abs().max():.2e}"


def test_every_row_of_the_table_is_compared_with_real_ranks() -> None:
    family = {"SGD": "SGD", "Adam": "Adam", "AdamW": "Adam", "AccumAdamW": "AccumAdam"}
    compared = {(family[kind], algorithm) for kind, algorithm, _, _ in ROWS}
    summed_by_gloo = {(name, "allreduce") for name in TABLE}
    assert compared | summed_by_gloo == {(name, row) for name, rows in TABLE.items() for row in rows}


@pytest.mark.parametrize(("kind", "algorithm"), [("SGD", "extra"), ("AdamW", "quasi_global")])
def test_bits_of_eight_ranks_with_larger_parameters(ranks: Pool, kind: str, algorithm: str) -> None:
    real, simulated = both(ranks, 8, kind, None, RATES[:8], 300, algorithm=algorithm)
    assert torch.equal(real, simulated)


SUMMED: list[tuple[str, str, dict[str, Any]]] = [
    ("SGD", "allreduce", {"momentum": 0.9}),
    ("AdamW", "allreduce", {"weight_decay": 0.1}),
    ("SGD", "awc", {"global_average_every": 5}),
    ("SGD", "gradient_tracking", {"global_average_every": 5, "communicate_every": 2}),
    ("SGD", "awc", {"global_average_every": 3, "mix_strength": by_step}),
    ("SGD", "allreduce", {"momentum": 0.9, "weights": WEIGHTS}),
]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("kind", "algorithm", "options"), SUMMED, ids=named)
def test_sums_over_all_ranks(ranks: Pool, kind: str, algorithm: str, options: dict[str, Any], n: int) -> None:
    options = options | ({"weights": WEIGHTS[:n]} if "weights" in options else {})
    real, simulated = both(ranks, n, kind, None, algorithm=algorithm, **options)
    # Two terms have one sum. Of more, gloo's ring begins each piece of the buffer with another rank.
    torch.testing.assert_close(real, simulated, rtol=0, atol=0 if n == 2 else 2e-15)


@pytest.mark.parametrize(("n", "ulps"), [(3, 1), (8, 2)])
def test_one_sum_over_all_ranks_to_the_ulp(ranks: Pool, n: int, ulps: int) -> None:
    real, simulated = both(ranks, n, "SGD", None, [0.0], 400, algorithm="atc", global_average_every=1)
    ulp = torch.from_numpy(np.spacing(real[0].abs().amax(0).numpy()))
    assert ((real[1] - simulated[1]).abs() <= ulps * ulp).all()


def quadratics(n: int, d: int = 13) -> tuple[problems.Quadratics, Quadratics, np.ndarray]:
    data = problems.least_squares(n, d, 2 * d, seed=n)
    return data, Quadratics(torch.from_numpy(data.hessians), torch.from_numpy(data.linear)), problems.start(n, d)


SGD_RULE = oracle.SGD(momentum=0.9)
ORACLE: list[tuple[str, str, str, dict[str, Any], dict[str, Any], Callable[..., np.ndarray]]] = [
    ("SGD", "awc", "one_peer_exponential", {"momentum": 0.9}, {"rule": SGD_RULE}, oracle.awc),
    ("SGD", "decentlam", "ring", {"momentum": 0.9}, {"momentum": 0.9}, oracle.decentlam),
    ("SGD", "exact_diffusion", "ring", {}, {}, oracle.exact_diffusion),
    ("SGD", "momentum_tracking", "ring", {"momentum": 0.8}, {"momentum": 0.8}, oracle.momentum_tracking),
    ("Adam", "quasi_global", "ring", {}, {"rule": oracle.Adam()}, oracle.quasi_global_adam),
]


@pytest.mark.parametrize(("kind", "algorithm", "graph", "options", "rule", "recursion"), ORACLE, ids=named)
def test_equals_the_dense_recursion(
    kind: str, algorithm: str, graph: str, options: Any, rule: Any, recursion: Callable[..., np.ndarray]
) -> None:
    data, problem, x0 = quadratics(16)
    w = {"ring": oracle.ring(16), "one_peer_exponential": oracle.one_peer_exponential(16)}[graph]
    rate = 0.02 if kind == "SGD" else 0.01
    lr = [rate * min(max(t - 1, 0) / 10, 1.0) for t in range(200)].__getitem__
    path = simulate(problem, 16, graph, algorithm, optimizer=kind, steps=200, lr=lr, x0=x0, **options)
    want = recursion(data, w, x0, lr, 200, **rule)
    np.testing.assert_allclose(path.X.numpy(), want[-1], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(path.distances, [data.error(x) for x in want], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(path.mean_distances, [data.mean_error(x) for x in want], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(path.consensus, [problems.consensus_distance(x) for x in want], rtol=1e-8, atol=1e-10)


def test_records_every_so_often_and_the_end() -> None:
    data, problem, x0 = quadratics(4)
    path = simulate(problem, 4, "ring", "atc", steps=25, lr=0.02, x0=x0, record_every=10, momentum=0.9)
    assert path.steps == [0, 10, 20, 25]
    assert path.states["momentum_buffer"].shape == path.X.shape == (4, 13)
    mean = x0.mean(0)
    want = 0.5 * mean @ data.hessians.mean(0) @ mean - data.linear.mean(0) @ mean
    assert path.losses[0] == pytest.approx(want) and len(path.losses) == 4
    assert path.losses[-1] < path.losses[0]


def test_256_ranks_take_seconds() -> None:
    problem = Quadratics.random(256, 50)
    simulate(problem, 256, "exponential", steps=1, lr=0.0)
    begin = time.process_time()
    for graph in ("exponential", "one_peer_exponential", "base_graph"):
        path = simulate(problem, 256, graph, "atc", steps=100, lr=0.02, record_every=100, momentum=0.5)
        assert path.distances[-1] < 0.3 * path.distances[0]
    push = simulate(problem, 256, "star", "push_sum", steps=20, lr=0.0, x0=torch.randn(256, 50), record_every=20)
    assert push.consensus[-1] < 1e-3 * push.consensus[0]
    assert time.process_time() - begin < 20


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10))


def test_a_module_on_every_rank_equals_autograd_rank_by_rank() -> None:
    source = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(m, 1, 6, 6, generator=source), torch.randint(10, (m,), generator=source)) for m in (5, 9, 30, 7)
    ]
    problem = ModuleProblem(network(), cross_entropy, data, batch=8, seed=3)
    X = problem.start() + 0.1 * torch.randn(4, len(problem.start()), generator=source, dtype=torch.float64)
    got = problem.grad(11, X)
    first = 0
    for rank, chosen in enumerate(problem.indices(11)):
        assert ((first <= chosen) & (chosen < first + len(data[rank][0]))).all()
        first += len(data[rank][0])
        model = network().double()
        nn.utils.vector_to_parameters(X[rank], model.parameters())
        loss = cross_entropy(model(problem.inputs[chosen].double()), problem.targets[chosen])
        want = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(got[rank], want, rtol=1e-10, atol=1e-12)
    assert not torch.equal(problem.indices(11), problem.indices(12))
    path = simulate(problem, 4, "ring", "awc", steps=40, lr=0.1, momentum=0.9, dtype=torch.float32)
    assert path.X.dtype == torch.float32 and path.losses[-1] < 0.5 * path.losses[0]


def test_refuses_what_the_optimizers_refuse() -> None:
    problem = Quadratics.random(8, 3)

    def run(graph: Any = None, algorithm: str = "awc", **keywords: Any) -> Trajectory:
        return simulate(problem, 8, graph, algorithm, **{"steps": 2, "lr": 0.1} | keywords)

    for match, arguments in {
        "static symmetric topology": (("exponential", "exact_diffusion"), {}),
        "diverges": ((None, "decentlam"), {"communicate_every": 2}),
        "use algorithm='momentum_tracking'": ((None, "gradient_tracking"), {"momentum": 0.9}),
        "unknown algorithm 'dag' for SGD": ((None, "dag"), {}),
        "has 8": ((topology.ring(4),), {}),
        "lr must be finite": ((), {"lr": lambda step: float("nan") if step else 0.1}),
        "Nesterov": ((), {"nesterov": True}),
        "communicate_every must": ((), {"communicate_every": 0}),
        "outer= runs over local steps": ((), {"outer": Outer()}),
        "unknown optimizer": ((), {"optimizer": "Lion"}),
        r"x0 must be \[N\] or \[n, N\]": ((), {"x0": torch.zeros(4, 3)}),
        "dtype must be": ((), {"dtype": torch.bfloat16}),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(*arguments[0], **arguments[1])
    with pytest.raises(TypeError, match="bucket_mb means nothing"):
        run(bucket_mb=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        run(betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="choose a batch size"):
        ModuleProblem(network(), cross_entropy, [(torch.zeros(m, 1, 6, 6), torch.zeros(m).long()) for m in (1, 2)])


def test_one_rank_is_the_local_optimizer() -> None:
    problem = Quadratics.random(1, 5)
    one = simulate(problem, 1, algorithm="momentum_tracking", steps=20, lr=0.1, momentum=0.9)
    assert torch.equal(one.X, simulate(problem, 1, algorithm="local", steps=20, lr=0.1, momentum=0.9).X)


def train_digits(n: int, seed: int, lr: float) -> torch.Tensor:
    """One real rank of bench/digits_table.py's "SGD awc" row on the exponential graph; its final parameters, flat."""
    torch.set_num_threads(1)
    table = digits_table()
    task, model = table.problem(n, seed), table.network(seed)
    opt = fusedfog.SGD(model.parameters(), lr=lr, momentum=0.9, topology="exponential")
    for step in range(table.STEPS):
        opt.param_groups[0]["lr"] = table.cosine(lr, step)
        mine = task.indices(step)[dist.get_rank()]
        opt.zero_grad()
        cross_entropy(model(task.inputs[mine]), task.targets[mine]).backward()
        opt.step()
    opt.drain()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def digits_table() -> Any:
    path = str(Path(__file__).resolve().parents[2] / "bench")
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module("digits_table")


@pytest.mark.slow
def test_a_cell_of_the_digits_table_with_real_ranks(ranks: Pool) -> None:
    pytest.importorskip("sklearn")
    table = digits_table()
    task = table.problem(8, 0)
    real = torch.stack(ranks.run(8, train_digits, 8, 0, 0.05)).mean(0)
    path = simulate(
        task, 8, "exponential", steps=table.STEPS, lr=lambda step: table.cosine(0.05, step), momentum=0.9,
        record_every=table.STEPS, dtype=torch.float32,
    )  # fmt: skip
    # Batched and single matrix products round differently.
    torch.testing.assert_close(path.X.mean(0), real, rtol=0, atol=1e-3)
    assert abs(table.accuracy(task, path.X.mean(0), 0) - table.accuracy(task, real, 0)) < 0.6
