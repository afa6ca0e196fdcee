"""What is not finite, in the interpreter: the kernel leaves the same differences out as the reference, and raises the alarm."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernel_rules import ROWS
from test_fused_pass import DTYPES, TOLERANCE, Case

from fusedfog.kernels import fused_pass, torch_pass

POISONS = (math.nan, math.inf, -math.inf)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
RULES = ("mix", "sgd-momentum", "adamw", "tracking", "decentlam", "outer")


def poisoned(name: str, dtype: torch.dtype, neighbours: int, where: str) -> tuple[Case, torch.Tensor]:
    """A case with every poison in some elements of each message, and where they are."""
    case = Case(ROWS[name], dtype, neighbours)
    bad = torch.zeros(case.size, dtype=torch.bool)
    for start, numel in case.region.spans:
        bad[start + numel // 2] = bad[start + numel - 1] = bad[start] = True
    places = bad.nonzero().flatten()
    values = torch.tensor(POISONS, dtype=dtype).repeat(len(places))[: len(places)]
    for received in case.arguments["inbox"]:
        if where == "neighbour":
            received[-1][places] = values.to(received[-1].dtype)
    if where == "own":
        case.written[0][places] = values
    return case, bad


def run(case: Case, maker) -> tuple[list[torch.Tensor], bool]:
    alarm = torch.zeros(16 // case.dtype.itemsize, dtype=case.dtype)
    case.arguments["alarm"] = alarm
    return case.run(maker, finite=False), bool(alarm.any())


@pytest.mark.parametrize("neighbours", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_neighbours_values_that_are_not_finite_count_as_the_ranks_own(name, dtype, neighbours):
    case, _ = poisoned(name, dtype, neighbours, "neighbour")
    (ours, alarmed), (theirs, also) = run(case, fused_pass.launch), run(case, torch_pass.run_pass)
    assert alarmed
    assert also
    for got, expected in zip(ours, theirs, strict=True):
        assert got[case.valid].isfinite().all()
        torch.testing.assert_close(got[case.valid], expected[case.valid], **TOLERANCE[got.dtype])


@pytest.mark.parametrize("name", ("sgd-momentum", "adamw"))
def test_own_values_that_are_not_finite_stay_where_they_are(name):
    case, bad = poisoned(name, torch.float32, 2, "own")
    (ours, alarmed), (theirs, also) = run(case, fused_pass.launch), run(case, torch_pass.run_pass)
    assert alarmed
    assert also
    for got in (ours[0], theirs[0]):
        assert torch.equal(~got[case.valid].isfinite(), bad[case.valid])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_and_neighbours_of_weight_zero_raise_no_alarm(dtype):
    case, _ = poisoned("adamw", dtype, 2, "neighbour")
    case.arguments["weights"] = (0.5, 0.0)  # the padding is NaN in every case
    for maker in (fused_pass.launch, torch_pass.run_pass):
        results, alarmed = run(case, maker)
        assert not alarmed
        assert all(result[case.valid].isfinite().all() for result in results)


def test_without_an_alarm_they_spread():
    case, bad = poisoned("adamw", torch.float32, 2, "neighbour")
    for maker in (fused_pass.launch, torch_pass.run_pass):
        param = case.run(maker, finite=False)[0]
        assert torch.equal(~param[case.valid].isfinite(), bad[case.valid])
