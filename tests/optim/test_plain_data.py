"""What goes into a checkpoint beside tensors comes back the same, or is refused with its path; nothing is called on the way."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedules

from fusedfog.optim.plain_data import decode, encode


def through_json(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "extra", tensors))
    return decode(json.loads(text), tensors.__getitem__)


def assert_same(one: Any, other: Any) -> None:
    """Equal in value and kind, however nested; NaN equals NaN."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    elif isinstance(one, float):
        assert (one == other and math.copysign(1, one) == math.copysign(1, other)) or math.isnan(one + other)
    else:
        assert one == other


KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just("!")
LEAVES = KEYS | st.binary() | st.just(float("nan")) | st.frozensets(st.integers())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS | st.tuples(KEYS), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(VALUES)
def test_what_is_plain_comes_back_as_it_was(value: Any) -> None:
    assert_same(through_json(value), value)


def test_random_number_generators_go_on_where_they_were() -> None:
    generator = np.random.default_rng(3)
    before = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "numpy's old dict": np.random.get_state(legacy=False),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    drawn = random.random(), np.random.rand(), generator.random(), torch.rand(3)
    after = through_json(before)
    random.setstate(after["python"])
    np.random.set_state(after["numpy's old dict"])
    assert drawn[1] == np.random.rand()
    np.random.set_state(after["numpy"])
    generator.bit_generator.state = after["generator"]
    torch.set_rng_state(after["torch"])
    again = random.random(), np.random.rand(), generator.random(), torch.rand(3)
    assert drawn[:3] == again[:3] and torch.equal(drawn[3], again[3])


def of_a_schedule(name: str, optimizer: torch.optim.Optimizer) -> Any:
    return {
        "StepLR": lambda: schedules.StepLR(optimizer, 2),
        "MultiStepLR": lambda: schedules.MultiStepLR(optimizer, [2, 4, 4]),
        "LambdaLR": lambda: schedules.LambdaLR(optimizer, lambda step: 0.9**step),
        "OneCycleLR": lambda: schedules.OneCycleLR(optimizer, 0.5, total_steps=20),
        "CyclicLR": lambda: schedules.CyclicLR(optimizer, 0.1, 0.5, step_size_up=3),
        "CosineAnnealingLR": lambda: schedules.CosineAnnealingLR(optimizer, 20),
        "CosineAnnealingWarmRestarts": lambda: schedules.CosineAnnealingWarmRestarts(optimizer, 3),
        "SequentialLR": lambda: schedules.SequentialLR(
            optimizer, [schedules.LinearLR(optimizer), schedules.ExponentialLR(optimizer, 0.9)], [3]
        ),
        "ReduceLROnPlateau": lambda: schedules.ReduceLROnPlateau(optimizer, patience=1),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "StepLR",
        "MultiStepLR",
        "LambdaLR",
        "OneCycleLR",
        "CyclicLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
        "SequentialLR",
        "ReduceLROnPlateau",
    ],
)
def test_torchs_schedules_go_on_where_they_were(name: str) -> None:
    def step(optimizer: torch.optim.Optimizer, schedule: Any) -> float:
        optimizer.step()
        schedule.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
        return float(optimizer.param_groups[0]["lr"])

    first, second = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9) for _ in range(2))
    schedule, resumed = of_a_schedule(name, first), of_a_schedule(name, second)
    for _ in range(3):
        step(first, schedule)
    resumed.load_state_dict(through_json(schedule.state_dict()))
    second.load_state_dict(first.state_dict())
    assert [step(first, schedule) for _ in range(4)] == [step(second, resumed) for _ in range(4)]


def test_subclasses_come_back_as_what_they_are_kinds_of() -> None:
    Point = collections.namedtuple("Point", "x y")
    default = collections.defaultdict(list, {"a": [1]})
    value = {"o": collections.OrderedDict(b=1, a=2), "d": default, "p": Point(1, 2), "s": torch.Size([2, 3])}
    assert_same(through_json(value), {"o": {"b": 1, "a": 2}, "d": {"a": [1]}, "p": (1, 2), "s": (2, 3)})
    assert through_json(collections.Counter({3: 2})) == collections.Counter({3: 2})
    assert type(through_json(collections.Counter())) is collections.Counter
    scalars = [np.float32(0.1), np.float64(0.1), np.int8(3), np.bool_(True)]
    assert_same(through_json(scalars), [float(np.float32(0.1)), 0.1, 3, True])
    assert_same(through_json({"x": torch.bfloat16}), {"x": torch.bfloat16})


@dataclasses.dataclass
class Settings:
    rate: float = 1.0


def contains_itself() -> list[Any]:
    loop: list[Any] = []
    loop.append({"again": loop})
    return loop


@pytest.mark.parametrize(
    ("value", "kind", "path"),
    [
        ({"a": [1, {"b": Settings()}]}, TypeError, "extra/a/1/b is of type Settings"),
        ({"f": lambda: 1}, TypeError, "extra/f is of type function"),
        ({"p": Path("x")}, TypeError, "extra/p is of type PosixPath"),
        ({"a": (1, 2j)}, TypeError, "extra/a/1 is of type complex"),
        ({"a": np.array(["x"])}, TypeError, "extra/a is a numpy array of <U1"),
        ({"a": np.array([object()])}, TypeError, "extra/a is a numpy array of object"),
        ({"a": {Settings: 1}}, TypeError, "extra/a has a key of type type"),
        ({"a": torch.nn.Linear(1, 1)}, TypeError, "extra/a is of type Linear"),
        ({"a": contains_itself()}, ValueError, "extra/a/0/again contains itself"),
    ],
)
def test_anything_else_is_refused_by_its_path(value: Any, kind: type[Exception], path: str) -> None:
    with pytest.raises(kind, match=path):
        encode(value, "extra", {})


def test_tensors_with_one_path_are_kept_apart() -> None:
    value = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    assert_same(through_json(value), value)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.sampled_from(["tensor", "bytes", "dtype", "load", "__reduce__"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["!", "of", "a"]), inner)
        | st.fixed_dictionaries(
            {"!": st.sampled_from(["dict", "tuple", "set", "Counter", "array", "dtype"]), "of": inner}
        )
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(ODD)
def test_json_that_was_not_written_by_us_is_data_or_an_error(plain: Any) -> None:
    def known(name: str) -> torch.Tensor:
        if name != "tensor":
            raise KeyError(name)
        return torch.ones(2)

    try:
        found = decode(plain, known)
    except (ValueError, TypeError, KeyError):
        return
    assert_plain(found)


def assert_plain(value: Any) -> None:
    taken = (type(None), bool, int, float, str, bytes, torch.Tensor, np.ndarray, torch.dtype)
    if isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            assert_plain(one)
    elif isinstance(value, dict):
        for pair in value.items():
            assert_plain(pair)
    else:
        assert isinstance(value, taken)
