"""The kernel in the interpreter equals the reference, on memory where everything that nobody may read is NaN."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from support.kernel_rules import ROWS, Row
from support.passes import make_pass

from fusedfog.kernels import BLOCK, Gradients, Region, fused_pass, reference, rules, torch_pass

NUMELS = (1, 63, 64, 65, 1000, 1024, 1025, 2500)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A stored value may differ from the reference's by two units in the last place of 1, the scale of all inputs, and of
# itself; the interpreter truncates to bf16 where hardware rounds, which makes it one unit of the value.
TOLERANCE = {
    torch.float32: {"rtol": 2**-22, "atol": 2**-22},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-22},
    torch.float16: {"rtol": 2**-10, "atol": 2**-22},
}


@dataclass
class Case:
    """One pass: flat tensors that are NaN but for the parameters' own elements, in [-1, 1]."""

    row: Row
    dtype: torch.dtype = torch.float32
    neighbours: int = 0
    grad_dtype: torch.dtype | None = None
    message_dtype: torch.dtype | None = None
    absent: frozenset[int] = frozenset()
    numels: tuple[int, ...] = NUMELS
    first: int = 0
    options: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        row, dtype, grad_dtype = self.row, self.dtype, self.grad_dtype or self.dtype
        self.random = torch.Generator().manual_seed(self.neighbours + 10 * row.states)
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
        states = [self.flat(torch.float32, positive=s > 0) for s in range(row.states)]
        messages = [self.nan(self.message_dtype or dtype) for _ in range(row.messages)]
        self.written = [self.flat(dtype), *states, *messages]
        gradients = [
            None if p in self.absent else self.uniform(numel).to(grad_dtype) for p, numel in enumerate(self.numels)
        ]
        addresses = torch.tensor([0 if gradient is None else gradient.data_ptr() for gradient in gradients])
        self.message = self.flat(dtype)
        inbox = tuple(
            tuple(self.flat(base.dtype) for _ in range(self.neighbours))
            for base in self.sent(self.written) or (self.message,)
        )
        self.arguments = {
            "region": self.region,
            "grads": Gradients(gradients, addresses, grad_dtype) if row.grads else None,
            "steps": torch.arange(len(self.numels), dtype=torch.float32),
            "inbox": inbox,
            "weights": tuple(0.5 / 2**k for k in range(self.neighbours)),
            "row_sum": 1.0,
            "grad_scale": None,
            "found_inf": None,
            "missing": "skip",
            "extra": None if row.extra is None else torch.tensor(row.extra),
            **self.options,
        }

    def sent(self, written: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the neighbours got: a tensor of its own, or what the pass is about to change."""
        named = {"message": self.message, "x": written[0]}
        return tuple(named[name] if name in named else written[1 + int(name)] for name in self.row.sent)

    def uniform(self, numel: int) -> torch.Tensor:
        return torch.rand(numel, generator=self.random) * 2 - 1

    def nan(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((self.size,), math.nan, dtype=dtype)

    def flat(self, dtype: torch.dtype, positive: bool = False) -> torch.Tensor:
        values = self.uniform(self.size).to(dtype)
        return torch.where(self.valid, values.abs() if positive else values, math.nan)

    def run(self, run, finite: bool = True) -> list[torch.Tensor]:
        """The pass on copies: parameters, states and messages after it; NaN wherever nothing belongs."""
        written, states = [tensor.clone() for tensor in self.written], self.row.states
        steps, on_gpu = self.arguments["steps"], run is fused_pass.launch
        if steps is not None:
            # By parameter for the reference; by block for the kernel, of which a program counts for itself alone.
            steps = steps[self.region.blocks[:, 0]] if on_gpu else steps.clone()
        run(
            make_pass(
                self.row.rule,
                written[0],
                tuple(written[1 : 1 + states]),
                self.row.hyper,
                sent=self.sent(written),
                messages=tuple(written[1 + states :]),
                advance=True,
                **{**self.arguments, "steps": steps},
            )
        )
        self.counts[on_gpu] = steps if on_gpu or steps is None else steps[self.region.blocks[:, 0]]
        for tensor, before in zip(written, self.written, strict=True):
            bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
            assert torch.equal(tensor.view(bits)[~self.valid], before.view(bits)[~self.valid])
            assert not finite or tensor[self.valid].isfinite().all()
        return written

    def check(self) -> list[torch.Tensor]:
        """Asserts that kernel and reference agree; the kernel's result."""
        ours, theirs = self.run(fused_pass.launch), self.run(torch_pass.run_pass)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got[self.valid], expected[self.valid], **TOLERANCE[got.dtype])
        if self.arguments["steps"] is not None:
            assert torch.equal(self.counts[True], self.counts[False])
        return ours


