"""Asynchronous members of an elastic run: they keep their clocks, meet only when members change, and reach the same limits."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.deaths import die
from support.elastic import Members, current_run, results_when_one_comes_back, say

import fusedfog

SLOTS, SIZE, VICTIM, LR = 4, 5, 2, 0.1
SLOW = pytest.mark.slow


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def is_first() -> bool:
    return os.environ["FUSEDFOG_INCARNATION"] == "0"


def numbers(slot: int) -> tuple[np.ndarray, np.ndarray]:
    """A member's own loss is h (x - c)^2 / 2 in each coordinate; here are h and c."""
    return 1.0 + np.arange(SIZE) * (slot + 1) / 8, np.linspace(-1, 1, SIZE) * (slot + 1) + 3 * (slot == 2)


def rest_of_ring(slots: list[int]) -> np.ndarray:
    """Where members on a ring come to rest, whatever their speeds: (I - W + a H) x = a H c. [members, SIZE]."""
    hs, cs = map(np.array, zip(*map(numbers, slots), strict=True))
    n, found = len(slots), np.empty((len(slots), SIZE))
    mixing = sum(np.roll(np.eye(n), shift, 0) for shift in (-1, 0, 1)) / 3
    for k in range(SIZE):
        pull = LR * np.diag(hs[:, k])
        found[:, k] = np.linalg.solve(np.eye(n) - mixing + pull, pull @ cs[:, k])
    return found


def begin(lr: float = LR, dead_after: float = 10.0, **keywords: Any) -> tuple[torch.nn.Parameter, Any]:
    x = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    given = {"topology": "ring", "asynchronous": True, **keywords}
    fusedfog.init(elastic=True, timeout=120, dead_after=dead_after, on_membership_change=Seen(x).see)
    return x, fusedfog.SGD([x], lr=lr, **given)


class Seen:
    """What a process had when it went over to other members."""

    changes: list[fusedfog.Change] = []
    values: list[np.ndarray] = []

    def __init__(self, x: torch.nn.Parameter) -> None:
        self.x = x

    def see(self, change: fusedfog.Change) -> None:
        Seen.changes.append(change)
        Seen.values.append(self.x.detach().clone().numpy())


def step(x: torch.nn.Parameter, opt: Any) -> None:
    h, c = map(torch.from_numpy, numbers(own_slot()))
    x.grad = h * (x.detach() - c)
    opt.step()


def enough(steps: int, since: int) -> bool:
    """Whether all members that there are have made so many steps since this process has asked first; for a fair end."""
    run = current_run()
    if since == steps:
        run.board.set(f"enough/{run.seat.uid}", "")
    return since >= steps and run.board.has([f"enough/{uid}" for uid in run.record.uids])


def outcome(x: torch.nn.Parameter, opt: Any, **more: Any) -> dict[str, Any]:
    stats = opt.stats()
    return {"x": x.detach().clone().numpy(), "steps": opt.steps, "members": stats["members"], "changes": Seen.changes, **more}


def trains_until_rest(steps: int, members: int, slowest: int) -> dict[str, Any]:
    """Slot 2 dies in its 20th step. Steps are counted from when there are so many members after that; one member is slow."""
    x, opt = begin()
    calls, since, before = 0, 0, opt.steps
    while not enough(steps, since):
        if is_first() and own_slot() == VICTIM and calls == 20:
            die()
        step(x, opt)
        calls += 1
        stats = opt.stats()
        since += stats["epoch"] > 0 and len(stats["members"]) == members
        time.sleep(0.003 if own_slot() == slowest else 0.0005)
    found = outcome(x, opt, made=opt.steps - before, calls=calls)
    fusedfog.agree(True)  # One that is done mixes only, which is another limit.
    opt.finish()
    return found


@pytest.mark.parametrize("slowest", [3, pytest.param(0, marks=SLOW)])
def test_survivors_come_to_rest_where_their_own_graph_has_it_and_keep_their_clocks(slowest: int) -> None:
    with Members(SLOTS) as members:
        members.start(trains_until_rest, 400, 3, slowest)
        results = members.results(180)
    assert list(results) == ["0.0", "1.0", "3.0"]
    for result in results.values():
        assert result["members"] == ("0.0", "1.0", "3.0")
        assert result["made"] == result["calls"], "its clock counts its own steps"
        assert result["changes"][-1].left == ("2.0",) and result["changes"][-1].cause == "slot 2 has ended"
    assert len({result["steps"] for result in results.values()}) > 1, "nobody took over the others' clock"
    found = np.array([result["x"] for result in results.values()])
    np.testing.assert_allclose(found, rest_of_ring([0, 1, 3]), rtol=0, atol=1e-8)


@SLOW
def test_all_come_to_rest_on_the_whole_graph_once_the_killed_one_is_back() -> None:
    results = results_when_one_comes_back(SLOTS, VICTIM, trains_until_rest, 500, 4, 1)
    assert list(results) == ["0.0", "1.0", "3.0", "2.1"]
    for result in results.values():
        assert result["members"] == ("0.0", "1.0", "2.1", "3.0") and result["made"] == result["calls"]
    found = np.array([results[uid]["x"] for uid in ("0.0", "1.0", "2.1", "3.0")])
    np.testing.assert_allclose(found, rest_of_ring([0, 1, 2, 3]), rtol=0, atol=1e-8)


def mixes_only(algorithm: str, topology: str) -> dict[str, Any]:
    """Without learning rate: what all come to is a mean of what they had when the members changed for the last time."""
    x, opt = begin(0.0, algorithm=algorithm, topology=topology)
    if is_first():
        with torch.no_grad(), opt.paused():
            x.copy_(torch.linspace(-1, 1, SIZE, dtype=torch.float64) * (own_slot() + 1) ** 2)
    else:
        say(opt.steps)
    calls, since = 0, 0
    while not enough(300, since):
        if is_first() and own_slot() == VICTIM and calls == 3:
            die()
        x.grad = torch.zeros_like(x)
        opt.step()
        calls += 1
        stats = opt.stats()
        since += stats["epoch"] > 0 and len(stats["members"]) == SLOTS
        time.sleep(0.001)
    opt.drain()
    return outcome(x, opt, at_change=Seen.values[-1], mass=opt.stats().get("mass", 1.0))


@pytest.mark.parametrize(
    ("algorithm", "topology"), [("push_sum", "exponential"), pytest.param("awc", "fully_connected", marks=SLOW)]
)
def test_a_newcomer_takes_the_mean_of_the_others_and_brings_nothing(algorithm: str, topology: str) -> None:
    results = results_when_one_comes_back(SLOTS, VICTIM, mixes_only, algorithm, topology)
    known = np.array([result["at_change"] for uid, result in results.items() if uid != "2.1"])
    assert known.std(0).max() > 1e-6, "they were apart, or this says nothing"
    found = np.array([result["x"] for result in results.values()])
    assert np.ptp(found, 0).max() < 1e-9
    if algorithm == "push_sum":
        # Of equal masses; whoever mixes first, with awc, counts more.
        np.testing.assert_allclose(found, np.tile(known.mean(0), (4, 1)), rtol=0, atol=1e-9)
        assert sum(result["mass"] for result in results.values()) == pytest.approx(4.0, abs=1e-9)
    assert (found >= known.min(0) - 1e-9).all() and (found <= known.max(0) + 1e-9).all()
