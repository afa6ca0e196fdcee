"""What `fusedfog.elastic_sampler` gives to the processes of an elastic run of which one is killed: each sample once."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest
import torch
from support.elastic import Members, say

import fusedfog

SLOTS, SAMPLES, BATCH, VICTIM, AT = 3, 200, 2, 1, 9


def train(algorithm: str, after_drawing: bool) -> dict[str, Any]:
    fusedfog.init(elastic=True, timeout=60)
    model = torch.nn.Linear(2, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.01, algorithm=algorithm, topology="fully_connected")
    sampler = fusedfog.elastic_sampler(SAMPLES, opt, BATCH, shuffle=False)
    own, used = os.environ["FUSEDFOG_SLOT"], {}
    while sampler.epoch < 1:
        for batch in sampler:
            if own == str(VICTIM) and opt.steps == AT:
                if after_drawing:
                    say(batch)
                time.sleep(60.0)  # Until it is killed.
            used[opt.steps] = batch
            opt.zero_grad()
            model(torch.ones(2)).backward()
            opt.step()
            # With what awc sends a step ahead, the victim's last message has come a step later.
            if own != str(VICTIM) and opt.steps == AT + (algorithm == "awc"):
                say("has its last message")
    return {"used": used, "steps": sampler.steps}


@pytest.mark.parametrize(
    ("algorithm", "after_drawing"), [("awc", True), pytest.param("atc", False, marks=pytest.mark.slow)]
)
def test_the_survivors_and_the_dead_have_used_each_sample_once(algorithm: str, after_drawing: bool) -> None:
    with Members(SLOTS) as members:
        members.start(train, algorithm, after_drawing)
        for uid in ("0.0", "2.0"):
            members.wait_for(uid, "has its last message")
        members.kill(VICTIM)
        results = members.results()
    assert list(results) == ["0.0", "2.0"]
    counts: Counter[int] = Counter()
    for result in results.values():
        assert result["steps"] == 34
        for batch in result["used"].values():
            counts.update(batch)
    for step in range(AT):  # What the dead one had used, by the definition of a share.
        first, end = step * SAMPLES // 34, (step + 1) * SAMPLES // 34
        size = end - first
        counts.update(range(first + VICTIM * size // SLOTS, first + (VICTIM + 1) * size // SLOTS))
    assert counts == Counter(dict.fromkeys(range(SAMPLES), 1))
