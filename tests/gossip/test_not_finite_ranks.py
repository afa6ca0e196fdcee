"""One rank is not finite: the others stay finite and say whose values they left out, whatever the algorithm and its options."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import Outer
from fusedfog.algorithms import TABLE

KINDS = {"SGD": "SGD", "Adam": "AdamW", "AccumAdam": "AccumAdamW"}
ROWS = [(KINDS[family], row) for family, rows in TABLE.items() for row in rows.values()]
SETUPS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"algorithm": row.name}) for kind, row in ROWS if not row.conserves and row.exchanges != "nothing"),
    ("SGD", {"momentum": 0.9, "topology": "fully_connected"}),
    ("AdamW", {"topology": "ring", "communicate_every": 2}),
    ("AdamW", {"global_average_every": 2}),
    ("AdamW", {"mesh": "machines"}),
    ("SGD", {"mesh": "machines", "algorithm": "atc", "inside": "parameters"}),
    ("AdamW", {"fused_backward": True}),
    ("AdamW", {"capturable": True}),
    ("AdamW", {"low_precision": "master"}),
    ("SGD", {"low_precision": "kahan", "momentum": 0.9}),
    ("Decentralized", {"topology": "ring"}),
    ("Decentralized", {"algorithm": "atc"}),
    ("AdamW", {"algorithm": "local", "outer": Outer(every=2), "topology": "ring"}),
    ("AdamW", {"data_parallel_steps": 4}),
    ("SGD", {"data_parallel_steps": 4, "momentum": 0.9, "algorithm": "decentlam", "topology": "ring"}),
    ("Decentralized", {"algorithm": "allreduce"}),
]
CONSERVING = [(kind, {"algorithm": row.name}) for kind, row in ROWS if row.conserves]
PHASES = ("gradient", "parameter", "state")
SICK, AT = 2, 2
Case = tuple[str, dict[str, Any], str, bool, float]


def tensors_of(opt: Any, params: list[nn.Parameter], phase: str) -> list[torch.Tensor]:
    if phase == "state":
        states = [opt.state[p] for p in params if p in opt.state]
        return [value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim]
    return [p.data for p in params if p.grad is not None]


def spoil(opt: Any, model: nn.Module, phase: str, whole: bool, value: float) -> None:
    """Every element of a model's tensors, or the first of one parameter's."""
    params = list(model.parameters())
    for tensor in tensors_of(opt, params if whole else params[:1], phase):
        (tensor if whole else tensor.flatten()[:1]).fill_(value)


@contextmanager
def spoilt_gradients(model: nn.Module, whole: bool, value: float) -> Iterator[None]:
    """The same of the gradients that a backward inside brings."""

    def of(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        (spoilt if whole else spoilt.flatten()[:1]).fill_(value)
        return spoilt

    params = list(model.parameters())
    handles = [param.register_hook(of) for param in (params if whole else params[:1])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(kind: str, keywords: dict[str, Any], phase: str, whole: bool, value: float, steps: int) -> dict[str, Any]:
    keywords = dict(keywords)
    if keywords.get("mesh"):
        keywords["mesh"] = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = model.bfloat16() if "low_precision" in keywords else model
    dtype = next(model.parameters()).dtype
    if kind == "Decentralized":
        opt = fusedfog.Decentralized(torch.optim.AdamW(model.parameters(), lr=1e-2), **keywords)
    else:
        opt = getattr(fusedfog, kind)(model.parameters(), lr=1e-2, **keywords)
    me, error = dist.get_rank(), ""
    torch.manual_seed(me)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(steps):
                opt.zero_grad()
                sick = me == SICK and step == AT
                # Where backward averages gradients, they are spoilt before it does.
                with spoilt_gradients(model, whole, value) if sick and phase == "gradient" else nullcontext():
                    model(torch.randn(5, 6, dtype=dtype)).square().mean().backward()
                if sick and phase != "gradient":
                    spoil(opt, model, phase, whole, value)
                opt.step()
        except fusedfog.NonFiniteError as found:
            error = str(found)
    stats = opt.stats()
    return {
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "error": error,
        "refused": stats["refused"],
        "from": stats.get("refused_from", {}),
        "healed": stats["healed"],
        "named": [str(one.message) for one in caught if issubclass(one.category, fusedfog.NonFiniteWarning)],
    }


def walk(cases: list[Case], nonfinite: str, steps: int = 8) -> list[dict[str, Any]]:
    return [
        train(kind, {**keywords, "nonfinite": nonfinite}, phase, whole, value, steps)
        for kind, keywords, phase, whole, value in cases
    ]


def cases(values: tuple[float, ...] = (math.nan,), wholes: tuple[bool, ...] = (False, True)) -> list[Case]:
    return [(*setup, *rest) for setup in SETUPS for rest in itertools.product(PHASES, wholes, values)]


def each(ranks: Pool, n: int, given: list[Case], nonfinite: str, steps: int = 8) -> list[tuple[Case, list[Any]]]:
    found = ranks.run(n, walk, given, nonfinite, steps, timeout=600)
    return [(case, [rank[i] for rank in found]) for i, case in enumerate(given)]


def assert_contained(ranks: Pool, n: int, given: list[Case]) -> None:
    for case, found in each(ranks, n, given, "contain"):
        sick = found[SICK]
        assert all(one["finite"] for rank, one in enumerate(found) if rank != SICK), case
        assert set().union(*[one["from"] for one in found]) <= {SICK}, case
        assert all(one["refused"] == sum(one["from"].values()) for one in found), case
        for rank, one in enumerate(found):
            assert len(one["named"]) == bool(one["refused"]), case
            assert all(f"rank {SICK}" in text and text.startswith(f"rank {rank}: ") for text in one["named"]), case
        # A parameter that leaves gradients finite, as one that saturates tanh, is seen where parameters travel.
        if not sick["finite"] and case[1].get("algorithm") != "allreduce":
            assert any(one["refused"] for one in found), case


def assert_healed(ranks: Pool, n: int, given: list[Case]) -> None:
    for case, found in each(ranks, n, given, "heal", 12):
        assert all(one["finite"] for one in found), case
        assert all(one["healed"] == 0 for rank, one in enumerate(found) if rank != SICK), case
        # Gradients that are not finite are skipped, so there is nothing to heal.
        if case[2] == "parameter":
            assert found[SICK]["healed"] > 0, case


def test_no_healthy_rank_becomes_sick_whatever_the_algorithm_and_phase(ranks: Pool) -> None:
    # Six cases a setup: so each setup has about one, and neighbouring ones others.
    assert_contained(ranks, 4, [case for i, case in enumerate(cases()) if i % 7 == 0])


def test_heal_brings_the_sick_rank_back(ranks: Pool) -> None:
    assert_healed(
        ranks, 4, [case for i, case in enumerate(cases()) if case[2] == "parameter" and (i // 2 + case[3]) % 2]
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8])
def test_no_healthy_rank_becomes_sick_in_full(ranks: Pool, n: int) -> None:
    assert_contained(ranks, n, cases((math.nan, math.inf, -math.inf)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8])
def test_heal_brings_the_sick_rank_back_in_full(ranks: Pool, n: int) -> None:
    assert_healed(ranks, n, cases((math.nan, math.inf, -math.inf)))


@pytest.mark.parametrize("kind_and_keywords", CONSERVING, ids=str)
@pytest.mark.parametrize("phase", ["gradient", pytest.param("parameter", marks=pytest.mark.slow)])
def test_methods_that_conserve_sums_end_on_every_rank_and_name_the_sick_one(
    ranks: Pool, kind_and_keywords: tuple[str, dict[str, Any]], phase: str
) -> None:
    found = ranks.run(4, train, *kind_and_keywords, phase, False, math.nan, 40)
    for rank, one in enumerate(found):
        assert f"rank {SICK}" in one["error"], one
        assert "sums over ranks must be conserved" in one["error"]
        assert one["finite"] == (rank != SICK)


def test_skipping_a_step_leaves_the_rank_well_and_keeps_mixing(ranks: Pool) -> None:
    setups: list[Case] = [(*setup, "gradient", True, math.inf) for setup in SETUPS]
    for case, found in each(ranks, 4, setups, "skip"):
        assert all(one["finite"] for one in found), case
        # Where gradients are averaged the others hear of it, for theirs are averaged without these.
        averages = case[1].get("algorithm") == "allreduce" or {"data_parallel_steps", "mesh"} & case[1].keys()
        assert averages or not any(one["refused"] for one in found), case


def skip_as_a_scaler(kind: str, keywords: dict[str, Any], scaled: bool) -> list[list[float]]:
    """Parameters after each step, one of which has gradients that are not finite on one rank."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(9))
    opt = getattr(fusedfog, kind)([p], lr=0.1, nonfinite="contain" if scaled else "skip", **keywords)
    path = []
    for step in range(5):
        p.grad = torch.full((9,), 0.1 * (dist.get_rank() + step))
        bad = dist.get_rank() == 1 and step == 2
        if bad:
            p.grad[3] = math.nan
        if scaled:
            opt.grad_scale, opt.found_inf = None, torch.tensor(float(bad))
        opt.step()
        path.append(p.tolist())
    return path


