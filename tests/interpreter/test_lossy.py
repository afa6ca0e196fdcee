"""Sixteen-bit parameters and states, and numbers on the device: the kernel in the interpreter equals the torch spec.

Its arithmetic may differ from torch's in the last bits, so a pass of the kernel is held against the reference with a
tolerance; but what it stores is held against `rounding` and `wire` applied to its own fp32 results, bit for bit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.kernel_rules import ROWS
from support.passes import make_pass, with_fields
from test_fused_pass import DTYPES, NUMELS, TOLERANCE, Case

from fusedfog.kernels import CompressedChannel, Pass, cpu_pass, fused_pass, lossy, rounding, torch_pass, wire

WAYS, HALVES, FORMATS = ("master", "kahan", "stochastic"), DTYPES[1:], tuple(wire.FORMATS)
SEED, FEW = 54321, (65, 1025)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


@pytest.fixture(autouse=True)
def _casts_of_the_hardware(monkeypatch):
    """The interpreter cuts values to bf16 and loses carries on the way to fp8; here they are rounded, ties to even."""
    carriers = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    dtypes = {
        tl.float32: torch.float32,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def convert(values, source, target, rounding_mode):
        given = torch.from_numpy(np.ascontiguousarray(values).copy()).view(dtypes[source])
        cast = given.to(dtypes[target])
        return cast.view(carriers[cast.itemsize]).numpy()

    monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", convert)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Equal bits, but zero is zero; NaNs and codes included."""
    if ours is None or theirs is None:
        return ours is theirs
    zeros = (ours.float() == 0) & (theirs.float() == 0)
    return bool(((bits(ours) == bits(theirs)) | zeros).all())


