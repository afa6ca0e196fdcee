"""A torch optimizer that a framework has built goes on as one of fusedfog's: same groups, same states, same schedules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusedfog
from fusedfog.optim.take_over import take_over

MAKERS: dict[str, Any] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True), fusedfog.SGD),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), amsgrad=True), fusedfog.Adam),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True), fusedfog.AdamW),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.01), fusedfog.Decentralized),
}


def train(net: nn.Module, opt: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> list[float]:
    rates = []
    for step in range(first, last):
        opt.zero_grad()
        net(torch.ones(2, 3) * (step + 1)).square().sum().backward()
        opt.step()
        schedule.step()
        rates.append(opt.param_groups[1]["lr"])
    return rates


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    opt = MAKERS[name][0]([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.003}])
    return net, opt, torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_training_goes_on_as_if_nothing_had_happened(name: str, before: int) -> None:
    reference = build(name)
    rates = train(*reference, 0, 8)
    net, old, schedule = build(name)
    found = train(net, old, schedule, 0, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Schedules warn about an optimizer whose steps they do not see.
        new = take_over(old, [schedule], algorithm="local")
        assert type(new) is MAKERS[name][1]
        assert schedule.optimizer is new
        found += train(net, new, schedule, before, 8)
    assert found == rates
    for mine, theirs in zip(net.parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_written_to_the_old_groups_is_seen() -> None:
    _, old, _ = build("AdamW")
    new = take_over(old, algorithm="local")
    old.param_groups[0]["lr"] = 0.0
    assert new.param_groups[0]["lr"] == 0.0


def test_a_subclass_keeps_its_own_step() -> None:
    class Special(torch.optim.SGD):
        pass

    net = nn.Linear(2, 2)
    assert isinstance(take_over(Special(net.parameters(), lr=0.1), algorithm="local"), fusedfog.Decentralized)


def test_ones_own_comes_back_and_takes_no_keywords() -> None:
    own = fusedfog.SGD(nn.Linear(2, 2).parameters(), lr=0.1, algorithm="local")
    assert take_over(own) is own
    with pytest.raises(TypeError, match="SGD is fusedfog's own already: give topology where it is built"):
        take_over(own, topology="ring")
