"""torch.distributed.checkpoint asks an optimizer without states to make a step; ours makes the states alone, on any one rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedfog

KINDS: dict[str, Any] = {
    "AdamW": lambda params: fusedfog.AdamW(params, lr=0.1),
    "SGD": lambda params: fusedfog.SGD(params, lr=0.1),
    "momentum": lambda params: fusedfog.SGD(params, lr=0.1, momentum=0.9),
    "momentum_tracking": lambda params: fusedfog.SGD(params, lr=0.1, momentum=0.9, algorithm="momentum_tracking"),
    "allreduce": lambda params: fusedfog.AdamW(params, lr=0.1, algorithm="allreduce"),
    "wire_dtype": lambda params: fusedfog.AdamW(params, lr=0.1, wire_dtype="int8"),
    "Decentralized": lambda params: fusedfog.Decentralized(torch.optim.RMSprop(params, lr=0.1)),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def iterate(model: nn.Module, opt: Any, times: int) -> None:
    for _ in range(times):
        opt.zero_grad()
        model(torch.full((2, 4), 0.1 * (dist.get_rank() + 1))).pow(2).sum().backward()
        opt.step()


def rank_zero_alone(kind: str, flat: bool) -> tuple[list[float], list[float], int, float]:
    """Rank 0 asks for its states before the first step and once more in between; the run is that of a rank that doesn't."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = []
    for asks in (False, dist.get_rank() == 0):
        model = net()
        opt = KINDS[kind](model.parameters())
        for _ in range(2):
            if asks:
                saved = get_optimizer_state_dict(model, opt, options=options)
                assert saved["param_groups" if not flat else "param_groups.weight.lr"]
                assert opt.stats()["torn_messages"] == 0
            opt.zero_grad()
            iterate(model, opt, 2)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
        steps, lr = int(opt.stats()["steps"]), opt.param_groups[0]["lr"]
    return runs[0], runs[1], steps, lr


@pytest.mark.parametrize("flat", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_asking_for_states_is_no_step_and_disturbs_nobody(ranks: Pool, kind: str, flat: bool) -> None:
    for undisturbed, disturbed, steps, lr in ranks.run(2, rank_zero_alone, kind, flat, pg_timeout=20):
        assert disturbed == undisturbed
        assert steps == 4
        assert lr == 0.1


def saves_and_loads(kind: str, flat: bool, steps: int) -> tuple[list[float], list[float]]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = net()
    opt = KINDS[kind](model.parameters())
    iterate(model, opt, steps)
    opt.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    again = net()
    other = KINDS[kind](again.parameters())
    with other.paused():
        again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, saved, options=options)
    for one in (model, again):
        iterate(one, opt if one is model else other, 3)
    return tuple(torch.cat([p.detach().flatten() for p in one.parameters()]).tolist() for one in (model, again))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "momentum", "Decentralized"])
def test_what_was_asked_for_before_the_first_step_loads_back(ranks: Pool, kind: str, flat: bool) -> None:
    for went_on, resumed in ranks.run(2, saves_and_loads, kind, flat, 0, pg_timeout=20):
        assert resumed == pytest.approx(went_on)
