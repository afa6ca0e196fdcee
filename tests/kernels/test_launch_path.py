"""Launches of the GPU pass through Triton's own launcher, down to a driver that keeps what it was given.

Kernels do not run here; the interpreter's tests run them. What is held: grid, and every argument as it was packed, against
what the `Pass` says; which calls compile another variant; what the engine launches.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support import triton_versions
from support.gpu_checks import IRREGULAR, among_echoes
from support.kernel_rules import ROWS
from support.passes import make_pass, with_fields
from support.stub_driver import Launch, StubGpu, stub_gpu, unavailable
from torch import nn

import fusedfog
from fusedfog.engine import scheduler
from fusedfog.engine.clock import StepSchedule
from fusedfog.kernels import BLOCK, CompressedChannel, Gradients, Pass, Region, fused_pass, samples

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"launches were NOT tested: {unavailable()}")

NUMELS = (1, 63, 64, 1000, 1025, 2500)
STARTS = (0, 64, 128, 192, 1216, 2304)
N = 4864
HALVES = (torch.float32, torch.bfloat16)


@pytest.fixture
def stub() -> Iterator[StubGpu]:
    with stub_gpu() as stub:
        yield stub


def region() -> Region:
    spans = tuple(zip(STARTS, NUMELS, strict=True))
    rows = [
        (index, offset, min(BLOCK, numel - offset), start + offset)
        for index, (start, numel) in enumerate(spans)
        for offset in range(0, numel, BLOCK)
    ]
    return Region(0, spans, torch.tensor(rows))


def pass_of(name: str, dtype: torch.dtype = torch.float32, neighbours: int = 2, **changed: Any) -> Pass:
    """A use of a rule on CPU tensors, with the tables that a GPU pass needs; the fourth gradient is missing."""
    row = ROWS[name]

    def flat(of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(N, dtype=of)

    param, states = flat(), tuple(flat(torch.float32) for _ in range(row.states))
    gradients = [None if index == 3 else torch.zeros(numel, dtype=dtype) for index, numel in enumerate(NUMELS)]
    homes = torch.tensor([0 if gradient is None else gradient.data_ptr() for gradient in gradients])
    named = {"x": param, "message": flat()}
    sent = tuple(named[part] if part in named else states[int(part)] for part in row.sent)
    arguments: dict[str, Any] = {
        "region": region(),
        "grads": Gradients(gradients, homes, dtype) if row.grads else None,
        "steps": torch.zeros(len(NUMELS)),
        "sent": sent,
        "inbox": tuple(tuple(flat(one.dtype) for _ in range(neighbours)) for one in sent or (param,)),
        "weights": tuple(0.5 / 2**k for k in range(neighbours)),
        "row_sum": 0.75,
        "messages": tuple(flat() for _ in range(row.messages)),
        "extra": None if row.extra is None else torch.tensor(row.extra),
    }
    return make_pass(row.rule, param, states, row.hyper, **{**arguments, **changed})


def launched(stub: StubGpu, work: Pass) -> Launch:
    stub.clear()
    fused_pass.launch(work)
    (launch,) = stub.launches()
    return launch


def homes(tensors: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def single(value: float) -> float:
    """The float32 that a kernel gets for it."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def expected(work: Pass) -> dict[str, list[Any]]:
    """By the names of the kernel's arguments, what a launch must say of the pass."""
    tensors = {
        "param": [work.param],
        "remainder": [work.precision.remainder],
        "states": work.states,
        "sent": work.mixing.sent or [work.param],
        "inbox": [tensor for message in work.mixing.inbox for tensor in message],
        "messages": work.messages,
        "blocks": [work.region.blocks],
        "addresses": [None if work.gradient.grads is None else work.gradient.grads.addresses],
        "grad_scale": [work.gradient.grad_scale],
        "found_inf": [work.gradient.found_inf],
        "extra": [work.extra],
        "norm_sums": [work.norm_sums],
        "numbers": [work.numbers],
    }
    numbers = {
        "row_sum": [single(work.mixing.row_sum)],
        "weights": list(map(single, work.mixing.weights)),
        "hyper": list(map(single, work.hyper)),
        "seed": [] if work.precision.seed is None else [float(work.precision.seed)],
        "strength": [single(work.compression.strength)] if work.compression.taken else [],
    }
    return {name: homes(found) for name, found in tensors.items()} | numbers


