"""`opt.leave()`: a rank that stops early says so, and nobody hangs: neighbours, their neighbours, or itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Outcome, Pool
from torch import nn

import fusedfog

FIRST = 1
"""The rank that leaves, after step `LAST`; on a ring of five, ranks 3 and 4 are not its neighbours."""
LAST = 3


def build(**keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    return model, fusedfog.SGD(model.parameters(), lr=0.01, momentum=0.9, bucket_mb=1e-4, **keywords)


def iterate(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    model(torch.full((2, 8), 0.1 * (dist.get_rank() + 1))).pow(2).sum().backward()
    opt.step()


def wait_until_all_are_told() -> None:
    dist.distributed_c10d._get_default_store().wait([f"told/{rank}" for rank in (0, 2, 3, 4)])


def stop_early(keywords: dict[str, Any]) -> int:
    """All live on until all have been told: not by a timeout, and not by the end of a neighbour's process."""
    model, opt = build(**keywords)
    dist.barrier()
    if dist.get_rank() == FIRST:
        for _ in range(LAST):
            iterate(model, opt)
        opt.leave()
        assert opt.state_dict()["fusedfog"]["steps"] == LAST
        with pytest.raises(RuntimeError, match=f"rank {FIRST} has left"):
            opt.step()
        with pytest.raises(RuntimeError, match=f"rank {FIRST} has left"):
            opt.consensus_distance()
        opt.leave()
        wait_until_all_are_told()
        return LAST
    try:
        for _ in range(1000):
            iterate(model, opt)
    except fusedfog.RankLeft as left:
        assert left.ranks == (FIRST,)
        assert "imed out" not in str(left.__cause__)
        dist.distributed_c10d._get_default_store().set(f"told/{dist.get_rank()}", "")
        with pytest.raises(fusedfog.RankLeft):
            opt.step()
        steps = opt.state_dict()["fusedfog"]["steps"]
        wait_until_all_are_told()
        raise fusedfog.RankLeft(f"{steps} steps; {left}", left.ranks) from None
    return 1000


def check_told(outcomes: list[Outcome], least: int) -> None:
    assert outcomes[FIRST].value == LAST
    for rank in {0, 1, 2, 3, 4} - {FIRST}:
        assert outcomes[rank].error_type == "RankLeft", outcomes[rank]
        assert f"rank {FIRST} after {LAST} steps" in outcomes[rank].message
        steps = int(outcomes[rank].message.split()[0])
        # A rank is at most one step ahead of each neighbour, and these are at most two away.
        assert least <= steps <= LAST + 3


@pytest.mark.parametrize(
    "keywords",
    [
        {"topology": "ring"},
        {"topology": "ring", "fused_backward": True},
        {"topology": "ring", "algorithm": "atc"},
        {"topology": "one_peer_exponential"},
        {"algorithm": "allreduce"},
    ],
    ids=lambda keywords: "-".join(map(str, keywords.values())),
)
def test_all_others_are_told_at_once_by_name(ranks: Pool, keywords: dict[str, Any]) -> None:
    check_told(ranks.outcomes(5, stop_early, keywords, pg_timeout=40), LAST)


def all_leave() -> tuple[int, float]:
    model, opt = build(topology="ring")
    other = build(algorithm="local")[1]
    for _ in range(LAST + 1):
        iterate(model, opt)
    time.sleep(0.3 * dist.get_rank())
    opt.leave()
    other.leave()
    other.step()
    # The same ranks may begin anew.
    again, fresh = build(topology="fully_connected", sync_init=False)
    with torch.no_grad():
        again[0].weight.fill_(float(dist.get_rank()))
    fresh.step()
    fresh.drain()
    return opt.state_dict()["fusedfog"]["steps"], again[0].weight.mean().item()


def test_all_ranks_may_leave_and_begin_anew(ranks: Pool) -> None:
    for steps, mean in ranks.run(3, all_leave):
        assert steps == LAST + 1
        assert mean == pytest.approx(1.0)


def go_on_without() -> tuple[float, int]:
    model, opt = build(topology="one_peer_exponential")
    if dist.get_rank() == FIRST:
        for _ in range(LAST):
            iterate(model, opt)
        opt.leave()
        return 0.0, 0
    try:
        while True:
            iterate(model, opt)
    except fusedfog.RankLeft as left:
        remainder = [rank for rank in range(dist.get_world_size()) if rank not in left.ranks]
    group = fusedfog.new_group(remainder)
    saved = opt.state_dict()
    del saved["fusedfog"]
    opt = fusedfog.SGD(model.parameters(), lr=0.01, momentum=0.9, group=group, sync_init=False)
    opt.load_state_dict(saved)
    assert len(opt.state) == 4
    for _ in range(4):
        iterate(model, opt)
    return opt.consensus_distance(), opt.stats()["exchanges"]


def test_the_remaining_ranks_go_on_in_a_new_group(ranks: Pool) -> None:
    results = ranks.run(4, go_on_without)
    remainder = [results[rank] for rank in range(4) if rank != FIRST]
    assert len(set(remainder)) == 1
    assert remainder[0][1] == 4
