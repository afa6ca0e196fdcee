"""Edits while a message is in flight, of buckets with so many parameters that a step looks at every fourth."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.pool import Pool
from torch import nn

import fusedfog


def torn(edited: int, every: int, paused: bool) -> tuple[list[float], list[str]]:
    """`torn_messages` after each of the steps that follow an edit of one of 300 parameters, and what was warned of."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(300)]
    opt = fusedfog.SGD(params, lr=0.1, topology="ring", communicate_every=every)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(2 * every + 6):
            for param in params:
                param.grad = torch.ones(1)
            opt.step()
            if step == 2 * every - 2 + (every == 1):  # the message for the next exchange is on its way
                with opt.paused() if paused else torch.no_grad(), torch.no_grad():
                    params[edited].mul_(2.0)
            found.append(opt.stats()["torn_messages"])
    opt.drain()
    return found, [one.category.__name__ for one in said if one.category.__name__ == "TornMessageWarning"]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("edited", [0, 1, 2, 3, 299])
def test_an_edit_is_counted_once_within_four_steps(ranks: Pool, edited: int, every: int) -> None:
    for found, warned in ranks.run(2, torn, edited, every, False):
        assert found[-1] == 1 and len(warned) == 1
        assert found[2 * every - 2 + (every == 1) + 4] == 1


def test_an_edit_in_a_pause_is_none(ranks: Pool) -> None:
    for found, warned in ranks.run(2, torn, 5, 1, True):
        assert found[-1] == 0 and warned == []
