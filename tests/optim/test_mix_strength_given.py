"""What mix_strength= may be, what is said of everything else, and on what ranks have to agree."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.mix_strength import MixStrength, first_mixed, rate_of


def build(given: Any, **keywords: Any) -> Any:
    return fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, mix_strength=given, **keywords)


@pytest.mark.parametrize("given", [0, 0.0, 0.5, 1, np.float32(0.25), np.int64(1)], ids=repr)
def test_numbers_from_zero_to_one_are_taken(given: Any) -> None:
    assert MixStrength.of(given) == MixStrength(float(given))
    build(given)


@pytest.mark.parametrize("given", [1.0000001, -1e-9, 2, math.nan, math.inf, -math.inf], ids=repr)
def test_other_numbers_are_refused(given: float) -> None:
    with pytest.raises(ValueError, match=f"mix_strength must be from 0 .* to 1 .*, got {re.escape(repr(given))}"):
        build(given)


@pytest.mark.parametrize("given", [None, "0.5", True, [0.5], 1j, torch.tensor(0.5)], ids=repr)
def test_other_things_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="mix_strength is a number from 0 to 1, a function of the step, or"):
        build(given)


class Table:
    def __init__(self, *values: float) -> None:
        self.values = values

    def __call__(self, step: int) -> float:
        return self.values[step]


def of_both(step: int, rate: float, *, power: float = 2.0) -> float:
    return rate**power


@pytest.mark.parametrize(
    ("given", "both", "value"),
    [
        (lambda step: 0.5, False, 0.5),
        (math.tanh, False, math.tanh(3)),
        (Table(1, 1, 1, 0.25), False, 0.25),
        (lambda step, total=6: step / total, False, 0.5),
        (lambda step, rate: rate, True, 0.5),
        (of_both, True, 0.25),
        (functools.partial(of_both, power=1.0), True, 0.5),
        (functools.partial(of_both, 0), False, None),
        (lambda step: np.float32(0.75), False, 0.75),
        (lambda step: torch.tensor(0.75), False, 0.75),
        (lambda step: step == 3, False, 1.0),
    ],
)
def test_functions_are_given_the_step_or_the_step_and_the_rate(given: Any, both: bool, value: float | None) -> None:
    strength = MixStrength.of(given)
    assert (strength.constant, strength.takes_rate) == (None, both)
    if value is not None:
        assert strength.at(0, 3, 0.5) == value


def needs_a_keyword(step: int, *, total: int) -> float:
    return step / total


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: 0.5, r"needs other arguments: \(\)"),
        (lambda step=0: 0.5, r"needs other arguments: \(step=0\)"),
        (lambda a, b, c: 0.5, r"needs other arguments: \(a, b, c\)"),
        (lambda *all_of_them: 0.5, r"needs other arguments: \(\*all_of_them\)"),
        (needs_a_keyword, r"needs other arguments: \(step: 'int', \*, total: 'int'\)"),
        (max, "does not tell its arguments; wrap it: lambda step"),
    ],
)
def test_other_functions_are_refused(given: Any, says: str) -> None:
    with pytest.raises(TypeError, match=f"mix_strength is a number .*{says}"):
        build(given)


@pytest.mark.parametrize("value", [1.5, -0.5, math.nan, math.inf, None, "weak", torch.ones(2)], ids=str)
def test_a_bad_value_names_rank_step_and_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"rank 3: mix_strength must be a number from 0 to 1, but is") as caught:
        MixStrength.of(lambda step: value).at(3, 17, 1.0)
    assert str(caught.value).endswith(f"but is {value!r} at step 17")
    with pytest.raises(ValueError, match=r"at step 17 and rate 0\.25$"):
        MixStrength.of(lambda step, rate: value).at(3, 17, 0.25)


def test_the_rate_is_one_while_all_are_zero_and_at_the_top() -> None:
    assert [rate_of(lr, top) for lr, top in [(0.0, 0.0), (0.1, 0.0), (0.1, 0.4), (0.5, 0.4), (0.0, 0.4)]] == [
        1.0, 1.0, 0.25, 1.0, 0.0,
    ]  # fmt: skip
    clock, schedule = Clock(), StepSchedule()
    for lr in (0.0, 0.3, 0.2):
        clock.tick(schedule, True, [9.0, lr], 1)
    assert clock.largest_lr == 0.3
    clock.restore({"steps": 5})
    assert clock.largest_lr == 0.0
    assert first_mixed([{"mix": False}, {"mix": True}, {}]) == 1
    assert first_mixed([{"mix": False}]) == 0


# -- ranks -------------------------------------------------------------------------------------------------------------


def same_numbers(step: int) -> float:
    return 1 / (1 + step)


def equal_elsewhere() -> Callable[[int], float]:
    return lambda step: 1 / (1 + step)


GIVEN: dict[str, tuple[Any, Any]] = {
    "numbers": (1.0, 0.5),
    "kinds": (1.0, lambda step: 1.0),
    "arguments": (lambda step: 1.0, lambda step, rate: 1.0),
    "late": (lambda step: 1.0, lambda step: 1.0 if step < 90 else 0.5),
    "powers": (lambda step, rate: rate, lambda step, rate: rate**2),
    "the same": (lambda step: 1 / (1 + step), lambda step: (1 + step) ** -1.0),
    "the same number": (1, 1.0),
    "the same table": (Table(1.0, 0.5, 0.25), Table(1.0, 0.5, 0.25)),
}


def given_by_each() -> dict[str, str]:
    told = {}
    for name, pair in GIVEN.items():
        try:
            build(pair[dist.get_rank()])
            told[name] = ""
        except fusedfog.MismatchError as error:
            told[name] = str(error)
    return told


def test_ranks_agree_on_numbers_and_on_values_of_functions(ranks: Pool) -> None:
    for told in ranks.run(2, given_by_each):
        assert "mix_strength is 0.5 on rank 1 but 1.0 on rank 0" in told["numbers"]
        assert "a function of step (1 at 0, 1 at 1, 1 at 100) on rank 1 but 1.0 on rank 0" in told["kinds"]
        assert "a function of step and rate (1 at (0, 1)" in told["arguments"]
        assert "(1 at 0, 1 at 1, 0.5 at 100) on rank 1" in told["late"]
        assert "0.25 at (100, 0.5)) on rank 1" in told["powers"]
        assert told["the same"] == told["the same number"] == told["the same table"] == ""


def a_bad_value(keywords: dict[str, Any]) -> tuple[str, bool, list[float], float]:
    """What is said in step 2, whether it changed nothing, and what happens when the function is mended."""
    table = [1.0, 0.5, 1.5, 0.0]
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, mix_strength=lambda step: table[step], **keywords)
    torch.manual_seed(dist.get_rank())
    said, kept = "", True
    for step in range(4):
        model(torch.randn(2, 4)).square().mean().backward()
        if step == 2:
            before = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(ValueError, match="mix_strength") as caught:
                opt.step()
            said = str(caught.value)
            kept = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            table[2] = 1.0
        opt.step()
        opt.zero_grad()
    return said, kept, model.weight.detach().flatten().tolist(), opt.consensus_distance()


@pytest.mark.parametrize("keywords", [{}, {"algorithm": "atc"}, {"capturable": True}], ids=str)
def test_a_bad_value_is_raised_before_anything_is_changed(ranks: Pool, keywords: dict[str, Any]) -> None:
    for rank, (said, kept, weights, distance) in enumerate(ranks.run(2, a_bad_value, keywords)):
        assert said == f"rank {rank}: mix_strength must be a number from 0 to 1, but is 1.5 at step 2"
        assert kept
        assert all(map(math.isfinite, weights))
        assert distance > 0


def in_backward() -> str:
    model = nn.Linear(4, 3)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, fused_backward=True, mix_strength=lambda step: 1.0 + step)
    for _ in range(2):
        try:
            model(torch.ones(2, 4)).square().mean().backward()
            opt.step()
        except ValueError as error:
            opt.drain()
            return str(error)
    return ""


def test_a_bad_value_is_named_in_backward_too(ranks: Pool) -> None:
    for rank, said in enumerate(ranks.run(2, in_backward)):
        assert said == f"rank {rank}: mix_strength must be a number from 0 to 1, but is 2.0 at step 1"


def compiled_and_plain() -> list[list[float]]:
    """The weights after steps of every strength, in compiled passes and without."""
    table, ends = [0.5, 0.0, 1.0, 0.25, 0.0, 0.75], []
    for compiled in (True, False):
        torch.manual_seed(dist.get_rank())
        model = nn.Linear(200, 100)
        opt = fusedfog.SGD(
            model.parameters(), lr=0.1, cpu_compile=compiled, mix_strength=lambda step: table[min(step, 5)]
        )
        for _ in table:
            opt.zero_grad()
            model(torch.randn(2, 200)).square().mean().backward()
            opt.step()
        opt.drain()
        ends.append(model.weight.detach().flatten().tolist())
    return ends


def test_compiled_passes_serve_every_strength(ranks: Pool) -> None:
    for compiled, plain in ranks.run(2, compiled_and_plain, timeout=300):
        torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-5, atol=1e-6)
