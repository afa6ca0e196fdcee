"""Edits of `opt.state` where ranks exchange: moments are free, sums over ranks are guarded, what neighbours know stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog


def step(opt: Any, weight: nn.Parameter) -> None:
    weight.grad = torch.full_like(weight, 1.0 + dist.get_rank() if dist.is_initialized() else 1.0)
    opt.step()


def tracking(way: str) -> tuple[str, float]:
    weight = nn.Parameter(torch.zeros(4))
    opt = fusedfog.SGD([weight], lr=0.1, momentum=0.9, algorithm="momentum_tracking", topology="ring")
    for _ in range(3):
        step(opt, weight)

    def edit() -> None:
        if way == "clear":
            opt.state.clear()
        elif way == "replace":
            opt.state[weight]["tracker"] = torch.zeros(4)
        else:
            opt.state[weight]["tracker"].zero_()

    edit()
    message = ""
    try:
        step(opt, weight)
    except RuntimeError as error:
        message = str(error)
    with opt.paused():
        opt.state.clear()
    for _ in range(200):
        step(opt, weight)
    tracker = opt.state[weight]["tracker"].sum()
    opt.drain()
    dist.all_reduce(tracker)
    return message, tracker.item() / 8


@pytest.mark.parametrize("way", ["clear", "replace", "in place"])
def test_a_state_that_is_being_sent_is_changed_inside_paused_alone(ranks: Pool, way: str) -> None:
    for message, mean in ranks.run(2, tracking, way):
        assert "tracker was changed while it is being sent" in message and "`with opt.paused():`" in message
        # The mean of the trackers is that of the momenta, 1.5 / (1 - 0.9): a sum that was broken would stay so.
        assert mean == pytest.approx(15.0, rel=1e-3)


def compressed() -> tuple[list[float], bool, str]:
    weight = nn.Parameter(torch.arange(16.0) + dist.get_rank())
    opt = fusedfog.AdamW([weight], lr=0.0, wire_dtype="int8", topology="ring")
    for _ in range(2):
        step(opt, weight)
    opt.state = {}
    for _ in range(20):
        step(opt, weight)
    fresh = opt.state[weight]["step"].item() == 20
    opt.state[weight]["param_replica0"] = torch.zeros(16)
    try:
        step(opt, weight)
        message = ""
    except ValueError as error:
        message = str(error)
    return weight.tolist(), fresh, message


def test_moments_may_be_cleared_under_compressed_messages_whose_replicas_stay(ranks: Pool) -> None:
    one, other = ranks.run(2, compressed)
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), atol=1e-3, rtol=0)
    for _, fresh, message in (one, other):
        assert fresh and "param_replica0 is what neighbours know of this rank" in message


@pytest.mark.parametrize("low_precision", ["master", "kahan"])
def test_clearing_moments_keeps_what_16_bit_parameters_lack(low_precision: Any) -> None:
    weight = nn.Parameter(torch.ones(4).bfloat16())
    opt = fusedfog.SGD([weight], lr=2.0**-12, momentum=0.5, low_precision=low_precision)
    for _ in range(8):
        opt.state.clear()
        weight.grad = torch.ones(4).bfloat16()
        opt.step()
    kept = opt.state[weight]
    value = kept["master_param"] if low_precision == "master" else weight.float() + kept["compensation"].float()
    torch.testing.assert_close(value, torch.full((4,), 1 - 8 * 2.0**-12))


def test_a_wrong_state_is_named_and_nothing_is_changed() -> None:
    model = nn.Linear(3, 2, bias=False)
    opt = fusedfog.AdamW(model.parameters(), model=model)
    step(opt, model.weight)
    before = model.weight.detach().clone()
    opt.state[model.weight]["exp_avg"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"opt.state of parameter weight: exp_avg was replaced by a tensor of shape \(5,\)"
    ):
        step(opt, model.weight)
    opt.state[model.weight]["exp_avg"] = 3
    with pytest.raises(ValueError, match=r"exp_avg was replaced by int, not by a tensor"):
        step(opt, model.weight)
    assert torch.equal(model.weight, before)
    del opt.state[model.weight]
    step(opt, model.weight)


def test_entries_of_the_users_own_are_kept_and_saved() -> None:
    weight = nn.Parameter(torch.ones(4))
    opt = fusedfog.AdamW([weight])
    step(opt, weight)
    opt.state[weight]["mine"] = 7
    step(opt, weight)
    saved = opt.state_dict()
    assert saved["state"][0]["mine"] == 7 and type(saved["state"][0]) is dict
    opt.load_state_dict(saved)
    assert opt.state[weight]["mine"] == 7 and opt.state[weight]["step"] == 2


def test_a_step_without_edits_looks_at_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(4))
    opt = fusedfog.AdamW([weight])
    step(opt, weight)
    looked = []
    monkeypatch.setattr("fusedfog.optim.states._edits", lambda *_: looked.append(1) or iter(()))
    step(opt, weight)
    assert not looked
    assert opt.state[weight]["step"] == 2
    step(opt, weight)
    assert looked
