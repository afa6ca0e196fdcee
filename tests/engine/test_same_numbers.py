"""Numbers of param groups that drift apart are noticed within 200 exchanges, and named once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog

EXPONENT = [1.0]
"""Of this process."""


def strength(step: int, rate: float) -> float:
    return float(0.5 ** EXPONENT[0])


def drift(keywords: dict[str, Any], change: str, steps: int, rank: int = 2) -> list[str]:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    keywords = dict(keywords)
    kind = getattr(fusedfog, keywords.pop("kind", "AdamW"))
    EXPONENT[0] = 1.0
    opt = kind([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], lr=0.1, **keywords)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if step == 20 and dist.get_rank() == rank:
                if change == "lr":
                    opt.param_groups[1]["lr"] = 0.05
                elif change == "betas":
                    opt.param_groups[0]["betas"] = (0.8, 0.999)
                elif change == "tensor":
                    opt.param_groups[0]["lr"] = torch.tensor(0.05)
                elif change == "strength":
                    EXPONENT[0] = 2.0
                elif change == "rounding":
                    opt.param_groups[0]["lr"] *= 1 + 1e-9
            opt.step()
    return [str(w.message) for w in caught if w.category is fusedfog.MismatchWarning]


@pytest.mark.parametrize(
    ("keywords", "change", "text"),
    [
        ({}, "lr", "lr of group 1 is 0.1 on ranks 0-1,3, 0.05 on rank 2 after 100 exchanges"),
        pytest.param(
            {"algorithm": "atc"},
            "betas",
            "betas[0] of group 0 is 0.9 on ranks 0-1,3, 0.8 on rank 2 after 100 exchanges",
            marks=pytest.mark.slow,
        ),
        (
            {"algorithm": "allreduce"},
            "tensor",
            "lr of group 0 is 0.1 on ranks 0-1,3, 0.05 on rank 2 after 100 exchanges",
        ),
        pytest.param(
            {"capturable": True},
            "lr",
            "lr of group 1 is 0.1 on ranks 0-1,3, 0.05 on rank 2 after 100 exchanges",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_rank_is_warned_once_with_ranks_and_values(
    ranks: Pool, keywords: dict[str, Any], change: str, text: str
) -> None:
    results = ranks.run(4, drift, keywords, change, 210)
    for rank, texts in enumerate(results):
        assert len(texts) == 1
        assert texts[0].startswith(f"rank {rank}: {text.split(' is ')[0]}")
        # Whoever comes first knows a part of the others at 100, and all of them at 200.
        assert "0.05 on rank 2" in texts[0] or "0.8 on rank 2" in texts[0]
        assert "fusedfog.mean(loss)" in texts[0]
    assert any(text in texts[0] for texts in results)


def test_a_strength_of_mixing_that_is_another_one_on_a_rank_is_noticed(ranks: Pool) -> None:
    for rank, texts in enumerate(ranks.run(4, drift, {"kind": "SGD", "mix_strength": strength}, "strength", 210)):
        assert len(texts) == 1
        assert texts[0].startswith(f"rank {rank}: mix_strength is 0.")
        assert "0.25 on rank 2" in texts[0]


def test_equal_numbers_and_the_last_digits_of_a_schedule_are_no_difference(ranks: Pool) -> None:
    assert ranks.run(4, drift, {"kind": "SGD"}, "rounding", 210) == [[]] * 4


def test_nothing_is_compared_between_the_hundreds(ranks: Pool) -> None:
    assert ranks.run(4, drift, {}, "lr", 99) == [[]] * 4


def twins(same: bool, keywords: dict[str, Any], scale: float = 1.0) -> list[str]:
    """What ranks that have the same batches, or their own, are told in 210 steps."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    opt = fusedfog.SGD(model.parameters(), lr=0.001, **keywords)
    source = torch.Generator().manual_seed(0 if same else dist.get_rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(210):
            opt.zero_grad()
            (scale * model(torch.randn(3, 4, generator=source)).square().mean()).backward()
            opt.step()
    return [str(w.message) for w in caught if "same gradients" in str(w.message)]


def test_rank_0_says_once_that_all_ranks_see_the_same_batches(ranks: Pool) -> None:
    told, *others = ranks.run(3, twins, True, {})
    assert len(told) == 1 and "all 3 ranks had the same gradients in exchange 100" in told[0]
    assert others == [[], []]


@pytest.mark.parametrize(
    ("same", "keywords", "scale"),
    [
        (False, {}, 1.0),
        (False, {"algorithm": "atc", "topology": "fully_connected"}, 1.0),  # equal parameters of other gradients
        (False, {"algorithm": "allreduce"}, 1.0),  # .grad is the mean, the same everywhere
        (True, {}, 0.0),  # gradients of zero say nothing
    ],
)
def test_nothing_is_said_of_ranks_with_batches_of_their_own(
    ranks: Pool, same: bool, keywords: dict[str, Any], scale: float
) -> None:
    assert ranks.run(2, twins, same, keywords, scale) == [[], []]
