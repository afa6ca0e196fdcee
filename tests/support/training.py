"""A rank's side of the recursion tests: train the standard quadratics with a real optimizer, record its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import fusedfog

Array = np.ndarray

CUTS = (1, 3, 7)
"""The vector x is held as parameters of these sizes and the rest, so that slots, padding and buckets all take part."""

TINY_BUCKETS = 2e-4
"""MB; 64 float64 elements are 512 bytes, so every parameter or two is a bucket of its own."""


class QuadraticLoss(nn.Module):
    """f(x) = x'Hx/2 - c'x with x cut into several parameters."""

    def __init__(self, hessian: Array, linear: Array, start: Array) -> None:
        super().__init__()
        self.register_buffer("hessian", torch.from_numpy(hessian.copy()))
        self.register_buffer("linear", torch.from_numpy(linear.copy()))
        pieces = np.split(start, [cut for cut in CUTS if cut < len(start)])
        self.parts = nn.ParameterList([torch.from_numpy(piece.copy()) for piece in pieces])

    def forward(self) -> torch.Tensor:
        x = torch.cat(list(self.parts))
        return 0.5 * x @ (self.hessian @ x) - self.linear @ x

    def vector(self) -> Array:
        return torch.cat([p.detach() for p in self.parts]).numpy().copy()


def train(
    kind: str,
    hessians: Array,
    linear: Array,
    x0: Array,
    rates: Sequence[float],
    *,
    record: bool = True,
    touch: Callable[[Any, int], None] | None = None,
    weights: Sequence[float] | None = None,
    **keywords: Any,
) -> Array:
    """Train rank i on (hessians[i], linear[i]) from x0[i] for len(rates) steps; returns its trajectory [steps + 1, d].

    `weights` has one for each rank.
    """
    rank = dist.get_rank()
    model = QuadraticLoss(hessians[rank], linear[rank], x0[rank])
    keywords = {"sync_init": False, "bucket_mb": TINY_BUCKETS} | keywords
    if weights is not None:
        keywords["weight"] = weights[rank]
    opt = getattr(fusedfog, kind)(model.parameters(), lr=rates[0], **keywords)
    path = [model.vector()]
    for step, rate in enumerate(rates):
        for group in opt.param_groups:
            group["lr"] = rate
        opt.zero_grad()
        model().backward()
        if touch is not None:
            touch(opt, step)
        opt.step()
        if record or step == len(rates) - 1:
            path.append(model.vector())
    opt.drain()
    return np.stack(path)
