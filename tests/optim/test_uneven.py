"""Uneven data: ranks with fewer batches go on mixing until all have made as many steps, by `uneven()` and by torch's `Join`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fusedfog

BATCHES = (3, 0, 7, 5)
"""How many batches each rank has; one has none."""

WAYS: dict[str, dict[str, Any]] = {
    "awc": {"topology": "ring"},
    "awc-one-peer": {},
    "atc": {"algorithm": "atc", "topology": "ring"},
    "fused_backward": {"fused_backward": True, "topology": "ring"},
    "atc-fused_backward": {"algorithm": "atc", "fused_backward": True, "topology": "ring"},
    "communicate_every": {"communicate_every": 3},
    "global_average_every": {"global_average_every": 4},
    "allreduce": {"algorithm": "allreduce"},
    "allreduce-fused_backward": {"algorithm": "allreduce", "fused_backward": True},
    "start": {"data_parallel_steps": 4, "topology": "ring"},
    "machines": {"mesh": True},
    "local": {"algorithm": "local"},
    "outer": {"algorithm": "local", "outer": fusedfog.Outer(every=3)},
    "push_sum": {"algorithm": "push_sum"},
    "momentum_tracking": {"algorithm": "momentum_tracking", "topology": "ring"},
    "wire_dtype": {"wire_dtype": "int8"},
    "capturable": {"capturable": True, "topology": "ring"},
    "max_grad_norm": {"max_grad_norm": 0.5, "topology": "ring"},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def step(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    model(torch.full((2, 6), 0.1 * (dist.get_rank() + 1), dtype=torch.float64)).pow(2).sum().backward()
    opt.step()


def train(keywords: dict[str, Any], way: str, batches: tuple[int, ...]) -> tuple[int, int, float, bool]:
    """Steps made inside, and in all after two more, the distance between ranks then, and whether gradients were kept."""
    model = net()
    keywords = dict(keywords)
    if keywords.get("mesh"):
        keywords["mesh"] = init_device_mesh("cpu", (2, 2))
    dtype = torch.float32 if "wire_dtype" in keywords else torch.float64
    model.to(dtype)
    opt = fusedfog.SGD(model.parameters(), lr=0.05, momentum=0.9, bucket_mb=1e-4, **keywords)
    mine = batches[dist.get_rank()]

    def one() -> None:
        opt.zero_grad()
        model(torch.full((2, 6), 0.1 * (dist.get_rank() + 1), dtype=dtype)).pow(2).sum().backward()
        opt.step()

    with opt.uneven() if way == "uneven" else Join([opt]):
        for _ in range(mine):
            one()
    kept = mine == 0 or "fused_backward" in keywords or all(p.grad is not None for p in model.parameters())
    inside = opt.stats()["steps"]
    one()
    one()
    return int(inside), int(opt.stats()["steps"]), opt.consensus_distance(), kept


JOINED = ("awc", "allreduce")
"""The ways that are tried with `Join` always."""


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "uneven") for name in WAYS),
        *(pytest.param(name, "Join", marks=[] if name in JOINED else [pytest.mark.slow]) for name in WAYS),
    ],
)
def test_all_ranks_make_as_many_steps_as_the_one_with_the_most_data(ranks: Pool, name: str, way: str) -> None:
    results = ranks.run(4, train, WAYS[name], way, BATCHES, pg_timeout=20)
    alone = name == "local" and way == "uneven"  # nothing is exchanged, so nobody has to go on
    assert [inside for inside, _, _, _ in results] == (list(BATCHES) if alone else [max(BATCHES)] * 4)
    assert len({distance for _, _, distance, _ in results}) == 1
    assert all(kept for _, _, _, kept in results)


def values(algorithm: str) -> list[float]:
    """One parameter, rank 1 without data: what a step without a gradient is, exactly."""
    model = nn.Linear(1, 1, bias=False).double()
    opt = fusedfog.SGD(model.parameters(), lr=0.0, algorithm=algorithm, topology="fully_connected")
    with opt.paused(), torch.no_grad():
        model.weight.fill_(float(dist.get_rank()))
    with opt.uneven():
        if dist.get_rank() == 0:
            opt.zero_grad()
            model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
            opt.param_groups[0]["lr"] = 1.0
            opt.step()
    return [model.weight.item()]


def test_a_rank_without_data_mixes_and_does_not_update(ranks: Pool) -> None:
    # The mean is 0.5; rank 0 moves by its own gradient, 1.
    assert ranks.run(2, values, "awc") == [[-0.5], [0.5]]
    # Rank 1 contributes zero to the mean gradient, as under DistributedDataParallel's join, and makes rank 0's step with lr 0.
    assert ranks.run(2, values, "allreduce") == [[-0.5], [1.0]]


def twice(way: str) -> str:
    """The error of a second backward that would average gradients again, which a rank without data could not know."""
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.05, algorithm="allreduce")
    with opt.uneven() if way == "uneven" else Join([opt]):
        loss = model(torch.ones(2, 6, dtype=torch.float64)).sum()
        with opt.no_sync():
            loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        try:
            loss.backward()
        except RuntimeError as error:
            opt.step()
            return str(error)
    return ""


@pytest.mark.parametrize("way", ["uneven", "Join"])
def test_gradients_are_averaged_once_a_step_inside(ranks: Pool, way: str) -> None:
    for rank, text in enumerate(ranks.run(2, twice, way)):
        assert text.startswith(f"rank {rank}: a second backward averages gradients before step()")


def several() -> tuple[int, int]:
    first, second = net(), net()
    opts = [fusedfog.SGD(model.parameters(), lr=0.05, topology="ring", algorithm="atc") for model in (first, second)]
    with pytest.raises(ValueError, match=r"first.uneven\(second\)"), opts[0].uneven(), opts[1].uneven():
        pass
    with opts[0].uneven(opts[1]):
        for i in range(BATCHES[dist.get_rank()]):
            with opts[1].uneven():  # a block inside its own is none
                step(first, opts[0])
            if i % 2:
                step(second, opts[1])
    return tuple(int(opt.stats()["steps"]) for opt in opts)


def test_one_block_takes_several_optimizers_and_may_be_nested(ranks: Pool) -> None:
    assert ranks.run(4, several, pg_timeout=20) == [(7, 3)] * 4


def leaves_early() -> tuple[int, int]:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="ring")
    for _ in range(2):
        with opt.uneven():
            for i in range(100):
                if i == BATCHES[dist.get_rank()]:
                    break
                step(model, opt)
    dist.barrier()
    store = dist.distributed_c10d._get_default_store()
    return int(opt.stats()["steps"]), sum(
        store.check([f"fusedfog/0-1-2-3/{n}/uneven/{k}"]) for n in range(9) for k in range(9)
    )


def test_a_rank_may_break_out_and_nothing_stays_in_the_store(ranks: Pool) -> None:
    for steps, left in ranks.run(4, leaves_early, pg_timeout=20):
        assert steps == 14
        assert left == 0


def a_long_lag() -> int:
    """No exchange holds a rank back, so one may find the block's first keys deleted."""
    model = nn.Linear(1, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.05, communicate_every=10**6)
    with opt.uneven():
        if dist.get_rank():
            for _ in range(1300):
                opt.step()
        else:
            store, key = dist.distributed_c10d._get_default_store(), opt._block._key
            while not store.check([key(1200)]) or store.check([key(101)]):
                time.sleep(0.01)
    return int(opt.stats()["steps"])


