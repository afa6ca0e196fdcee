"""Edits of parameters between steps, seen by version counters or not: edited values are used entirely, and it is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import fake_cuda, ordered_backend
from support.pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.gossip.samples import ELEMENTS, places
from fusedfog.params.layout import ParamSpec, build_layout


def numpy_view(params: list[Tensor], new: list[Tensor]) -> None:
    for param, value in zip(params, new, strict=True):
        if param.dtype == torch.bfloat16:
            param.data.copy_(value)
        else:
            param.detach().numpy()[...] = value.numpy()


def in_place(params: list[Tensor], new: list[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, new, strict=True):
            param.copy_(value)


def by_init(params: list[Tensor], new: list[Tensor]) -> None:
    for param, value in zip(params, new, strict=True):
        nn.init.zeros_(param)
        with torch.no_grad():
            param.add_(value)


def data_copy(params: list[Tensor], new: list[Tensor]) -> None:
    for param, value in zip(params, new, strict=True):
        param.data.copy_(value)


def data_arithmetic(params: list[Tensor], new: list[Tensor]) -> None:
    for param, value in zip(params, new, strict=True):
        param.data.mul_(0.0).add_(value)


def moved(params: list[Tensor], new: list[Tensor]) -> None:
    for param, value in zip(params, new, strict=True):
        param.data = value.clone()


EDITS: dict[str, Callable[[list[Tensor], list[Tensor]], None]] = {
    "data.copy_": data_copy,
    "data.mul_": data_arithmetic,
    "numpy": numpy_view,
    "copy_": in_place,
    "init": by_init,
    "data =": moved,
}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "awc": ("SGD", {"momentum": 0.9}),
    "awc adam": ("AdamW", {"weight_decay": 0.0}),
    "awc hooks": ("SGD", {"fused_backward": True}),
    "awc every two": ("SGD", {"communicate_every": 2}),
    "awc averaging": ("SGD", {"global_average_every": 2}),
    "awc mesh": ("SGD", {"mesh": True, "inside": "parameters", "topology": "ring"}),
    "capturable": ("SGD", {"capturable": True}),
    "master": ("SGD", {"low_precision": "master"}),
    "tracking": ("SGD", {"algorithm": "gradient_tracking"}),
    "wrapped": ("wrapped", {}),
    "atc": ("SGD", {"algorithm": "atc"}),
    "atc hooks": ("SGD", {"algorithm": "atc", "fused_backward": True}),
    "wrapped atc": ("wrapped", {"algorithm": "atc"}),
    "push_sum": ("SGD", {"algorithm": "push_sum"}),
    "quasi_global": ("SGD", {"algorithm": "quasi_global", "momentum": 0.9}),
    "allreduce": ("SGD", {"algorithm": "allreduce"}),
}
IN_FLIGHT = [
    name for name, (_, options) in METHODS.items() if options.get("algorithm", "") in ("", "gradient_tracking")
]


FAST = ("awc", "awc hooks", "awc every two", "tracking", "wrapped", "atc", "push_sum", "allreduce")
"""Those that the fast tests go through; each way of delivery and of passing is among them or in a test of its own."""


def build(name: str, params: list[nn.Parameter]) -> Any:
    kind, options = METHODS[name]
    options = {"bucket_mb": 0.002, "sync_init": False} | options
    if options.get("mesh"):
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    if kind == "wrapped":
        return fusedfog.Decentralized(torch.optim.SGD(params, lr=0.0), **options)
    return getattr(fusedfog, kind)(params, lr=0.0, **options)


def parameters(name: str, rank: int) -> list[nn.Parameter]:
    torch.manual_seed(rank)
    dtype = torch.bfloat16 if name == "master" else torch.float32
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 30), (7,), (300,), (1,), (20, 20))]


def step(opt: Any, params: list[nn.Parameter]) -> None:
    opt.zero_grad()
    sum((param * 1.0).sum() for param in params).backward()
    opt.step()


def edited_on_all_ranks(name: str, kind: str, at: int) -> tuple[list[bool], float, list[str]]:
    """Whether the values after each step from the edit on are exactly what all ranks put there; lr is 0."""
    params = parameters(name, dist.get_rank())
    generator = torch.Generator().manual_seed(77)
    best = [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]
    opt = build(name, params)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(at + 4):
            if number == at:
                EDITS[kind]([*params], best)
            step(opt, params)
            if number >= at:
                found.append(all(torch.equal(param, value) for param, value in zip(params, best, strict=True)))
    opt.drain()
    torn = [str(one.message) for one in said if issubclass(one.category, fusedfog.TornMessageWarning)]
    return found, opt.stats()["torn_messages"], torn


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_what_all_ranks_put_in_is_what_they_have_however_it_came_in(ranks: Pool, name: str) -> None:
    # Where messages are made within the step, there is one way for all edits.
    for kind in EDITS if name in IN_FLIGHT else ("data.copy_", "copy_"):
        for found, torn, said in ranks.run(4, edited_on_all_ranks, name, kind, 3):
            assert all(found), (kind, found)
            assert (torn > 0) == (name in IN_FLIGHT), kind
            assert len(said) == (name in IN_FLIGHT)
            assert all("paused()" in text and "swapped(values)" in text for text in said)


MIXING = 60
"""Steps; what is mixed of a message that is edited while it travels is old or new, so that ranks stay apart by an edit, here a
hundredth: the distance was once 0.0102 of before after 40 steps, and once 0.0101 after 60."""


def alone_and_always(name: str, kind: str, every: int) -> tuple[list[bool], float, float]:
    """Rank 0 edits alone at one step; then all ranks shrink their parameters before every step."""
    rank, params = dist.get_rank(), parameters(name, dist.get_rank())
    opt = build(name, params)
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fusedfog.TornMessageWarning)
        for number in range(6):
            if number == 3 and rank == 0:
                new = [torch.full_like(param, 5.0) for param in params]
                EDITS[kind]([*params], new)
            step(opt, params)
            if number == 3 and rank == 0:
                kept = [bool((param == 5.0).all()) for param in params]
        with opt.paused():
            EDITS[kind]([*params], [torch.full_like(param, rank + 1.0) for param in params])
        before = opt.consensus_distance()
        for number in range(MIXING):
            if number % every == 0:
                EDITS[kind]([*params], [param.detach() * 0.99 for param in params])
            step(opt, params)
    return kept, before, opt.consensus_distance() / 0.99 ** (MIXING // every)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", ["data.copy_", "copy_"])
@pytest.mark.parametrize(
    "name",
    [
        "awc",
        "wrapped",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("awc hooks", "tracking", "capturable")),
    ],
)
def test_one_rank_keeps_what_it_edits_and_edits_at_every_step_do_not_stop_the_mixing(
    ranks: Pool, name: str, kind: str, every: int
) -> None:
    found = ranks.run(4, alone_and_always, name, kind, every)
    assert all(found[0][0])
    for _, before, after in found:
        assert before > 0.1 and after < 0.05 * before


def many(kind: str, edited: int) -> tuple[bool, float]:
    """A model of 300 parameters, one of which is edited: noticed by the very next step."""
    torch.manual_seed(dist.get_rank())
    params = [nn.Parameter(torch.randn(3 if number % 2 else 100)) for number in range(300)]
    opt = fusedfog.SGD(params, lr=0.0, sync_init=False)
    for _ in range(3):
        step(opt, params)
    EDITS[kind]([params[edited]], [torch.full_like(params[edited], 5.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fusedfog.TornMessageWarning)
        step(opt, params)
        kept = bool((params[edited] == 5.0).all())
        for _ in range(6):
            step(opt, params)
    return kept and bool((params[edited] == 5.0).all()), opt.stats()["torn_messages"]


@pytest.mark.parametrize("edited", [0, 1, 298, 299])
def test_of_many_parameters_any_is_noticed_in_time_and_counted_once(ranks: Pool, edited: int) -> None:
    for kind in ("data.copy_", "copy_"):
        assert ranks.run(2, many, kind, edited) == [(True, 1.0)] * 2


def nothing_edited(name: str) -> float:
    """NaNs that are there to stay, averages, drains, saved states and swaps are no edits."""
    params = parameters(name, dist.get_rank())
    with torch.no_grad():
        params[0][3] = float("nan") if name != "tracking" else 0.0
        params[2][5] = -0.0
    opt = build(name, params)
    for _ in range(5):
        step(opt, params)
        with opt.averaged():
            pass
        with opt.swapped([torch.zeros_like(param) for param in params]):
            pass
        opt.state_dict()
        with opt.paused(), torch.no_grad():
            params[1].add_(1.0)
        step(opt, params)
    opt.load_state_dict(opt.state_dict())
    step(opt, params)
    opt.drain()
    return float(opt.stats()["torn_messages"])


@pytest.mark.parametrize("name", ["awc", "awc hooks", "tracking", "wrapped", "master", "awc mesh"])
def test_what_is_no_edit_counts_as_none(ranks: Pool, name: str) -> None:
    assert ranks.run(4, nothing_edited, name) == [0.0] * 4


def sums_are_kept() -> tuple[float, float]:
    """Push-sum's message is made within the step, so edits before it are not torn, and no share is lost."""
    params = [nn.Parameter(torch.full((500,), float(dist.get_rank())))]
    opt = fusedfog.SGD(params, lr=0.0, algorithm="push_sum", sync_init=False)
    for number in range(40):
        if number == 5:
            params[0].data.add_(1.0)
        step(opt, params)
    return params[0][0].item(), opt.stats()["torn_messages"]