@pytest.mark.parametrize(
    "keywords", [{}, {"algorithm": "atc"}, {"algorithm": "allreduce"}, {"max_grad_norm": 1.0}], ids=str
)
def test_a_skipped_step_is_the_one_that_a_grad_scaler_skips(ranks: Pool, keywords: dict[str, Any]) -> None:
    for kind in ("SGD", "AdamW"):
        assert ranks.run(4, skip_as_a_scaler, kind, keywords, False) == ranks.run(
            4, skip_as_a_scaler, kind, keywords, True
        )


def spread(nonfinite: str) -> bool:
    return bool(train("AdamW", {"nonfinite": nonfinite}, "gradient", False, math.nan, 8)["finite"])


def test_propagate_is_what_it_was(ranks: Pool) -> None:
    assert ranks.run(4, spread, "propagate") == [False] * 4


def averages() -> tuple[list[float], float, float]:
    p, me = nn.Parameter(torch.zeros(3)), dist.get_rank()
    opt = fusedfog.SGD([p], lr=0.1)
    with torch.no_grad():
        p.fill_(float(me))
        if me == SICK:
            p[0] = math.nan
    with opt.averaged():
        inside = p.tolist()
    return inside, opt.consensus_distance(), p[0].item()


def test_averages_over_all_ranks_are_those_of_finite_values(ranks: Pool) -> None:
    mean = [0.0 + 1.0 + 3.0, 6.0]
    squares = sum((x - 4 / 3) ** 2 for x in (0.0, 1.0, 3.0)) + 2 * sum((x - 1.5) ** 2 for x in range(4))
    for rank, (inside, distance, own) in enumerate(ranks.run(4, averages)):
        assert inside == pytest.approx([mean[0] / 3, mean[1] / 4, mean[1] / 4])
        assert distance == pytest.approx(math.sqrt(squares / 4))
        assert math.isnan(own) == (rank == SICK)


