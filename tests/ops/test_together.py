"""`mean` and `agree`: what ranks decide together, by any process group and by none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool

import fusedfog


def means() -> list[object]:
    rank = dist.get_rank()
    group = fusedfog.new_group([0, 1] if rank < 2 else [2, 3])
    matrix = torch.full((2, 3), float(rank), dtype=torch.bfloat16).t()
    kept = matrix.clone()
    found = fusedfog.mean(matrix)
    assert torch.equal(matrix, kept) and found.data_ptr() != matrix.data_ptr()
    return [
        fusedfog.mean(float(rank)),
        fusedfog.mean(np.float32(rank)),
        fusedfog.mean(rank, group=group),
        fusedfog.mean(0.1 * 3**rank),
        math.isnan(fusedfog.mean([math.inf, -math.inf, 1.0, 2.0][rank])),
        fusedfog.mean(math.inf if rank == 1 else 0.0),
        fusedfog.mean(torch.tensor(float(rank), requires_grad=True)),
        fusedfog.mean(torch.tensor([[rank]], dtype=torch.float64)),
        found,
        fusedfog.mean(torch.ones(0)),
    ]


def test_mean_is_that_of_all_ranks_and_keeps_kind_shape_and_dtype(ranks: Pool) -> None:
    results = ranks.run(4, means)
    for rank, (number, numpy, pair, exact, nan, inf, scalar, single, matrix, empty) in enumerate(results):
        assert (number, numpy, pair) == (1.5, 1.5, 0.5 if rank < 2 else 2.5)
        assert isinstance(number, float) and isinstance(numpy, float)
        assert exact == results[0][3] == pytest.approx(1.0)
        assert nan and inf == math.inf
        assert torch.equal(scalar, torch.tensor(1.5)) and not scalar.requires_grad
        assert torch.equal(single, torch.tensor([[1.5]], dtype=torch.float64))
        assert torch.equal(matrix, torch.full((3, 2), 1.5, dtype=torch.bfloat16))
        assert empty.shape == (0,)


def agreements() -> list[bool]:
    rank = dist.get_rank()
    return [
        fusedfog.agree(rank == 2),
        fusedfog.agree(False),
        fusedfog.agree(torch.tensor(1)),
        fusedfog.agree(flag=True),
    ]


def test_agree_is_true_where_any_rank_is(ranks: Pool) -> None:
    assert ranks.run(3, agreements) == [[True, False, True, True]] * 3


def alone() -> tuple[float, bool, bool, list[float]]:
    return fusedfog.mean(2), fusedfog.agree(True), fusedfog.agree(False), fusedfog.mean(torch.ones(2)).tolist()


def test_alone_they_are_the_rank_s_own(ranks: Pool) -> None:
    assert ranks.run(1, alone, init=False) == [(2.0, True, False, [1.0, 1.0])]
    assert ranks.run(1, alone) == [(2.0, True, False, [1.0, 1.0])]


def mistakes() -> str:
    with pytest.raises(TypeError, match=r"x.float\(\)"):
        fusedfog.mean(torch.ones(2, dtype=torch.int64))
    with pytest.raises(fusedfog.MismatchError) as error:
        fusedfog.mean(torch.ones(2 + dist.get_rank()))
    return str(error.value)


def test_different_shapes_are_an_error_before_anything_is_sent(ranks: Pool) -> None:
    for text in ranks.run(2, mistakes):
        assert "shape (3,) on cpu on rank 1 but" in text


def different(first: str, second: str) -> None:
    calls = {
        "mean()": lambda: fusedfog.mean(1.0),
        "agree()": lambda: fusedfog.agree(True),
    }
    calls[first if dist.get_rank() == 0 else second]()


def test_ranks_in_different_calls_are_told_of_each_other_at_once(ranks: Pool) -> None:
    for rank, outcome in enumerate(ranks.outcomes(3, different, "mean()", "agree()")):
        assert outcome.error_type == "MismatchError"
        name = "agree" if rank else "mean"
        assert outcome.message == (
            f"rank {rank}: {name}: rank 0 is in mean(), ranks 1-2 are in agree(): every rank must call the same"
        )


def stops_alone() -> None:
    if dist.get_rank() == 0:
        fusedfog.agree(True)


def test_a_rank_that_does_not_call_is_named(ranks: Pool) -> None:
    outcome = ranks.outcomes(3, stops_alone, pg_timeout=1.5)[0]
    assert outcome.error_type == "PeerTimeout"
    assert "rank 0: agree: ranks 1-2 did not come within" in outcome.message
