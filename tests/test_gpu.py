"""What needs a real GPU: the compiled pass against its CPU reference, and whole optimizers against torch.optim."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: the GPU path was NOT tested here", allow_module_level=True)

from support.gpu_cases import Case, all_cases, check_beyond_int32
from support.gpu_checks import CHECKS

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_a_pass_equals_the_reference(case: Case):
    case.check(DEVICE)


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad", "tracking"])
def test_a_pass_repeats_bit_for_bit(name: str):
    for once, again in zip(Case(name).bits(DEVICE), Case(name).bits(DEVICE), strict=True):
        assert torch.equal(once.view(torch.int32), again.view(torch.int32))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    check_beyond_int32(DEVICE)


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_optimizers(check):
    check(DEVICE)
