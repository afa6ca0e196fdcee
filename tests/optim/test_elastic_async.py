"""Asynchronous members of an elastic run: they keep their clocks, meet only when members change, and reach the same limits."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.deaths import die
from support.elastic import Members, current_run, let_go_after, linger, results_when_one_comes_back, say

import fusedfog
from fusedfog.comm.window import opening

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


def begin(lr: float = LR, dead_after: float = 30.0, **keywords: Any) -> tuple[torch.nn.Parameter, Any]:
    x = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    given = {"topology": "ring", "asynchronous": True, **keywords}
    fusedfog.init(elastic=True, timeout=120, on_membership_change=Seen(x).see)
    let_go_after(dead_after)
    return x, fusedfog.SGD([x], lr=lr, **given)


class Seen:
    """What a process had when it went over to other members."""

    changes: ClassVar[list[fusedfog.Change]] = []
    values: ClassVar[list[np.ndarray]] = []
    kept: ClassVar[float] = 1.0
    """What becomes of the gradient of a step in which somebody joins."""

    def __init__(self, x: torch.nn.Parameter) -> None:
        self.x = x

    def see(self, change: fusedfog.Change) -> None:
        Seen.changes.append(change)
        Seen.values.append(self.x.detach().clone().numpy())
        if change.epoch and change.joined and self.x.grad is not None:
            self.x.grad.mul_(self.kept)


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
    return {
        "x": x.detach().clone().numpy(),
        "steps": opt.steps,
        "members": stats["members"],
        "changes": list(Seen.changes),
        **more,
    }


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
    """Members pull apart until somebody joins, and from that moment on only mix: what do they come to?"""
    Seen.kept = 0.0
    x, opt = begin(algorithm=algorithm, topology=topology)
    target = torch.linspace(-1, 1, SIZE, dtype=torch.float64) * (own_slot() + 1) ** 2
    made, since = opt.steps, 0
    while not enough(300, since):
        if is_first() and own_slot() == VICTIM and opt.steps == 10:
            die()
        x.grad = torch.zeros_like(x) if "2.1" in Seen.changes[-1].members else x.detach() - target
        opt.step()
        stats = opt.stats()
        since += stats["epoch"] > 0 and len(stats["members"]) == SLOTS
        time.sleep(0.001)
    opt.drain()
    return outcome(x, opt, at_change=Seen.values[-1], mass=opt.stats().get("mass", 1.0), made=opt.steps - made)


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


def stands_still(until: int, max_lag: int | None) -> Any:
    """Slot 1 is stopped. Nobody waits for it, or no longer than for a member: the others go on without it."""
    x, opt = begin(dead_after=2.0, max_lag=max_lag)
    board = current_run().board
    # One that is through goes on: it must not end while the other opens its windows with it, or waits for it.
    while not board.has(["through/0", "through/2"]):
        step(x, opt)
        if opt.steps == 20:
            say("trains")
        if opt.steps >= until and len(opt.stats()["members"]) <= 2:
            board.set(f"through/{own_slot()}", "")
        time.sleep(0.005)
    return [change.members for change in Seen.changes], opt.steps


@pytest.mark.parametrize("max_lag", [None, 3])
def test_one_that_stands_still_for_too_long_is_let_go_though_nobody_waits_for_it(max_lag: int | None) -> None:
    with Members(3) as members:
        members.start(stands_still, 60, max_lag)
        for slot in range(3):
            members.wait_for(f"{slot}.0", "trains")
        members.signal("1.0", signal.SIGSTOP)
        for uid in ("0.0", "2.0"):
            members.processes[uid].join(90)
        members.kill(1)
        results = members.results()
    assert list(results) == ["0.0", "2.0"]
    for seen, made in results.values():
        assert seen[1] == ("0.0", "2.0") and made >= 60


def is_slow(until: int) -> Any:
    """A step of slot 1 takes longer than `dead_after`, and in the middle of one the members change."""
    x, opt = begin(dead_after=2.0)
    while opt.steps < until or "2.0" in opt.stats()["members"]:
        if own_slot() == 2 and opt.steps == 5:
            time.sleep(0.5)
            die()
        step(x, opt)
        time.sleep(3.0 if own_slot() == 1 else 0.05)
    return opt.steps, opt.stats()["members"]


@SLOW
def test_a_slow_member_is_waited_for_when_members_change() -> None:
    with Members(3) as members:
        members.start(is_slow, 6)
        results = members.results()
    # Those who are through end first, and the slow one goes on without them.
    assert results["0.0"][1] == ("0.0", "1.0")
    assert min(result[0] for result in results.values()) >= 6


def is_done_early(until: int) -> Any:
    """Slot 0 has no data and serves from the beginning; slot 1 dies, and comes back; slot 2 has much."""
    x, opt = begin()
    with opt.uneven():
        if not is_first():
            say(("joined", opt.steps))
        while own_slot() != 0 and opt.steps < until:
            if is_first() and own_slot() == 1 and opt.steps == 20:
                die()
            step(x, opt)
            time.sleep(0.002)
            if own_slot() == 2 and opt.steps == until - 1:
                # It has more until the killed one is back, and is through.
                while "1.1" not in opt.stats()["members"]:
                    step(x, opt)
                    opt._engine.clock.steps -= 1
                    time.sleep(0.002)
    return outcome(x, opt, stats=opt.stats(), distance=opt.consensus_distance())


def test_who_is_done_serves_on_through_a_death_and_a_return() -> None:
    results = results_when_one_comes_back(3, 1, is_done_early, 100)
    assert list(results) == ["0.0", "2.0", "1.1"]
    for result in results.values():
        assert result["members"] == ("0.0", "1.1", "2.0")
        assert result["stats"]["rank_steps"][0] == 0 and result["stats"]["rank_steps"][2] == 100
        assert np.isfinite(result["x"]).all() and result["distance"] < 5
    assert len({tuple(result["stats"]["rank_steps"]) for result in results.values()}) == 1
    assert results["0.0"]["steps"] == 0, "steps that only mix are none of training"


def figures() -> tuple[int, int, int]:
    """Threads, descriptors, and mapped files of shared memory of this process."""
    with open("/proc/self/maps") as file:
        mapped = sum("memfd" in line or "/dev/shm" in line for line in file)
    return threading.active_count(), len(os.listdir("/proc/self/fd")), mapped


def changes_again_and_again(times: int, algorithm: str) -> Any:
    x, opt = begin(algorithm=algorithm)
    run: Any = current_run()
    found: list[tuple[int, int, int]] = []
    while opt.stats()["reforms"] < times:
        before = opt.stats()["reforms"]
        step(x, opt)
        if opt.stats()["reforms"] > before:
            found.append(figures())
        if own_slot() == 0:
            run.call(run.record.epoch)  # As if a newcomer had come, that goes away.
    fusedfog.agree(True)
    return found, opt.stats()["members"]


@pytest.mark.parametrize("algorithm", ["awc", pytest.param("push_sum", marks=SLOW)])
def test_nothing_is_left_of_windows_over_many_changes(algorithm: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with Members(3) as members:
        members.start(changes_again_and_again, 20, algorithm)
        results = members.results(180)
    for found, uids in results.values():
        assert uids == ("0.0", "1.0", "2.0") and len(found) >= 20
        first, last = found[1], found[-1]
        assert last[0] <= first[0] + 2 and last[1] <= first[1] + 4 and last[2] <= first[2], found
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "fusedfog" in name}


def meets_others(until: int, at: int) -> Any:
    """All call `averaged()` when their own clock is `at`; the fast one waits there while another dies, and comes back."""
    if not is_first():
        time.sleep(1.5)  # The fast one is in the call by then.
    x, opt = begin()
    began, means = opt.steps, []
    while opt.steps < until:
        if is_first() and own_slot() == 1 and opt.steps == 5:
            die()
        step(x, opt)
        if opt.steps == at:
            with opt.averaged():
                means.append(x.detach().clone().numpy())
        time.sleep(0.15 if own_slot() == 2 and opt.steps < at else 0.005)
        linger(opt, "1.1", until)
    return began, opt.steps, means, [change.members for change in Seen.changes]


def test_a_newcomer_comes_in_once_those_that_wait_for_each_other_in_a_call_have_met() -> None:
    results = results_when_one_comes_back(3, 1, meets_others, 400, 40)
    began, _, means, seen = results["1.1"]
    assert seen[0] == ("0.0", "1.1", "2.0")
    assert len(means) == (began < 40), "it makes the calls that are ahead of the clock that it has taken"
    assert {result[1] for result in results.values()} == {400}
    (one,), (other,) = results["0.0"][2], results["2.0"][2]
    np.testing.assert_array_equal(np.array([one, *means]), np.array([other] * (1 + len(means))))


def dies_in_opening(where: str) -> Any:
    """Slot 3 dies, and then slot 1, as it opens the windows of those that are left."""
    x, opt = begin()
    while opt.steps < 10:
        step(x, opt)
    if own_slot() == 3:
        die()
    if own_slot() == 1:
        patched = opening._Opening._connect_all if where == "connects" else opening._Opening._await_senders
        setattr(opening._Opening, patched.__name__, lambda *given: die())
    while len(opt.stats()["members"]) > 2 or opt.steps < 60:
        step(x, opt)
        time.sleep(0.005)
    fusedfog.agree(True)
    return opt.stats()["members"], figures()[2]


@pytest.mark.parametrize("where", ["connects", pytest.param("waits", marks=SLOW)])
def test_a_member_dies_while_windows_are_opened(where: str) -> None:
    with Members(4) as members:
        members.start(dies_in_opening, where)
        results = members.results(100)
    assert {uid: result[0] for uid, result in results.items()} == dict.fromkeys(("0.0", "2.0"), ("0.0", "2.0"))


def asks_for_shares() -> str:
    _, opt = begin()
    with pytest.raises(ValueError, match="leave out asynchronous=True") as caught:
        fusedfog.elastic_sampler(100, opt, 2)
    return str(caught.value)


def test_data_that_is_dealt_out_by_one_clock_is_refused() -> None:
    with Members(1) as members:
        members.start(asks_for_shares)
        assert "slot 0" in members.results()["0.0"]
