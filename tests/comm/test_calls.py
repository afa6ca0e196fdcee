"""Calls that only some ranks make: nobody hangs, and every rank that waits is told who is where."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Outcome, Pool
from support.waits import await_said, end_all_but, meet, pids_of_all, say, shorten, unhurried
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm.calls import Call
from fusedfog.comm.group import find_group, group_timeout

TIMEOUT = 2.0
"""Seconds until ranks that wait for others give up, once all have come to what is tested."""
STEPS = 2


def build(**keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    return model, fusedfog.SGD(model.parameters(), lr=0.01, **{"topology": "ring", **keywords})


def iterate(model: nn.Module, opt: Any, times: int = 1) -> None:
    for _ in range(times):
        opt.zero_grad()
        model(torch.full((2, 8), 0.1 * (dist.get_rank() + 1))).pow(2).sum().backward()
        opt.step()


def enter_averaged(model: nn.Module, opt: Any) -> None:
    with opt.averaged():
        pass


def enter_paused(model: nn.Module, opt: Any) -> None:
    with opt.paused():
        pass


def add_group(model: nn.Module, opt: Any) -> None:
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def build_another(model: nn.Module, opt: Any) -> None:
    fusedfog.AdamW(nn.Linear(2, 2).parameters())


def save(model: nn.Module, opt: Any) -> None:
    fusedfog.save_checkpoint("never-written", model, opt)


X = torch.ones(3)

CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "averaged()": enter_averaged,
    "consensus_distance()": lambda model, opt: opt.consensus_distance(),
    "paused()": enter_paused,
    "load_state_dict()": lambda model, opt: opt.load_state_dict(opt.state_dict()),
    "set_topology()": lambda model, opt: opt.set_topology("ring"),
    "add_param_group()": add_group,
    "AdamW()": build_another,
    "save_checkpoint()": save,
    "neighbor_allreduce()": lambda model, opt: fusedfog.neighbor_allreduce(X, "ring"),
    "neighbor_allgather()": lambda model, opt: fusedfog.neighbor_allgather(X, "ring"),
    "pair_gossip()": lambda model, opt: fusedfog.pair_gossip(X, dist.get_rank() ^ 1),
    "allreduce_parameters()": lambda model, opt: fusedfog.allreduce_parameters([X.clone()]),
    "broadcast_parameters()": lambda model, opt: fusedfog.broadcast_parameters([X.clone()]),
    "broadcast_optimizer_state()": lambda model, opt: fusedfog.broadcast_optimizer_state(opt),
    "hierarchical_neighbor_allreduce()": lambda model, opt: fusedfog.hierarchical_neighbor_allreduce(X, mesh=opt.mesh),
    "new_group()": lambda model, opt: fusedfog.new_group(range(4)),
    "mean()": lambda model, opt: fusedfog.mean(1.0),
    "agree()": lambda model, opt: fusedfog.agree(True),
}


@unhurried()
def alone(name: str, keywords: dict[str, Any]) -> None:
    """Rank 0 makes a call that the others do not make: they step on."""
    model, opt = build(**keywords)
    opt.mesh = init_device_mesh("cpu", (2, 2)) if name.startswith("hierarchical") else None
    iterate(model, opt, STEPS)
    meet("trained")
    shorten(TIMEOUT)
    if dist.get_rank() == 0:
        CALLS[name](model, opt)
    iterate(model, opt, 100)


def check_alone(outcomes: list[Outcome], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.error_type == "PeerTimeout", outcome
        assert outcome.message.startswith(f"rank {rank}: "), outcome.message
        assert f"rank 0 is in {name}, rank" in outcome.message
        assert re.search(r" (are|is) in (step|backward)\(\) ", outcome.message)  # where algorithms exchange
        assert outcome.message.endswith(": every rank must call it")
        assert outcome.seconds < 20


FAST = ("averaged()", "neighbor_allreduce()")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_a_call_of_one_rank_alone_is_named_on_every_rank(ranks: Pool, name: str) -> None:
    check_alone(ranks.outcomes(4, alone, name, {"topology": "fully_connected"}), name)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["atc", "allreduce", "momentum_tracking"])
def test_it_is_so_whatever_the_others_step_with(ranks: Pool, algorithm: str) -> None:
    keywords = {"topology": "fully_connected", "algorithm": algorithm}
    check_alone(ranks.outcomes(4, alone, "averaged()", keywords), "averaged()")


@unhurried()
def apart(first: str, second: str, timeout: float) -> None:
    """Rank 0 makes one call and the others another one."""
    model, opt = build()
    iterate(model, opt, STEPS)
    meet("trained")
    shorten(timeout)
    CALLS[first if dist.get_rank() == 0 else second](model, opt)
    iterate(model, opt, 100)


PAIRS = [  # the first two run always
    ("averaged()", "consensus_distance()"),
    ("consensus_distance()", "paused()"),
    ("paused()", "load_state_dict()"),
    ("set_topology()", "averaged()"),
    ("mean()", "broadcast_parameters()"),
    ("allreduce_parameters()", "agree()"),
    ("AdamW()", "averaged()"),
    ("averaged()", "neighbor_allreduce()"),
    ("save_checkpoint()", "mean()"),
]


@pytest.mark.parametrize(
    ("first", "second"), [*PAIRS[:2], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[2:])]
)
def test_different_calls_of_all_ranks_are_named_at_once(ranks: Pool, first: str, second: str) -> None:
    for rank, outcome in enumerate(ranks.outcomes(4, apart, first, second, 30.0)):
        assert outcome.error_type == "MismatchError", outcome
        assert outcome.message.startswith(f"rank {rank}: ")
        names = [name.replace("AdamW()", "the construction of an optimizer") for name in (first, second)]
        assert f"rank 0 is in {names[0]}, ranks 1-3 are in {names[1]}: every rank must call the same" in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [("neighbor_allgather()", "new_group()")],
)
def test_where_calls_meet_by_different_ways_the_timeout_says_so(ranks: Pool, first: str, second: str) -> None:
    for outcome in ranks.outcomes(4, apart, first, second, TIMEOUT):
        assert outcome.error_type == "PeerTimeout", outcome
        assert f"rank 0 is in {first}, ranks 1-3 are in {second}: every rank must call it" in outcome.message


@unhurried()
def one_more(ends: bool) -> None:
    model, opt = build(algorithm="atc", topology="fully_connected")
    iterate(model, opt, STEPS)
    if ends:
        end_all_but([0])
    else:
        meet("trained")
        shorten(TIMEOUT)
    try:
        if dist.get_rank() == 0:
            iterate(model, opt)
    finally:
        if dist.get_rank() == 0:
            say("told")
        await_said("told")  # An evaluation that waits for nobody.


def test_one_more_step_than_the_others_is_named(ranks: Pool) -> None:
    outcome = ranks.outcomes(4, one_more, False)[0]
    assert outcome.error_type == "PeerTimeout"
    assert (
        f"rank 0 is in step() {STEPS}, ranks 1-3 are in no call of fusedfog, their last was step() {STEPS - 1}: "
        "every rank must call it"
    ) in outcome.message


def test_others_that_have_ended_are_named_as_such(ranks: Pool) -> None:
    outcome = ranks.outcomes(4, one_more, True, pg_timeout=60)[0]
    assert outcome.error_type == "ExchangeError"
    assert f"rank 0 is in step() {STEPS}, ranks 1-3 have ended" in outcome.message
    assert outcome.seconds < 30


@unhurried()
def stops_early() -> None:
    """Rank 2 alone stops, and evaluates with the others, it thinks."""
    model, opt = build(topology="one_peer_exponential")
    iterate(model, opt, 5)
    meet("trained")
    shorten(TIMEOUT)
    if dist.get_rank() != 2:
        iterate(model, opt, 45)
    with opt.averaged():
        pass


def test_early_stopping_on_one_rank_is_named_on_every_rank(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, stops_early)
    for outcome in outcomes:
        assert outcome.error_type == "PeerTimeout", outcome
        assert "rank 2 is in averaged()" in outcome.message
        assert re.search(r" (are|is) in (step|backward)\(\) ", outcome.message)  # where algorithms exchange


def stopped() -> None:
    model, opt = build(topology="fully_connected")
    iterate(model, opt, STEPS)
    pids = pids_of_all()
    meet("trained")
    shorten(TIMEOUT)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        iterate(model, opt, 100)
    finally:
        say(f"told/{dist.get_rank()}")
        await_said("told/0", "told/2")
        if dist.get_rank() == 0:
            os.kill(pids[1], signal.SIGKILL)  # It would be waited for.


@pytest.mark.slow
def test_a_process_that_is_stopped_does_not_answer(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, stopped)
    for rank in (0, 2):
        assert outcomes[rank].error_type == "PeerTimeout"
        assert "rank 1 does not answer (stopped, or cut off)" in outcomes[rank].message


@unhurried()
def in_subgroups() -> None:
    mine = [0, 2] if dist.get_rank() % 2 == 0 else [1, 3]
    group = fusedfog.new_group(mine)
    model, opt = build(group=group)
    iterate(model, opt, STEPS)
    meet("trained")
    shorten(TIMEOUT)
    if dist.get_rank() == 3:
        opt.consensus_distance()
    if dist.get_rank() % 2:
        iterate(model, opt, 5)


@pytest.mark.slow
def test_a_group_s_ranks_are_named_as_the_group_counts_them(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, in_subgroups)
    assert [outcomes[rank].error_type for rank in range(4)] == [None, "PeerTimeout", None, "PeerTimeout"]
    for rank in (1, 3):
        assert "rank 1 is in consensus_distance()" in outcomes[rank].message
        assert "(ranks of the group of global ranks [1, 3])" in outcomes[rank].message


WHERE = (
    f": ranks 0-1,3 are in step() {STEPS}, rank 2 is in no call of fusedfog, its last was step() {STEPS - 1}: "
    "every rank must call it"
)


@unhurried()
def logs(limit: float) -> tuple[list[str], float]:
    """What a rank logs of its last step, for which rank 2 comes late, and how long it took."""
    os.environ["FUSEDFOG_WAIT_LOG_S"] = str(limit)
    records: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())
            if records[-1].endswith(WHERE):
                say(f"logged/{dist.get_rank()}")

    handler = Kept(logging.WARNING)
    logging.getLogger("fusedfog").addHandler(handler)
    try:
        model, opt = build(topology="fully_connected", algorithm="atc")
        iterate(model, opt, STEPS)
        if dist.get_rank() == 2:
            time.sleep(1.0)
            if limit < 1.0:
                # On a busy machine the first lines may find others on their way here, too.
                await_said("logged/0", "logged/1", "logged/3")
        begin = time.monotonic()
        iterate(model, opt)
    finally:
        logging.getLogger("fusedfog").removeHandler(handler)
    return [record for record in records if f" in step() {STEPS} for " in record], time.monotonic() - begin


def test_a_rank_that_waits_logs_who_is_where_and_goes_on(ranks: Pool) -> None:
    limit = 0.3
    results = ranks.run(4, logs, limit)
    for rank in (0, 1, 3):
        records = results[rank][0]
        assert all(record.startswith(f"rank {rank} has been in step() {STEPS} for ") for record in records)
        assert any(record.endswith(WHERE) for record in records)
    for records, seconds in results:
        assert len(records) <= max(0, 1 + math.log2(seconds / limit)), "it is said again after twice the time"


def test_nothing_is_logged_of_calls_that_do_not_last(ranks: Pool) -> None:
    assert [records for records, _ in ranks.run(4, logs, 20.0)] == [[]] * 4


def others_mistakes() -> str:
    """An error of the closure's own is left as it is, whatever it is about."""
    _, opt = build()

    def closure() -> float:
        raise RuntimeError("connection reset by peer, says my database")

    with pytest.raises(RuntimeError) as error:
        opt.step(closure)
    assert type(error.value) is RuntimeError
    return str(error.value)


def test_errors_of_the_user_s_own_code_are_left_alone(ranks: Pool) -> None:
    assert ranks.run(2, others_mistakes) == ["connection reset by peer, says my database"] * 2


def a_mesh_waits_as_long_as_its_world() -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2))
    place = torch.device("cpu")
    views = [find_group(mesh.get_group(0)), find_group(dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=77)))]
    dist.barrier()  # torch connects a group's ranks one after another
    return [group_timeout(view, place).total_seconds() for view in views]


def test_groups_without_a_timeout_of_their_own_wait_as_long_as_the_default_group(ranks: Pool) -> None:
    assert ranks.run(4, a_mesh_waits_as_long_as_its_world, pg_timeout=29) == [[29.0, 77.0]] * 4


def test_construction_is_one_call_and_none_of_add_param_group(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    class Recorded(Call):
        def __init__(self, name: str, *args: Any) -> None:
            names.append(name)
            super().__init__(name, *args)

    monkeypatch.setattr("fusedfog.optim.base.Call", Recorded)
    monkeypatch.setattr("fusedfog.optim.calls.Call", Recorded)
    opt = fusedfog.SGD([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=0.1)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert names == ["SGD()", "add_param_group()"]
