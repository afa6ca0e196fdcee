"""A GPU's way to learn whose values are not finite, on the stand-in: steps later, and with no wait of the host."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from test_gpu_branches import gpu_world
from torch import nn

import fusedfog

SICK = 2


def train(keywords: dict[str, Any], steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    with gpu_world() as gpu, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, error = nn.Linear(6, 3), ""
        opt = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, **keywords)
        try:
            for step in range(steps):
                opt.zero_grad()
                model(torch.ones(2, 6)).square().sum().backward()
                if step == 2 and dist.get_rank() == SICK:
                    model.weight.data[0].fill_(math.nan)
                # The first steps, and the first ones with something sick, make room for the host's copies.
                with gpu.without_syncs() if step == 3 else contextlib.nullcontext():
                    opt.step()
        except fusedfog.NonFiniteError as found:
            error = str(found)
        stats = opt.stats()
        return {
            "finite": bool(model.weight.isfinite().all()),
            "error": error,
            "from": stats.get("refused_from", {}),
            "healed": stats["healed"],
            "named": [str(one.message)[:34] for one in caught if issubclass(one.category, fusedfog.NonFiniteWarning)],
        }


@pytest.mark.parametrize("keywords", [{"topology": "ring"}, {"topology": "ring", "algorithm": "atc"}], ids=str)
def test_neighbours_name_the_sick_rank_within_a_few_steps(ranks: Pool, keywords: dict[str, Any]) -> None:
    for rank, one in enumerate(ranks.run(4, train, keywords, 40, init=False)):
        assert one["finite"] == (rank != SICK)
        near = rank in (1, 3)
        assert set(one["from"]) == ({SICK} if near else set()), (rank, one)
        assert one["named"] == [f"rank {rank}: values from rank {SICK} are not"] * near


def test_a_rank_heals_once_it_has_been_told(ranks: Pool) -> None:
    # Of torch's own rules, the stand-in's passes on the CPU do not look at own values; the kernel and other rules do.
    keywords = {"topology": "ring", "algorithm": "quasi_global", "nonfinite": "heal"}
    for rank, one in enumerate(ranks.run(4, train, keywords, 12, init=False)):
        assert one["finite"], (rank, one)
