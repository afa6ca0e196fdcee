"""`communicate_every=` as a function of the step: which steps exchange, on real ranks, and across a resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn

import fusedfog
from fusedfog import simulate
from fusedfog.engine.rhythm import described, is_due, pauses


def thinning(step: int) -> bool:
    """Every step at first, then every third one."""
    return step < 4 or step % 3 == 2


def by_four(step: int) -> bool:
    return (step + 1) % 4 == 0


def never(step: int) -> bool:
    return False


def numpy_bool(step: int) -> Any:
    return np.bool_(step % 2 == 0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def train(model: nn.Module, opt: Any, steps: range) -> list[int]:
    """How many exchanges there were after each step."""
    counts = []
    for step in steps:
        source = torch.Generator().manual_seed(100 * step + dist.get_rank())
        opt.zero_grad()
        model(torch.randn(4, 5, generator=source)).square().mean().backward()
        opt.step()
        counts.append(opt.stats()["exchanges"])
    return counts


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- which steps exchange --------------------------------------------------------------------------------------------


def counted(rhythm: Any, keywords: dict[str, Any]) -> list[int]:
    model = net()
    return train(model, fusedfog.AdamW(model.parameters(), lr=0.02, communicate_every=rhythm, **keywords), range(12))


SETUPS: dict[str, dict[str, Any]] = {
    "awc": {},
    "atc": {"algorithm": "atc"},
    "hooks": {"fused_backward": True, "bucket_mb": 1e-4},
    "int8": {"wire_dtype": "int8"},
}


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("rhythm", [thinning, numpy_bool, never])
def test_the_steps_of_which_it_says_so_exchange(ranks: Pool, rhythm: Callable[[int], bool], name: str) -> None:
    expected = np.cumsum([bool(rhythm(step)) for step in range(12)]).tolist()
    assert ranks.run(2, counted, rhythm, SETUPS[name]) == [expected] * 2


def both(keywords: dict[str, Any]) -> bool:
    one, other = net(), net()
    train(one, fusedfog.AdamW(one.parameters(), lr=0.02, communicate_every=by_four, **keywords), range(9))
    train(other, fusedfog.AdamW(other.parameters(), lr=0.02, communicate_every=4, **keywords), range(9))
    return same(values(one), values(other))


@pytest.mark.parametrize("keywords", [{}, {"algorithm": "atc", "global_average_every": 3}, {"data_parallel_steps": 2}])
def test_a_function_of_every_fourth_step_is_the_number_4(ranks: Pool, keywords: dict[str, Any]) -> None:
    assert ranks.run(4, both, keywords) == [True] * 4


def test_simulated_ranks_keep_the_rhythm_too() -> None:
    problem = simulate.Quadratics.random(4, 3, seed=0)
    found = [
        simulate.simulate(problem, 4, "ring", steps=9, lr=0.1, communicate_every=rhythm).X for rhythm in (by_four, 4)
    ]
    assert torch.equal(*found)


def resumed(keywords: dict[str, Any]) -> bool:
    one, other = net(), net()
    opt = fusedfog.AdamW(one.parameters(), lr=0.02, communicate_every=thinning, **keywords)
    train(one, opt, range(6))
    saved, weights = opt.state_dict(), values(one)
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
    train(one, opt, range(6, 13))
    again = fusedfog.AdamW(other.parameters(), lr=0.02, communicate_every=thinning, **keywords)
    with again.paused(), torch.no_grad():
        for p, value in zip(other.parameters(), weights, strict=True):
            p.copy_(value)
    again.load_state_dict(saved)
    train(other, again, range(6, 13))
    return same(values(one), values(other))


@pytest.mark.parametrize("keywords", [{}, {"algorithm": "atc"}])
def test_a_resume_goes_on_in_the_rhythm(ranks: Pool, keywords: dict[str, Any]) -> None:
    assert ranks.run(4, resumed, keywords) == [True] * 4


def switched() -> list[int]:
    model = net()
    opt = fusedfog.AdamW(model.parameters(), lr=0.02)
    train(model, opt, range(3))
    opt.switch(communicate_every=by_four)
    return train(model, opt, range(3, 8))


def test_a_switch_may_bring_one(ranks: Pool) -> None:
    assert ranks.run(2, switched) == [[4, 4, 4, 4, 5]] * 2


# -- what is told ----------------------------------------------------------------------------------------------------


def disagrees() -> str:
    odd = dist.get_rank() == 1
    with pytest.raises(fusedfog.MismatchError) as caught:
        fusedfog.AdamW(net().parameters(), lr=0.02, communicate_every=thinning if odd else by_four)
    return str(caught.value)


def test_ranks_compare_its_values(ranks: Pool) -> None:
    for text in ranks.run(2, disagrees):
        assert "communicate_every is a function of the step (of the first 64 these exchange: 0, 1, 2, 3, 5, 8," in text
        assert "on rank 1 but a function of the step (of the first 64 these exchange: 3, 7, 11," in text


def gives_numbers(wrapped: bool) -> tuple[str, bool]:
    """What the first step says, the second one being the one that would exchange by a number; whether it changed nothing."""
    model = net()

    def rhythm(step: int) -> Any:
        return True if step == 0 else 4

    if wrapped:
        inner = torch.optim.AdamW(model.parameters(), lr=0.02)
        opt: Any = fusedfog.Decentralized(inner, communicate_every=rhythm)
    else:
        opt = fusedfog.AdamW(model.parameters(), lr=0.02, communicate_every=rhythm)
    before = values(model)
    model(torch.ones(2, 5)).sum().backward()
    with pytest.raises(TypeError) as caught:
        opt.step()
    return str(caught.value), same(before, values(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_number_in_place_of_an_answer_is_told_before_anything_changes(ranks: Pool, wrapped: bool) -> None:
    for text, unchanged in ranks.run(2, gives_numbers, wrapped):
        assert unchanged and text == (
            "communicate_every as a function says whether a step exchanges, True or False, but is 4 at step 1; for every H-th "
            "step that is lambda step: (step + 1) % H == 0"
        )


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "4", None])
def test_what_is_neither_a_number_of_steps_nor_a_function_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="communicate_every must be a whole number of at least 1, or a function"):
        fusedfog.AdamW(net().parameters(), lr=0.02, communicate_every=given)


@pytest.mark.parametrize("algorithm", ["decentlam", "exact_diffusion", "extra"])
def test_it_is_refused_where_a_number_is(algorithm: str) -> None:
    with pytest.raises(ValueError, match="does not work with communicate_every=a function: it diverges"):
        fusedfog.SGD(net().parameters(), lr=0.1, algorithm=algorithm, communicate_every=thinning)


def test_words_for_it() -> None:
    assert described(3) == "3" and described(never).endswith("these exchange: none)")
    assert described(lambda step: [True][step]) == "a function of the step (IndexError in the first 64)"
    assert (pauses(1), pauses(2), pauses(thinning)) == (False, True, True)
    assert [is_due(3, step) for step in range(4)] == [False, False, True, False]
