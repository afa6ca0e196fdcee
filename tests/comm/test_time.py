"""When things happen: stragglers, dropped and finished optimizers, dead peers, timeouts, pauses."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import await_said, end_all_but, is_said, meet, say, shorten
from torch import nn

import fusedfog

NAP = 0.3


def net(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3))


def iterate(model: nn.Module, opt: Any, steps: int = 1) -> None:
    x = torch.full((2, 40), 0.1 * (dist.get_rank() + 1))
    for _ in range(steps):
        opt.zero_grad()
        model(x).pow(2).sum().backward()
        opt.step()


# -- stragglers -------------------------------------------------------------------------------------------------------


def straggle(algorithm: str, fused_backward: bool, first: int) -> list[int]:
    """On rank 2, the step that each neighbour has come to, its forward and backward made, while rank 2 naps before its step 5.

    It naps until both have come to step `first`, and then for a while in which they could go on.
    """
    model = net()
    opt = fusedfog.SGD(
        model.parameters(),
        lr=0.01,
        algorithm=algorithm,
        topology="ring",
        fused_backward=fused_backward,
        bucket_mb=0.001,
    )
    x = torch.ones(2, 40)
    found: list[int] = []
    for step in range(9):
        opt.zero_grad()
        model(x).sum().backward()
        say(f"{step}/{dist.get_rank()}")
        if step == 5 and dist.get_rank() == 2:
            await_said(f"{first}/1", f"{first}/3")
            time.sleep(NAP)
            found = [max(other for other in range(9) if is_said(f"{other}/{rank}")) for rank in (1, 3)]
        opt.step()
    return found


@pytest.mark.parametrize(
    ("algorithm", "fused_backward", "delayed"),
    # With fused_backward the straggler's message of step 5 leaves in backward, before its nap, so the next one is late. For
    # AWC that holds if its own inbox had come by then; otherwise its hooks have left the work, and the sending, to step().
    [("awc", False, {6}), ("atc", False, {5}), ("awc", True, {6, 7}), ("atc", True, {6})],
)
def test_a_straggler_delays_only_the_step_that_needs_its_message(
    ranks: Pool, algorithm: str, fused_backward: bool, delayed: set[int]
) -> None:
    assert set(ranks.run(4, straggle, algorithm, fused_backward, min(delayed))[2]) <= delayed


# -- ends -------------------------------------------------------------------------------------------------------------


def drop_and_go_on() -> float:
    for _ in range(4):
        model = net()
        opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
        iterate(model, opt, 3)
        del opt
        gc.collect()
    total = torch.ones(1)
    dist.all_reduce(total)
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="one_peer_exponential")
    iterate(model, opt, 5)
    return opt.consensus_distance() + total.item()


def test_an_optimizer_dropped_with_messages_in_flight_leaves_the_group_usable(ranks: Pool) -> None:
    results = ranks.run(4, drop_and_go_on)
    assert len(set(results)) == 1
    assert 4 < results[0] < 5


def exit_first(survivors: list[int]) -> tuple[int, float]:
    group = dist.new_group(survivors, use_local_synchronization=True) if dist.get_rank() in survivors else None
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
    iterate(model, opt, 3)
    end_all_but(survivors)
    saved = opt.state_dict()
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    again = fusedfog.SGD(net().parameters(), lr=0.01, topology="ring", group=group)
    again.step()
    again.step()
    return saved["fusedfog"]["steps"], total.item()


def test_ranks_that_finish_first_leave_the_others_and_their_group_usable(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, exit_first, [0, 1])
    assert [o.value for o in outcomes[:2]] == [(3, 2.0)] * 2
    assert [o.error_type for o in outcomes[2:]] == ["Died"] * 2


def never_step() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
    meet("built")
    shorten(3.0)
    try:
        if dist.get_rank() != 2:
            iterate(model, opt, 3)
    finally:
        say(f"told/{dist.get_rank()}")
        await_said("told/1", "told/3")


def test_a_peer_that_never_steps_is_named_within_the_timeout(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, never_step)
    for rank in (1, 3):
        assert outcomes[rank].error_type == "PeerTimeout"
        # Whoever is the first to give up tells the other.
        assert f"rank {rank}: step" in outcomes[rank].message
        assert "step 0, bucket 0: receiving from rank 2" in outcomes[rank].message
        assert "3 s" in outcomes[rank].message
        assert outcomes[rank].seconds < 20


def never_build() -> None:
    meet("begun")
    shorten(3.0)
    try:
        if dist.get_rank() != 2:
            fusedfog.SGD(net().parameters(), lr=0.01)
    finally:
        say(f"told/{dist.get_rank()}")
        await_said("told/0", "told/1", "told/3")


def test_a_peer_that_never_builds_its_optimizer_is_named_within_the_timeout(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, never_build)
    for rank in (0, 1, 3):
        assert outcomes[rank].error_type == "PeerTimeout"
        assert "rank 2 did not come" in outcomes[rank].message
        assert outcomes[rank].seconds < 20


def killed() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
    for step in range(6):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        iterate(model, opt)


def test_a_killed_peer_is_named(ranks: Pool) -> None:
    outcomes = ranks.outcomes(4, killed, pg_timeout=60)
    assert outcomes[1].error_type == "Died"
    for rank in (0, 2):
        assert outcomes[rank].error_type == "ExchangeError"
        assert "rank 1: connection lost" in outcomes[rank].message or "rank 1 has ended" in outcomes[rank].message
        assert outcomes[rank].seconds < 30


# -- edits and pauses ---------------------------------------------------------------------------------------------------


def edit_parameters(paused: bool) -> tuple[list[str], int]:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
    iterate(model, opt, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            if paused:
                with opt.paused(), torch.no_grad():
                    model[0].weight.mul_(0.9)
            else:
                with torch.no_grad():
                    model[0].weight.mul_(0.9)
            iterate(model, opt)
        with opt.averaged():
            pass
        iterate(model, opt)
    return [str(w.message) for w in caught], opt.stats()["torn_messages"]


def test_an_edit_while_messages_are_in_flight_is_warned_about_once_and_counted(ranks: Pool) -> None:
    for texts, torn in ranks.run(4, edit_parameters, False):
        assert len(texts) == 1
        assert "opt.paused()" in texts[0]
        assert torn == 2


def test_an_edit_inside_paused_is_fine(ranks: Pool) -> None:
    assert ranks.run(4, edit_parameters, True) == [([], 0)] * 4


def pause_and_replace() -> np.ndarray:
    model = nn.Linear(1, 1, bias=False).double()
    opt = fusedfog.SGD(model.parameters(), lr=0.0, topology="fully_connected")
    opt.step()
    with opt.paused(), torch.no_grad():
        model.weight.fill_(float(dist.get_rank()))
    opt.step()
    return model.weight.detach().numpy().copy()


def test_the_step_after_a_pause_exchanges_the_edited_values(ranks: Pool) -> None:
    np.testing.assert_allclose(ranks.run(4, pause_and_replace), 1.5)


def average_and_restore() -> tuple[float, bool, str]:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring")
    torch.manual_seed(dist.get_rank())
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(8, 3)).pow(2).sum().backward()
        opt.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    error = ""
    with opt.averaged(model):
        assert torch.is_grad_enabled(), "the body's grad mode is the user's"
        inside = torch.cat([value.flatten().double() for value in model.state_dict().values()])
        same = [torch.empty_like(inside) for _ in range(4)]
        dist.all_gather(same, inside)
        spread = max((one - same[0]).abs().max().item() for one in same)
        try:
            opt.step()
        except RuntimeError as caught:
            error = str(caught)
    restored = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return spread, restored, error


def test_averaged_holds_the_global_mean_and_restores_exactly(ranks: Pool) -> None:
    for spread, restored, error in ranks.run(4, average_and_restore):
        assert spread == 0
        assert restored
        assert "step() inside averaged()" in error


def rank_zero_saves_alone() -> float:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring", momentum=0.9)
    for _ in range(6):
        iterate(model, opt)
        if dist.get_rank() == 0:
            opt.state_dict()
            opt.drain()
    return opt.consensus_distance()


def test_saving_on_one_rank_alone_changes_nothing_for_the_others(ranks: Pool) -> None:
    assert len(set(ranks.run(4, rank_zero_saves_alone))) == 1


def leave_without_a_word() -> None:
    # The worker's process ends here and now, with messages in flight, as a script does after its last step.
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, topology="ring")
    iterate(model, opt, 2)
    dist.destroy_process_group()


def test_the_process_group_may_be_destroyed_with_messages_in_flight(ranks: Pool) -> None:
    ranks.run(4, leave_without_a_word)