def test_a_rank_that_lags_far_behind_catches_up(ranks: Pool) -> None:
    assert ranks.run(2, a_long_lag, pg_timeout=30) == [1300, 1300]


def one_raises(batches: tuple[int, ...]) -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="fully_connected")
    with opt.uneven():
        for i in range(batches[dist.get_rank()]):
            if dist.get_rank() == 2 and i == 4:
                raise LookupError("no such file")
            step(model, opt)


def test_an_error_inside_is_raised_as_it_is_and_named_on_the_other_ranks(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, one_raises, (3, 0, 9, 9), pg_timeout=20)
    assert (outcomes[2].error_type, outcomes[2].message) == ("LookupError", "no such file")
    for rank in (0, 1, 3):
        assert outcomes[rank].error_type in ("ExchangeError", "PeerTimeout"), outcomes[rank]
        assert "rank 2" in outcomes[rank].message
        assert "by LookupError: no such file" in outcomes[rank].message


def joins_with_ddp() -> tuple[int, bool]:
    model = net()
    ddp = fusedfog.local_gradients(DistributedDataParallel(model, broadcast_buffers=False))
    opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="ring")
    for _ in range(2):
        with Join([ddp, opt]):
            for _ in range(BATCHES[dist.get_rank()]):
                step(ddp, opt)
    step(ddp, opt)
    return int(opt.stats()["steps"]), all(p.isfinite().all() for p in model.parameters())


def test_join_takes_a_ddp_with_local_gradients_beside(ranks: Pool) -> None:
    assert ranks.run(4, joins_with_ddp, pg_timeout=20) == [(15, True)] * 4


def alone() -> int:
    model = nn.Linear(2, 2)
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    with opt.uneven():
        opt.step()
    with pytest.raises(RuntimeError, match="Join needs a process group"):
        Join([opt])
    return int(opt.stats()["steps"])


def test_a_rank_that_is_alone_just_steps(ranks: Pool) -> None:
    assert ranks.run(1, alone, init=False) == [1]


def in_a_group() -> int:
    group = fusedfog.new_group([0, 2] if dist.get_rank() % 2 == 0 else [1, 3])
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.05, group=group)
    with opt.uneven():
        for _ in range(BATCHES[dist.get_rank()]):
            step(model, opt)
    return int(opt.stats()["steps"])


def test_a_group_counts_its_own_ranks_alone(ranks: Pool) -> None:
    assert ranks.run(4, in_a_group, pg_timeout=20) == [7, 5, 7, 5]
