"""Whether a loop goes by the clock of its elastic run: one that counts its own steps is warned once, and no other one is."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.elastic import Members

import fusedfog
from fusedfog.comm.elastic.run import Run
from fusedfog.optim.clock_reads import PATIENCE, ClockReads


def warned(program: Callable[[ClockReads], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program(ClockReads(2))
    return [str(one.message) for one in caught]


def counts(reads: ClockReads, steps: int) -> None:
    for _ in range(steps):
        reads.begin_step()


def goes_by_the_clock(reads: ClockReads, steps: int, every: int = 1) -> None:
    for step in range(steps):
        if step % every == 0:
            reads.read()
        reads.begin_step()


def test_a_newcomer_that_counts_its_own_steps_is_warned_once_and_told_what_to_write() -> None:
    def program(reads: ClockReads) -> None:
        reads.move(0, 523)
        reads.read()  # As in `if opt.steps == 0: prepare()`.
        counts(reads, 3 * PATIENCE)

    (text,) = warned(program)
    assert "slot 2: opt.steps went from 0 to 523" in text and "while opt.steps < N" in text


def test_a_member_whose_clock_was_moved_in_mid_training_is_warned() -> None:
    def program(reads: ClockReads) -> None:
        counts(reads, 2 * PATIENCE)
        reads.move(40, 42)
        counts(reads, 2 * PATIENCE)

    (text,) = warned(program)
    assert "from 40 to 42" in text


def test_it_has_as_many_steps_as_are_said() -> None:
    def program(steps: int) -> Callable[[ClockReads], None]:
        return lambda reads: (counts(reads, 7), reads.move(0, 1), counts(reads, steps))[0]

    assert not warned(program(PATIENCE))
    assert warned(program(PATIENCE + 1))


@pytest.mark.parametrize("every", [1, PATIENCE // 2])
def test_a_newcomer_that_goes_by_the_clock_is_not_warned(every: int) -> None:
    def program(reads: ClockReads) -> None:
        reads.move(0, 523)
        goes_by_the_clock(reads, 3 * PATIENCE, every)

    assert not warned(program)


def test_nobody_is_warned_whose_clock_is_its_own_count() -> None:
    def program(reads: ClockReads) -> None:
        counts(reads, PATIENCE)
        reads.move(PATIENCE, PATIENCE)
        counts(reads, 3 * PATIENCE)

    assert not warned(program)


def test_what_a_function_reads_that_hears_of_new_members_is_no_loop() -> None:
    def program(reads: ClockReads) -> None:
        counts(reads, 1)
        with reads.ignored():
            reads.read()
        reads.move(1, 5)
        counts(reads, 2 * PATIENCE)

    assert len(warned(program)) == 1


def train(kind: str, right: str) -> Any:
    """Slots 1 and 2 die at step 10. Started again, 1 counts its steps, and 2 makes its loop in the `right` way. Slot 0 waits."""
    slot, again = int(os.environ["FUSEDFOG_SLOT"]), os.environ["FUSEDFOG_INCARNATION"] != "0"
    fusedfog.init(elastic=True, timeout=60)
    model = torch.nn.Linear(3, 1, bias=False)
    if kind == "Decentralized":
        opt: Any = fusedfog.Decentralized(torch.optim.SGD(model.parameters(), lr=0.01))
    else:
        opt = getattr(fusedfog, kind)(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)
    run: Any = Run.current()

    def step() -> None:
        opt.zero_grad()
        model(torch.ones(3)).backward()
        opt.step()
        schedule.step()
        opt.stats(), opt.state_dict(), repr(opt)

    began = opt.steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not again:
            for count in range(10**9):  # It counts, and the clock is its count.
                if slot and count == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                if run.board.get("enough") is not None:
                    break
                step()
                time.sleep(0.005)
        elif slot == 1:
            for _ in range(2 * PATIENCE):
                step()
        elif right == "looks":
            while opt.steps < began + 2 * PATIENCE:
                step()
        else:
            draw = iter(fusedfog.elastic_sampler(10**6, opt, 2))
            for _ in range(2 * PATIENCE):
                next(draw)
                step()
    return began, [str(one.message) for one in caught if "opt.steps" in str(one.message)]


@pytest.mark.parametrize(
    ("kind", "right"), [("Decentralized", "looks"), pytest.param("SGD", "draws", marks=pytest.mark.slow)]
)
def test_of_processes_that_are_started_again_the_one_that_counts_is_warned(kind: str, right: str) -> None:
    with Members(3) as members:
        members.start(train, kind, right)
        for slot in (1, 2):
            members.processes[f"{slot}.0"].join()
            members.start_again(slot, train, kind, right)
        for slot in (1, 2):
            members.processes[f"{slot}.1"].join(90)
        members.store.set("fusedfog/test/enough", "")
        results = members.results()
    assert results["0.0"] == (0, [])
    (began, (text,)), (since, texts) = results["1.1"], results["2.1"]
    assert began > 0 and f"slot 1: opt.steps went from 0 to {began}" in text
    assert since > 0 and texts == []
