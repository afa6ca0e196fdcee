"""How x is kept in 16 bits: stochastic rounding, a master copy, Kahan compensation. The torch spec alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from support.kernel_rules import ROWS
from support.passes import make_pass, with_fields

from fusedfog.kernels import Gradients, Region, rounding, run_pass

HALVES = (torch.bfloat16, torch.float16)
REPLICAS = 2**17


random_bits = functools.cache(rounding.noise)


def drawn(value: float, dtype: torch.dtype, stream: int = 0) -> torch.Tensor:
    """One value rounded at many places."""
    return rounding.stochastic(torch.full((REPLICAS,), value), dtype, random_bits(1, stream, 0, REPLICAS))


def spacing(value: float, dtype: torch.dtype) -> float:
    """The distance of neighbours in `dtype` around a value, towards zero at powers of two."""
    digits, smallest = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}[dtype]
    return 2.0 ** (max(math.frexp(value)[1] - 1, smallest) - digits + 1)


# -- stochastic rounding -------------------------------------------------------------------------------------------------

VALUES = (1.0 + 1e-5, math.pi, -math.e, 0.1, 2 - 1e-4, 1 - 1e-4, 1 + 2**-23, 255.9, 6.1e-5, -6.2e-5, 1000.123, 2**-14)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_the_mean_is_right(value: float, dtype: torch.dtype) -> None:
    found = drawn(value, dtype)
    exact, step = torch.tensor(value).double(), spacing(value, dtype)
    assert (found - exact).abs().max() < step, "one of the two neighbours"
    assert len(found.unique()) <= 2 and torch.equal(found.to(dtype).float(), found)
    # The mean of n draws is off by a standard deviation of at most step/2/sqrt(n); four of them.
    error = (found.double().mean() - exact).abs()
    assert error < 4 * step / 2 / math.sqrt(REPLICAS)
    assert error < 3e-5 * abs(value)


@pytest.mark.parametrize("value", [2**-24 * 1.25, 2**-24 * 1000.75, 2**-25, 2**-26, -(2**-30), 2**-14 - 2**-26])
def test_subnormals_of_fp16_are_right_on_average(value: float) -> None:
    found = drawn(value, torch.float16)
    assert set((found * 2**24).unique().tolist()) == {math.floor(value * 2**24), math.ceil(value * 2**24)}
    assert torch.equal(found.half().float(), found)
    chance = value * 2**24 - math.floor(value * 2**24)
    ups = (found > value).double().mean()
    assert abs(ups - chance) < 4 * math.sqrt(chance * (1 - chance) / REPLICAS) + 2**-13


@pytest.mark.parametrize("value", [2.0**-140, 1.75 * 2.0**-134, -(2.0**-127)])
def test_subnormals_of_bf16_are_right_on_average(value: float) -> None:
    found, step = drawn(value, torch.bfloat16).double(), 2.0**-133
    assert (found - value).abs().max() < step and torch.equal((found / step).round() * step, found)
    assert (found.mean() - value).abs() < 4 * step / 2 / math.sqrt(REPLICAS)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_that_the_dtype_holds_stay(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in range(3):
        found = rounding.stochastic(every.float(), dtype, rounding.noise(seed, 0, 0, 2**16))
        assert torch.equal(found.to(dtype)[~every.isnan()], every[~every.isnan()])
        assert torch.equal(found.isnan(), every.isnan())


def test_what_is_not_finite_stays_and_what_is_too_large_overflows() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    for dtype in HALVES:
        found = rounding.stochastic(special, dtype, rounding.noise(0, 0, 0, 3000))
        assert torch.equal(found[~special.isnan()], special[~special.isnan()]) and found[special.isnan()].isnan().all()
    # Between the largest number and what would be the next, infinity is one of the neighbours.
    for dtype, value, chance in ((torch.float16, 65504 + 8.0, 0.25), (torch.bfloat16, 2.0**128 - 2.0**118, 0.75)):
        found = drawn(value, dtype).to(dtype)
        assert set(found.unique().tolist()) == {torch.finfo(dtype).max, math.inf}
        assert abs(found.isinf().double().mean() - chance) < 0.01
    assert drawn(1e30, torch.float16).half().isinf().all()


def test_noise_is_uniform_in_every_bit() -> None:
    count = 2**17
    for seed, stream in ((0, 0), (1, 0), (2**24 - 1, 5), (77, 255)):
        found = rounding.noise(seed, stream, 0, count)
        assert int(found.min()) >= 0 and int(found.max()) < 2**32
        means = torch.stack([((found >> bit) & 1).float().mean() for bit in range(32)])
        assert (means - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(count)
        for shift in (0, 16):
            counts = torch.bincount((found >> shift) & 0xFFFF, minlength=2**16).double()
            # Chi squared of 65,536 cells, of two each: its standard deviation is sqrt(2*65,536).
            assert abs(((counts - 2) ** 2 / 2).sum() - 2**16) < 5 * math.sqrt(2 * 2**16)


def test_noise_differs_by_seed_stream_and_place() -> None:
    count = 2**14
    one = rounding.noise(3, 1, 0, count)
    others = {
        "seed": rounding.noise(4, 1, 0, count),
        "stream": rounding.noise(3, 2, 0, count),
        "place": rounding.noise(3, 1, 1, count),
        "far place": rounding.noise(3, 1, 2**32, count),
        "farther place": rounding.noise(3, 1, 2**33, count),
    }
    for name, other in others.items():
        assert (one == other).sum() <= 1, name
        for shift in (0, 16):
            a, b = (((bits >> shift) & 0xFFFF).double() for bits in (one, other))
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(count), name
    assert torch.equal(one[100:], rounding.noise(3, 1, 100, count - 100)), "wherever the buffer is cut"
    assert int(one[7]) == rounding.hash32(7 ^ rounding.hash32(3 + (1 << 24)))
    assert int(rounding.noise(3, 1, 2**32 + 7, 1)) == rounding.hash32((7 + 0x9E3779B9) ^ rounding.hash32(3 + (1 << 24)))


# -- passes --------------------------------------------------------------------------------------------------------------

NUMEL = 1024
REGION = Region(0, ((0, NUMEL),), None)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """A gradient at what the model sees: x in 16 bits."""
    return torch.sin(3 * x.float()) + 0.3 * x.float()


class Run:
    """Steps of one rule on parameters kept in some way, by gradients at the parameters as they are kept."""

    def __init__(
        self, name: str, param: torch.Tensor, remainder: torch.Tensor | None = None, **options: object
    ) -> None:
        self.row, self.param, self.remainder, self.options = ROWS[name], param, remainder, options
        self.states = tuple(torch.zeros(NUMEL) for _ in range(self.row.states))
        self.steps = torch.zeros(1)

    def step(self, gradient: torch.Tensor, seed: int | None = None, **changes: object) -> None:
        work = make_pass(
            self.row.rule,
            self.param,
            self.states,
            self.row.hyper,
            REGION,
            grads=Gradients((gradient,), None, gradient.dtype),
            steps=self.steps,
            remainder=self.remainder,
            seed=seed,
            **self.options,
        )
        run_pass(with_fields(work, **changes))
        self.steps += 1

    @property
    def x(self) -> torch.Tensor:
        return rounding.restored(self.param, self.remainder)


def started(name: str, dtype: torch.dtype, way: str) -> Run:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(3))
    param = x.to(dtype)
    return Run(name, param, {"master": x.clone(), "kahan": (x - param.float()).to(dtype)}.get(way))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-momentum-all", "adamw", "adamw-amsgrad"])
def test_a_master_copy_takes_the_steps_of_fp32_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    ours = started(name, dtype, "master")
    # "missing" makes it take the reference, as ours does, and not torch's fused optimizers.
    exact = Run(name, ours.remainder.clone(), missing="zero")
    for _ in range(50):
        gradient = quadratic(exact.param.to(dtype)).to(dtype)
        assert torch.equal(gradient, quadratic(ours.param).to(dtype))
        ours.step(gradient)
        exact.step(gradient)
        assert torch.equal(ours.remainder, exact.param)
        assert torch.equal(ours.param, ours.remainder.to(dtype))
    for state, expected in zip(ours.states, exact.states, strict=True):
        assert torch.equal(state, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_compensated_parameters_follow_fp32(name: str, dtype: torch.dtype) -> None:
    # Steps of a hundredth of bf16's spacing, which plain rounding loses.
    small = (3e-5, *ROWS[name].hyper[1:])
    kahan, plain, seeded = (started(name, dtype, way) for way in ("kahan", "plain", "stochastic"))
    exact = Run(name, started(name, dtype, "master").remainder, missing="zero")
    first = exact.param.clone()
    for t in range(200):
        gradient = torch.cos(torch.arange(NUMEL) + t / 100)
        for run, seed in ((kahan, None), (plain, None), (seeded, t), (exact, None)):
            run.step(gradient, seed, hyper=small)
    errors = [(run.x - exact.param).square().mean().sqrt() for run in (kahan, plain, seeded)]
    moved = (exact.param - first).square().mean().sqrt()
    assert errors[0] * 20 < errors[1], "rounding to nearest"
    assert errors[0] < 0.05 * moved
    # Stochastic rounding errs, but not in the mean, where rounding to nearest stands still.
    drift = [((run.x - first) * (exact.param - first)).mean() / moved**2 for run in (plain, seeded)]
    assert abs(drift[1] - 1) < 0.2
    if dtype == torch.bfloat16:
        assert drift[0] < 0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_compensation_rounded_up_to_a_tie_is_not_lost(dtype: torch.dtype) -> None:
    half = torch.finfo(dtype).eps / 2
    odd = 1 + 2 * half  # The next value but one above x is even, so that a tie would go there.
    param, remainder = (torch.full((4,), value, dtype=dtype) for value in (odd, 0.0))
    x = torch.tensor([odd + half * (1 - 2**-12), odd - half * (1 - 2**-12), odd + half / 3, odd])
    rounding.keep(x, param, remainder, None)
    assert (param == odd).all() and remainder[0] == half and remainder[1] == -half
    held = rounding.restored(param, remainder)
    assert torch.equal(held, param.float() + remainder.float())
    assert (held - x).abs().max() <= half * 2**-9, "half a unit of the compensation"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", ["master", "kahan"])
def test_a_parameter_written_between_passes_is_what_counts(way: str, dtype: torch.dtype) -> None:
    run, fresh = started("sgd-momentum", dtype, way), started("sgd-momentum", dtype, way)
    gradient = torch.ones(NUMEL)
    for _ in range(3):
        run.step(gradient)
        fresh.step(gradient)
    kept = run.x[::2].clone()
    written = torch.linspace(2, 3, NUMEL // 2).to(dtype)
    run.param[1::2] = written
    if way == "kahan":
        run.remainder[1::2] = 0.25  # Any compensation that is not one.
    assert torch.equal(run.x[1::2], written.float()), "the rest is dropped"
    assert torch.equal(run.x[::2], kept), "and kept where nothing was written"
    fresh.param[1::2] = written
    fresh.remainder[1::2] = written.float() if way == "master" else 0
    for _ in range(3):
        run.step(gradient)
        fresh.step(gradient)
        assert torch.equal(run.param, fresh.param) and torch.equal(run.remainder, fresh.remainder)


def test_a_master_of_overflowed_fp16_is_kept_while_param_is_infinite() -> None:
    param, master = torch.tensor([math.inf, math.inf, math.nan]).half(), torch.tensor([7e4, 1.0, 2.0])
    assert torch.equal(rounding.restored(param, master)[:2], torch.tensor([7e4, math.inf]))
    assert rounding.restored(param, master)[2].isnan()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_neighbours_get_what_parameters_hold_and_x_keeps_the_rest(dtype: torch.dtype) -> None:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(5))
    param, received = x.to(dtype), torch.randn(NUMEL, generator=torch.Generator().manual_seed(6)).to(dtype)
    expected = x + 0.25 * (received.float() - param.float())
    master = x.clone()
    work = make_pass("mix", param, (), (), REGION, remainder=master, inbox=((received,),), weights=(0.25,))
    run_pass(work)
    assert torch.equal(master, expected) and torch.equal(param, expected.to(dtype))
    # Equal messages leave x as it is, to the last bit.
    run_pass(with_fields(work, inbox=((param.clone(),),)))
    assert torch.equal(master, expected)


def test_seeded_passes_repeat_and_other_seeds_differ() -> None:
    runs = [started("adamw", torch.bfloat16, "stochastic") for _ in range(3)]
    for run in runs:
        run.states = tuple(state.bfloat16() for state in run.states)
    for t in range(5):
        gradient = torch.cos(torch.arange(NUMEL) + t / 10)
        for run, seed in zip(runs, (t, t, t + 100), strict=True):
            run.step(gradient, seed)
    same = [torch.equal(a, b) for a, b in zip(runs[0].states, runs[1].states, strict=True)]
    assert all(same) and torch.equal(runs[0].param, runs[1].param)
    assert not torch.equal(runs[0].param, runs[2].param)
    # A state that decays by less than bf16's spacing decays on average.
    slow = torch.full((NUMEL,), 1.0, dtype=torch.bfloat16)
    for t in range(100):
        rounding.keep(slow.float() * 0.999, slow, None, rounding.noise(t, 2, 0, NUMEL))
    assert abs(slow.float().mean() - 0.999**100) < 3e-3
    stuck = torch.full((NUMEL,), 1.0, dtype=torch.bfloat16)
    for _ in range(100):
        rounding.keep(stuck.float() * 0.999, stuck, None, None)
    assert (stuck == 1).all()


def test_chunks_do_not_show_in_stochastic_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (64, 1024, 65536):
        monkeypatch.setattr("fusedfog.kernels.torch_pass.CHUNK", chunk)
        run = started("adamw", torch.bfloat16, "stochastic")
        run.states = tuple(state.bfloat16() for state in run.states)
        run.step(torch.ones(NUMEL), seed=9)
        found.append((run.param, *run.states))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bad_input_is_named() -> None:
    run = started("sgd-momentum", torch.bfloat16, "kahan")
    with pytest.raises(ValueError, match=r"a seed is in \[0, 2\^24\), not 16777216"):
        run.step(torch.ones(NUMEL), seed=2**24)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 parameters with a remainder of torch\.float16"):
        run.step(torch.ones(NUMEL), remainder=run.remainder.half())
