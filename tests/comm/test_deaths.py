"""A rank is killed, and every other one is told so by name: whatever it waits for, and whether it waits for that rank or not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.deaths import check_named, die
from support.pool import Outcome, Pool
from torch import nn

import fusedfog

VICTIM = 0
"""On a ring of four, rank 2 is not its neighbour."""

LONG = 300.0
"""Seconds that the process group would wait, and nobody does."""

MUCH = 6_000_000
"""Elements of a message that no socket takes in one piece."""


def build(elements: int = 8, **keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(elements, 1, bias=False)
    return model, fusedfog.SGD(model.parameters(), lr=0.01, topology="ring", **keywords)


def iterate(model: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()


def check_told(outcomes: list[Outcome], victim: int = VICTIM) -> None:
    """Beside the origin, the text names the victim, and whose error it is."""
    check_named(outcomes, victim)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            text = outcome.value[2]
            assert f"It began with rank {victim}, which has ended." in text
            assert text.startswith(f"rank {rank}: ")


def told(function: Callable[[], object]) -> tuple[str, int | None, str]:
    """What is raised; and this rank goes on living, so that nobody learns of it by its end."""
    try:
        function()
    except RuntimeError as error:
        return type(error).__name__, getattr(error, "origin", None), str(error)
    return "nothing", None, ""


def in_mid_message(algorithm: str) -> tuple[str, int | None, str]:
    model, opt = build(MUCH, algorithm=algorithm)
    iterate(model, opt)
    dist.barrier()
    if dist.get_rank() == VICTIM:
        if algorithm == "awc":
            model.weight.grad = torch.ones_like(model.weight)
            opt.step()  # Its messages have begun to travel, and cannot have arrived.
        die()

    def train() -> None:
        while True:
            iterate(model, opt)

    return told(train)


@pytest.mark.parametrize("algorithm", ["awc", pytest.param("atc", marks=pytest.mark.slow)])
def test_a_death_in_the_middle_of_a_message_is_noticed_at_once(ranks: Pool, algorithm: str) -> None:
    check_told(ranks.outcomes(4, in_mid_message, algorithm, pg_timeout=LONG))


X = torch.ones(3)

CALLS: dict[str, Callable[[nn.Module, Any, str], object]] = {
    "step()": lambda model, opt, folder: [iterate(model, opt) for _ in range(9)],
    "averaged()": lambda model, opt, folder: opt.averaged().__enter__(),
    "consensus_distance()": lambda model, opt, folder: opt.consensus_distance(),
    "save_checkpoint()": lambda model, opt, folder: fusedfog.save_checkpoint(folder, model, opt),
    "SGD()": lambda model, opt, folder: build(),
    "neighbor_allreduce()": lambda model, opt, folder: fusedfog.neighbor_allreduce(X, "ring"),
    "allreduce_parameters()": lambda model, opt, folder: fusedfog.allreduce_parameters([X.clone()]),
    "new_group()": lambda model, opt, folder: fusedfog.new_group(range(4)),
    "mean()": lambda model, opt, folder: fusedfog.mean(1.0),
}


def all_but_one(name: str, folder: str) -> tuple[str, int | None, str]:
    model, opt = build(algorithm="atc")
    iterate(model, opt)
    dist.barrier()
    if dist.get_rank() == VICTIM:
        die()
    return told(lambda: CALLS[name](model, opt, folder))


FAST = ("step()", "consensus_distance()", "save_checkpoint()", "SGD()")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_whoever_waits_in_any_call_is_told_by_name(ranks: Pool, name: str, tmp_path: Path) -> None:
    check_told(ranks.outcomes(4, all_but_one, name, str(tmp_path / "checkpoint"), pg_timeout=LONG))


def before_anything_is_built() -> tuple[str, int | None, str]:
    fusedfog.init("gloo")
    dist.barrier()
    if dist.get_rank() == VICTIM:
        die()
    return told(build)


def test_a_rank_that_dies_after_init_is_missed_by_those_that_build(ranks: Pool) -> None:
    check_told(ranks.outcomes(4, before_anything_is_built, pg_timeout=LONG))


def a_rank_that_is_not_waited_for() -> tuple[str, int | None, str]:
    model, opt = build(algorithm="atc")
    iterate(model, opt)
    dist.barrier()
    if dist.get_rank() == VICTIM:
        die()
    if dist.get_rank() == 2:
        time.sleep(2.0)  # It evaluates, and is told meanwhile.
    begin = time.monotonic()
    found = told(lambda: iterate(model, opt))
    again = told(lambda: opt.consensus_distance())
    assert again[:2] == found[:2]
    assert dist.get_rank() != 2 or time.monotonic() - begin < 60
    return found


def test_a_rank_that_waits_for_nobody_is_told_by_its_next_call_and_by_all_later_ones(ranks: Pool) -> None:
    check_told(ranks.outcomes(4, a_rank_that_is_not_waited_for, pg_timeout=LONG))


def with_a_connection_of_its_own() -> bytes:
    """The user's own connection, opened by another thread of this process, lives on."""
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs = listener.accept()[0]
    model, opt = build()
    iterate(model, opt)
    dist.barrier()
    if dist.get_rank() == VICTIM:
        die()
    assert told(lambda: [iterate(model, opt) for _ in range(9)])[0] == "ExchangeError"
    ours.sendall(b"alive")
    return theirs.recv(9)


@pytest.mark.slow
def test_other_connections_of_the_process_are_left_alone(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, with_a_connection_of_its_own, pg_timeout=LONG)
    assert [outcome.value for outcome in outcomes[1:]] == [b"alive"] * 2


def one_naps() -> int:
    model, opt = build(algorithm="atc")
    for step in range(3):
        if step == 1 and dist.get_rank() == VICTIM:
            time.sleep(1.5)
        iterate(model, opt)
    return int(opt.stats()["exchanges"])


def test_a_rank_that_is_slow_is_not_taken_for_dead(ranks: Pool) -> None:
    assert ranks.run(4, one_naps) == [3] * 4
