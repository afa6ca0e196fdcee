"""Launches that do not ask Triton for the kernel's variant take the one that it would name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from support.passes import with_fields
from support.stub_driver import Launch, StubGpu, stub_gpu, unavailable
from test_launch_path import options, pass_of

from fusedfog.kernels import Gradients, Pass, fused_pass, samples
from fusedfog.kernels.launcher import kinds_of

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"launches were NOT tested: {unavailable()}")


class Asked:
    """A kernel that counts how often it is asked for a variant: whenever it is launched by itself."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.times = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.times += 1
        return self.kernel[grid]


@pytest.fixture
def stub() -> Iterator[StubGpu]:
    with stub_gpu() as stub:
        yield stub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked(fused_pass.fused_pass)
    monkeypatch.setattr(fused_pass.LAUNCHER, "kernel", asked)
    return asked


def launched(stub: StubGpu, work: Pass) -> Launch:
    stub.clear()
    fused_pass.launch(work)
    (launch,) = stub.launches()
    return launch


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """As many elements, at an address that is no multiple of 16."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]


def passes() -> dict[str, Pass]:
    """Passes that Triton makes different kernels of, among others."""
    plain, bf16 = pass_of("sgd-momentum"), pass_of("sgd", torch.bfloat16)
    grads = plain.gradient.grads
    assert grads is not None
    found = {name: pass_of("sgd-momentum", **changed) for name, changed in options().items()}
    found |= {f"{count} neighbours": pass_of("sgd-momentum", neighbours=count) for count in (1, 2, 3)}
    found |= {f"{name} in fp16": pass_of(name, torch.float16) for name in ("mix", "sgd", "adam")}
    found |= {
        "another rule": pass_of("sgd"),
        "bf16": bf16,
        "gradients of fp32": with_fields(bf16, grads=Gradients(grads.tensors, grads.addresses, torch.float32)),
        "states of bf16": dataclasses.replace(plain, states=tuple(state.bfloat16() for state in plain.states)),
        "an inbox at any address": with_fields(plain, inbox=(tuple(map(unaligned, plain.mixing.inbox[0])),)),
        "parameters at any address": dataclasses.replace(plain, param=unaligned(plain.param)),
        "steps at any address": with_fields(plain, steps=unaligned(plain.gradient.steps)),
        "what was sent by name": with_fields(plain, sent=(plain.param,)),
        "what was sent in its own buffer": with_fields(plain, sent=(plain.param.clone(),)),
        "random rounding": with_fields(bf16, seed=3),
        "no names": dataclasses.replace(plain, messages=(), hyper=tuple(plain.hyper)),
    }
    return found


def test_a_known_launch_is_the_one_that_triton_makes(stub: StubGpu, asked: Asked) -> None:
    works = passes()
    first = {name: launched(stub, work) for name, work in works.items()}
    kinds = asked.times
    for name, work in [*works.items()][::-1]:  # In another order, so that each follows upon others.
        assert launched(stub, work) == first[name], name
    assert asked.times == kinds
    for name, work in works.items():
        fused_pass.LAUNCHER.forget()
        assert launched(stub, work) == first[name], name
    assert asked.times == kinds + len(works)
    assert 20 < len({launch.handle for launch in first.values()}) <= kinds


def test_numbers_are_not_asked_for_twice(stub: StubGpu, asked: Asked) -> None:
    work = pass_of("adamw")
    for value in (0.0, 1.0, 16.0, float("nan")):
        changed = with_fields(work, row_sum=value, weights=(value, 1), hyper=(value,) * len(work.hyper))
        assert launched(stub, changed).flat("weights")[1] == 1.0
    assert asked.times == 1


def test_arguments_whose_values_make_variants_are_refused() -> None:
    tensor = torch.zeros(4)
    for value in (1, True, "name", [tensor], (tensor, 16)):
        with pytest.raises(TypeError, match="a tensor, a float, None or a tuple of those, not"):
            kinds_of((tensor, value))
    assert kinds_of((torch.nn.Parameter(tensor),)) == kinds_of((tensor,))


def test_constants_are_the_last_parameters_of_their_kernel() -> None:
    for kernel, constants in (
        (fused_pass.fused_pass, fused_pass.arguments_of(pass_of("adamw"))[1]),
        (samples.sample_words, samples._CONSTANTS[True]),
    ):
        names = list(inspect.signature(kernel.fn).parameters)
        assert names[-len(constants.compiled) :] == list(constants.compiled)


def test_a_bound_launch_is_made_again_and_again() -> None:
    addresses, seen = torch.zeros(512, dtype=torch.int64), torch.zeros(512, dtype=torch.int16)
    with stub_gpu() as stub:
        compare = samples.launch_of(addresses, seen, torch.zeros(2), True)
        for _ in range(3):
            compare()
        first, *others = stub.launches("sample_words")
    assert first.grid == (2, 1, 1) and first.arguments["COMPARE"] is True
    assert first.arguments["addresses"] == addresses.data_ptr() and first.arguments["seen"] == seen.data_ptr()
    assert others == [first, first]


def test_who_listens_to_launches_hears_of_known_ones_too(stub: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    work = pass_of("adamw")
    launched(stub, work)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: heard.append(metadata.get()["name"]))
    launched(stub, work)
    assert heard == ["fused_pass"]
