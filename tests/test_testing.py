"""`fusedfog.testing.fail_at`: the rank, the step and the way that were asked for, once, and nothing else."""

from __future__ import annotations

import math
import re
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog import testing
from fusedfog.testing import HOWS, InjectedFailure, cut_off, fail_at

STEP = 2


def train(steps: int, **keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", **keywords)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        opt.step()
    return model, opt


def fail(how: str) -> tuple[bool, float]:
    begin = time.monotonic()
    with fail_at(1, STEP, how, seconds=0.5):
        model, opt = train(5)
    opt.drain()
    return all(bool(p.isfinite().all()) for p in model.parameters()), time.monotonic() - begin


def test_a_killed_rank_dies_at_its_step_and_the_others_name_it(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, fail, "kill", pg_timeout=300)
    assert "SIGKILL" in outcomes[1].message
    for rank in (0, 2):
        assert outcomes[rank].error_type == "ExchangeError"
        assert "It began with rank 1, which has ended" in outcomes[rank].message
        # What it sent at the end of the step before, others may have used.
        assert re.search(rf"step(\(\))? ({STEP}|{STEP + 1})", outcomes[rank].message)


def test_nan_gradients_of_one_rank_reach_the_others_as_any_would(ranks: Pool) -> None:
    results = ranks.run(3, fail, "nan")
    assert [finite for finite, _ in results] == [True, False, True]


def test_a_slow_rank_sleeps_and_all_go_on(ranks: Pool) -> None:
    results = ranks.run(2, fail, "slow")
    assert results[1][1] > 0.5


@pytest.mark.slow
def test_a_stopped_rank_is_named_when_the_timeout_is_over(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, fail, "stop", pg_timeout=3, timeout=15)
    assert outcomes[1].error_type == "Hung"
    for rank in (0, 2):
        assert outcomes[rank].error_type == "PeerTimeout"
        assert "It began with rank 1, which does not answer (stopped, or cut off)" in outcomes[rank].message


def test_a_rank_that_is_cut_off_for_a_while_keeps_the_others_waiting_and_loses_nothing(ranks: Pool) -> None:
    results = ranks.run(3, fail, "partition", pg_timeout=300)
    assert all(finite for finite, _ in results) and all(seconds > 0.5 for _, seconds in results)


def test_nothing_reaches_a_process_that_is_cut_off_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_connection(listener.getsockname()) as there,
        listener.accept()[0] as here,
    ):
        # However slow this machine is, its time is not over before the test says so.
        now = 0.0
        monkeypatch.setattr(testing, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
        cut_off(1.5)
        with pytest.raises(ValueError, match="cut off already"):
            cut_off(1.0)
        there.sendall(b"late")
        here.settimeout(0.2)
        with pytest.raises(TimeoutError):
            here.recv(4)
        with pytest.raises(TimeoutError):
            socket.create_connection(other.getsockname(), 0.2)
        now = math.inf  # Whenever its thread has begun to count.
        here.settimeout(60)
        assert here.recv(4) == b"late"
        wait_until_over()
        socket.create_connection(other.getsockname(), 60).close()


def wait_until_over() -> None:
    while "connect" in vars(socket.socket):
        time.sleep(0.01)


def test_it_raises_once_at_its_step_and_leaves_nothing_behind() -> None:
    with fail_at(0, STEP, "raise"), pytest.raises(InjectedFailure, match=f"rank 0: injected at step {STEP}"):
        train(5)
    with fail_at(0, STEP, "raise") as failing:
        train(STEP)
        assert failing._hook is not None
    train(5)
    with fail_at(1, STEP, "raise"):
        train(5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 1, "killl"), "did you mean 'kill'"),
        ((-1, 1, "kill"), "count from 0, got rank -1 and step 1"),
        ((0, -1, "kill"), "count from 0, got rank 0 and step -1"),
    ],
)
def test_nonsense_is_refused(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fail_at(*arguments)
    with pytest.raises(ValueError, match="seconds must be positive"):
        fail_at(0, 0, "slow", seconds=0.0)
    with pytest.raises(ValueError, match="seconds must be positive"):
        cut_off(-1.0)
    assert "kill" in HOWS
