"""torch.compile around `step` or a whole training step runs our step outside the graph, and trains as torch's does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedfog


def trained(build: Callable[[Any], Any], way: str) -> tuple[Tensor, int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    opt = build(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    step = torch.compile(opt.step, backend="aot_eager") if way == "step" else opt.step

    def train(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        step()
        schedule.step()
        opt.zero_grad()
        return loss

    train_compiled = torch.compile(train, backend="aot_eager") if way == "whole" else train
    for i in range(5):
        torch.manual_seed(i)
        train_compiled(torch.randn(3, 4))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), graphs


@pytest.mark.parametrize("way", ["step", "whole"])
@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Decentralized"])
def test_a_compiled_step_is_an_eager_one(kind: str, fused_backward: bool, way: str) -> None:
    if kind == "Decentralized":
        if fused_backward:
            pytest.skip("Decentralized has no fused_backward")
        expected, _ = trained(lambda params: torch.optim.SGD(params, lr=0.1), "eager")
        found, graphs = trained(lambda params: fusedfog.Decentralized(torch.optim.SGD(params, lr=0.1)), way)
    else:
        expected, _ = trained(lambda params: getattr(torch.optim, kind)(params, lr=0.1), "eager")
        found, graphs = trained(
            lambda params: getattr(fusedfog, kind)(params, lr=0.1, fused_backward=fused_backward, bucket_mb=1e-4), way
        )
    torch.testing.assert_close(found, expected)
    assert graphs == (way == "whole")  # the forward's, and none of ours
