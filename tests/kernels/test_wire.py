"""Compressed messages: what codes mean, and that differences to replicas lead to the exact limit. The torch spec alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.passes import make_pass

from fusedfog.kernels import CompressedChannel, Gradients, Region, run_pass, wire

FORMATS = tuple(wire.FORMATS)
EIGHT = FORMATS[1:]
SMALLEST = 2.0**-126  # The smallest scale; steps below it are not made.
LARGEST = torch.finfo(torch.float32).max

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
# What differences look like, beside any pattern of bits: one magnitude, now and then a zero.
alike = st.builds(
    lambda values, exponent: [value * 2.0**exponent for value in values],
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=200),
    st.integers(-140, 120),
)
flats = st.one_of(st.lists(numbers, min_size=1, max_size=200), alike).map(lambda values: torch.tensor(values))
formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def largest_beside(values: torch.Tensor) -> torch.Tensor:
    """For each element, the largest size in its group: of 64 elements at a multiple of 64, those equal modulo 4."""
    found = torch.zeros_like(values)
    for start in range(0, len(values), 64):
        for place in range(4):
            group = slice(start + place, min(start + 64, len(values)), 4)
            if len(values[group]):
                found[group] = values[group].abs().max()
    return found


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# -- formats -------------------------------------------------------------------------------------------------------------


@formats
@given(values=flats)
@settings(max_examples=60, deadline=None)
def test_errors_are_bounded_by_the_groups_largest(dtype: torch.dtype, values: torch.Tensor) -> None:
    codes, scales = wire.encode(values, dtype)
    assert codes.dtype == dtype and len(codes) == len(values)
    assert (scales is None) == (dtype == torch.bfloat16)
    assert scales is None or (scales.dtype == torch.uint8 and len(scales) == -(-len(values) // 64) * 4)
    decoded, exact = wire.decode(codes, scales, torch.float32).double(), values.double()
    assert decoded.isfinite().all()
    errors, most = (decoded - exact).abs(), largest_beside(values).double()
    if dtype == torch.bfloat16:
        fits = exact.abs() < (2 - 2**-8) * 2.0**127  # Beyond, the nearest is infinity, which is not sent.
        assert (errors <= exact.abs() * 2**-8 + 2.0**-134)[fits].all() and (decoded[~fits] == 0).all()
    elif dtype == torch.int8:
        assert (errors <= most / 127 + SMALLEST / 2).all()
    else:
        # Three bits behind the first, subnormals below 2^-14 of the largest, and 512 is cut to 448.
        assert (errors <= exact.abs() / 8 + most * 2**-18 + SMALLEST * 2**-10).all()
        assert (errors <= exact.abs() / 16 + most * 2**-18 + SMALLEST * 2**-10)[exact.abs() < 0.9 * most].all()


@formats
@given(values=flats)
@settings(max_examples=60, deadline=None)
def test_what_codes_mean_has_these_codes(dtype: torch.dtype, values: torch.Tensor) -> None:
    codes, scales = wire.encode(values, dtype)
    again, scales_again = wire.encode(wire.decode(codes, scales, torch.float32), dtype)
    assert same(again, codes) if codes.float().isfinite().all() else torch.equal(again == codes, codes.isfinite())
    assert same(scales_again, scales)


@formats
@given(values=flats, cut=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_where_a_tensor_is_cut_does_not_matter(dtype: torch.dtype, values: torch.Tensor, cut: int) -> None:
    codes, scales = wire.encode(values, dtype)
    parts = [wire.encode(part, dtype) for part in (values[: 64 * cut], values[64 * cut :]) if len(part)]
    assert same(torch.cat([part for part, _ in parts]), codes)
    if scales is not None:
        assert torch.equal(torch.cat([found for _, found in parts]), scales)
        assert torch.equal(wire.scales_of(scales, 64 * cut, len(values)), scales[4 * cut :])
    here, behind = slice(0, 64 * cut), slice(64 * cut, None)
    decoded = wire.decode(codes, scales, torch.float32)
    for part in (here, behind):
        if len(values[part]):
            some = None if scales is None else scales[part.start // 16 :][: -(-len(values[part]) // 64) * 4]
            assert torch.equal(wire.decode(codes[part], some, torch.float32), decoded[part])


@formats
def test_doubles_are_encoded_like_floats(dtype: torch.dtype) -> None:
    values = torch.randn(300) * torch.exp2(torch.linspace(-100, 100, 300))
    codes, scales = wire.encode(values, dtype)
    assert all(same(*pair) for pair in zip(wire.encode(values.double(), dtype), (codes, scales), strict=True))
    assert torch.equal(wire.decode(codes, scales, torch.float64), wire.decode(codes, scales, torch.float32).double())


@formats
def test_zeros_tiny_and_huge_values(dtype: torch.dtype) -> None:
    def back(values: torch.Tensor) -> torch.Tensor:
        return wire.decode(*wire.encode(values, dtype), torch.float32)

    assert (back(torch.zeros(100)) == 0).all()
    assert (back(torch.full((3,), 2.0**-149)) == 0).all(), "below every format's last step"
    tiny = torch.full((70,), 1e-38)
    torch.testing.assert_close(back(tiny), tiny, rtol=0.02, atol=2.0**-127)
    huge = torch.full((70,), 3e38)
    torch.testing.assert_close(back(huge), huge, rtol=0.13, atol=0)
    assert back(torch.full((70,), LARGEST)).isfinite().all()
    # Powers of two, the only one in their group, are exact.
    powers = torch.zeros(64 * 240)
    powers[::64] = torch.exp2(torch.arange(-112.0, 128.0))
    assert torch.equal(back(powers), powers)


@formats
def test_a_group_that_is_not_finite_says_nothing_and_others_do(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 200)
    fine, was = wire.decode(*wire.encode(values, dtype), torch.float32), values.clone()
    values[[5, 70, 199]] = torch.tensor([math.nan, math.inf, -math.inf])
    codes, scales = wire.encode(values, dtype)
    decoded, places = wire.decode(codes, scales, torch.float32), torch.arange(200)
    groups = places if scales is None else places // 64 * 4 + places % 4
    spoilt = torch.isin(groups, groups[[5, 70, 199]])
    assert (decoded[spoilt] == 0).all() and torch.equal(decoded[~spoilt], fine[~spoilt])
    if scales is not None:
        assert torch.equal(scales[groups] == wire.SPOILT, spoilt) and (codes.float()[spoilt] == 0).all()
        assert (scales[[15, 12, 13, 14]] == torch.tensor([wire.SPOILT, *scales[12:15]])).all()
    end = CompressedChannel.zeros(torch.zeros(256), dtype)
    wire.give(wire.cut(end, 0, 200), values)
    assert end.spoilt() and end.replica.isfinite().all()
    # What was not said is said once there are values again.
    for _ in range(12):
        wire.give(wire.cut(end, 0, 200), was)
    assert not end.spoilt()
    torch.testing.assert_close(end.replica[:200], was, rtol=0, atol=1e-7)
    assert (end.replica[200:] == 0).all() and (end.codes[200:].float() == 0).all()


@formats
def test_a_receiver_that_heard_everything_knows_the_replica(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    end, own = (CompressedChannel.zeros(torch.zeros(192), dtype) for _ in range(2))
    for _ in range(20):
        wire.give(wire.cut(end, 64, 150), torch.randn(86, generator=random))
        wire.give(wire.cut(own, 64, 150), torch.randn(86, generator=random))
        here = (wire.cut(end, 64, 150), wire.cut(own, 64, 150))
        neighbor_delta = wire.take(here[1], [here[0].codes], [here[0].scales], [0.25])
        assert neighbor_delta.data_ptr() == own.neighbor_delta[64:].data_ptr()
    torch.testing.assert_close(own.neighbor_delta, 0.25 * (end.replica - own.replica), rtol=0, atol=1e-6)
    before = own.neighbor_delta.clone()
    wire.take(here[1], [torch.full_like(here[0].codes, 1)], [here[0].scales], [0.0])
    assert torch.equal(own.neighbor_delta, before), "a weight of zero is skipped"


def test_a_wire_has_room_for_its_tensor() -> None:
    for dtype in FORMATS:
        for like, arithmetic in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
            end = CompressedChannel.zeros(torch.zeros(192, dtype=like), dtype)
            assert end.codes.dtype == dtype and end.replica.dtype == end.neighbor_delta.dtype == arithmetic
            assert (end.scales is None) if dtype == torch.bfloat16 else end.scales.shape == (12,)
            assert not end.spoilt()


# -- an oracle of CHOCO-SGD in numpy ----------------------------------------------------------------------------------------
# Every rank keeps a copy of every neighbour's replica; there are no neighbor_deltas and no codes, only rounded differences.

Rounding = Callable[[np.ndarray], np.ndarray]


def to_steps(values: np.ndarray, digits: int, least: float) -> np.ndarray:
    """The nearest multiples of 2^(exponent - digits), where exponents are at least `least`."""
    exponents = np.frexp(values)[1] - 1
    steps = np.exp2(np.maximum(exponents, least) - digits)
    return np.rint(values / steps) * steps


def in_groups(values: np.ndarray, top: int, rounded: Rounding) -> np.ndarray:
    """Rounded in units in which the largest of sixteen lies between 2^top and twice that."""
    found = np.zeros_like(values)
    for start in range(0, len(values), 64):
        for place in range(4):
            group = values[start + place : start + 64 : 4]
            if group.size and np.abs(group).max() > 0:
                unit = 2.0 ** (np.frexp(np.abs(group).max())[1] - 1 - top)
                found[start + place : start + 64 : 4] = rounded(group / unit) * unit
    return found


ORACLE: dict[torch.dtype, Rounding] = {
    # By way of fp32, as torch converts doubles.
    torch.bfloat16: lambda values: to_steps(values.astype(np.float32).astype(np.float64), 7, -math.inf),
    torch.float8_e4m3fn: lambda values: in_groups(values, 8, lambda x: to_steps(np.clip(x, -448, 448), 3, -6)),
    torch.int8: lambda values: in_groups(values, 6, lambda x: np.clip(np.rint(x), -127, 127)),
}

N, SIZE, RATE, STEPS = 4, 150, 0.3, 100
RING = [np.array([[0.5, 0.25, 0, 0.25], [0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25], [0.25, 0, 0.25, 0.5]])]
ONE_PEER = [np.eye(N) / 2 + np.roll(np.eye(N), 2**r, axis=1) / 2 for r in range(2)]


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curvatures and minima of each rank's quadratic, and where it starts; [n, size] each."""
    random = np.random.default_rng(0)
    return random.uniform(1, 2, (N, SIZE)), random.normal(size=(N, SIZE)), random.normal(size=(N, SIZE))