def lame(wire: str) -> tuple[bool, str]:
    """As many steps as a sick rank gets through."""
    found = train("AdamW", {"wire_dtype": wire, "topology": "ring"}, "gradient", False, math.nan, AT + 1)
    return found["finite"], found["error"]


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_compressed_messages_end_the_sick_rank_alone(ranks: Pool, wire: str) -> None:
    found = ranks.run(4, lame, wire)
    assert [error != "" for _, error in found] == [rank == SICK for rank in range(4)]
    assert all(finite for rank, (finite, _) in enumerate(found) if rank != SICK)


def accuracy_on_digits(nonfinite: str) -> float:
    """Of the average model after one rank's parameters were lost half way."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    me, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    opt = fusedfog.AdamW(model.parameters(), lr=5e-3, model=model, nonfinite=nonfinite)
    torch.manual_seed(me)
    mine = torch.arange(me, 1400, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fusedfog.NonFiniteWarning)
        for step in range(100):
            some = mine[torch.randint(len(mine), (32,))]
            opt.zero_grad()
            nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            if step == 60 and me == SICK:
                spoil(opt, model, "parameter", True, math.nan)
            opt.step()
    with opt.averaged(), torch.no_grad():
        return float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())


def test_digits_are_learned_although_a_rank_was_lost(ranks: Pool) -> None:
    accuracy = {way: ranks.run(4, accuracy_on_digits, way)[0] for way in ("contain", "heal", "propagate")}
    assert accuracy["propagate"] < 0.2, "NaN is zero to argmax"
    assert accuracy["contain"] > 0.85
    assert accuracy["heal"] > 0.85
