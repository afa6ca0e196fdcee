"""A step in which an epoch of an elastic run begins, or ends: who waits in it, and what becomes of messages on their way."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
from support.deaths import die
from support.elastic import Members, current_run, linger, results_when_one_comes_back

import fusedfog
from fusedfog.comm.calls import _Here
from fusedfog.comm.elastic.watching import Watcher


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def begin(params: Any, **keywords: Any) -> Any:
    fusedfog.init(elastic=True, timeout=60)
    return fusedfog.SGD(params, lr=0.1, topology="ring", **keywords)


def steps(params: Any, opt: Any, until: int, pause: float = 0.0) -> None:
    while opt.steps < until:
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        time.sleep(pause)


def outcome(opt: Any) -> tuple[int, tuple[str, ...]]:
    return opt.steps, opt.stats()["members"]


def begins_slowly(until: int) -> Any:
    """A newcomer that is admitted, and then takes its time for its first batch, in a step that the others are in already."""
    params = [torch.nn.Parameter(torch.zeros(6))]
    opt = begin(params)
    if os.environ["FUSEDFOG_INCARNATION"] != "0":
        time.sleep(1.5)
    else:
        steps(params, opt, 10)
        if own_slot() == 1:
            die()
    while opt.steps < until:
        steps(params, opt, opt.steps + 1, 0.01)
        linger(opt, "1.1", until)
    return outcome(opt)


def test_members_wait_for_a_newcomer_in_the_step_in_which_they_have_admitted_it() -> None:
    results = results_when_one_comes_back(3, 1, begins_slowly, 300)
    assert results == {uid: (300, ("0.0", "1.1", "2.0")) for uid in ("0.0", "1.1", "2.0")}


def in_several_buckets(algorithm: str, told: bool) -> tuple[int, tuple[str, ...]]:
    """Slot 2 dies; or slot 0 is told, when it has sent some of a step's buckets, that the epoch is over."""
    params = [torch.nn.Parameter(torch.full((300_000,), float(number))) for number in range(4)]
    opt = begin(params, algorithm=algorithm, bucket_mb=1.0)
    steps(params, opt, 10)
    if own_slot() == 2 and not told:
        die()
    if own_slot() == 0 and told:
        _be_told_between_two(opt._engine.exchanges)
    steps(params, opt, 30)
    assert all(param.isfinite().all() for param in params)
    return outcome(opt)


def _be_told_between_two(exchanges: Any) -> None:
    real, sent = exchanges.start, []

    def start(*given: Any) -> None:
        sent.append(given)
        if len(sent) == 2:
            current_run().wake("the test ends it")
        real(*given)

    exchanges.start = start


@pytest.mark.parametrize(("algorithm", "told"), [("atc", True), ("awc", False)])
def test_an_epoch_that_ends_while_some_buckets_of_a_step_are_on_their_way_ends_no_member(
    algorithm: str, told: bool
) -> None:
    with Members(3) as members:
        members.start(in_several_buckets, algorithm, told)
        results = members.results()
    left = ("0.0", "1.0", "2.0") if told else ("0.0", "1.0")
    assert results == {uid: (30, left) for uid in left}


def agrees_often(until: int) -> tuple[int, tuple[str, ...]]:
    """Members wait for each other in a call only, and slot 2 is in one whenever it sees that somebody wants to join."""
    if own_slot() == 2:

        def look(watcher: Watcher, record: Any, real: Any = Watcher._look) -> None:
            calls = _Here.calls[:1]
            # What holds a step up, it sees there.
            if calls and (calls[0].name == "agree()" or time.monotonic() - calls[0].since > 1.0):
                real(watcher, record)

        mock.patch.object(Watcher, "_look", look).start()
    params = [torch.nn.Parameter(torch.zeros(6))]
    opt = begin(params, communicate_every=3)
    while opt.steps < until:
        if opt.steps == 12 and own_slot() == 1 and os.environ["FUSEDFOG_INCARNATION"] == "0":
            die()
        steps(params, opt, opt.steps + 1, 0.01)
        linger(opt, "1.1", until)
        if opt.steps % 3 == 0:
            fusedfog.agree(False)
    return outcome(opt)


def test_a_newcomer_comes_in_though_members_are_in_a_call_again_and_again() -> None:
    results = results_when_one_comes_back(4, 1, agrees_often, 300)
    uids = ("0.0", "1.1", "2.0", "3.0")
    assert results == {uid: (300, uids) for uid in uids}
