"""Ranks that were built differently hear so at construction: every rank, in seconds, with rank and field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog

ODD = 2
"""The rank that is built differently."""


def build(what: str) -> None:
    odd = dist.get_rank() == ODD
    width = 5 if what == "width" and odd else 4
    dtype = torch.float64 if what == "dtype" and odd else torch.float32
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)).to(dtype)
    keywords: dict[str, Any] = {"lr": 0.1, "topology": "ring", "algorithm": "awc", "bucket_mb": 25}
    change = {
        "lr": {"lr": 0.2},
        "topology": {"topology": "exponential"},
        "algorithm": {"algorithm": "atc"},
        "bucket_mb": {"bucket_mb": 1},
        "communicate_every": {"communicate_every": 2},
        "momentum": {"momentum": 0.9},
    }
    if odd:
        keywords |= change.get(what, {})
    params = list(model.parameters())
    before = [p.data_ptr() for p in params]
    kind = fusedfog.Adam if what == "optimizer" and odd else fusedfog.SGD
    try:
        kind(params[:-1] if what == "number" and odd else params, model=model, **keywords)
    finally:
        assert [p.data_ptr() for p in params] == before, "a failed construction changed the model"


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("width", "parameter 0 (0.weight) is shape (5, 4) float32"),
        ("dtype", "parameter 0 (0.weight) is shape (4, 4) float64"),
        ("number", "number of parameters is 3 on rank 2 but 4 on rank 0"),
        ("lr", "lr of group 0 is 0.2 on rank 2 but 0.1 on rank 0"),
        ("momentum", "momentum of group 0 is 0.9 on rank 2 but 0 on rank 0"),
        ("topology", "topology is exponential"),
        ("algorithm", "algorithm is 'atc' on rank 2 but 'awc' on rank 0"),
        ("optimizer", "optimizer is Adam on rank 2 but SGD on rank 0"),
        ("bucket_mb", "bucket_mb is 1 on rank 2 but 25 on rank 0"),
        ("communicate_every", "communicate_every is 2 on rank 2 but 1 on rank 0"),
    ],
)
def test_a_mismatch_raises_on_every_rank_and_names_rank_and_field(ranks: Pool, what: str, field: str) -> None:
    for outcome in ranks.outcomes(4, build, what):
        assert outcome.error_type == "MismatchError", outcome.traceback
        assert field in outcome.message
        assert "on rank 2" in outcome.message
        assert outcome.seconds < 20  # of the 30 of the timeout


def mismatch_then_agree() -> float:
    model = nn.Linear(3, 3)
    with pytest.raises(fusedfog.MismatchError, match="lr of group 0"):
        fusedfog.SGD(model.parameters(), lr=0.1 * (1 + dist.get_rank()))
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fusedfog.MismatchError, match="topology is"):
        opt.set_topology("ring" if dist.get_rank() else "exponential")
    with pytest.raises(fusedfog.MismatchError, match="add_param_group"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2 + dist.get_rank()))]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.full((2,), float(dist.get_rank())))], "lr": 0.0})
    opt.set_topology("fully_connected")
    opt.step()
    opt.step()
    return opt.consensus_distance()


def test_after_a_mismatch_the_group_still_works(ranks: Pool) -> None:
    assert ranks.run(4, mismatch_then_agree) == [pytest.approx(0, abs=1e-6)] * 4


def start_values(sync_init: bool) -> tuple[float, float]:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(float(dist.get_rank()))
    opt = fusedfog.SGD(model.parameters(), lr=0.1, sync_init=sync_init, model=model)
    return opt.consensus_distance(), model[1].running_mean[0].item()


def test_sync_init_gives_everyone_rank_zeros_parameters_and_buffers(ranks: Pool) -> None:
    assert ranks.run(4, start_values, True) == [(0.0, 0.0)] * 4
    unsynced = ranks.run(4, start_values, False)
    assert unsynced[0][0] > 0.1
    assert [mean for _, mean in unsynced] == [0.0, 1.0, 2.0, 3.0]


def in_a_subgroup() -> tuple[float, int] | None:
    # Ranks 1 and 3 train together, numbered 0 and 1 within their group; rank 1 has made another group before.
    extra = dist.new_group([1], use_local_synchronization=True) if dist.get_rank() == 1 else None
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return None
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(3, 3)
    opt = fusedfog.SGD(model.parameters(), lr=0.0, group=group, sync_init=False, topology="one_peer_exponential")
    first = opt.consensus_distance()
    opt.step()
    assert first > 0.1
    assert extra is None or dist.get_rank() == 1
    return opt.consensus_distance(), opt.stats()["bytes_sent"] > 0


def test_ranks_in_topologies_are_group_ranks(ranks: Pool) -> None:
    results = ranks.run(4, in_a_subgroup)
    assert results[0] is None
    assert results[1] == results[3] == (pytest.approx(0, abs=1e-6), True)
