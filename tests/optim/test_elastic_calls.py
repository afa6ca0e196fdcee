"""Calls that all members make together, in which one of them is killed: the others complete them, over those that are left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.deaths import die
from support.elastic import Members, current_run, linger, results_when_one_comes_back

import fusedfog
from fusedfog.optim.recovery import Recovery

SIZE = 6
VICTIM = 2


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def begin(**keywords: Any) -> tuple[torch.nn.Linear, Any]:
    fusedfog.init(elastic=True, timeout=60)
    model = torch.nn.Linear(SIZE, 1, bias=False).double()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, **{"topology": "ring", **keywords})
    model.weight.grad = torch.full_like(model.weight, 1.0 + own_slot())
    opt.step()
    return model, opt


def average(model: Any, opt: Any, folder: str) -> Any:
    own = model.weight.detach().clone()
    with opt.averaged():
        mean = model.weight.detach().clone().numpy()
    assert torch.equal(model.weight.detach(), own)
    return mean, own.numpy()


def distance(model: Any, opt: Any, folder: str) -> Any:
    return opt.consensus_distance(), model.weight.detach().clone().numpy()


def save(model: Any, opt: Any, folder: str) -> Any:
    path = fusedfog.save_checkpoint(folder, model, opt)
    model.weight.data.zero_()
    fusedfog.load_checkpoint(folder, model, opt)
    return path.name, model.weight.detach().clone().numpy()


def mean(model: Any, opt: Any, folder: str) -> Any:
    return fusedfog.mean(float(own_slot())), model.weight.detach().clone().numpy()


CALLS: dict[str, Callable[..., Any]] = {"averaged": average, "distance": distance, "save": save, "mean": mean}


def without_one(name: str, folder: str) -> tuple[Any, int, int]:
    """The victim is killed as the others are in the call; afterwards these make steps."""
    model, opt = begin()
    if own_slot() == VICTIM:
        die()
    found = CALLS[name](model, opt, folder)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
    return found, opt.steps, opt.stats()["epoch"]


@pytest.mark.parametrize(
    "name", ["averaged", *(pytest.param(name, marks=pytest.mark.slow) for name in CALLS if name != "averaged")]
)
def test_a_call_is_completed_by_those_that_are_left(name: str, tmp_path: Path) -> None:
    with Members(4) as members:
        members.start(without_one, name, str(tmp_path))
        results = members.results()
    assert list(results) == ["0.0", "1.0", "3.0"]
    found = [result[0] for result in results.values()]
    assert {result[1:] for result in results.values()} == {(4, 1)}
    own = np.array([one[1] for one in found])
    if name == "averaged":
        for one in found:
            np.testing.assert_allclose(one[0], own.mean(0), rtol=0, atol=1e-14)
    elif name == "distance":
        expected = np.sqrt(((own - own.mean(0)) ** 2).sum((1, 2)).mean())
        np.testing.assert_allclose([one[0] for one in found], expected, rtol=1e-12)
    elif name == "mean":
        assert [one[0] for one in found] == [4 / 3] * 3
    else:
        assert len({one[0] for one in found}) == 1 and np.isfinite(own).all() and (own != 0).any()


def at_the_end(folder: str) -> Any:
    """The victim is killed when it has the average, so that one member at least has it too, and not all know of it."""
    model, opt = begin()
    run = current_run()
    if own_slot() == VICTIM:
        run.commit = die
    return average(model, opt, folder)


def test_who_has_completed_a_call_makes_it_again_if_another_one_has_not(tmp_path: Path) -> None:
    with Members(4) as members:
        members.start(at_the_end, str(tmp_path))
        results = members.results()
    own = np.array([result[1] for result in results.values()])
    for mean, _ in results.values():
        np.testing.assert_allclose(mean, own.mean(0), rtol=0, atol=1e-14)


def build_late() -> tuple[int, tuple[str, ...]]:
    fusedfog.init(elastic=True, timeout=60)
    if own_slot() == VICTIM:
        die()
    model = torch.nn.Linear(SIZE, 1, bias=False)
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    return opt.steps, opt.stats()["members"]


@pytest.mark.slow
def test_an_optimizer_is_built_by_those_that_are_left() -> None:
    with Members(4) as members:
        members.start(build_late)
        results = members.results()
    assert list(results.values()) == [(1, ("0.0", "1.0", "3.0"))] * 3


ROWS = {
    "allreduce": ({"algorithm": "allreduce"}, "or none"),
    "fused": ({"fused_backward": True}, "fused_backward"),
    "first data-parallel": ({"data_parallel_steps": 3}, "data_parallel_steps"),
    "weight": ({"weight": 2.0}, "shares"),
}


def all_refused() -> dict[str, str]:
    fusedfog.init(elastic=True, timeout=30)
    found = {}
    for name, (keywords, _) in ROWS.items():
        model = torch.nn.Linear(SIZE, 1, bias=False)
        try:
            fusedfog.SGD(model.parameters(), lr=0.1, **keywords)
        except ValueError as error:
            found[name] = str(error)
    return found


def test_what_does_not_work_with_members_that_change_is_refused_before_anything_is_sent() -> None:
    with Members(1) as members:
        members.start(all_refused)
        (found,) = members.results().values()
    for name, (_, words) in ROWS.items():
        assert "init(elastic=True)" in found[name] and words in found[name], found.get(name)


def goes_over_and_waits(until: int) -> Any:
    """Slot 2 hears slowly of the new members, in the step in which all go over to them: the others wait for it there."""
    slow = own_slot() == 2
    fusedfog.init(
        elastic=True, timeout=60, on_membership_change=lambda change: time.sleep(1.5) if slow and change.epoch else None
    )
    model = torch.nn.Linear(SIZE, 1, bias=False)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring")
    while opt.steps < until:
        if opt.steps == 10 and own_slot() == 1:
            die()
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
    return opt.steps, opt.stats()["members"]


def test_who_goes_over_in_a_step_may_wait_for_others_in_it() -> None:
    with Members(3) as members:
        members.start(goes_over_and_waits, 20)
        results = members.results()
    assert results == {uid: (20, ("0.0", "2.0")) for uid in ("0.0", "2.0")}


def with_large_buckets(until: int) -> Any:
    """Awc, whose buckets are passed one by one where a first one has come and others have not."""
    fusedfog.init(elastic=True, timeout=60)
    params = [torch.nn.Parameter(torch.zeros(300_000)) for _ in range(4)]
    opt = fusedfog.SGD(params, lr=0.1, topology="ring", bucket_mb=1)
    while opt.steps < until:
        if opt.steps == 10 and own_slot() == 1:
            die()
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    return opt.steps, len(opt._engine.buckets.all), opt.stats()["members"]


def test_a_death_is_survived_by_a_model_of_several_large_buckets() -> None:
    with Members(3) as members:
        members.start(with_large_buckets, 30)
        results = members.results()
    assert results == {uid: (30, 4, ("0.0", "2.0")) for uid in ("0.0", "2.0")}


def hears_in_mid_step(algorithm: str, topology: str, until: int) -> Any:
    """In step 10, slot 0 hears that the epoch is over when it has made its messages and has not sent them."""
    model, opt = begin(algorithm=algorithm, topology=topology)
    while opt.steps < until:
        fails = opt.steps == 10 and own_slot() == 0 and opt.stats()["epoch"] == 0
        engine, before, scalar = opt._engine, model.weight.detach().clone(), 1.0
        if fails:
            real, wake = engine.exchanges.start, current_run().wake
            engine.exchanges.start = lambda *given, real=real, wake=wake: (wake("unknown"), real(*given))
            if algorithm == "push_sum":
                scalar = engine.exchanges._push_sum.scalars[fusedfog.rank()]
                assert abs(scalar - 1) > 0.1
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
        if fails:
            torch.testing.assert_close(model.weight.detach(), before - 0.1 / scalar, rtol=0, atol=1e-14)
    return opt.steps, opt.stats()["reforms"]


@pytest.mark.parametrize(
    ("algorithm", "topology"), [("push_sum", "star"), pytest.param("atc", "ring", marks=pytest.mark.slow)]
)
def test_a_step_whose_messages_never_left_mixes_nothing(algorithm: str, topology: str) -> None:
    with Members(3) as members:
        members.start(hears_in_mid_step, algorithm, topology, 40)
        results = members.results()
    assert list(results.values()) == [(40, 1)] * 3


def joins_at_the_second_attempt(until: int) -> Any:
    """Slot 1 dies at step 10; when it is back, its first epoch ends before it has taken it up."""
    if os.environ["FUSEDFOG_INCARNATION"] != "0":
        fails = [fusedfog.ExchangeError("the epoch is over")]

        def adopt(self: Recovery, record: Any, real: Any = Recovery._adopt) -> None:
            if fails:
                raise fails.pop()
            real(self, record)

        mock.patch.object(Recovery, "_adopt", adopt).start()
        fusedfog.init(elastic=True, timeout=60)
        model = torch.nn.Linear(SIZE, 1, bias=False).double()
        opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", algorithm="push_sum")
    else:
        model, opt = begin(algorithm="push_sum")
    fresh = current_run().record.fresh
    while opt.steps < until:
        if opt.steps == 10 and own_slot() == 1 and os.environ["FUSEDFOG_INCARNATION"] == "0":
            die()
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
        time.sleep(0.005)
        linger(opt, "1.1", until)
    return opt.steps, opt.stats()["exchanges"], fresh


@pytest.mark.slow
def test_a_newcomer_whose_first_epoch_ends_at_once_is_a_newcomer_in_the_next_one() -> None:
    results = results_when_one_comes_back(3, 1, joins_at_the_second_attempt, 1500)
    assert {result[0] for result in results.values()} == {1500}
    assert len({result[1] for result in results.values()}) == 1, "they count exchanges alike"
    assert results["1.1"][2] == ("1.1",)
