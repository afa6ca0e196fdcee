"""`measure=True`: what stats() tells of the last step equals what its tensors say, in every mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog

TINY = 2e-4


def measured(algorithm: str, keywords: dict[str, Any]) -> dict[str, float]:
    """The last step's figures, and what they should be, from the parameters of all ranks before it."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    params = list(model.parameters())
    options: dict[str, Any] = {"bucket_mb": TINY, "sync_init": False, "topology": "ring", **keywords}
    opt = fusedfog.SGD(params, lr=0.1, algorithm=algorithm, measure=True, **options)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 5)).square().sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params]).item() if params[0].grad is not None else 0.0
        sent = torch.cat([p.detach().flatten() for p in params])
        if algorithm == "atc":
            sent -= 0.1 * torch.cat([p.grad.flatten() for p in params])
        opt.step()
    everyone = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, sent)
    n, rank = len(everyone), dist.get_rank()
    pull = (everyone[(rank + 1) % n] + everyone[(rank - 1) % n] - 2 * sent) / 3
    opt.drain()
    return {"norm": norm, "pull": pull.norm().item()} | opt.stats()


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
@pytest.mark.parametrize("keywords", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_stats_tell_gradient_norm_and_disagreement(ranks: Pool, algorithm: str, keywords: dict[str, Any]) -> None:
    if keywords and algorithm == "atc":
        pytest.skip("the expectation of what was sent knows no clipping")
    for found in ranks.run(4, measured, algorithm, keywords):
        assert found["gradient_norm"] == pytest.approx(
            min(found["norm"], keywords.get("max_grad_norm", math.inf)), rel=1e-5
        )
        assert found["disagreement"] == pytest.approx(found["pull"], rel=1e-5)
        assert found["pull"] > 0


def test_a_gradient_that_is_not_finite_shows_and_nothing_is_measured_unasked() -> None:
    for measure in (True, False):
        param = nn.Parameter(torch.ones(3))
        opt = fusedfog.SGD([param], lr=0.0, measure=measure)
        param.grad = torch.tensor([1.0, math.inf, 1.0])
        opt.step()
        assert opt.stats().get("gradient_norm") == (math.inf if measure else None)


def test_compiled_passes_measure_nothing() -> None:
    with pytest.raises(ValueError, match="compiled passes measure nothing"):
        fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, measure=True, cpu_compile=True)
