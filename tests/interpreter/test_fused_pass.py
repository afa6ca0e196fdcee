"""The kernel in the interpreter equals the reference, on memory where everything that nobody may read is NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import triton
import triton.language as tl
from fusedfog.kernels import BLOCK, Gradients, Region, adam_hyper, fused_pass, reference, rules, sgd_hyper

NUMELS = (1, 63, 64, 65, 1000, 1024, 1025, 2500)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A stored value may differ from the reference's by two units in the last place of 1, the scale of all inputs; the
# interpreter truncates to bf16 where hardware rounds, which makes it one unit of the value itself.
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 2**-22},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-22},
    torch.float16: {"rtol": 2**-10, "atol": 2**-22},
}


def sgd(states: int, **options: float) -> tuple[str, int, tuple[float, ...]]:
    group = {"lr": 0.1, "momentum": 0.9 * states, "dampening": 0.0, "weight_decay": 0.0}
    return "sgd", states, sgd_hyper({**group, "maximize": False, "nesterov": False, **options})


def adam(states: int, **options: object) -> tuple[str, int, tuple[float, ...]]:
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False}
    return "adam", states, adam_hyper({**group, "maximize": False, **options})


RULES = {
    "mix": ("mix", 0, ()),
    "sgd": sgd(0),
    "sgd-decay-maximize": sgd(0, weight_decay=0.1, maximize=True),
    "sgd-momentum": sgd(1),
    "sgd-momentum-all": sgd(1, dampening=0.3, weight_decay=0.1, maximize=True),
    "sgd-nesterov": sgd(1, nesterov=True, weight_decay=0.1),
    "adam": adam(2),
    "adam-coupled-maximize": adam(2, weight_decay=0.1, maximize=True),
    "adamw": adam(2, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw-amsgrad": adam(3, weight_decay=0.1, decoupled_weight_decay=True),
    "adam-no-memory": adam(2, betas=(0.0, 0.0)),
}


@dataclass
class Case:
    """One pass: flat tensors that are NaN but for the parameters' own elements, in [-1, 1]."""

    rule: str
    states: int
    hyper: tuple[float, ...]
    dtype: torch.dtype = torch.float32
    neighbours: int = 0
    sent: int = 0
    messages: int = 1
    grad_dtype: torch.dtype | None = None
    missing: frozenset[int] = frozenset()
    numels: tuple[int, ...] = NUMELS
    first: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.neighbours + 10 * self.states)
        starts = [0]
        for numel in self.numels:
            starts.append(starts[-1] + -(-numel // 64) * 64)
        self.size, self.spans = starts[-1], tuple(zip(starts[:-1], self.numels, strict=True))
        blocks = [
            (index, offset, min(BLOCK, numel - offset), start + offset)
            for index, (start, numel) in enumerate(self.spans)
            for offset in range(0, numel, BLOCK)
            if index >= self.first
        ]
        self.region = Region(self.first, self.spans[self.first :], torch.tensor(blocks))
        self.valid = torch.zeros(self.size, dtype=torch.bool)
        for start, numel in self.region.spans:
            self.valid[start : start + numel] = True
        dtype, grad_dtype = self.dtype, self.grad_dtype or self.dtype
        states = [self.flat(torch.float32, positive=s > 0) for s in range(self.states)]
        self.written = [self.flat(dtype), *states, *(self.nan(dtype) for _ in range(self.messages))]
        gradients = [
            None if p in self.missing else self.uniform(numel).to(grad_dtype) for p, numel in enumerate(self.numels)
        ]
        addresses = torch.tensor([0 if gradient is None else gradient.data_ptr() for gradient in gradients])
        weights = [0.5 / 2**k for k in range(self.neighbours)]
        self.arguments = {
            "region": self.region,
            "grads": Gradients(gradients, addresses, grad_dtype),
            "steps": torch.arange(len(self.numels), dtype=torch.float32),
            "sent": tuple(self.flat(dtype) for _ in range(self.sent)),
            "inbox": tuple(tuple(self.flat(dtype) for _ in range(self.neighbours)) for _ in range(max(self.sent, 1))),
            "weights": tuple(weights),
            "row_sum": 1.0,
            "grad_scale": None,
            "found_inf": None,
            **self.options,
        }

    def uniform(self, numel: int) -> torch.Tensor:
        return torch.rand(numel, generator=self.random) * 2 - 1

    def nan(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((self.size,), math.nan, dtype=dtype)

    def flat(self, dtype: torch.dtype, positive: bool = False) -> torch.Tensor:
        values = self.uniform(self.size).to(dtype)
        return torch.where(self.valid, values.abs() if positive else values, math.nan)

    def run(self, run) -> list[torch.Tensor]:
        """The pass on copies: parameters, states and messages after it; NaN wherever nothing belongs."""
        written = [tensor.clone() for tensor in self.written]
        states, messages = written[1 : 1 + self.states], written[1 + self.states :]
        run(self.rule, written[0], tuple(states), self.hyper, messages=tuple(messages), **self.arguments)
        for tensor, before in zip(written, self.written, strict=True):
            bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
            assert torch.equal(tensor.view(bits)[~self.valid], before.view(bits)[~self.valid])
            assert tensor[self.valid].isfinite().all()
        return written

    def check(self) -> list[torch.Tensor]:
        """Asserts that kernel and reference agree; the kernel's result."""
        ours, theirs = self.run(fused_pass.launch), self.run(reference.run_pass)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got[self.valid], expected[self.valid], **TOLERANCE[got.dtype])
        return ours


@pytest.mark.parametrize("neighbours", range(9))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_neighbours_equals_the_reference(rule, dtype, neighbours):
    Case(*RULES[rule], dtype=dtype, neighbours=neighbours, numels=(65, 1025)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_any_size_equals_the_reference(rule, dtype):
    Case(*RULES[rule], dtype=dtype, neighbours=1).check()


@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_of_another_dtype(rule):
    options = {"grad_scale": torch.tensor(0.25), "found_inf": torch.tensor(0.0)}
    Case(*RULES[rule], dtype=torch.bfloat16, grad_dtype=torch.float32, neighbours=1, options=options).check()


@pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-amsgrad"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_no_gradient_means_mixed_but_not_updated(rule, found_inf):
    case = Case(
        *RULES[rule], neighbours=2, missing=frozenset({0, 4, 7}), options={"found_inf": torch.tensor(found_inf)}
    )
    param, *states, message = case.check()
    mixing = Case("mix", 0, (), neighbours=2)
    mixing.written[0], mixing.arguments["inbox"] = case.written[0], case.arguments["inbox"]
    mixed = mixing.run(fused_pass.launch)[0]
    for index, (start, numel) in enumerate(case.spans):
        here = slice(start, start + numel)
        skipped = bool(found_inf) or index in case.missing
        assert torch.equal(param[here], message[here])
        assert torch.equal(param[here], mixed[here]) == skipped
        for state, before in zip(states, case.written[1:], strict=False):
            assert torch.equal(state[here], before[here]) == skipped


def test_gradients_are_not_read_when_the_update_is_off():
    case = Case(*RULES["sgd-momentum"], options={"found_inf": torch.tensor(1.0)})
    case.arguments["grads"].addresses.fill_(16)
    case.check()


@pytest.mark.parametrize("rule", ["mix", "sgd-momentum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pass_without_gradients_applies_the_rule_with_zero(rule, dtype):
    options = {"grads": None, "steps": None, "row_sum": 0.75}
    Case(*RULES[rule], dtype=dtype, neighbours=3, sent=1, options=options).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_weight_keeps_its_neighbours_nans_out(dtype):
    case = Case(*RULES["adamw"], dtype=dtype, neighbours=3, numels=(65, 1025))
    case.arguments["weights"] = (0.5, 0.0, 0.25)
    received = case.arguments["inbox"][0]
    case.arguments["inbox"] = ((received[0], case.nan(dtype), received[2]),)
    with_nan = case.check()
    case.arguments["inbox"], case.arguments["weights"] = ((received[0], received[2]),), (0.5, 0.25)
    for tensor, expected in zip(with_nan, case.check(), strict=True):
        assert torch.equal(tensor[case.valid], expected[case.valid])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixing_small_integers_by_dyadic_weights_is_exact(dtype):
    case = Case("mix", 0, (), dtype=dtype, neighbours=2, options={"weights": (0.25, 0.5), "row_sum": 2.0})
    for tensor in (case.written[0], *case.arguments["inbox"][0]):
        tensor[case.valid] = torch.randint(-16, 16, (int(case.valid.sum()),)).to(dtype) * 4
    x, (a, b) = case.written[0].double(), (tensor.double() for tensor in case.arguments["inbox"][0])
    expected = 2 * x + 0.25 * (a - x) + 0.5 * (b - x)
    for tensor in case.run(fused_pass.launch):
        assert torch.equal(tensor.double()[case.valid], expected[case.valid])


def test_a_consensus_is_kept_bit_for_bit():
    case = Case("mix", 0, (), neighbours=3, options={"weights": (0.1, 0.2, 0.3)})
    case.arguments["inbox"] = ((case.written[0],) * 3,)
    assert torch.equal(case.run(fused_pass.launch)[0][case.valid], case.written[0][case.valid])


@pytest.mark.parametrize("first", [1, 6])
def test_a_region_leaves_the_rest_of_its_segment_alone(first):
    Case(*RULES["adamw"], neighbours=1, first=first).check()


@triton.jit
def probe(x, mixed, g, states, step, hyper):
    """Two messages mixed, two made: what a tracking rule needs."""
    (lr,) = hyper
    y = mixed[1] + g - states[0]
    return mixed[0] - lr * y, (g,), (mixed[0] - lr * y, y)


def probe_reference(x, mixed, g, states, step, hyper):
    (lr,) = hyper
    y = mixed[1] + g - states[0]
    return mixed[0] - lr * y, (g,), (mixed[0] - lr * y, y)


@pytest.mark.parametrize("neighbours", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_rule_is_a_function_and_its_twin(monkeypatch, neighbours, dtype):
    monkeypatch.setattr(rules, "probe", probe, raising=False)
    monkeypatch.setitem(reference.RULES, "probe", probe_reference)
    Case(
        "probe", 1, (0.1,), dtype, neighbours, sent=2, messages=2, missing=frozenset({1}), numels=(65, 64, 1025)
    ).check()


@triton.jit
def powers(log_beta, steps, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, rules.one_minus_power(log_beta, tl.load(steps + at)))


# The branch of the bias correction that is not taken may overflow.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999])
def test_bias_correction_is_accurate(beta):
    steps = torch.tensor([1, 2, 3, 5, 9, 10, 50, 100, 692, 999, 1001, 5000, 10000, 10001, 1e5, 1e6])
    out = torch.empty(16)
    powers[(1,)](math.log(beta) if beta else -math.inf, steps, out, 16)
    torch.testing.assert_close(out.double(), 1 - beta ** steps.double(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("count", [1, 5, 1024, 1500])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_steps_advance_where_there_is_a_gradient(count, found_inf):
    addresses = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)) * 64
    steps = torch.full((count + 1,), 3.0)
    flag = None if found_inf is None else torch.tensor(found_inf)
    fused_pass.launch_advance(steps[:count], Gradients((), addresses, torch.float32), flag)
    assert torch.equal(steps[:count], 3.0 + (addresses != 0) * (not found_inf))
    assert steps[count] == 3


def test_missing_tables_and_strange_dtypes_are_refused():
    case = Case("mix", 0, (), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"takes fp32, bf16 and fp16, not torch\.float64"):
        fused_pass.launch("mix", torch.zeros(64).double(), (), (), messages=(), **case.arguments)
    case.arguments["region"] = Region(0, case.spans, None)
    with pytest.raises(ValueError, match="block table"):
        fused_pass.launch("mix", torch.zeros(64), (), (), messages=(), **case.arguments)
    with pytest.raises(ValueError, match="address table"):
        fused_pass.launch_advance(torch.zeros(1), Gradients((), None, torch.float32))
