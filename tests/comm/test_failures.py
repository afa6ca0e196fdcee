"""Where a failure began, as it follows from what ranks answer: whose word counts, and who has only finished."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool

import fusedfog
from fusedfog.comm import calls, failures, whereabouts
from fusedfog.comm import communicator as communicator_module
from fusedfog.comm.failures import Origin, Vigil, find
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.comm.whereabouts import ENDED, LEFT, Address, State, World

HERE, ELSEWHERE = "a", "b"


def world(host: str = HERE) -> World:
    own = Address(HERE, "10.0.0.1", 1, "")
    others = {rank: Address(host, "10.0.0.2", rank, "") for rank in (1, 2, 3)}
    return World(None, 0, own, lambda state: None, addresses=others)  # type: ignore[arg-type]


def answers(of: World, states: dict[int, State]) -> Any:
    """As `whereabouts.ask`, from these states."""

    def ask(asked: World, ranks: Any, own: State, patience: float = 0.0) -> dict[int, State]:
        of.refused = {rank for rank, state in states.items() if state.fate == ENDED}
        return {rank: states[rank] for rank in ranks}

    return mock.patch.object(whereabouts, "ask", ask)


def look(of: World, states: dict[int, State], next_one: int | None = None, *, later: bool = False) -> Origin | None:
    vigil = Vigil(of, "name", State(), lasting=True)
    with answers(of, states):
        found = vigil.look(states, next_one)
        if later:
            with mock.patch.object(failures.time, "monotonic", lambda: failures.time.perf_counter() + 1e6):
                found = vigil.look(states, next_one)
    return found


LIVES, GONE = State(call="step()"), State(fate=ENDED)


def test_a_port_of_this_host_that_refuses_is_a_death() -> None:
    assert look(world(), {1: LIVES, 2: GONE}) == Origin(2, ENDED)
    assert look(world(), {1: LIVES, 3: LIVES}) is None


def test_a_firewall_s_refusal_is_none() -> None:
    elsewhere = world(ELSEWHERE)
    assert look(elsewhere, {1: LIVES, 2: GONE}) is None
    elsewhere.reached.add(2)
    assert look(elsewhere, {1: LIVES, 2: GONE}) == Origin(2, ENDED)


def test_silence_is_no_death() -> None:
    assert look(world(), {1: State(fate=whereabouts.SILENT)}, later=True) is None


@pytest.mark.parametrize("finished", [State(fate=LEFT), State(failed=True, last="step() 9")])
def test_a_rank_that_has_finished_counts_once_what_it_sent_has_had_time(finished: State) -> None:
    states = {1: finished, 2: LIVES}
    assert look(world(), states, 1) is None
    assert look(world(), states, 1, later=True) == Origin(1, ENDED)
    assert look(world(), states, None, later=True) == Origin(1, ENDED)
    assert look(world(), states, 2, later=True) is None, "its message may have come"


def test_what_a_rank_says_of_the_origin_counts_more_than_its_own_end() -> None:
    said = State(call="step()", failed=True, ended=(("name", 3, "has ended", False),))
    assert look(world(), {1: said, 2: LIVES}) == Origin(3, "has ended")
    of = world()
    of.refused = {1}
    assert find(of, {1: said, 2: LIVES}, "name", first=[1]) == Origin(3, "has ended")
    assert find(of, {1: said, 2: LIVES}, "another name", first=[1]) == Origin(1, ENDED)


def test_of_several_dead_the_one_that_was_waited_for_is_named() -> None:
    of = world()
    of.refused = {1, 2}
    assert find(of, {1: GONE, 2: GONE}, "name", first=[2]) == Origin(2, ENDED)
    assert find(of, {1: GONE, 2: GONE}, "name") == Origin(1, ENDED)
    assert find(world(), {1: LIVES}, "name") is None


def told_of_nobody(late: bool) -> None:
    communicator = communicator_for(find_group(), torch.device("cpu"))
    vigil = mock.Mock(look=lambda *_: Origin(-1, "rank 1 has given up: it saw nobody", late))
    if dist.get_rank() == 0:
        with mock.patch.object(calls, "vigil", lambda *_: vigil):
            transfer = communicator.start([], [(1, torch.empty(3))], tag=7, label="step 0, bucket 0")
            error = fusedfog.PeerTimeout if late else fusedfog.ExchangeError
            with pytest.raises(error, match="rank 1 has given up: it saw nobody"):
                transfer.wait()


@pytest.mark.parametrize("late", [True, False])
def test_who_is_told_of_a_failure_that_began_with_no_known_rank_says_so(ranks: Pool, late: bool) -> None:
    ranks.run(2, told_of_nobody, late)


def waits_for_one_that_has_ended() -> None:
    communicator = communicator_for(find_group(), torch.device("cpu"))
    if dist.get_rank() == 2:
        communicator.membership.note_leaving(5)
    dist.barrier()
    if dist.get_rank() == 1:
        # Connections stay open, as they do for a message that is half on its way.
        with mock.patch.object(communicator, "close"):
            communicator.conclude(fusedfog.RankLeft("rank 2 has left", (2,)), [2])
    if dist.get_rank() == 0:
        transfer = communicator.start([], [(1, torch.empty(3))], tag=7, label="step 0, bucket 0")
        with pytest.raises(fusedfog.RankLeft, match=r"left with opt\.leave\(\): rank 2 after 5 steps"):
            transfer.wait()
    dist.barrier()


def test_who_waits_for_a_rank_that_has_ended_as_another_one_left_is_told(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, waits_for_one_that_has_ended, pg_timeout=40)
    assert [outcome.message for outcome in outcomes] == ["", "", ""]
    assert outcomes[0].seconds < 20


def test_a_rank_that_a_call_needs_is_looked_at_without_being_waited_for() -> None:
    of = world()
    vigil = Vigil(of, "SGD()", State(), needed=[0, 1, 3])
    with answers(of, {1: LIVES, 2: LIVES, 3: GONE}):
        assert vigil.look([2], None) == Origin(3, ENDED)
    with answers(of, {1: LIVES, 2: LIVES, 3: State(failed=True, last="step() 9")}):
        assert vigil.look([2], None) is None, "it had finished"


def test_of_many_ranks_that_are_needed_all_are_looked_at_in_turn() -> None:
    of = world()
    of.addresses = {rank: Address(HERE, "10.0.0.2", rank, "") for rank in range(1, 200)}
    vigil = Vigil(of, "SGD()", State(), needed=range(200))
    with answers(of, {rank: GONE if rank == 150 else LIVES for rank in range(200)}):
        found = [vigil.look([2], None) for _ in range(4)]
    assert Origin(150, ENDED) in found


def gives_up_while_a_thread_waits() -> None:
    communicator = communicator_for(find_group(), torch.device("cpu"))
    if dist.get_rank() == 0:
        transfer = communicator.start([], [(1, torch.empty(3))], tag=7, label="step 0, bucket 0")
        while not transfer.begun:
            time.sleep(0.01)
        kept: list[object] = []
        # As for a message half on its way, whose thread no shutdown wakes; and the waiter itself has ended.
        with (
            mock.patch.object(communicator._sockets, "shut_down"),
            mock.patch.object(communicator._waiter, "stop", lambda patience: True),
            mock.patch.object(communicator_module, "leak", kept.append),
            mock.patch.object(dist, "destroy_process_group"),
        ):
            communicator.hear(Origin(1, ENDED))
            assert transfer.over.is_set()
            communicator.end(communicator.ended or RuntimeError(), 0.0)
        assert len(kept) == 1
    dist.barrier()


def test_a_group_in_which_a_thread_waits_is_never_freed_though_its_transfer_is_over(ranks: Pool) -> None:
    assert ranks.outcomes(2, gives_up_while_a_thread_waits, pg_timeout=40)[0].message == ""
