"""A rank is killed while optimizers are built, at any place of it: every other one is told so by name, and none is torn down."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from support.deaths import check_named
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm import shared_opening
from fusedfog.comm.sockets import Sockets

LONG = 300.0
"""Seconds that the process group would wait, and nobody does."""

PLACES = 8
"""Into so many parts the calls of a construction are cut; the victim dies at the end of one of them."""


def build(**keywords: Any) -> object:
    return fusedfog.AdamW(nn.Linear(64, 64).parameters(), lr=0.01, **keywords)


def on_a_mesh() -> Callable[[], object]:
    # The mesh is made before, by torch alone, which waits for the timeout.
    return partial(build, mesh=init_device_mesh("cpu", (2, 2)), wire_dtype="int8")


SETUPS: dict[str, Callable[[], Callable[[], object]]] = {
    "flat": lambda: partial(build, topology="ring"),
    "mesh": on_a_mesh,
    "two": lambda: lambda: [build(topology="ring"), build(algorithm="atc", topology="exponential")],
}


class CallCount:
    """Counts the calls of functions of fusedfog's and of torch.distributed's in this thread, and kills at one of them."""

    def __init__(self, fatal: int = -1) -> None:
        self.count, self._fatal = 0, fatal

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and any(
            part in frame.f_code.co_filename for part in ("fusedfog/", "distributed/")
        ):
            self.count += 1
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def count_calls(setup: str) -> int:
    counter = CallCount()
    fusedfog.init("gloo")
    construct = SETUPS[setup]()
    dist.barrier()
    sys.setprofile(counter)
    try:
        construct()
    finally:
        sys.setprofile(None)
    return counter.count


def die_at(setup: str, victim: int, fatal: int) -> tuple[str, int | None, str]:
    fusedfog.init("gloo")  # Nobody can tell a rank that has died before it said where it is from one that has not come.
    construct = SETUPS[setup]()
    dist.barrier()
    try:
        if dist.get_rank() == victim:
            sys.setprofile(CallCount(fatal))
        construct()
        # Whoever had got what it needed from the victim before learns of it by the next call.
        fusedfog.mean(1.0)
    except RuntimeError as error:
        return type(error).__name__, getattr(error, "origin", None), str(error)
    return "nothing", None, ""


def cases() -> list[Any]:
    """(setup, victim, place); what is left to `make test-all` is marked."""
    quick = [("flat", 3, 3), ("flat", 0, 5), ("mesh", 3, 4)]
    found = [(setup, victim, place) for setup in SETUPS for victim in (0, 3) for place in range(1, PLACES + 1)]
    return [*quick, *(pytest.param(*one, marks=pytest.mark.slow) for one in found if one not in quick)]


@pytest.mark.parametrize(("setup", "victim", "place"), cases())
def test_a_death_in_construction_is_told_by_name(ranks: Pool, setup: str, victim: int, place: int) -> None:
    calls = min(ranks.run(4, count_calls, setup))
    fatal = max(1, calls * place // PLACES)
    check_named(ranks.outcomes(4, die_at, setup, victim, fatal, pg_timeout=LONG), victim)


def dies_before_it_connects(victim: int) -> tuple[str, int | None, str]:
    fusedfog.init("gloo")
    construct = SETUPS["mesh"]()
    dist.barrier()
    with mock.patch.object(shared_opening, "_connect", wraps=shared_opening._connect) as connect:
        if dist.get_rank() == victim:
            connect.side_effect = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            construct()
        except RuntimeError as error:
            return type(error).__name__, getattr(error, "origin", None), str(error)
    return "nothing", None, ""


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_death_between_an_offer_of_memory_and_the_connection_is_told_by_name(ranks: Pool, victim: int) -> None:
    check_named(ranks.outcomes(4, dies_before_it_connects, victim, pg_timeout=LONG), victim)


def test_what_listens_is_never_shut_down() -> None:
    sockets = Sockets()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as far, listener.accept()[0] as near:
            sockets.take_new()
            assert sockets.port == port
            sockets.shut_down()  # Before anybody has said where it listens, as when the first exchange fails.
            assert far.recv(1) == near.recv(1) == b""
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            socket.create_connection(("127.0.0.1", port)).close()
            listener.accept()[0].close()


def test_before_ports_are_known_connections_to_other_ports_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        sockets = Sockets()
        with socket.create_server(("127.0.0.1", 0)), socket.create_connection(elsewhere.getsockname()) as ours:
            theirs = elsewhere.accept()[0]
            sockets.take_new()
            sockets.shut_down()
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
            theirs.close()


def dies_in_new_group(victim: int) -> list[tuple[str, int | None, str]]:
    fusedfog.init("gloo", timeout=LONG)
    dist.barrier()
    told = []
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        if dist.get_rank() == victim:
            new_group.side_effect = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        # torch waits for the victim's address in a thread that nobody waits for, and holds the connection to the store.
        for call in (lambda: build(topology="ring"), lambda: fusedfog.mean(1.0), lambda: build(topology="ring")):
            try:
                call()
            except RuntimeError as error:
                told.append((type(error).__name__, getattr(error, "origin", None), str(error)))
    return told


@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_after_a_death_in_the_making_of_a_group_later_calls_are_told_so_too(ranks: Pool, victim: int) -> None:
    outcomes = ranks.outcomes(4, dies_in_new_group, victim, init=False)
    assert outcomes[victim].error_type == "Died"
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.error_type is None, outcome
            assert [one[:2] for one in outcome.value] == [("ExchangeError", victim)] * 3, outcome.value