def choco(
    rounds: list[np.ndarray], rounding: Rounding, steps: int, rate: float, strengths: Sequence[float] = (1.0,)
) -> np.ndarray:
    """x_i += s*sum_j w_ij*(known_j - known_i) - rate*gradient_i(x_i), with replicas of their own for each round's graph.

    s goes through `strengths` again and again.
    """
    curvature, minimum, x = problem()
    known = [np.zeros((N, SIZE)) for _ in rounds]
    path = [x]
    for t in range(steps):
        mixing, replicas = rounds[t % len(rounds)], known[t % len(rounds)]
        for i in range(N):
            replicas[i] += rounding(x[i] - replicas[i])
        moved = [sum(mixing[i, j] * (replicas[j] - replicas[i]) for j in range(N)) for i in range(N)]
        x = x + strengths[t % len(strengths)] * np.array(moved) - rate * curvature * (x - minimum)
        path.append(x)
    return np.array(path)


def limit(rounds: list[np.ndarray], rate: float) -> np.ndarray:
    """Where uncompressed steps lead: the fixed point of a period's affine map, element by element."""
    curvature, minimum, _ = problem()
    found = np.zeros((N, SIZE))
    for e in range(SIZE):
        matrix, vector = np.eye(N), np.zeros(N)
        for mixing in rounds:
            step = mixing - rate * np.diag(curvature[:, e])
            matrix, vector = step @ matrix, step @ vector + rate * curvature[:, e] * minimum[:, e]
        found[:, e] = np.linalg.solve(np.eye(N) - matrix, vector)
    return found


