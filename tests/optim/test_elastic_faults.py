"""What may go wrong in an elastic run beside one death: several, stopped processes, broken networks, no store, bad starts."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import pytest
import torch
from support.deaths import die
from support.elastic import Members, current_run, let_go_after, linger, results_when_one_comes_back, say

import fusedfog
from fusedfog.comm.elastic import forming

SIZE = 6
SLOW = pytest.mark.slow


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def begin(
    size: int = SIZE, dead_after: float = 30.0, min_ranks: int = 1, **keywords: Any
) -> tuple[torch.nn.Linear, Any]:
    fusedfog.init(elastic=True, timeout=60, min_ranks=min_ranks)
    let_go_after(dead_after)
    return build(size, **keywords)


def build(size: int = SIZE, **keywords: Any) -> tuple[torch.nn.Linear, Any]:
    model = torch.nn.Linear(size, 1, bias=False)
    return model, fusedfog.SGD(model.parameters(), lr=0.1, **{"topology": "ring", **keywords})


def steps(model: torch.nn.Linear, opt: Any, until: int, pause: float = 0.0) -> None:
    while opt.steps < until:
        model.weight.grad = (model.weight - own_slot()).detach()
        opt.step()
        if opt.steps % 10 == 0:
            say(opt.steps)
        time.sleep(pause)


def outcome(opt: Any) -> tuple[int, tuple[str, ...]]:
    return opt.steps, opt.stats()["members"]


def two_die(first: list[int]) -> tuple[int, tuple[str, ...]]:
    model, opt = begin()
    steps(model, opt, 10)
    if own_slot() in first:
        die()
    steps(model, opt, 40)
    return outcome(opt)


@pytest.mark.parametrize(
    "victims", [[0, 3], pytest.param([0, 1, 2], marks=SLOW), pytest.param([1, 2, 3, 4], marks=SLOW)]
)
def test_several_die_at_once(victims: list[int]) -> None:
    with Members(5) as members:
        members.start(two_die, victims)
        results = members.results()
    left = tuple(f"{slot}.0" for slot in range(5) if slot not in victims)
    assert results == {uid: (40, left) for uid in left}


def dies_while_reforming(at: str) -> tuple[int, tuple[str, ...]]:
    """Slot 3 is killed, and then slot 0: as it has written its note, or as it has proposed, or as it connects."""
    model, opt = begin()
    steps(model, opt, 10)
    if own_slot() == 3:
        die()
    if own_slot() == 0:
        if at == "noted":
            forming._Forming._situation = lambda self, notes: die()  # type: ignore[method-assign]
        elif at == "proposed":
            swap = current_run().board.swap
            current_run().board.swap = lambda *given: (swap(*given), die())
        else:
            forming.open_epoch = lambda *given: die()  # type: ignore[assignment]
    steps(model, opt, 40)
    return outcome(opt)


@pytest.mark.parametrize("at", [pytest.param("noted", marks=SLOW), "proposed", pytest.param("connecting", marks=SLOW)])
def test_the_one_that_proposes_dies_while_the_others_form_an_epoch(at: str) -> None:
    with Members(4) as members:
        members.start(dies_while_reforming, at)
        results = members.results()
    assert results == {uid: (40, ("1.0", "2.0")) for uid in ("1.0", "2.0")}


def stops(dead_after: float, until: int) -> Any:
    model, opt = begin(dead_after=dead_after)
    try:
        steps(model, opt, until, 0.01)
    except fusedfog.Minority as error:
        return str(error)
    return outcome(opt)


@SLOW
def test_a_process_that_stands_still_for_a_while_is_no_less_a_member() -> None:
    with Members(3) as members:
        members.start(stops, 30.0, 100)
        members.wait_for("1.0", 20)
        members.signal("1.0", signal.SIGSTOP)
        time.sleep(3.0)
        members.signal("1.0", signal.SIGCONT)
        results = members.results()
    assert results == {uid: (100, ("0.0", "1.0", "2.0")) for uid in ("0.0", "1.0", "2.0")}


def behind_a_launcher(until: int) -> Any:
    model, opt = begin(dead_after=3.0)
    steps(model, opt, until, 0.01)
    return outcome(opt)


@SLOW
def test_a_process_whose_launcher_counts_on_is_waited_for() -> None:
    """As one that holds Python's lock for a long time: here it is stopped, and the launcher's counter goes on all the same."""
    with Members(3) as members:
        members.start(behind_a_launcher, 60)
        members.wait_for("1.0", 20)
        members.signal("1.0", signal.SIGSTOP)
        for count in range(12):
            members.store.set("fusedfog/test/beat/1.0", str(count))
            time.sleep(0.5)
        members.signal("1.0", signal.SIGCONT)
        results = members.results()
    assert results == {uid: (60, ("0.0", "1.0", "2.0")) for uid in ("0.0", "1.0", "2.0")}


@SLOW
def test_a_certificate_of_the_launcher_is_believed() -> None:
    """Of a process that only does not answer: without it, the others would wait for `dead_after` seconds."""
    with Members(3) as members:
        members.start(stops, 50.0, 60)
        members.wait_for("1.0", 20)
        members.signal("1.0", signal.SIGSTOP)
        members.store.set("fusedfog/test/dead/1.0", "killed by signal 9")
        for uid in ("0.0", "2.0"):
            members.wait_for(uid, 60, timeout=40)


def cut_off(sides: list[list[int]], store: bool, until: int) -> Any:
    """From step 10 on nobody answers whoever is on another side; without `store`, the smaller one does not reach that either."""
    model, opt = begin(dead_after=2.0)
    steps(model, opt, 10)
    mine = next(side for side in sides if own_slot() in side)
    run: Any = current_run()
    real_ask = forming.ask
    others = {f"{slot}.0" for side in sides if side is not mine for slot in side}

    def ask(seats: Any, patience: float) -> Any:
        seats = list(seats)
        found = real_ask([seat for seat in seats if seat.uid not in others], patience)
        return {seat.uid: found.get(seat.uid, forming.Heard()) for seat in seats}

    forming.ask = ask
    # Whoever could ask all others for longer than these wait for it would come back to them.
    run.board.set(f"cut/{own_slot()}", "")
    while not run.board.has([f"cut/{slot}" for side in sides for slot in side]):
        time.sleep(0.01)
    if not store and mine is not max(sides, key=len):
        run.board._client = lambda place: (_ for _ in ()).throw(OSError("no route to host"))
        run.board.store = None
    run.wake("the network is broken")
    try:
        steps(model, opt, until)
    except fusedfog.Minority as error:
        assert opt.steps >= 10 and torch.isfinite(model.weight).all()
        return str(error)
    return outcome(opt)


@pytest.mark.parametrize("store", [True, pytest.param(False, marks=SLOW)])
def test_of_two_sides_of_a_broken_network_the_larger_one_goes_on(store: bool) -> None:
    with Members(5) as members:
        members.start(cut_off, [[0, 1], [2, 3, 4]], store, 40)
        results = members.results()
    for uid in ("2.0", "3.0", "4.0"):
        assert results[uid] == (40, ("2.0", "3.0", "4.0"))
    for uid in ("0.0", "1.0"):
        assert isinstance(results[uid], str)
        assert ("cannot reach slots 2-4" in results[uid]) or ("without this process" in results[uid]) or not store
        assert "Start it again" in results[uid]


def without_store(victim: int) -> Any:
    model, opt = begin()
    steps(model, opt, 10)
    run: Any = current_run()
    say("store")
    real, begin_at = run.board._client, time.monotonic()

    def client(place: int) -> Any:
        if time.monotonic() - begin_at < 4:
            raise OSError("connection refused")
        return real(place)

    run.board._client, run.board.store = client, None
    if own_slot() == victim:
        die()
    steps(model, opt, 40)
    return outcome(opt)


@SLOW
def test_without_a_store_members_wait_until_one_answers_again() -> None:
    with Members(3) as members:
        members.start(without_store, 1)
        results = members.results()
    assert results == {uid: (40, ("0.0", "2.0")) for uid in ("0.0", "2.0")}


def other_model(until: int) -> Any:
    fusedfog.init(elastic=True, timeout=60)
    board, second = current_run().board, os.environ["FUSEDFOG_INCARNATION"] != "0"
    model = torch.nn.Linear(SIZE + second, 1, bias=False)
    try:
        opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring")
    except fusedfog.MismatchError as error:
        board.set("told", "")
        return str(error)
    steps(model, opt, 5)
    if own_slot() == 1:
        die()
    steps(model, opt, until - 60, 0.02)
    while opt.steps < until:
        # However late the newcomer is started, the others are still there.
        steps(model, opt, opt.steps + 1, 0.02 if board.get("told") is not None else 0.3)
    return outcome(opt)


def test_a_newcomer_with_another_model_is_told_so_and_nobody_else_notices() -> None:
    results = results_when_one_comes_back(3, 1, other_model, 120)
    assert "joins a run of another model" in results["1.1"] and f"({SIZE + 1})" in results["1.1"].replace("1, ", "(")
    assert results["0.0"] == results["2.0"] == (120, ("0.0", "2.0"))


def hold(seconds: float) -> Any:
    try:
        fusedfog.init(elastic=True, timeout=30, dead_after=1.0)
    except fusedfog.LaunchError as error:
        return str(error)
    say("in")
    time.sleep(seconds)
    return "in"


@SLOW
def test_a_slot_that_is_taken_and_a_process_that_is_older_than_its_successor() -> None:
    with Members(1) as members:
        members.start_one(0, 3, hold, 15.0)
        members.wait_for("0.3", "in")
        again = Members(1)
        again.port = members.port
        again.start_one(0, 3, hold, 0.0)
        twice = again.results()["0.3"]
        members.start_one(0, 2, hold, 0.0)
        old = members.results()["0.2"]
    for text in (old, twice):
        assert "is taken by 0.3" in text


def reforming_again_and_again(times: int) -> Any:
    model, opt = begin()
    run: Any = current_run()
    figures = []
    for turn in range(times):
        steps(model, opt, opt.steps + 2)
        run.call(run.record.epoch)  # As if a newcomer had come, that goes away.
        if turn >= times // 4 and turn % (times // 4) == 0:
            with open("/proc/self/statm") as file:
                memory = int(file.read().split()[1]) * 4 // 1024
            figures.append((threading.active_count(), len(os.listdir("/proc/self/fd")), memory))
    steps(model, opt, opt.steps + 2)
    return figures, opt.stats()["reforms"], outcome(opt)[1]


@SLOW
def test_threads_descriptors_and_memory_stay_what_they_are_over_200_changes() -> None:
    with Members(3) as members:
        members.start(reforming_again_and_again, 200)
        results = members.results(timeout=280)
    for figures, reforms, uids in results.values():
        assert reforms >= 200 and uids == ("0.0", "1.0", "2.0")
        first, last = figures[0], figures[-1]
        assert last[0] <= first[0] + 2 and last[1] <= first[1] + 4, figures
        assert last[2] <= first[2] + 24, f"MB: {figures}"


def leaves(until: int) -> Any:
    model, opt = begin()
    steps(model, opt, 10)
    if own_slot() == 1:
        opt.leave()
        with pytest.raises(RuntimeError, match="has left its elastic run"):
            opt.step()
        say("left")
        time.sleep(8.0)
        return "left"
    steps(model, opt, until)
    return outcome(opt)


@SLOW
def test_a_member_that_has_left_is_not_waited_for_while_its_process_lives() -> None:
    with Members(3) as members:
        members.start(leaves, 40)
        results = members.results()
    assert results == {"0.0": (40, ("0.0", "2.0")), "1.0": "left", "2.0": (40, ("0.0", "2.0"))}


def needs_all(until: int) -> Any:
    model, opt = begin(min_ranks=3)
    if os.environ["FUSEDFOG_INCARNATION"] == "0":
        steps(model, opt, 10)
        if own_slot() == 1:
            die()
    steps(model, opt, until)
    return outcome(opt)


@SLOW
def test_with_fewer_than_min_ranks_members_wait_for_one_that_joins_them() -> None:
    with Members(3) as members:
        members.start(needs_all, 40)
        members.processes["1.0"].join()
        time.sleep(1.0)
        members.start_again(1, needs_all, 40)
        results = members.results()
    assert results == {uid: (40, ("0.0", "1.1", "2.0")) for uid in ("0.0", "2.0", "1.1")}


def comes_late(until: int) -> Any:
    if own_slot() == 2:
        time.sleep(6.0)
    fusedfog.init(elastic=True, timeout=60, dead_after=2.0)
    model, opt = build()
    while opt.steps < until:
        steps(model, opt, opt.steps + 1, 0.02)
        linger(opt, "2.0", until)
    return outcome(opt)


@SLOW
def test_who_comes_when_the_run_has_begun_without_it_joins() -> None:
    with Members(3) as members:
        members.start(comes_late, 600)
        results = members.results()
    assert results == {uid: (600, ("0.0", "1.0", "2.0")) for uid in ("0.0", "1.0", "2.0")}


def all_die(until: int) -> Any:
    model, opt = begin()
    again = os.environ["FUSEDFOG_INCARNATION"] != "0"
    steps(model, opt, 10)
    if not again:
        die()
    return opt.steps, opt.stats()["members"], opt.stats()["epoch"]


@SLOW
def test_a_run_of_which_all_have_died_begins_anew() -> None:
    with Members(2) as members:
        members.start(all_die, 20)
        for uid in ("0.0", "1.0"):
            members.processes[uid].join()
        for slot in range(2):
            members.start_again(slot, all_die, 20)
        results = members.results()
    assert set(results) == {"0.1", "1.1"}
    for reached, uids, epoch in results.values():
        assert reached == 10 and uids == ("0.1", "1.1") and epoch >= 1


def through_everything(keywords: dict[str, Any]) -> Any:
    """Steps, measures and averages until the test says that it is enough."""
    model, opt = begin(topology="auto", **keywords)
    board = current_run().board
    while True:
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
        if opt.steps % 7 == 0:
            opt.consensus_distance()
        if opt.steps % 20 == 0:
            with opt.averaged():
                pass
        if opt.steps % 5 == 0 and fusedfog.agree(board.get("enough") is not None):
            return outcome(opt)
        time.sleep(0.005)


@SLOW
@pytest.mark.parametrize(
    ("seed", "keywords"),
    [
        (0, {}),
        (1, {"algorithm": "atc"}),
        (2, {"algorithm": "push_sum"}),
        (3, {"wire_dtype": "int8"}),
        (4, {"asynchronous": True}),
        (5, {"asynchronous": True, "algorithm": "push_sum"}),
    ],
)
def test_killed_at_random_moments_and_started_again_at_once_all_go_on(seed: int, keywords: dict[str, Any]) -> None:
    chance = random.Random(seed)
    with Members(4) as members:
        members.start(through_everything, keywords)
        living = [0] * 4
        for _ in range(15):
            time.sleep(chance.choice([0.1, 1.0, 3.0]) * chance.random())
            slot = chance.randrange(4)
            members.kill(slot, living[slot])
            del members.processes[f"{slot}.{living[slot]}"]
            living[slot] += 1
            members.start_one(slot, living[slot], through_everything, keywords)
        time.sleep(10.0)
        members.store.set("fusedfog/test/enough", "")
        results = members.results(timeout=120)
    uids = tuple(f"{slot}.{incarnation}" for slot, incarnation in enumerate(living))
    assert set(results) == set(uids)
    assert {result[1] for result in results.values()} == {uids}
    assert len({result[0] for result in results.values()}) == 1
