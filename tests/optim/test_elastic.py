"""Processes of an elastic run are killed, and the others train on: what they reach, by the formula of those that are left."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch
from support.elastic import Members, say

import fusedfog

SLOTS, SIZE = 4, 5


def target(slot: int) -> torch.Tensor:
    """Where a member's own loss is least."""
    return torch.linspace(-1, 1, SIZE, dtype=torch.float64) * (slot + 1) + 3 * (slot == 2)


def curvature(slot: int) -> torch.Tensor:
    return 1.0 + torch.arange(SIZE, dtype=torch.float64) * (slot + 1) / 8


def optimum(slots: list[int]) -> np.ndarray:
    """Where the sum of these members' losses is least; by numpy alone."""
    hs = np.array([1.0 + np.arange(SIZE) * (slot + 1) / 8 for slot in slots])
    cs = np.array([np.linspace(-1, 1, SIZE) * (slot + 1) + 3 * (slot == 2) for slot in slots])
    return (hs * cs).sum(0) / hs.sum(0)


class Plan:
    """What a process does beside training; plain, as it travels."""

    def __init__(
        self, steps: int, *, victim: int = -1, at: int = -1, pause: float = 0.0, kind: str = "SGD", **keywords: Any
    ):
        self.steps, self.victim, self.at, self.pause, self.kind, self.keywords = (
            steps,
            victim,
            at,
            pause,
            kind,
            keywords,
        )


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def build(plan: Plan) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(SIZE, 1, bias=False).double()
    keywords = {"lr": 0.05, **plan.keywords}
    if plan.kind == "Decentralized":
        algorithm = keywords.pop("algorithm", "awc")
        return model, fusedfog.Decentralized(torch.optim.SGD(model.parameters(), **keywords), algorithm=algorithm)
    return model, getattr(fusedfog, plan.kind)(model.parameters(), **keywords)


def one_step(model: torch.nn.Linear, opt: Any) -> None:
    slot = own_slot()
    opt.zero_grad()
    (curvature(slot) * (model.weight[0] - target(slot)) ** 2).sum().mul(0.5).backward()
    opt.step()


def train(plan: Plan) -> dict[str, Any]:
    changes: list[fusedfog.Change] = []
    fusedfog.init(elastic=True, timeout=60, dead_after=5.0, on_membership_change=changes.append)
    model, opt = build(plan)
    began = opt.steps
    first = os.environ["FUSEDFOG_INCARNATION"] == "0"
    while opt.steps < plan.steps:
        if first and opt.steps == plan.at and own_slot() == plan.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        one_step(model, opt)
        if opt.steps % 10 == 0:
            say(opt.steps)
        time.sleep(plan.pause)
    return {
        "x": model.weight.detach()[0].numpy(),
        "steps": opt.steps,
        "began": began,
        "changes": changes,
        "stats": opt.stats(),
        "rank": fusedfog.rank(),
        "updates": {name: float(state["step"]) for name, state in enumerate(opt.state.values()) if "step" in state},
    }


def test_three_of_four_train_on_when_one_is_killed() -> None:
    with Members(SLOTS) as members:
        members.start(train, Plan(60, victim=2, at=20))
        results = members.results()
    assert list(results) == ["0.0", "1.0", "3.0"]
    for place, result in enumerate(results.values()):
        assert result["steps"] == 60 and result["rank"] == place
        first, second = result["changes"]
        assert first.members == ("0.0", "1.0", "2.0", "3.0") and first.epoch == 0
        assert second.members == ("0.0", "1.0", "3.0") and second.epoch == 1
        assert second.left == ("2.0",) and second.joined == () and "rank 2" in second.cause
        stats = result["stats"]
        assert (stats["epoch"], stats["members"], stats["reforms"]) == (1, ("0.0", "1.0", "3.0"), 1)
        assert 0 < stats["reform_s"] < 60
    assert len({result["stats"]["exchanges"] for result in results.values()}) == 1