def mismatches(launch: Launch, work: Pass) -> list[str]:
    """What a launch says otherwise than the pass."""
    wanted = expected(work)
    wrong = [name for name, values in wanted.items() if launch.flat(name) != values]
    channels = [
        tensor
        for wire in (*work.compression.taken, *work.compression.given)
        for tensor in (wire.codes, wire.scales, wire.neighbor_delta, wire.replica)
    ]
    received = [tensor for message in work.compression.scales for tensor in message]
    known = {value for values in wanted.values() for value in values} | set(
        homes([*channels, *received, work.gradient.steps])
    )
    packed = {
        value for name in launch.arguments for value in launch.flat(name) if isinstance(value, int) and value > 2**16
    }
    wrong += [f"unknown pointer {pointer:#x}" for pointer in packed - known]
    assert work.region.blocks is not None
    if launch.grid != (len(work.region.blocks), 1, 1):
        wrong.append("grid")
    return wrong


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_rule_is_launched_with_what_its_pass_says(name: str, dtype: torch.dtype, stub: StubGpu) -> None:
    before = "x" not in ROWS[name].writes or ROWS[name].rule.endswith("before")
    work = pass_of(name, dtype, 0 if before else 2)
    launch = launched(stub, work)
    assert launch.kernel == "fused_pass"
    assert mismatches(launch, work) == []
    assert (
        launch.arguments["GRAD_DTYPE"]
        == fused_pass.DTYPES[dtype if work.gradient.grads is None else work.gradient.grads.dtype]
    )
    assert (launch.stream, launch.shared) == (0, 0)


def options() -> dict[str, dict[str, Any]]:
    """What a pass may have beside its rule, each made new."""
    return {
        "grad_scale": {"grad_scale": torch.tensor(0.5)},
        "found_inf": {"found_inf": torch.tensor(0.0)},
        "zero": {"missing": "zero"},
        "norm_sums": {"norm_sums": torch.zeros(len(region().blocks), 2)},
        "numbers": {"numbers": torch.zeros(20)},
        "no neighbours": {"inbox": (), "weights": ()},
        "no gradients": {"grads": None},
        "no messages": {"messages": ()},
    }


@pytest.mark.parametrize("option", options())
def test_options_reach_the_kernel_and_make_one_variant_each(option: str, stub: StubGpu) -> None:
    launched(stub, pass_of("sgd-momentum"))
    assert stub.variants == 1
    for _ in range(2):
        work = pass_of("sgd-momentum", **options()[option])
        assert mismatches(launched(stub, work), work) == []
    assert stub.variants == 2


@pytest.mark.parametrize("kept", ["master", "compensation", "stochastic"])
def test_precise_parameters_reach_the_kernel(kept: str, stub: StubGpu) -> None:
    remainder = {"master": torch.float32, "compensation": torch.bfloat16}.get(kept)
    for seed in (1, 16, 12345):
        more = {"seed": seed} if remainder is None else {"remainder": torch.zeros(N, dtype=remainder)}
        work = pass_of("adamw", torch.bfloat16, **more)
        assert mismatches(launched(stub, work), work) == []
    assert stub.variants == 1


@pytest.mark.parametrize("code", [torch.bfloat16, torch.int8], ids=str)
def test_wires_reach_the_kernel(code: torch.dtype, stub: StubGpu) -> None:
    one, other = CompressedChannel.zeros(torch.zeros(N), code), CompressedChannel.zeros(torch.zeros(N), code)
    inbox, scales = ((other.codes,),), ((other.scales,),)
    work = pass_of("sgd", neighbours=1, messages=(), inbox=inbox, scales=scales, taken=(one,), given=(one,))
    launch = launched(stub, work)
    assert mismatches(launch, work) == []
    packed = {value for name in launch.arguments for value in launch.flat(name) if isinstance(value, int)}
    assert packed >= set(homes([one.codes, one.scales, one.neighbor_delta, one.replica, *scales[0]]))
    for strength in (0, 0.25, 1):
        work = with_fields(work, strength=strength)
        assert mismatches(launched(stub, work), work) == []
    assert stub.variants == 1


def test_a_difference_is_seen(stub: StubGpu) -> None:
    work = pass_of("tracking")
    launch = launched(stub, work)
    others = {
        "param": work.messages[0],
        "states": work.states[::-1],
        "inbox": work.mixing.inbox[::-1],
        "messages": work.messages[::-1],
        "weights": work.mixing.weights[::-1],
        "row_sum": 0.5,
        "hyper": work.hyper[::-1],
        "numbers": torch.zeros(9),
        "seed": 3,
        "region": dataclasses.replace(work.region, blocks=region().blocks[1:]),
    }
    assert mismatches(launch, work) == []
    for name, other in others.items():
        assert mismatches(launch, with_fields(work, **{name: other})), name