@dataclass
class Lossy(Case):
    """A case whose parameters and states are kept in fewer bits, and whose messages may be compressed."""

    way: str | None = None
    state_dtype: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    changes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.message_dtype = torch.float32
        super().__post_init__()
        row, param = self.row, self.written[0]
        states = [state.to(self.state_dtype) for state in self.written[1 : 1 + row.states]]
        messages = self.written[1 + row.states :]
        self.arguments["inbox"] = self.arguments["inbox"] if "x" in row.writes else ()
        param, remainder = self.split(param)
        more: dict = {"remainder": remainder, "seed": SEED if self.way == "stochastic" else None}
        more["sent"] = self.sent([param, *states])
        more["spoilt"] = torch.zeros(4)
        if self.wire is not None:
            bases = more["sent"] or (param,)
            ends = tuple(self.end(base) for base in bases)
            if "x" in row.writes:
                senders = tuple(tuple(self.end(base) for _ in range(self.neighbours)) for base in bases)
                more["taken"] = ends
                for sender in (sender for found in senders for sender in found):
                    # What others have in their padding must not matter.
                    sender.codes.copy_(torch.where(self.valid, sender.codes.float(), 1.0))
                more["inbox"] = tuple(tuple(sender.codes for sender in found) for found in senders)
                more["scales"] = tuple(tuple(sender.scales for sender in found) for found in senders)
            # What is taken and what is given are mostly the ends of one exchange.
            more["given"] = ends if row.messages == len(ends) else tuple(self.end(param) for _ in range(row.messages))
        self.work = make_pass(
            row.rule,
            param,
            tuple(states),
            row.hyper,
            messages=tuple(messages),
            **{**self.arguments, **more, **self.changes},
        )

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Parameters and what they lack of x, which lies between two of their values."""
        if self.way not in ("master", "kahan"):
            return x, None
        x = x.float() * (1 + self.flat(torch.float32) * 2**-12)
        param = x.to(self.dtype)
        x[::7] += 1  # Somebody has written these parameters since.
        if self.way == "master":
            return param, x
        remainder = (x - param.float()).to(self.dtype)
        # Compensations rounded up to half a unit, the most that there may be.
        above = (bits(param) + 1).view(self.dtype).float() - param.float()
        remainder[1::5] = (above / 2).to(self.dtype)[1::5]
        return param, remainder

    def end(self, like: torch.Tensor) -> CompressedChannel:
        """A wire on which something was sent and received, of all sizes."""
        made = CompressedChannel.zeros(like, self.wire)
        for tensor in (made.replica, made.neighbor_delta):
            tensor[self.valid] = self.uniform(self.size)[self.valid]
        encoded = self.uniform(self.size) * torch.exp2(self.uniform(self.size) * 20 - 18)
        for start, numel in self.region.spans:
            here = wire.cut(made, start, start + numel)
            known = here.replica.clone()
            wire.give(here, known + encoded[start : start + numel])
        return made

    def after(self, run=fused_pass.launch, **changes) -> Pass:
        """The pass made on copies. Nothing has touched the padding."""
        before = with_fields(self.work, **changes)
        work = copy.deepcopy(before)
        if run is fused_pass.launch and work.gradient.steps is not None:
            work = with_fields(work, steps=work.gradient.steps[self.region.blocks[:, 0]])  # By block; see `Pass.steps`.
        run(work)
        for ours, was in zip(written(work), written(before), strict=True):
            assert torch.equal(bits(ours)[~self.valid], bits(was)[~self.valid])
        for end in (*work.compression.taken, *work.compression.given):
            for tensor in (end.codes, end.replica, end.neighbor_delta):
                assert (tensor.float()[~self.valid] == 0).all()
        return work

    def check(self) -> Pass:
        """Asserts that kernel, reference and spec agree; the pass that the kernel made."""
        ours, theirs = self.after(), self.after(torch_pass.run_pass)
        self.check_close(ours, theirs)
        assert ours.compression.spoilt.any() == theirs.compression.spoilt.any()
        for work, run in ((ours, fused_pass.launch), (theirs, torch_pass.run_pass)):
            self.check_param(work)
            self.check_wires(work)
            self.check_states(work, run)
        return ours

    def check_close(self, ours: Pass, theirs: Pass) -> None:
        for got, expected in zip(written(ours), written(theirs), strict=True):
            if got is not ours.precision.remainder:
                torch.testing.assert_close(got[self.valid], expected[self.valid], **TOLERANCE[got.dtype])
        if ours.precision.remainder is not None:
            # A unit of the compensation, which is rounded itself, beside the tolerance of fp32.
            units = {torch.float32: 2**-21, torch.bfloat16: 2**-15, torch.float16: 2**-19}
            x, expected = (
                rounding.restored(work.param, work.precision.remainder)[self.valid] for work in (ours, theirs)
            )
            torch.testing.assert_close(x, expected, rtol=0, atol=units[ours.precision.remainder.dtype])

    def check_param(self, work: Pass) -> None:
        """Parameters and rest are what `rounding` makes of the message, where that is x_new."""
        before = self.work
        if "x" not in self.row.writes:
            assert same(work.param, before.param) and same(work.precision.remainder, before.precision.remainder)
            return
        if not self.row.messages:
            return
        x_new = work.messages[0]
        param, remainder = (
            before.param.clone(),
            None if before.precision.remainder is None else before.precision.remainder.clone(),
        )
        random = None if work.precision.seed is None else rounding.noise(SEED, 0, 0, self.size)
        rounding.keep(x_new, param, remainder, None if self.dtype == torch.float32 else random)
        assert same(work.param[self.valid], param[self.valid])
        if remainder is not None:
            assert same(work.precision.remainder[self.valid], remainder[self.valid])

    def check_states(self, work: Pass, run) -> None:
        """States of 16 bits are what `rounding` makes of the fp32 states of the same pass."""
        if self.state_dtype == torch.float32 or any(name.isdigit() for name in self.row.sent):
            return  # States that were sent themselves would be mixed less precisely.
        wide = self.after(run, states=tuple(state.float() for state in self.work.states))
        for s, (state, exact) in enumerate(zip(work.states, wide.states, strict=True)):
            expected = self.work.states[s].clone()
            if str(s) in self.row.writes:
                random = None if work.precision.seed is None else rounding.noise(SEED, 1 + s, 0, self.size)
                rounding.keep(exact, expected, None, random)
            assert same(state[self.valid], expected[self.valid])

    def check_wires(self, work: Pass) -> None:
        """Gaps are what `wire.take` makes of what came in, codes, scales and replicas what `give` makes of messages."""
        before = copy.deepcopy(self.work)
        for start, numel in before.region.spans:
            stop = start + numel
            for m, end in enumerate(before.compression.taken):
                codes = [flat[start:stop] for flat in before.mixing.inbox[m]]
                scales = [wire.scales_of(found, start, stop) for found in before.compression.scales[m]]
                wire.take(wire.cut(end, start, stop), codes, scales, before.mixing.weights)
            for m, end in enumerate(before.compression.given):
                wire.give(wire.cut(end, start, stop), work.messages[m][start:stop])
        for ours, expected in zip(
            (*work.compression.taken, *work.compression.given),
            (*before.compression.taken, *before.compression.given),
            strict=True,
        ):
            for name in ("neighbor_delta", "codes", "scales", "replica"):
                assert same(getattr(ours, name), getattr(expected, name)), name


def written(work: Pass) -> list[torch.Tensor]:
    """The tensors a pass may write, wires apart."""
    return [
        work.param,
        *work.states,
        *work.messages,
        *(() if work.precision.remainder is None else (work.precision.remainder,)),
    ]


# -- parameters and states -------------------------------------------------------------------------------------------------

KEPT = ("mix", "sgd-momentum", "adamw-amsgrad", "descend", "exact-diffusion-before-momentum", "decentlam", "tracking")


def neighbours_of(name: str) -> tuple[int, ...]:
    return (0, 1, 2, 8) if "x" in ROWS[name].writes and "before" not in name else (0,)


PRODUCT = [
    pytest.param(name, k, way, dtype, id=f"{name}-{k}-{way}-{str(dtype)[6:]}")
    for name in KEPT
    for k in neighbours_of(name)
    for way in WAYS
    for dtype in HALVES
]
# One dtype and one way for each rule and number of neighbours: each way meets each number, each dtype each rule.
PAIRWISE = [
    pytest.param(name, k, WAYS[(r + i) % 3], HALVES[(r + i) % 2], id=f"{name}-{k}-diagonal{r + i}")
    for r, name in enumerate(KEPT)
    for i, k in enumerate(neighbours_of(name))
]


@pytest.mark.parametrize(("name", "neighbours", "way", "dtype"), PAIRWISE)
def test_16_bit_parameters_equal_the_reference(name, neighbours, way, dtype):
    Lossy(ROWS[name], dtype, neighbours, numels=FEW, way=way).check()


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("name", "neighbours", "way", "dtype"), PRODUCT)
def test_16_bit_parameters_equal_the_reference_in_full(name, neighbours, way, dtype, state_dtype):
    Lossy(ROWS[name], dtype, neighbours, way=way, state_dtype=state_dtype).check()


@pytest.mark.parametrize("way", WAYS)
def test_any_size_in_16_bits_equals_the_reference(way):
    Lossy(ROWS["sgd-momentum"], HALVES[WAYS.index(way) % 2], 1, way=way, numels=NUMELS, first=2).check()


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad", "tracking"])
def test_bf16_states_equal_the_reference(name, way):
    Lossy(ROWS[name], torch.bfloat16, 1, way=way, state_dtype=torch.bfloat16, numels=FEW).check()


def test_bf16_states_of_fp32_parameters_are_rounded_stochastically():
    case = Lossy(ROWS["adamw"], neighbours=1, state_dtype=torch.bfloat16, numels=FEW, changes={"seed": SEED})
    ours, nearest = case.check(), case.after(seed=None)
    assert same(ours.param[case.valid], nearest.param[case.valid]), "which has nothing to round"
    moved = [(a != b)[case.valid].float().mean() for a, b in zip(ours.states, nearest.states, strict=True)]
    assert 0.2 < moved[0] < 0.3, "a quarter of all values goes to the farther neighbour"
    assert 0.1 < moved[1] < 0.2, "less, where the step is below the spacing"


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_without_a_gradient_16_bit_parameters_are_mixed_and_states_stay(way, found_inf):
    options = {"found_inf": torch.tensor(found_inf)}
    settings = {"way": way, "state_dtype": torch.bfloat16, "absent": frozenset({0}), "options": options}
    case = Lossy(ROWS["adamw"], torch.bfloat16, 2, numels=FEW, **settings)
    ours = case.check()
    for state, before in zip(ours.states, case.work.states, strict=True):
        kept = bits(state) == bits(before)
        assert kept[:65].all() and bool(kept[128:][: FEW[1]].all()) == bool(found_inf)


@pytest.mark.parametrize("way", ["master", "kahan"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_written_parameter_is_what_counts(way, dtype):
    case = Lossy(ROWS["mix"], dtype, way=way, numels=FEW)
    case.work.param[case.valid] = case.uniform(case.size)[case.valid].to(dtype) + 4
    ours = case.after()
    assert same(ours.param[case.valid], case.work.param[case.valid])
    x = rounding.restored(ours.param, ours.precision.remainder)[case.valid]
    # A compensation may still be one for the new value: it is below half a unit of it.
    assert same(x if way == "master" else x.to(dtype), ours.param[case.valid].to(x.dtype if way == "master" else dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_that_are_not_finite_or_too_large_are_those_of_the_reference(way, dtype):
    case = Lossy(ROWS["sgd"], dtype, 1, way=way, numels=FEW)
    gradients, large = case.work.gradient.grads.tensors, torch.finfo(dtype).max
    values = torch.tensor([math.inf, -math.inf, math.nan, large, -large, large / 2, 1e-7, -1e-30, 0.0])
    gradients[0][: len(values)] = values.to(dtype)
    for rule_hyper in (ROWS["sgd"].hyper, (1.9, *ROWS["sgd"].hyper[1:])):
        ours, theirs = (case.after(run, hyper=rule_hyper) for run in (fused_pass.launch, torch_pass.run_pass))
        case.check_param(ours)
        assert same(ours.param[: len(values)].isfinite().float(), theirs.param[: len(values)].isfinite().float())


@triton.jit
def noises(places, out, seed, STREAM: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    random = lossy.noise(tl.cast(seed, tl.int32), STREAM, tl.load(places + at))
    tl.store(out + at, random.to(tl.int64))


@pytest.mark.parametrize("first", [0, 12_345, 2**31 - 9, 2**32 - 30, 5 * 2**32 + 77, 2**45])
def test_noise_is_that_of_the_spec_anywhere(first):
    for seed in (0, 1, 12_345, 2**24 - 1):
        for stream in (0, 1, 7, 127, 128, 255):
            out = torch.zeros(64, dtype=torch.int64)
            noises[(1,)](torch.arange(first, first + 64), out, float(seed), stream, 64)
            assert torch.equal(out, rounding.noise(seed, stream, first, 64))


@triton.jit
def rounds(values, random_seed, near, some, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(values + at)
    tl.store(near + at, lossy.nearest(value, DTYPE))
    tl.store(some + at, lossy.stochastic(value, DTYPE, tl.cast(random_seed, tl.int32), 0, at.to(tl.int64)))


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)], ids=str)
def test_any_bits_are_rounded_as_the_spec_rounds_them(dtype, device):
    random = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (4096,), generator=random, dtype=torch.int64).to(torch.int32)
    # Half of them around fp16's range, where exponents at random rarely fall.
    around = torch.exp2(torch.rand(2048, generator=random) * 48 - 30) * torch.sign(torch.randn(2048, generator=random))
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 2**-25, 3 * 2**-25, 65519.996, 65520.0, 3.4e38, 0.0, -0.0]
    )
    patterns[-2:] = torch.tensor([2**31 - 1, -1])  # NaNs of ones alone, to which nothing can be added.
    values = patterns.view(torch.float32)
    values[:2048] = around
    values[: len(ties)] = ties
    near, some = torch.zeros(4096), torch.zeros(4096)
    rounds[(1,)](values, float(SEED), near, some, device, 4096)
    stochastic = rounding.stochastic(values, dtype, rounding.noise(SEED, 0, 0, 4096))
    for ours, expected in ((near, values.to(dtype).float()), (some, stochastic)):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert same(torch.where(ours.isnan(), 0.0, ours), torch.where(ours.isnan(), 0.0, expected))


# -- numbers on the device -------------------------------------------------------------------------------------------------


def numbers_of(work: Pass, dtype: torch.dtype) -> torch.Tensor:
    seed = () if work.precision.seed is None else (float(work.precision.seed),)
    strength = (work.compression.strength,) if work.compression.taken else ()
    return torch.tensor([work.mixing.row_sum, *work.mixing.weights, *work.hyper, *seed, *strength], dtype=dtype)


# The interpreter multiplies scalars of the host in double: lr*weight_decay has to be exact.
EXACT = {"sgd-momentum": ROWS["sgd-momentum"].hyper, "mix": ()}
EXACT["adamw"] = (2**-6, *ROWS["adamw"].hyper[1:9], 0.125, 1.0)


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, None) for name in EXACT), ("mix", "master"), ("sgd-momentum", "kahan"), ("adamw", "stochastic")],
)
@pytest.mark.parametrize("run", [fused_pass.launch, torch_pass.run_pass, cpu_pass.run_pass])
def test_numbers_on_the_device_give_the_bits_of_those_on_the_host(name, way, run):
    dtype = torch.float32 if way is None else torch.bfloat16
    state_dtype = torch.bfloat16 if way == "stochastic" else torch.float32
    case = Lossy(ROWS[name], dtype, 2, way=way, state_dtype=state_dtype, wire=torch.int8 if way else None, numels=FEW)
    work = with_fields(case.work, hyper=EXACT[name], row_sum=0.75, strength=0.375)
    found = numbers_of(work, torch.float32 if run is fused_pass.launch else torch.float64)
    unread = {"row_sum": math.nan, "weights": (math.nan,) * 2, "hyper": (math.nan,) * len(EXACT[name])}
    unread |= {"strength": math.nan}
    seed = None if work.precision.seed is None else 7
    case.work = work
    host, device = case.after(run), case.after(run, numbers=found, seed=seed, **unread)
    for ours, theirs in zip(written(host), written(device), strict=True):
        assert same(ours[case.valid], theirs[case.valid])
    for ours, theirs in zip(host.compression.given, device.compression.given, strict=True):
        assert all(
            same(getattr(ours, part), getattr(theirs, part))
            for part in ("codes", "scales", "replica", "neighbor_delta")
        )
    assert not same(host.param[case.valid], work.param[case.valid])
