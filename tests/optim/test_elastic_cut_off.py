"""A member of an elastic run that nothing reaches for a time: the others go on, and it says that they have, or comes back."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.elastic import Members, let_go_after

import fusedfog
from fusedfog.testing import fail_at

SLOTS, STEPS, AT, VICTIM = 3, 60, 20, 2


def train(seconds: float) -> dict[str, Any]:
    fusedfog.init(elastic=True, timeout=60)
    let_go_after(3.0)
    model = torch.nn.Linear(4, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="fully_connected")
    try:
        with fail_at(VICTIM, AT, "partition", seconds=seconds):
            while opt.steps < STEPS:
                opt.zero_grad()
                model(torch.ones(4)).square().backward()
                opt.step()
                time.sleep(0.01)
    except fusedfog.Minority as error:
        return {"minority": str(error), "steps": opt.steps}
    return {"members": opt.stats()["members"], "reforms": opt.stats()["reforms"], "steps": opt.steps}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 8.0], ids=["for less than dead_after", "for longer"])
def test_a_member_that_nothing_reaches_for_a_time_is_let_go_when_that_was_too_long(seconds: float) -> None:
    with Members(SLOTS) as members:
        members.start(train, seconds)
        results = members.results(120)
    if seconds < 1:
        for result in results.values():
            assert result == {"members": ("0.0", "1.0", "2.0"), "reforms": 0, "steps": STEPS}
        return
    for uid in ("0.0", "1.0"):
        assert results[uid] == {"members": ("0.0", "1.0"), "reforms": 1, "steps": STEPS}
    assert "minority" in results["2.0"], results["2.0"]
