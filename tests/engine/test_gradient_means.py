"""Gradients averaged in backward: what users see, and the steps made of it, beside DistributedDataParallel's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fusedfog

STEPS = 6


class Net(nn.Module):
    """Three layers of which the middle one may be left out, one that ranks use in turns, and a parameter used twice."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.sometimes = nn.Linear(7, 7)
        self.gain = nn.Parameter(torch.ones(7))
        self.reentrant = reentrant

    def forward(self, x: Tensor, sometimes: bool = False) -> Tensor:
        x = torch.tanh(self.first(x)) * self.gain
        x = checkpoint(self.middle, x, use_reentrant=True) if self.reentrant else self.middle(x)
        if sometimes:
            x = x + self.sometimes(x)
        return self.last(torch.tanh(x) * self.gain)


def batch(step: int, micro: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    return torch.randn(4, 5, generator=source)


def run(
    model: nn.Module, opt: torch.optim.Optimizer, net: nn.Module, twist: str, sync: Callable[[], Any]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Gradients before every step, and the parameters in the end."""
    seen = []
    for step in range(STEPS):
        opt.zero_grad(set_to_none=twist != "zeros")
        micros = 3 if twist in ("accumulated", "every micro-batch") else 1
        for micro in range(micros):
            with sync() if twist == "accumulated" and micro < micros - 1 else nullcontext():
                odd = twist == "unused" and step % 3 == dist.get_rank()
                (net(batch(step, micro), odd) if twist == "unused" else net(batch(step, micro))).square().mean().backward()
        if twist == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        seen.append([torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()])
        opt.step()
    return seen, [p.detach().clone() for p in model.parameters()]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02),
}


def ours(kind: str, params: Any, **keywords: Any) -> Any:
    if kind == "SGD":
        return fusedfog.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, **keywords)
    if kind == "Decentralized":
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=0.02), **keywords)
    return fusedfog.AdamW(params, lr=0.02, **keywords)


def both(kind: str, twist: str, keywords: dict[str, Any]) -> Any:
    model = Net(twist == "reentrant")
    opt = ours(kind, model.parameters(), bucket_mb=1e-4, **keywords)
    own = run(model, opt, model, twist, opt.no_sync)
    # DistributedDataParallel cannot have reentrant checkpointing beside parameters that are not used.
    other = Net()
    if twist != "unused":
        other.sometimes.requires_grad_(False)
    ddp = DistributedDataParallel(other, find_unused_parameters=twist == "unused")
    kind = "AdamW" if kind == "Decentralized" else kind
    inner = OPTIMIZERS[kind]([p for p in other.parameters() if p.requires_grad])
    theirs = run(other, inner, ddp, twist, ddp.no_sync)
    return own, theirs


TWISTS = ("plain", "zeros", "accumulated", "every micro-batch", "clipped", "unused", "reentrant")
START = {"algorithm": "awc", "data_parallel_steps": STEPS}


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Decentralized"])
@pytest.mark.parametrize("keywords", [{"algorithm": "allreduce"}, START], ids=["allreduce", "start"])
def test_gradients_and_steps_are_those_of_distributed_data_parallel(
    ranks: Pool, kind: str, keywords: dict[str, Any]
) -> None:
    for twist in TWISTS:
        results = ranks.run(3, both, kind, twist, keywords)
        for (seen, params), (wanted, wanted_params) in results:
            for step, (own, other) in enumerate(zip(seen, wanted, strict=True)):
                for a, b in zip(own, other, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f"{twist}, step {step}")
            for a, b in zip(params, wanted_params, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=twist)
        for (_, params), _ in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(params, results[0][0][1], strict=True)), twist
