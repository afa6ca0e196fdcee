"""A small network, and ranks whose batches have different sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fusedfog

BATCHES = [3, 1, 8, 4]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def batch(step: int, rank: int) -> Tensor:
    source = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(BATCHES[rank], 5, generator=source, dtype=torch.float64)


def steps_of(model: nn.Module, opt: Any, steps: range, members: list[int]) -> None:
    for step in steps:
        opt.zero_grad()
        model(torch.cat([batch(step, rank) for rank in members])).square().mean().backward()
        opt.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def build(kind: str, params: Any, **keywords: Any) -> Any:
    if kind == "Decentralized":
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=0.02), **keywords)
    return getattr(fusedfog, kind)(params, lr=0.05 if kind == "SGD" else 0.02, **keywords)
