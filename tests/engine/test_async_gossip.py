"""`asynchronous=True`: no step waits for another rank, and the limit depends on nobody's speed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import ordered_backend
from support.pool import Pool
from support.waits import await_said, say, shorten
from support.windows import TRANSPORTS, slow_gpu, transport
from torch import nn

import fusedfog
from fusedfog.gossip.window_delivery import WindowDelivery
from fusedfog.topology import from_matrix, ring, sequence

N, RATE = 4, 0.2


def store() -> Any:
    return dist.distributed_c10d._get_default_store()


def quadratic(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """f(x) = sum_k h_k (x_k - c_k)^2 / 2, another one on each rank."""
    h = torch.tensor([1.0 + 0.5 * rank, 2.0 - 0.3 * rank, 0.7], dtype=torch.float64)
    c = torch.tensor([1.0 * rank, -(rank**2), 3.0 - rank], dtype=torch.float64)
    return h, c


def limit() -> np.ndarray:
    """The solution of (I - W + a H) x = a H c, coordinate by coordinate."""
    W = ring(N).matrix()
    found = np.zeros((N, 3))
    for k in range(3):
        h, c = (np.array([quadratic(rank)[part][k].item() for rank in range(N)]) for part in (0, 1))
        found[:, k] = np.linalg.solve(np.eye(N) - W + RATE * np.diag(h), RATE * h * c)
    return found


def descend(how: str, kind: str, slower: int, steps: int) -> tuple[list[float], int]:
    """Until every rank has made so many steps; which one is the slowest, a busy machine may see otherwise."""
    rank = dist.get_rank()
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    h, c = quadratic(rank)
    with transport(how):
        if kind == "Decentralized":
            inner = torch.optim.SGD([x], lr=RATE)
            opt: Any = fusedfog.Decentralized(inner, topology="ring", asynchronous=True)
        else:
            opt = fusedfog.SGD([x], lr=RATE, topology="ring", asynchronous=True, fused_backward=kind == "fused")
    made = 0
    while not store().check([f"enough/{one}" for one in range(N)]):
        if made == steps:
            store().set(f"enough/{rank}", "")
        (h * (x - c) ** 2 / 2).sum().backward()
        opt.step()
        opt.zero_grad()
        made += 1
        time.sleep(0.0005 * (slower if rank == 0 else 1))
    values = x.tolist()
    dist.barrier()  # A rank that is done mixes only, which is another limit.
    opt.finish()
    assert opt.stats()["steps"] == made
    return values, made


@pytest.mark.parametrize(
    ("how", "kind", "slower", "steps"),
    [
        ("memory", "step", 1, 800),
        ("memory", "step", 10, 500),
        pytest.param("tcp", "step", 3, 1500, marks=pytest.mark.slow),  # Messages take as long as several steps.
        ("memory", "fused", 3, 800),
        ("memory", "Decentralized", 3, 800),
    ],
)
def test_the_limit_of_averages_depends_on_no_rank_s_speed(
    ranks: Pool, how: str, kind: str, slower: int, steps: int
) -> None:
    found = ranks.run(N, descend, how, kind, slower, steps)
    np.testing.assert_allclose(np.array([values for values, _ in found]), limit(), rtol=0, atol=1e-10)


COLUMNS = np.array(
    [  # Who sends to whom: column j is what rank j gives; irregular, and strongly connected.
        [1, 0, 0, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 0, 1],
    ],
    dtype=float,
)
DIGRAPH = COLUMNS / COLUMNS.sum(0)


def push(how: str) -> tuple[list[float], float, list[float]]:
    rank = dist.get_rank()
    start = torch.tensor([float(rank), (-3.0) ** rank], dtype=torch.float64)
    x = nn.Parameter(start.clone())
    graph = from_matrix(DIGRAPH, stochastic="column")
    with transport(how):
        opt = fusedfog.SGD([x], lr=0.0, algorithm="push_sum", topology=graph, asynchronous=True, sync_init=False)
    sums: list[float] = []
    # Where one rank is through with its steps before another begins, they have mixed little: so on until all have one value.
    apart = math.inf
    while len(sums) < 12 or (apart > 1e-10 and len(sums) < 200):
        for _ in range(10 * (1 + rank % 3)):
            x.grad = torch.ones_like(x)
            opt.step()
        opt.drain()
        total = torch.tensor([opt.stats()["mass"]], dtype=torch.float64)
        dist.all_reduce(total)
        sums.append(total.item())
        ends = torch.stack([x.detach(), -x.detach()])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        apart = ends.sum(0).max().item()
    return x.tolist(), opt.stats()["mass"], sums


@pytest.mark.parametrize("how", TRANSPORTS)
def test_push_sum_keeps_its_mass_and_finds_the_exact_mean_on_an_irregular_digraph(ranks: Pool, how: str) -> None:
    mean = np.mean([[float(rank), (-3.0) ** rank] for rank in range(5)], 0)
    for values, _, sums in ranks.run(5, push, how):
        np.testing.assert_allclose(sums, 5.0, rtol=0, atol=1e-10)
        np.testing.assert_allclose(values, mean, rtol=1e-9, atol=1e-9)


def push_and_descend(slower: int) -> list[float]:
    rank, rate = dist.get_rank(), 0.01
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    h, c = quadratic(rank)
    graph = from_matrix(DIGRAPH, stochastic="column")
    opt = fusedfog.SGD([x], lr=rate, algorithm="push_sum", topology=graph, asynchronous=True)
    made = 0
    # Whoever a busy machine keeps from its steps meanwhile holds most of the mass, and has to have made as many.
    while not store().check([f"enough/{one}" for one in range(5)]):
        if made == 1500:
            store().set(f"enough/{rank}", "")
        x.grad = (h * (x.detach() - c)).clone()
        opt.step()
        made += 1
        time.sleep(0.0003 * (slower if rank == 0 else 1))
    opt.finish()
    with opt.averaged():
        return x.tolist()


def test_push_sum_minimises_the_sum_of_all_losses_though_one_rank_is_slow(ranks: Pool) -> None:
    pairs = [quadratic(rank) for rank in range(5)]
    best = sum(h * c for h, c in pairs) / sum(h for h, _ in pairs)
    plain = sum(h * c for h, c in pairs[1:]) / sum(h for h, _ in pairs[1:])
    for values in ranks.run(5, push_and_descend, 3, timeout=120):
        error = np.abs(np.array(values) - best.numpy()).max()
        # Far closer than to what the fast ranks alone would minimise.
        assert error < 0.2 * (best - plain).abs().max().item()


def together(self: WindowDelivery, station: Any) -> Any:
    """What all have sent is there before anybody takes, and all have taken before anybody sends again."""
    view = self.communicator.view
    station.endpoint.fence(20.0)
    meet_by_store(view.size)
    found = TAKE(self, station)
    meet_by_store(view.size)
    return found


TAKE = WindowDelivery._take
_meetings = itertools.count()


def meet_by_store(size: int) -> None:
    """A barrier that no backend takes part in."""
    name = f"meeting/{next(_meetings)}"
    if store().add(name, 1) == size:
        store().set(f"{name}/over", "")
    store().wait([f"{name}/over"])


def in_step(asynchronous: bool, kind: str, keywords: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).to(dtype)
    opt = getattr(fusedfog, kind)(
        model.parameters(), lr=0.05, topology="fully_connected", asynchronous=asynchronous, **keywords
    )
    for step in range(6):
        opt.zero_grad()
        with mock.patch.object(WindowDelivery, "_take", together):
            model(torch.full((3, 4), 0.1 * (dist.get_rank() + step), dtype=dtype)).square().mean().backward()
            opt.step()
    opt.drain()
    found = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    opt.release()
    return found


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        ("SGD", {"momentum": 0.9}),
        ("AdamW", {}),
        ("AdamW", {"communicate_every": 2}),
        ("AccumAdamW", {"accum_steps": 2}),
        ("Adam", {"max_grad_norm": 0.1, "mix_strength": 0.5}),
    ],
)
def test_in_step_asynchronous_averages_are_synchronous_ones(ranks: Pool, kind: str, keywords: dict[str, Any]) -> None:
    first, second = (ranks.run(3, in_step, asynchronous, kind, keywords) for asynchronous in (True, False))
    np.testing.assert_allclose(np.array(first), np.array(second), rtol=1e-12, atol=1e-14)


ON_GPU: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "fused_backward": True}),
    ("AdamW", {"bucket_mb": 1e-4, "max_lag": 3}),
    ("SGD", {"algorithm": "push_sum"}),
]


def in_step_on_gpus() -> list[list[float]]:
    ordered_backend.open_world(20.0)
    with slow_gpu() as gpu:
        found = [in_step(True, kind, keywords, torch.float32) for kind, keywords in ON_GPU]
        assert not gpu.runtime.registered, "memory of closed windows"
        return found


def in_step_on_cpus() -> list[list[float]]:
    return [in_step(True, kind, keywords, torch.float32) for kind, keywords in ON_GPU]


def test_steps_on_gpus_are_those_on_cpus_through_copies_that_come_late(ranks: Pool) -> None:
    ordered_backend.build()
    first, second = ranks.run(3, in_step_on_gpus, init=False, timeout=120), ranks.run(3, in_step_on_cpus)
    np.testing.assert_allclose(np.array(first), np.array(second), rtol=1e-6, atol=1e-7)
    assert len({tuple(found[0]) for found in first}) == 3


def beside_a_rank_that_waits(algorithm: str) -> int:
    """Rank 1 makes no step until rank 0 has made fifty."""
    x = nn.Parameter(torch.zeros(10))
    opt = fusedfog.AdamW([x], lr=0.1, algorithm=algorithm, topology="ring", asynchronous=True)
    if dist.get_rank() == 1:
        store().wait(["through"])
    for _ in range(50):
        x.grad = torch.ones(10)
        opt.step()
    store().set("through", "")
    opt.finish()
    stats = opt.stats()
    assert stats["rank_steps"] == [50] * 3 and stats["total_steps"] == 150
    return stats["steps"]


@pytest.mark.parametrize("algorithm", ["awc", "push_sum"])
def test_no_step_waits_for_a_rank_that_makes_none(ranks: Pool, algorithm: str) -> None:
    assert ranks.run(3, beside_a_rank_that_waits, algorithm) == [50] * 3


def too_far() -> str:
    x = nn.Parameter(torch.zeros(3))
    opt = fusedfog.SGD([x], lr=0.1, topology="ring", asynchronous=True, max_lag=4)
    if dist.get_rank() == 1:
        await_said("through")
        return ""
    shorten(1.5)
    made = 0
    try:
        while True:
            x.grad = torch.ones(3)
            opt.step()
            made += 1
    except fusedfog.PeerTimeout as error:
        say("through")
        return f"{made} {error}"


def test_max_lag_waits_for_the_slowest_neighbour_and_names_it(ranks: Pool) -> None:
    said = ranks.run(2, too_far)[0]
    made, _, text = said.partition(" ")
    assert 4 <= int(made) <= 6
    assert "rank 1 stayed more than max_lag behind" in text


def uneven_lengths(rounds: int) -> list[Any]:
    x = nn.Parameter(torch.full((3,), float(dist.get_rank())))
    opt = fusedfog.SGD([x], lr=0.0, topology="ring", asynchronous=True, max_lag=3, sync_init=False)
    found: list[Any] = []
    for _ in range(rounds):
        with opt.uneven():
            for _ in range(5 * dist.get_rank()):
                x.grad = torch.zeros(3)
                opt.step()
        found.append(opt.stats()["rank_steps"])
    return [found, opt.consensus_distance()]


def test_ranks_with_more_and_less_data_end_together(ranks: Pool) -> None:
    for found, distance in ranks.run(3, uneven_lengths, 3):
        assert found == [[0, 5, 10], [0, 10, 20], [0, 15, 30]]
        assert distance < 1.0


def killed() -> tuple[list[int], bool]:
    rank = dist.get_rank()
    x = nn.Parameter(torch.full((3,), float(rank), dtype=torch.float64))
    opt = fusedfog.SGD([x], lr=0.0, topology="fully_connected", asynchronous=True, sync_init=False)
    for step in range(2000):
        if rank == 1 and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        x.grad = torch.zeros(3, dtype=torch.float64)
        opt.step()
        if 1 in opt._engine.exchanges.windows.dead() and step > 20:
            break
        time.sleep(0.005)
    opt.finish()
    return opt.stats()["rank_steps"], bool(x.isfinite().all())


def test_others_go_on_without_a_rank_that_was_killed(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, killed)
    assert outcomes[1].error_type == "Died"
    for rank in (0, 2):
        steps, finite = outcomes[rank].value
        assert steps[1] == -1 and min(steps[0], steps[2]) > 10 and finite


def everything_else(algorithm: str, kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    keywords: dict[str, Any] = {"algorithm": algorithm, "asynchronous": True, "topology": "ring", "model": model}
    if kind == "Decentralized":
        opt: Any = fusedfog.Decentralized(torch.optim.RMSprop(model.parameters(), lr=0.01), **keywords)
    else:
        opt = getattr(fusedfog, kind)(model.parameters(), lr=0.01, max_grad_norm=1.0, **keywords)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)

    def train(steps: int) -> None:
        for _ in range(steps):
            for _ in range(2):  # Accumulated.
                (model(torch.randn(6, 4) + rank).square().mean() / 2).backward()
            opt.step()
            schedule.step()
            opt.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(5)
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # An edit tears nothing: what is sent is a copy.
        train(3)
        with opt.averaged():
            inside = model[0].weight.clone()
        distance = opt.consensus_distance()
        opt.drain()
        saved = opt.state_dict()
        train(2)
        opt.load_state_dict(saved)
        with opt.paused(), torch.no_grad():
            model[0].bias.zero_()
        train(3)
        if kind != "Decentralized":
            extra = nn.Parameter(torch.ones(3))
            opt.add_param_group({"params": [extra]})
            extra.grad = torch.ones(3)
            opt.step()
        opt.set_topology("fully_connected")
        train(2)
        opt.finish()
        opt.drain()
    stats = opt.stats()
    weights = [weight.tolist() for weight in (inside,)]
    return {"inside": weights, "distance": distance, "steps": stats["steps"], "mass": stats.get("mass", 0.0)}


@pytest.mark.parametrize(
    ("algorithm", "kind"), [("awc", "AdamW"), ("push_sum", "SGD"), ("push_sum", "AdamW"), ("awc", "Decentralized")]
)
def test_what_all_ranks_do_together_works_as_before(ranks: Pool, algorithm: str, kind: str) -> None:
    found = ranks.run(3, everything_else, algorithm, kind)
    assert all(one["inside"] == found[0]["inside"] and one["distance"] == found[0]["distance"] for one in found)
    assert len({one["steps"] for one in found}) == 1
    if algorithm == "push_sum":
        assert sum(one["mass"] for one in found) == pytest.approx(3.0, abs=1e-10)


def refused() -> dict[str, str]:
    def said(**keywords: Any) -> str:
        try:
            fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, **keywords)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    opt = fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    asynchronous = fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, asynchronous=True)
    one_way = from_matrix(np.array([[1.0, 0.5], [0.0, 0.5]]), stochastic="column")
    found = {
        "lag": said(max_lag=3),
        "whole": said(asynchronous=True, max_lag=1.5),
        "changing": said(asynchronous=True, topology=sequence([ring(2), from_matrix(np.eye(2))])),
        "atc": said(asynchronous=True, algorithm="atc"),
        "one way": said(asynchronous=True, algorithm="push_sum", topology=one_way),
    }
    with pytest.raises(ValueError, match="only asynchronous optimizers finish"):
        opt.finish()
    with pytest.raises(ValueError, match="build another one"):
        asynchronous.switch(algorithm="atc")
    with pytest.raises(ValueError, match=r"use `with opt\.uneven"):
        asynchronous.join_hook()
    dist.barrier()
    return found


def test_what_does_not_go_together_says_what_to_use_instead(ranks: Pool) -> None:
    for found in ranks.run(2, refused):
        assert "asynchronous=True" in found["lag"]
        assert "must be a whole number of steps" in found["whole"]
        assert "use a static topology" in found["changing"]
        assert "use algorithm='awc' or 'push_sum'" in found["atc"]
        assert "every rank reaches every other one" in found["one way"]