def test_numbers_make_no_variants(stub: StubGpu) -> None:
    work = pass_of("adamw")
    launched(stub, work)
    for value in (0.0, 1.0, 16.0, -1.0, 1e-30, math.inf, math.nan):
        for changed in (
            {"row_sum": value},
            {"weights": (value, 1.0)},
            {"hyper": (value,) * len(work.hyper)},
            {"row_sum": 1, "weights": (0, 1)},  # as integers, 1 and multiples of 16 would be compiled in
        ):
            launched(stub, with_fields(work, **changed))
    assert stub.variants == 1


def test_sizes_and_addresses_make_no_variants(stub: StubGpu) -> None:
    launched(stub, pass_of("adamw"))
    for first in range(1, 8):
        part = region()
        launched(stub, pass_of("adamw", region=dataclasses.replace(part, blocks=part.blocks[first:])))
    assert stub.variants == 1


def test_single_numbers_at_any_address_make_one_variant(stub: StubGpu) -> None:
    room = torch.zeros(32)
    for at in (0, 1, 2, 3, 4, 7):
        scalars = {"grad_scale": room[at], "found_inf": room[8 + at], "extra": room[16 + at]}
        work = pass_of("quasi-global-adam-before", neighbours=0, inbox=(), steps=torch.zeros(32)[at:], **scalars)
        assert mismatches(launched(stub, work), work) == []
    assert stub.variants == 1


def test_figures_of_any_bucket_make_one_variant(stub: StubGpu) -> None:
    whole = region()
    assert whole.blocks is not None
    norm_sums = torch.zeros(len(whole.blocks), 2)
    for first in (0, 1, 2, 3):
        bucket = dataclasses.replace(whole, blocks=whole.blocks[first:])
        launch = launched(stub, pass_of("sgd", region=bucket, norm_sums=norm_sums[first:]))
        assert launch.flat("norm_sums") == [norm_sums.data_ptr() + 8 * first]
    assert stub.variants == 1


def test_what_makes_a_variant(stub: StubGpu) -> None:
    calls: list[Callable[[], Pass]] = [
        lambda: pass_of("sgd"),
        lambda: pass_of("sgd", neighbours=1),
        lambda: pass_of("sgd", neighbours=4),
        lambda: pass_of("sgd", torch.bfloat16),
        lambda: pass_of("sgd", torch.float16),
        lambda: pass_of("sgd-momentum"),
        lambda: pass_of("mix"),
        lambda: pass_of("adam"),
        lambda: pass_of("adamw-amsgrad"),
    ]
    for number, call in enumerate(calls, 1):
        for _ in range(2):
            launched(stub, call())
        assert stub.variants == number
    # Decoupled decay, maximize and momentum of another size are numbers.
    for same in ("sgd-decay-maximize", "sgd-momentum-all", "sgd-nesterov", "adamw", "adam-no-memory"):
        launched(stub, pass_of(same))
    assert stub.variants == len(calls)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_other_devices(capability: int) -> None:
    with stub_gpu(capability) as stub:
        work = pass_of("adamw")
        assert mismatches(launched(stub, work), work) == []


def test_num_warps(stub: StubGpu) -> None:
    assert launched(stub, pass_of("sgd", neighbours=1, messages=())).block == (128, 1, 1)
    assert launched(stub, pass_of("adamw")).block == (256, 1, 1)


# -- the engine --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.out, self.unused = nn.Linear(45, 33), nn.Linear(33, 3), nn.Linear(3, 3)


def trained(stub: StubGpu, steps: int, **options: Any) -> list[list[Launch]]:
    """The launches of each step of AdamW with one neighbour; new learning rates, gradients at new addresses, one absent."""
    net = Net()
    optimizer = fusedfog.AdamW(net.parameters(), lr=0.5, algorithm="local", **options)
    among_echoes(optimizer, "awc", 2)
    found = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
        for param in (*net.line.parameters(), *net.out.parameters()):
            param.grad = torch.zeros_like(param)
        if step % 2:
            net.out.bias.grad = None
        stub.clear()
        optimizer.step()
        table = optimizer._engine.segments[0].gradient_table
        assert table.tolist() == [
            0 if p.grad is None else p.grad.data_ptr() for p in optimizer._engine.segments[0].params
        ]
        found.append(stub.launches())
    return found


def test_the_engine_launches_one_pass_a_segment_and_two_looks_at_samples_of_kernels_that_two_steps_have_loaded() -> None:
    with stub_gpu(take_gpu_way=True) as stub:
        trained(stub, 2)
        variants = stub.variants
        launches = trained(stub, 6)
        assert stub.variants == variants
    for step, found in enumerate(launches):
        (launch,) = [one for one in found if one.kernel == "fused_pass"]
        assert single(0.3 / (step + 1)) in launch.flat("hyper")
        assert launch.flat("weights") == [0.5]
        assert len(launch.flat("states")) == 2
        looks = (["sample_words"] if step else [], ["sample_words"])
        assert [one.kernel for one in found] == [*looks[0], "fused_pass", *looks[1]]
    assert (
        len({launch.flat("param")[0] for found in launches for launch in found if launch.kernel == "fused_pass"}) == 1
    )