def test_push_sum_keeps_its_sums_through_edits(ranks: Pool) -> None:
    for value, torn in ranks.run(3, sums_are_kept):
        assert value == pytest.approx(2.0, abs=1e-5) and torn == 0


def trackers_are_kept() -> tuple[list[float], float]:
    params = [nn.Parameter(torch.full((500,), float(dist.get_rank())))]
    opt = fusedfog.SGD(params, lr=0.01, algorithm="gradient_tracking", sync_init=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fusedfog.TornMessageWarning)
        for number in range(12):
            if number == 6:
                params[0].data.mul_(0.5)
            params[0].grad = torch.full((500,), dist.get_rank() + 1.0)
            opt.step()
    return opt.state[params[0]]["tracker"][:2].tolist(), opt.stats()["torn_messages"]


def test_trackers_sum_to_the_gradients_sum_through_edits(ranks: Pool) -> None:
    found = ranks.run(4, trackers_are_kept)
    assert all(torn == 1 for _, torn in found)
    assert sum(tracker[0] for tracker, _ in found) == pytest.approx(1.0 + 2.0 + 3.0 + 4.0, abs=1e-4)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(0, 5))
def test_a_sample_has_some_of_every_parameter_and_enough_of_every_bucket(numels: list[int], seed: int) -> None:
    specs = [ParamSpec(str(i), (numel,), (1,), torch.float32, 0, True, float(i)) for i, numel in enumerate(numels)]
    (segment,) = build_layout(specs, 1 << 30, graded=False)
    found = places(segment.slots, seed)
    inside = [np.sum((found >= slot.start) & (found < slot.stop)) for slot in segment.slots]
    assert sum(inside) == len(found) == len(set(found.tolist()))
    assert len(found) >= min(ELEMENTS, sum(numels))
    assert len(found) <= ELEMENTS + len(numels)
    assert all(number >= 1 for number, numel in zip(inside, numels, strict=True) if numel)


def late(edits: int) -> tuple[float, list[str]]:
    """On a GPU the host learns of edits some steps later, without a wait."""
    ordered_backend.open_world()
    with fake_cuda.pretend(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params = [nn.Parameter(torch.full((700,), 1.0)), nn.Parameter(torch.zeros(3, 3))]
        opt = fusedfog.SGD(params, lr=0.0)
        for number in range(24):
            if number in (3, 4, 5)[:edits]:
                params[0].data.add_(1.0)  # seen by the device alone
            if number == 12:
                with torch.no_grad():
                    params[0].add_(1.0)  # by both
            for param in params:
                param.grad = torch.ones_like(param)
            opt.step()
        opt.drain()
        torn = opt.stats()["torn_messages"]
    return torn, [str(one.message) for one in said if issubclass(one.category, fusedfog.TornMessageWarning)]


@pytest.mark.parametrize("edits", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_gpu_tells_later_and_counts_no_edit_twice(ranks: Pool, edits: int) -> None:
    for torn, said in ranks.run(2, late, edits, init=False):
        assert torn == edits + 1
        (text,) = said
        assert ("noticed on the GPU some steps later" in text) == (edits > 0)
