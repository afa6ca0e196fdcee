"""Collective operations of a step and of plain tensors: gloo ends the process if they meet, so they must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import meet, shorten, unhurried
from torch import nn

import fusedfog

TIMEOUT = 2.0


@unhurried()
def apart(keywords: dict[str, Any], opened: bool) -> None:
    torch.manual_seed(0)
    if opened:
        fusedfog.neighbor_allreduce(torch.ones(3), "ring")
    model = nn.Linear(300, 30)
    opt = fusedfog.SGD(model.parameters(), lr=0.01, **keywords)
    opt.step()
    meet("trained")
    shorten(TIMEOUT)
    if dist.get_rank() == 0:
        fusedfog.neighbor_allreduce(torch.ones(3), "ring")
    for _ in range(20):
        opt.step()


@pytest.mark.parametrize("opened", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "keywords",
    [{"algorithm": "allreduce"}, pytest.param({"global_average_every": 1, "topology": "ring"}, marks=pytest.mark.slow)],
)
def test_an_operation_of_one_rank_while_the_others_average_is_named(
    ranks: Pool, keywords: dict[str, Any], opened: bool
) -> None:
    for rank, outcome in enumerate(ranks.outcomes(3, apart, keywords, opened)):
        assert outcome.error_type == "PeerTimeout", outcome
        assert outcome.message.startswith(f"rank {rank}: ")
        assert "rank 0 is in neighbor_allreduce(), ranks 1-2 are in step() " in outcome.message
