"""The reference rules equal torch.optim, and the blocked pass applies them where and only where it should."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from support.kernel_rules import ROWS
from support.passes import make_pass

from fusedfog import kernels
from fusedfog.kernels import Gradients, Region, adam_hyper, reference, sgd_hyper, torch_pass

SHAPES = ((1,), (3,), (8, 8), (5, 13), (2, 3, 5, 7), (1000,))
NUMELS = tuple(math.prod(shape) for shape in SHAPES)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}

SGD = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay, "maximize": maximize}
    for momentum, dampening, nesterov, decay, maximize in product(
        (0, 0.9), (0, 0.3), (False, True), (0, 0.1), (False, True)
    )
    if not (nesterov and (dampening or not momentum)) and (momentum or not dampening)
]
ADAM = [
    {"betas": betas, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
    for betas, decay, amsgrad, maximize in product(((0.9, 0.999), (0.0, 0.5)), (0, 0.1), (False, True), (False, True))
]
OPTIMIZERS = [(torch.optim.SGD, options) for options in SGD]
OPTIMIZERS += [(optimizer, options) for optimizer in (torch.optim.Adam, torch.optim.AdamW) for options in ADAM]


class Segment:
    """A flat segment whose padding and states are NaN at first, and one optimizer's rule on it."""

    def __init__(self, values: list[torch.Tensor], states: int = 0, dtype: torch.dtype = torch.float32) -> None:
        starts = [0]
        for value in values:
            starts.append(starts[-1] + -(-value.numel() // 64) * 64)
        self.spans = tuple((start, value.numel()) for start, value in zip(starts[:-1], values, strict=True))
        self.region, self.steps = Region(0, self.spans, None), torch.zeros(len(values))
        self.param = torch.full((starts[-1],), math.nan, dtype=dtype)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.states = tuple(self.param.new_full((starts[-1],), math.nan, dtype=state_dtype) for _ in range(states))
        for (start, numel), value in zip(self.spans, values, strict=True):
            self.param[start : start + numel] = value.flatten()
            for state in self.states:
                state[start : start + numel] = 0
        self.valid = ~self.param.isnan()

    def views(self, flat: torch.Tensor | None = None) -> list[torch.Tensor]:
        flat = self.param if flat is None else flat
        return [flat[start : start + numel] for start, numel in self.spans]

    def like(self, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(self.param.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(self.valid, values, math.nan).to(dtype or self.param.dtype)

    def step(self, rule: str, hyper: tuple[float, ...], gradients, **options) -> None:
        grads = Gradients(gradients, None, self.param.dtype)
        kernels.run_pass(
            make_pass(
                rule,
                self.param,
                self.states,
                hyper,
                self.region,
                grads=grads,
                steps=self.steps,
                advance=True,
                **options,
            )
        )
        for tensor in (self.param, *self.states):
            assert tensor[~self.valid].isnan().all()


def build(optimizer: type, options: dict, dtype: torch.dtype):
    """The same parameters under torch's optimizer and as a segment, and the segment's rule and hyper tuple."""
    values = [torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7)) for shape in SHAPES]
    theirs = optimizer([value.clone() for value in values], lr=0.01, **options)
    group = theirs.param_groups[0]
    if optimizer is torch.optim.SGD:
        return theirs, Segment(values, int(bool(group["momentum"])), dtype), "sgd", sgd_hyper(group)
    return theirs, Segment(values, 3 if group["amsgrad"] else 2, dtype), "adam", adam_hyper(group)


def gradients_of(theirs: torch.optim.Optimizer, random: torch.Generator, absent=()) -> list[torch.Tensor | None]:
    for index, value in enumerate(theirs.param_groups[0]["params"]):
        value.grad = torch.randn(value.shape, dtype=value.dtype, generator=random)
        if index in absent:
            value.grad = None
    return [value.grad for value in theirs.param_groups[0]["params"]]


def assert_equal(segment: Segment, theirs: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    for ours, value in zip(segment.views(), theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours, value.flatten(), **TOLERANCE[dtype])


# Each time every option with one of the dtypes, in turns.
@pytest.mark.parametrize(
    ("optimizer", "options", "dtype"),
    [
        pytest.param(*of, dtype, marks=() if (number + place) % len(TOLERANCE) == 0 else pytest.mark.slow)
        for number, of in enumerate(OPTIMIZERS)
        for place, dtype in enumerate(TOLERANCE)
    ],
)
def test_200_steps_without_neighbours_equal_torch(optimizer, options, dtype):
    theirs, segment, rule, hyper = build(optimizer, options, dtype)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        segment.step(rule, hyper, gradients_of(theirs, random))
        theirs.step()
    assert_equal(segment, theirs, dtype)
    names = ("momentum_buffer",) if rule == "sgd" else ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for state, name in zip(segment.states, names, strict=False):
        for ours, value in zip(segment.views(state), theirs.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(ours, theirs.state[value][name].flatten(), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"), [(torch.optim.SGD, SGD[-1]), (torch.optim.SGD, SGD[6]), (torch.optim.AdamW, ADAM[2])]
)
def test_missing_gradients_do_not_count_as_steps(optimizer, options, dtype):
    theirs, segment, rule, hyper = build(optimizer, options, dtype)
    random = torch.Generator().manual_seed(0)
    for t in range(20):
        absent = {0} | {index for index in range(1, 6) if (t + index) % 3 == 0}
        segment.step(rule, hyper, gradients_of(theirs, random, absent), found_inf=torch.zeros(()))
        theirs.step()
    assert_equal(segment, theirs, dtype)
    assert segment.steps.tolist() == [0, 14, 13, 13, 14, 13]


def test_found_inf_turns_the_update_off_and_leaves_mixing_on():
    theirs, segment, rule, hyper = build(torch.optim.AdamW, {}, torch.float32)
    grads = gradients_of(theirs, torch.Generator().manual_seed(0))
    grads[1].fill_(math.inf)
    before, received, message = segment.param.clone(), segment.like(1), segment.like(2)
    segment.step(
        rule, hyper, grads, inbox=((received,),), weights=(0.5,), messages=(message,), found_inf=torch.ones(())
    )
    expected = before + 0.5 * (received - before)
    assert torch.equal(segment.param[segment.valid], expected[segment.valid])
    assert torch.equal(message[segment.valid], expected[segment.valid])
    assert all((state[segment.valid] == 0).all() for state in segment.states)
    assert (segment.steps == 0).all()


@pytest.mark.parametrize(("optimizer", "options"), [(torch.optim.SGD, SGD[-1]), (torch.optim.AdamW, {})])
def test_with_neighbours_the_update_is_torchs_step_at_the_unmixed_parameters(optimizer, options):
    theirs, segment, rule, hyper = build(optimizer, options, torch.float64)
    random = torch.Generator().manual_seed(0)
    for t in range(5):
        grads = gradients_of(theirs, random)
        before, a, b = segment.param.clone(), segment.like(2 * t), segment.like(2 * t + 1)
        for value, own in zip(theirs.param_groups[0]["params"], segment.views(), strict=True):
            value.copy_(own.view(value.shape))
        theirs.step()
        segment.step(rule, hyper, grads, inbox=((a, b),), weights=(0.3, 0.2))
        inner = torch.cat([value.flatten() for value in theirs.param_groups[0]["params"]])
        mixed = 0.5 * before + 0.3 * a + 0.2 * b
        expected = mixed[segment.valid] + inner - before[segment.valid]
        torch.testing.assert_close(segment.param[segment.valid], expected, **TOLERANCE[torch.float64])


def test_after_pass_averages_what_was_sent_and_ignores_gradients():
    segment = Segment([torch.ones(100), torch.ones(3)])
    sent, received, message = segment.like(0), segment.like(1), segment.like(2, torch.bfloat16)
    arguments = {"sent": (sent,), "inbox": ((received,),), "weights": (0.25,), "row_sum": 2.0, "messages": (message,)}
    kernels.run_pass(make_pass("mix", segment.param, (), (), region=segment.region, **arguments))
    expected = 2 * sent + 0.25 * (received - sent)
    torch.testing.assert_close(segment.param, expected, equal_nan=True)
    assert torch.equal(message[segment.valid], segment.param[segment.valid].bfloat16())
    assert message[~segment.valid].isnan().all()


def test_grad_scale_multiplies_gradients():
    segment, scaled = Segment([torch.ones(10)]), Segment([torch.ones(10)])
    hyper = sgd_hyper(torch.optim.SGD([torch.zeros(1)], lr=0.5).param_groups[0])
    segment.step("sgd", hyper, [torch.full((10,), 2.0)])
    scaled.step("sgd", hyper, [torch.full((10,), 8.0)], grad_scale=torch.tensor(0.25))
    assert (segment.param[:10] == 0).all() and (scaled.param[:10] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mixing_small_integers_by_dyadic_weights_is_exact(dtype):
    segment = Segment([torch.arange(-60.0, 61.0) * 2], dtype=dtype)
    received = [(segment.like(k).mul(8).round() * 2).nan_to_num() for k in range(2)]
    x, (a, b) = segment.param.double().clone(), (tensor.double() for tensor in received)
    kernels.run_pass(
        make_pass("mix", segment.param, (), (), region=segment.region, inbox=(received,), weights=(0.5, 0.25))
    )
    expected = (x + 0.5 * (a - x) + 0.25 * (b - x)).to(dtype)
    assert torch.equal(segment.param[segment.valid], expected[segment.valid])


def test_a_zero_weight_keeps_its_neighbours_nans_out():
    segment = Segment([torch.ones(70)])
    inbox = ((torch.full((128,), math.nan), torch.full((128,), 3.0)),)
    kernels.run_pass(make_pass("mix", segment.param, (), (), region=segment.region, inbox=inbox, weights=(0.0, 0.5)))
    assert (segment.param[:70] == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_rounded_once(dtype):
    value, received, gradient = (
        torch.randn(1000, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(3)
    )
    half, full = Segment([value], 2, dtype), Segment([value.float()], 2)
    hyper = adam_hyper(torch.optim.AdamW([torch.zeros(1)]).param_groups[0])
    inbox = torch.cat([received, received.new_zeros(24)])
    half.step("adam", hyper, [gradient], inbox=((inbox,),), weights=(0.5,))
    full.step("adam", hyper, [gradient.float()], inbox=((inbox.float(),),), weights=(0.5,))
    assert torch.equal(half.param[:1000], full.param[:1000].to(dtype))
    assert torch.equal(half.states[1][:1000], full.states[1][:1000])


@pytest.mark.parametrize("chunk", [1, 64, 333, 1000])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_chunk_boundaries_do_not_show(monkeypatch, chunk, name):
    hyper = {"sgd": sgd_hyper({"lr": 0.1, **SGD[-1]}), "adam": adam_hyper(torch.optim.AdamW([torch.zeros(1)]).defaults)}
    results = []
    for size in (chunk, torch_pass.CHUNK):
        monkeypatch.setattr(torch_pass, "CHUNK", size)
        segment = Segment([torch.linspace(-1, 1, 1000), torch.ones(1)], 1 if name == "sgd" else 2)
        received, message = segment.like(1), segment.like(2)
        gradients = [segment.like(3)[:1000], torch.ones(1)]
        for _ in range(3):
            options = {"inbox": ((received,),), "weights": (0.5,), "messages": (message,)}
            segment.step(name, hyper[name], gradients, **options)
        results.append((segment.param, *segment.states, message))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_read_in_memory_order():
    weight = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    segment = Segment([weight.permute(0, 2, 3, 1)])
    segment.step("sgd", sgd_hyper(torch.optim.SGD([weight], lr=1.0).param_groups[0]), [gradient])
    assert torch.equal(segment.param[:120].view(2, 4, 5, 3), (weight - gradient).permute(0, 2, 3, 1))


def test_a_region_leaves_the_rest_of_its_segment_alone():
    segment = Segment([torch.ones(10), torch.ones(70), torch.ones(5)])
    region = Region(1, segment.spans[1:2], None)
    grads = Gradients([None, torch.ones(70), None], None, torch.float32)
    hyper = sgd_hyper(torch.optim.SGD([torch.zeros(1)], lr=1.0).param_groups[0])
    kernels.run_pass(make_pass("sgd", segment.param, (), hyper, region=region, grads=grads, steps=segment.steps))
    assert [view.unique().tolist() for view in segment.views()] == [[1], [0], [1]]


def test_every_rule_has_a_row():
    assert {row.rule for row in ROWS.values()} == set(kernels.RULES)


@pytest.mark.parametrize("name", ROWS)
def test_rules_work_on_stacked_ranks_and_change_no_argument(name):
    row, random = ROWS[name], torch.Generator().manual_seed(0)
    hyper = row.hyper if row.extra is None else (*row.hyper, row.extra)
    x, a, b, g, *kept = (torch.rand(4, 9, generator=random) for _ in range(4 + row.states))
    given = [tensor.clone() for tensor in (x, a, b, g, *kept)]
    rule, mixed = reference.RULES[row.rule], (a, b)[: max(len(row.sent), 1)]
    x_new, states, messages = rule(x, mixed, g, tuple(kept), 3.0, hyper)
    assert all(torch.equal(tensor, before) for tensor, before in zip((x, a, b, g, *kept), given, strict=True))
    assert len(states) == row.states and len(messages) == row.messages
    assert torch.equal(x_new, x) == ("x" not in row.writes)
    for s, (state, before) in enumerate(zip(states, kept, strict=True)):
        assert str(s) in row.writes or torch.equal(state, before)
    for rank in range(4):
        here = (tuple(m[rank] for m in mixed), g[rank], tuple(s[rank] for s in kept), 3.0, hyper)
        alone = rule(x[rank], *here)
        torch.testing.assert_close(alone[0], x_new[rank])
        for one, all_ranks in zip(alone[1] + alone[2], states + messages, strict=True):
            torch.testing.assert_close(one, all_ranks[rank])


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("name", ["exact-diffusion-before-momentum", "tracking", "adamw-tracking-amsgrad"])
def test_a_missing_gradient_may_count_as_zero(name, found_inf):
    row, results = ROWS[name], []
    missing, zeros = [torch.ones(70), None], [torch.zeros(70) if found_inf else torch.ones(70), torch.zeros(10)]
    if found_inf:
        missing[0].fill_(math.inf)
    flag, scale = torch.tensor(found_inf), torch.tensor(math.nan if found_inf else 0.5)
    for grads, options in (
        (missing, {"found_inf": flag, "missing": "zero", "grad_scale": scale}),
        (zeros, {"grad_scale": torch.tensor(0.5)}),
    ):
        segment = Segment([torch.linspace(-1, 1, 70), torch.ones(10)], row.states)
        sent = tuple(segment.param if part == "x" else segment.states[int(part)] for part in row.sent)
        inbox = tuple((segment.like(k),) for k in range(max(len(sent), 1)))
        for _ in range(3):
            segment.step(row.rule, row.hyper, grads, sent=sent, inbox=inbox, weights=(0.5,), **options)
        assert segment.steps.tolist() == [3, 3]
        results.append((segment.param, *segment.states))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_extra_number_comes_from_a_tensor(monkeypatch, dtype):
    monkeypatch.setitem(reference.RULES, "scale", lambda x, mixed, g, states, step, hyper: (x * hyper[1], states, ()))
    segment = Segment([torch.ones(70)], dtype=dtype)
    value = torch.tensor([1 / 3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kernels.run_pass(make_pass("scale", segment.param, (), (0.0,), region=segment.region, extra=value))
    assert torch.equal(segment.param[:70], value.expand(70).to(dtype))


def test_messages_may_be_of_several_dtypes():
    param, y = torch.linspace(-1, 1, 64).bfloat16(), torch.linspace(0, 1, 64)
    segment, u, before = Segment([param], 0, torch.bfloat16), torch.zeros(64), y.clone()
    received, messages = (param * 2, y + 2**-20), (torch.empty(64, dtype=torch.bfloat16), torch.empty(64))
    kernels.run_pass(
        make_pass(
            "tracking",
            segment.param,
            (y, u),
            (0.5, 0.0, 0.0, 1.0),
            segment.region,
            sent=(segment.param, y),
            inbox=tuple((tensor,) for tensor in received),
            weights=(0.5,),
            messages=messages,
        )
    )
    assert torch.equal(y, before + 0.5 * (received[1] - before)) and not torch.equal(y, before)
    assert torch.equal(segment.param, (1.5 * param.float() - 0.5 * y).bfloat16())
    assert torch.equal(messages[0], segment.param) and torch.equal(messages[1], y)


def test_hyper_tuples_form_differences_in_double():
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": True}
    coupled = adam_hyper({**group, "decoupled_weight_decay": False})
    assert coupled == (1e-3, 0.9, 1 - 0.9, 0.999, 1 - 0.999, math.log(0.9), math.log(0.999), 1e-8, 0.1, 0.0, -1.0)
    assert adam_hyper({**group, "decoupled_weight_decay": True})[8:10] == (0.0, 0.1)
    assert adam_hyper({**group, "betas": (0, 0), "decoupled_weight_decay": True})[5:7] == (-math.inf, -math.inf)
    assert all(type(value) is float for value in (*coupled, *sgd_hyper({"lr": 1, **SGD[0]})))


def test_bad_input_is_named():
    segment, other = Segment([torch.ones(10)]), torch.ones(64)
    region = segment.region

    def run(*arguments, **named) -> None:
        kernels.run_pass(make_pass(*arguments, **named))

    with pytest.raises(ValueError, match="unknown update rule 'lion'; there are mix, sgd, adam"):
        run("lion", segment.param, (), (), region=region)
    with pytest.raises(ValueError, match='missing is "skip" or "zero", not \'ignore\''):
        run("mix", segment.param, (), (), region=region, missing="ignore")
    with pytest.raises(ValueError, match="2 inboxes for 1 messages sent"):
        run("mix", segment.param, (), (), region=region, inbox=((other,), (other,)), weights=(0.5,))
    with pytest.raises(ValueError, match=r"1 weights for inboxes of \[2\] neighbours"):
        run("mix", segment.param, (), (), region=region, inbox=((other, other),), weights=(0.5,))
    with pytest.raises(ValueError, match="gradient of parameter 0 has 11 elements, its parameter 10"):
        segment.step("mix", (), [torch.ones(11)])
    with pytest.raises(ValueError, match="rule 'mix' makes 1 messages, but 2 were given"):
        run("mix", segment.param, (), (), region=region, messages=(other, other))