@pytest.mark.parametrize("neighbours", range(3))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_rule_equals_the_reference(name, dtype, neighbours):
    Case(ROWS[name], dtype, neighbours, numels=(65, 1025)).check()


@pytest.mark.parametrize("neighbours", range(3, 9))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["mix", "sgd-momentum-all", "adamw-amsgrad", "decentlam", "tracking"])
def test_any_number_of_neighbours_equals_the_reference(name, dtype, neighbours):
    Case(ROWS[name], dtype, neighbours, numels=(65, 1025)).check()


@pytest.mark.parametrize("name", ROWS)
def test_any_size_equals_the_reference(name):
    Case(ROWS[name], DTYPES[list(ROWS).index(name) % 3], neighbours=1).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_of_any_dtype_equals_the_reference(dtype):
    Case(ROWS["adamw-amsgrad"], dtype, neighbours=1).check()


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.messages])
def test_messages_may_be_wider_than_parameters(name):
    Case(ROWS[name], torch.bfloat16, 1, message_dtype=torch.float32, numels=(65, 1025)).check()


WITH_GRADIENT = [name for name, row in ROWS.items() if row.grads]


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_scaled_gradients_of_another_dtype(name):
    options = {"grad_scale": torch.tensor(0.25), "found_inf": torch.tensor(0.0)}
    Case(ROWS[name], torch.bfloat16, 1, grad_dtype=torch.float32, numels=(65, 1025), options=options).check()


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad", "tracking"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_no_gradient_means_mixed_but_not_updated(name, found_inf):
    row, options = ROWS[name], {"found_inf": torch.tensor(found_inf)}
    case = Case(row, neighbours=2, absent=frozenset({0, 4, 7}), options=options)
    after = case.check()
    param, states, messages = after[0], after[1 : 1 + row.states], after[1 + row.states :]
    mixed = []
    for base, inbox in zip(case.sent(case.written) or (case.written[0],), case.arguments["inbox"], strict=True):
        mixing = Case(ROWS["mix"], neighbours=2)
        mixing.written[0], mixing.arguments["inbox"] = base, (inbox,)
        mixed.append(mixing.run(fused_pass.launch)[0])
    for index, (start, numel) in enumerate(case.spans):
        here = slice(start, start + numel)
        skipped = bool(found_inf) or index in case.absent
        assert torch.equal(param[here], messages[0][here])
        for message, expected in zip(messages, mixed, strict=True):
            assert torch.equal(message[here], expected[here]) == skipped
        for state, before in zip(states, case.written[1:], strict=False):
            assert torch.equal(state[here], before[here]) == skipped


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_a_missing_gradient_may_count_as_zero(name, found_inf):
    numels, options = (65, 1025, 1024), {"missing": "zero", "found_inf": torch.tensor(found_inf)}
    # What must not be read: the values of gradients that overflowed, and their scale.
    options["grad_scale"] = torch.tensor(math.nan if found_inf else 0.5)
    case = Case(ROWS[name], neighbours=1, numels=numels, absent=frozenset({1}), options=options)
    for gradient in case.arguments["grads"].tensors:
        if found_inf and gradient is not None:
            gradient.fill_(math.nan)
    zeroed = case.check()
    case.arguments.update(missing="skip", found_inf=None, grad_scale=torch.tensor(0.5))
    gradients = case.arguments["grads"].tensors
    gradients[1] = torch.zeros(1025)
    case.arguments["grads"].addresses[1] = gradients[1].data_ptr()
    for gradient in gradients:
        gradient.mul_(0.0 if found_inf else 1.0).nan_to_num_()
    for tensor, expected in zip(zeroed, case.run(fused_pass.launch), strict=True):
        assert torch.equal(tensor[case.valid], expected[case.valid])