def ours(
    rounds: list[np.ndarray],
    dtype: torch.dtype,
    steps: int,
    rate: float,
    storage: torch.dtype = torch.float64,
    strengths: Sequence[float] = (1.0,),
) -> Iterator[tuple[torch.Tensor, list[list[CompressedChannel]]]]:
    """The ranks' parameters, [n, size], and wires by round and rank, at first and after each step, made by passes."""
    curvature, minimum, start = (torch.from_numpy(found) for found in problem())
    padded, region = -(-SIZE // 64) * 64, Region(0, ((0, SIZE),), None)
    params = torch.zeros(N, padded, dtype=storage)
    params[:, :SIZE] = start
    ends = [[CompressedChannel.zeros(params[i], dtype) for i in range(N)] for _ in rounds]
    for i in range(N):
        wire.give(wire.cut(ends[0][i], 0, SIZE), params[i, :SIZE])
    yield params[:, :SIZE], ends
    for t in range(steps):
        mixing, here, following = rounds[t % len(rounds)], ends[t % len(rounds)], ends[(t + 1) % len(rounds)]
        # Copies, as an exchange makes them: a pass writes the next codes where this rank's last ones are.
        codes, scales = ([getattr(end, part) for end in here] for part in ("codes", "scales"))
        codes, scales = ([None if found is None else found.clone() for found in part] for part in (codes, scales))
        for i in range(N):
            peers = [j for j in range(N) if j != i and mixing[i, j]]
            gradient = (curvature[i] * (params[i, :SIZE] - minimum[i])).to(storage)
            run_pass(
                make_pass(
                    "sgd",
                    params[i],
                    (),
                    (rate, 0.0, 1.0, 0.0, 1.0, 0.0),
                    region,
                    grads=Gradients((gradient,), None, storage),
                    inbox=([codes[j] for j in peers],),
                    scales=([scales[j] for j in peers],),
                    weights=[mixing[i, j] for j in peers],
                    taken=(here[i],),
                    strength=strengths[t % len(strengths)],
                    given=(following[i],),
                )
            )
        yield params[:, :SIZE], ends


graphs = pytest.mark.parametrize("rounds", [RING, ONE_PEER], ids=["ring", "one-peer"])


@formats
@graphs
def test_passes_take_the_steps_of_the_oracle(rounds: list[np.ndarray], dtype: torch.dtype) -> None:
    expected = choco(rounds, ORACLE[dtype], 30, RATE)
    for t, (params, _) in enumerate(ours(rounds, dtype, 30, RATE)):
        np.testing.assert_allclose(params.numpy(), expected[t], rtol=0, atol=1e-12)


@formats
@graphs
def test_passes_that_mix_more_and_less_strongly_take_the_steps_of_the_oracle(
    rounds: list[np.ndarray], dtype: torch.dtype
) -> None:
    strengths = (1.0, 0.3, 0.0, 0.7, 0.7)
    expected = choco(rounds, ORACLE[dtype], 30, RATE, strengths)
    for t, (params, _) in enumerate(ours(rounds, dtype, 30, RATE, strengths=strengths)):
        np.testing.assert_allclose(params.numpy(), expected[t], rtol=0, atol=1e-12)
    assert np.abs(expected[-1] - choco(rounds, ORACLE[dtype], 30, RATE)[-1]).max() > 1e-2


@formats
@graphs
def test_the_limit_is_that_of_exact_messages(rounds: list[np.ndarray], dtype: torch.dtype) -> None:
    expected = limit(rounds, RATE)
    *_, (params, _) = ours(rounds, dtype, STEPS, RATE)
    np.testing.assert_allclose(params.numpy(), expected, rtol=0, atol=1e-9)
    # Exact messages lead there too, and rounding x itself does not.
    exact = choco(rounds, lambda values: values, STEPS, RATE)[-1]
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-9)
    curvature, minimum, x = problem()
    for t in range(STEPS):
        sent, mixing = np.array([ORACLE[dtype](row) for row in x]), rounds[t % len(rounds)]
        x = x + mixing @ sent - sent - RATE * curvature * (x - minimum)
    assert np.abs(x - expected).max() > 1e-4


