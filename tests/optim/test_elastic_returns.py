"""A process that stood still for too long, and was let go: it comes back by itself, unless its place is another one's."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from support.elastic import Members, current_run, let_go_after, say

import fusedfog

SLOW = pytest.mark.slow
STAYS, BACK = ("0.0", "2.0"), ("0.0", "1.0.1", "2.0")


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def trains_until_it_is_back(kind: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Slot 1 is stopped after 20 steps, until the others are without it; all make 50 steps more once it is back."""
    changes: list[fusedfog.Change] = []
    fusedfog.init(elastic=True, timeout=120, on_membership_change=changes.append)
    let_go_after(3.0)
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = getattr(fusedfog, kind)([x], lr=0.1, **{"topology": "ring", **keywords})
    calls, until, run = 0, 10**9, current_run()
    while opt.steps < until:
        x.grad = torch.full_like(x, 1.0 + own_slot())
        opt.step()
        calls += 1
        if opt.stats()["members"] == BACK:
            until = run.record.steps + 50
        if calls == 20:
            say("trains")
        if calls > 20 and opt.stats()["members"] == STAYS:
            say("goes on")
        time.sleep(0.005)
    fusedfog.agree(True)  # Without a clock in common, one might end while another opens its windows with it.
    updates = [int(state["step"]) for state in opt.state.values() if "step" in state]
    return {
        "steps": opt.steps,
        "x": x.tolist(),
        "changes": changes,
        "stats": opt.stats(),
        "updates": updates,
        "calls": calls,
    }


def stop_until_it_is_let_go(members: Members, uid: str = "1.0") -> None:
    for slot in range(members.slots):
        members.wait_for(f"{slot}.0", "trains", 100)
    members.signal(uid, signal.SIGSTOP)
    for other in STAYS:
        members.wait_for(other, "goes on", 100)


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        ("SGD", {}),
        ("SGD", {"asynchronous": True}),
        pytest.param("AdamW", {"algorithm": "push_sum"}, marks=SLOW),
        pytest.param("SGD", {"algorithm": "gradient_tracking"}, marks=SLOW),
        pytest.param("AdamW", {"wire_dtype": "int8"}, marks=SLOW),
    ],
)
def test_one_that_stood_still_for_too_long_comes_back_by_itself(kind: str, keywords: dict[str, Any]) -> None:
    with Members(3) as members:
        members.start(trains_until_it_is_back, kind, keywords)
        stop_until_it_is_let_go(members)
        members.signal("1.0", signal.SIGCONT)
        results = members.results(120)
    assert list(results) == ["0.0", "1.0", "2.0"]
    for result in results.values():
        assert torch.tensor(result["x"]).isfinite().all()
    if not keywords.get("asynchronous"):
        assert len({result["steps"] for result in results.values()}) == 1, "it has the others' clock"
    for uid in STAYS if kind == "AdamW" else ():
        assert results[uid]["updates"] == [results[uid]["calls"]], "each gradient was used once"
    for uid in STAYS:
        left, joined = results[uid]["changes"][1:3]
        assert left.left == ("1.0",) and joined.joined == ("1.0.1",) and joined.members == BACK
    back = results["1.0"]["changes"][1]
    assert back.members == BACK and back.joined == ("1.0.1",) and "slot 1" in back.cause
    assert results["1.0"]["stats"]["reforms"] >= 1


def is_told(until: int) -> str:
    """Slot 1 is stopped, and when it wakes, its place is another process'."""
    fusedfog.init(elastic=True, timeout=120)
    let_go_after(3.0)
    x = torch.nn.Parameter(torch.zeros(3))
    opt = fusedfog.SGD([x], lr=0.1, topology="ring")
    before = None
    try:
        while opt.steps < until or opt.stats()["members"] == ("0.0", "1.0", "2.0"):
            before = x.detach().clone()
            x.grad = torch.ones_like(x)
            opt.step()
            if opt.steps == 20:
                say("trains")
            if opt.steps > 20 and opt.stats()["members"] != ("0.0", "1.0", "2.0"):
                say("goes on")
            time.sleep(0.01)
    except fusedfog.Minority as error:
        assert before is not None and x.isfinite().all()
        return str(error)
    return str(opt.stats()["members"])


def test_one_whose_place_has_been_taken_meanwhile_says_so() -> None:
    with Members(3) as members:
        members.start(is_told, 300)
        stop_until_it_is_let_go(members)
        members.start_again(1, is_told, 300)
        members.wait_for("1.1", "goes on", 100)
        members.signal("1.0", signal.SIGCONT)
        results = members.results(120)
    assert "1.1 on" in results["1.0"] and "started in its place" in results["1.0"], results["1.0"]
    for uid in ("0.0", "1.1", "2.0"):
        assert "Minority" not in results[uid]


def stops_in_a_call() -> Any:
    """Slot 1 stands still in `averaged()`, which the others make without it."""
    fusedfog.init(elastic=True, timeout=120)
    let_go_after(2.0)
    x = torch.nn.Parameter(torch.full((3,), float(own_slot())))
    opt = fusedfog.SGD([x], lr=0.0, topology="ring")
    x.grad = torch.zeros_like(x)
    opt.step()
    if own_slot() == 1:
        commit = current_run().commit
        current_run().commit = lambda: (os.kill(os.getpid(), signal.SIGSTOP), commit())[1]
    try:
        with opt.averaged():
            pass
    except fusedfog.Minority as error:
        return str(error)
    say("has averaged")
    for _ in range(300):
        x.grad = torch.zeros_like(x)
        opt.step()
        time.sleep(0.01)
    return opt.stats()["members"]


@SLOW
def test_one_that_was_let_go_in_a_call_of_all_is_told_to_be_started_again() -> None:
    with Members(3) as members:
        members.start(stops_in_a_call)
        for uid in STAYS:
            members.wait_for(uid, "has averaged", 100)
        members.signal("1.0", signal.SIGCONT)
        results = members.results(120)
    assert results["0.0"] == results["2.0"] == STAYS
    assert "go on without this process" in results["1.0"] and "Start it again" in results["1.0"]