@pytest.mark.parametrize("missing", ["skip", "zero"])
def test_gradients_are_not_read_when_the_update_is_off(missing):
    options = {"found_inf": torch.tensor(1.0), "missing": missing}
    case = Case(ROWS["sgd-momentum"], options=options)
    case.arguments["grads"].addresses.fill_(16)
    case.check()


@pytest.mark.parametrize("name", ["mix", "sgd-momentum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pass_without_gradients_applies_the_rule_with_zero(name, dtype):
    row = dataclasses.replace(ROWS[name], sent=("message",))
    Case(row, dtype, neighbours=3, options={"grads": None, "steps": None, "row_sum": 0.75}).check()


@pytest.mark.parametrize("step", range(1, 8))
def test_accumulated_moments_are_committed_every_third_step(step):
    case = Case(ROWS["accum-adam"], numels=(65, 1025), options={"steps": torch.full((2,), step - 1.0)})
    _, m, v, total, _ = case.check()
    committed = step % 3 == 0
    assert torch.equal(m[case.valid], case.written[1][case.valid]) != committed
    assert torch.equal(v[case.valid], case.written[2][case.valid]) != committed
    assert bool((total[case.valid] == 0).all()) == committed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_weight_keeps_its_neighbours_nans_out(dtype):
    case = Case(ROWS["adamw"], dtype, neighbours=3, numels=(65, 1025))
    case.arguments["weights"] = (0.5, 0.0, 0.25)
    received = case.arguments["inbox"][0]
    case.arguments["inbox"] = ((received[0], case.nan(dtype), received[2]),)
    with_nan = case.check()
    case.arguments["inbox"], case.arguments["weights"] = ((received[0], received[2]),), (0.5, 0.25)
    for tensor, expected in zip(with_nan, case.check(), strict=True):
        assert torch.equal(tensor[case.valid], expected[case.valid])


NANS = [name for name in ROWS if ROWS[name].states]


@pytest.mark.parametrize("name", NANS)
def test_what_is_not_a_number_stays_where_the_reference_keeps_it(name):
    """A NaN in any one tensor: the same elements are NaN afterwards, and amsgrad's maximum is one of them."""
    case = Case(ROWS[name], neighbours=1, numels=(65, 1025))
    gradients = [] if case.arguments["grads"] is None else case.arguments["grads"].tensors[1:]
    inboxes = [received for message in case.arguments["inbox"] for received in message]
    for tensor in (*case.written[: 1 + ROWS[name].states], case.message, *gradients, *inboxes):
        place = 7 if tensor.numel() == 1025 else 135  # The same element of parameter 1, which starts at 128.
        before = tensor[place].clone()
        tensor[place] = math.nan
        ours, theirs = case.run(fused_pass.launch, finite=False), case.run(torch_pass.run_pass, finite=False)
        for got, expected in zip(ours, theirs, strict=True):
            assert torch.equal(got[case.valid].isnan(), expected[case.valid].isnan())
        tensor[place] = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixing_small_integers_by_dyadic_weights_is_exact(dtype):
    case = Case(ROWS["mix"], dtype, neighbours=2, options={"weights": (0.25, 0.5), "row_sum": 2.0})
    for tensor in (case.written[0], *case.arguments["inbox"][0]):
        tensor[case.valid] = torch.randint(-16, 16, (int(case.valid.sum()),)).to(dtype) * 4
    x, (a, b) = case.written[0].double(), (tensor.double() for tensor in case.arguments["inbox"][0])
    expected = 2 * x + 0.25 * (a - x) + 0.5 * (b - x)
    for tensor in case.run(fused_pass.launch):
        assert torch.equal(tensor.double()[case.valid], expected[case.valid])


def test_a_consensus_is_kept_bit_for_bit():
    case = Case(ROWS["mix"], neighbours=3, options={"weights": (0.1, 0.2, 0.3)})
    case.arguments["inbox"] = ((case.written[0],) * 3,)
    assert torch.equal(case.run(fused_pass.launch)[0][case.valid], case.written[0][case.valid])


@pytest.mark.parametrize("first", [1, 6])
def test_a_region_leaves_the_rest_of_its_segment_alone(first):
    Case(ROWS["adamw"], neighbours=1, first=first).check()


@triton.jit
def probe(x, mixed, g, states, step, hyper):
    """Two messages mixed, two made: what a tracking rule needs."""
    y = mixed[1] + g - states[0]
    x_new = mixed[0] - hyper.rate * y
    return x_new, (g,), (x_new, y)


class Probe(NamedTuple):
    rate: float


def probe_reference(x, mixed, g, states, step, hyper: Probe):
    y = mixed[1] + g - states[0]
    x_new = mixed[0] - hyper.rate * y
    return x_new, (g,), (x_new, y)


@pytest.mark.parametrize("neighbours", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_rule_is_a_function_and_its_twin(monkeypatch, neighbours, dtype):
    monkeypatch.setattr(rules, "probe", probe, raising=False)
    monkeypatch.setitem(reference.RULES, "probe", reference.with_names(probe_reference))
    row = Row("probe", Probe(0.1), "g0", "x0", 1, 2, ("message", "message"))
    Case(row, dtype, neighbours, absent=frozenset({1}), numels=(65, 64, 1025)).check()


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


@pytest.mark.parametrize("missing", ["skip", "zero"])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("advance", [True, False])
def test_steps_advance_where_an_update_was_made(advance, found_inf, missing):
    case = Case(ROWS["adamw"], numels=(65, 2049, 3), absent=frozenset({2}))
    flag = None if found_inf is None else torch.tensor(found_inf)
    before = torch.tensor([3.0, 3.0, 3.0, 3.0, 7.0, 7.0])
    steps = before.clone()
    options = {**case.arguments, "found_inf": flag, "missing": missing, "steps": steps, "advance": advance}
    fused_pass.launch(make_pass("adam", case.written[0], tuple(case.written[1:3]), case.row.hyper, **options))
    updated = [missing == "zero" or (p < 2 and not found_inf) for p in (0, 1, 1, 1, 2)]
    assert torch.equal(steps - before, advance * torch.tensor([*updated, False]).float())


def test_missing_tables_and_strange_dtypes_are_refused():
    case = Case(ROWS["mix"])
    with pytest.raises(ValueError, match=r"takes fp32, bf16 and fp16, not torch\.float64"):
        fused_pass.launch(make_pass("mix", torch.zeros(64).double(), (), (), **case.arguments))
    case.arguments["region"] = Region(0, case.spans, None)
    with pytest.raises(ValueError, match="block table"):
        fused_pass.launch(make_pass("mix", torch.zeros(64), (), (), **case.arguments))
    case = Case(ROWS["sgd"])
    grads = dataclasses.replace(case.arguments["grads"], addresses=None)
    with pytest.raises(ValueError, match="address table"):
        fused_pass.launch(make_pass("sgd", torch.zeros(64), (), (), **{**case.arguments, "grads": grads}))


@pytest.mark.parametrize("options", [{}, {"found_inf": torch.ones(())}, {"grad_scale": torch.tensor(0.5)}], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd-momentum-all", "mix", "exact-diffusion", "tracking"])
def test_figures_are_the_references_sums(name, options):
    absent = frozenset({1}) if ROWS[name].grads else frozenset()
    case = Case(ROWS[name], torch.float32, 2, numels=(65, 130, 2500), absent=absent, options=dict(options))
    if name == "exact-diffusion":
        case.arguments["row_sum"] = 0.0
    by_block = torch.full((len(case.region.blocks), 2), math.nan)
    by_parameter = torch.full((3, 2), math.nan, dtype=torch.float64)
    case.arguments["norm_sums"] = by_block
    case.run(fused_pass.launch)
    case.arguments["norm_sums"] = by_parameter
    case.run(torch_pass.run_pass)
    summed = torch.zeros(3, 2).index_add_(0, case.region.blocks[:, 0], by_block)
    torch.testing.assert_close(summed.double(), by_parameter, rtol=1e-5, atol=1e-9)
    assert (by_parameter[:, 0] > 0).all()
    assert not absent or by_parameter[1, 1] == 0