@formats
@graphs
def test_the_mean_is_kept_and_reached(rounds: list[np.ndarray], dtype: torch.dtype) -> None:
    mean = problem()[2].mean(0)
    for params, ends in ours(rounds, dtype, 60, 0.0):
        np.testing.assert_allclose(params.numpy().mean(0), mean, rtol=0, atol=1e-13)
        for end in ends:
            assert sum(channels.neighbor_delta for channels in end).abs().max() < 1e-13
    np.testing.assert_allclose(params.numpy(), np.tile(mean, (N, 1)), rtol=0, atol=1e-10)


@formats
def test_fp32_reaches_the_limit_to_its_last_bits(dtype: torch.dtype) -> None:
    *_, (params, ends) = ours(RING, dtype, STEPS, RATE, torch.float32)
    np.testing.assert_allclose(params.numpy(), limit(RING, RATE), rtol=0, atol=5e-6)
    for i, end in enumerate(ends[0]):
        apart = sum(RING[0][i, j] * (ends[0][j].replica.double() - end.replica.double()) for j in range(N))
        assert (apart - end.neighbor_delta).abs().max() < 5e-6


def test_bad_input_is_named() -> None:
    x, region = torch.zeros(64), Region(0, ((0, 64),), None)
    end = CompressedChannel.zeros(x, torch.int8)
    two, scales = {"inbox": ((end.codes,) * 2,), "weights": (0.25, 0.25)}, (end.scales,)
    with pytest.raises(ValueError, match="2 wires and 1 scales for 1 messages"):
        run_pass(make_pass("mix", x, (), (), region, taken=(end, end), scales=(scales * 2,), **two))
    with pytest.raises(ValueError, match="1 wires and 1 scales for 1 messages"):
        run_pass(make_pass("mix", x, (), (), region, taken=(end,), scales=(scales,), **two))
    with pytest.raises(ValueError, match="rule 'mix' makes 1 messages, but 2 were given"):
        run_pass(make_pass("mix", x, (), (), region, given=(end, end)))