@pytest.mark.parametrize(
    ("kind", "algorithm", "options"),
    [
        ("AdamW", "awc", {}),
        ("AdamW", "awc", {"bucket_mb": 1e-3}),
        ("SGD", "atc", {"momentum": 0.9}),
        ("SGD", "momentum_tracking", {"momentum": 0.9}),
        ("AdamW", "dag", {}),
        ("AdamW", "quasi_global", {}),
    ],
)
def test_no_kernel_is_compiled_after_construction(
    kind: str, algorithm: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a round with more neighbours, a step that is silent, or one that averages over all ranks."""
    monkeypatch.setattr(scheduler, "warm_pass", fused_pass.warm)
    schedule = StepSchedule(communicate_every=2)

    def compiled() -> int:
        kernels = fused_pass.fused_pass, samples.sample_words
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    with stub_gpu(take_gpu_way=True) as stub:
        net = Net()
        optimizer = getattr(fusedfog, kind)(net.parameters(), lr=0.1, algorithm="local", **options)
        among_echoes(optimizer, algorithm, 4, bent=IRREGULAR, schedule=schedule)
        warm = compiled()
        assert warm > 1 and not stub.launches()
        for _ in range(8):
            for param in net.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert compiled() == warm and stub.variants > 1


def test_the_address_table_is_what_the_pass_reads() -> None:
    with stub_gpu(take_gpu_way=True) as stub:
        net = nn.Linear(40, 40)
        optimizer = fusedfog.SGD(net.parameters(), lr=0.1, algorithm="local")
        (segment,) = optimizer._engine.segments
        net.weight.grad = torch.zeros(40, 40)
        optimizer.step()
        (launch,) = stub.launches("fused_pass")
        assert launch.flat("addresses") == [segment.gradient_table.data_ptr()]
        assert launch.grid == (len(segment.whole.blocks), 1, 1)
        by_id = dict(zip(map(id, segment.params), segment.gradient_table.tolist(), strict=True))
        assert by_id == {id(net.weight): net.weight.grad.data_ptr(), id(net.bias): 0}


# -- the stub itself -----------------------------------------------------------------------------------------------------


@triton.jit
def all_kinds(pointer, absent, pair, number, small, flag, whole, SIZE: tl.constexpr):
    tl.store(pointer + tl.arange(0, SIZE), number + small + whole + tl.load(pair[0]) + pair[1])


def test_the_stub_reads_every_kind_of_argument() -> None:
    with stub_gpu(also=[all_kinds]) as stub:
        tensor, other = torch.zeros(64), torch.zeros(64)
        all_kinds[(3, 2)](tensor, None, (other, 0.25), 0.1, -7, True, 2**40, SIZE=32, num_warps=2)
        (launch,) = stub.launches()
    assert (launch.kernel, launch.grid, launch.block) == ("all_kinds", (3, 2, 1), (64, 1, 1))
    wanted = {
        "pointer": tensor.data_ptr(),
        "absent": None,
        "pair": (other.data_ptr(), 0.25),
        "number": single(0.1),
        "small": -7,
        "flag": True,
        "whole": 2**40,
        "SIZE": 32,
    }
    assert launch.arguments == wanted
    assert len(launch.packed) == 7 + 2  # two pointers to scratch memory


def test_the_stub_refuses_what_a_driver_refuses() -> None:
    with stub_gpu(also=[all_kinds]) as stub:
        with pytest.raises(RuntimeError, match="invalid argument"):
            all_kinds[(1, 1 << 17)](torch.zeros(64), None, (torch.zeros(64), 0.25), 0.1, -7, True, 2**40, SIZE=32)
        assert len(stub) == 0


def test_after_the_stub_there_is_no_driver() -> None:
    with stub_gpu() as stub:
        launched(stub, pass_of("mix"))
    with pytest.raises(RuntimeError, match="active drivers"):
        fused_pass.launch(pass_of("mix"))


@pytest.mark.slow
def test_the_same_with_the_oldest_triton() -> None:
    if triton_versions.HOME in Path(triton.__file__).parents:
        pytest.skip("this is the run with another Triton")
    try:
        triton_versions.unpacked(triton_versions.VERSIONS[0])
    except triton_versions.Unavailable as problem:
        pytest.skip(f"launches were NOT tested with the oldest Triton: {problem}")
    done = triton_versions.run(
        triton_versions.VERSIONS[0], "tests/kernels/test_launch_path.py", "-k", "not bfloat16", "-v"
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert triton_versions.counts(done.stdout)["passed"] > 60
