"""What goes with what: every pair of features builds and makes two steps, or raises the text of its row, on two ranks."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedfog
from fusedfog import topology
from fusedfog.algorithm import Outer
from fusedfog.algorithms import TABLE, WRAPPED, algorithm_for
from fusedfog.optim import compatibility
from fusedfog.optim.compatibility import ROWS, Refusal, check, choose_topology, first_refusal
from fusedfog.optim.features import FEATURES, HYPER, ROWS_OF_ALGORITHMS, Setup

PACKAGE = Path(fusedfog.__file__).parent
OPTIMIZERS = {"SGD": "SGD", "Adam": "AdamW", "AccumAdam": "AccumAdamW", "wrapped": "Decentralized"}
ALGORITHMS = [(family, name) for family, rows in {**TABLE, "wrapped": WRAPPED}.items() for name in rows]


class Endless(topology.Topology):
    """A sequence that never repeats, as far as it says, but whose ranks have one neighbour at most."""

    def __init__(self, n: int) -> None:
        super().__init__(f"endless({n})", n, None)

    @property
    def max_degree(self) -> int:
        return 1

    def _round(self, rank: int, step: int) -> topology.Round:
        return topology.ring(self.size).round(rank, step)

    def is_doubly_stochastic(self) -> bool:
        return True


def graphs() -> dict[str, topology.Topology]:
    """Two ranks' topologies, one of each kind that a row knows."""
    still = topology.from_matrix(np.eye(2))
    return {
        "static symmetric": topology.ring(2),
        "not static symmetric": topology.sequence([topology.ring(2), still]),
        "not doubly stochastic": topology.from_matrix(np.array([[0.5, 0.5], [0.25, 0.75]]), stochastic="row"),
        "endless": Endless(2),
        "endless of any degree": topology.from_rounds(2, lambda step: {}, doubly_stochastic=True),
    }


@dataclass
class Ingredients:
    """What an optimizer is built of."""

    keywords: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    sharded: bool = False


OPTIONS: dict[str, dict[str, Any]] = {
    "communicate_every": {"communicate_every": 2},
    "global_average_every": {"global_average_every": 2},
    "outer": {"outer": Outer(every=2)},
    "fused_backward": {"fused_backward": True},
    "wire_dtype": {"wire_dtype": "int8"},
    "low_precision": {"low_precision": "kahan"},
    "low_precision of fp32": {"low_precision": "kahan"},
    "state_dtype": {"state_dtype": torch.bfloat16},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
    "measure": {"measure": True},
    "heals": {"nonfinite": "heal"},
    "asynchronous": {"asynchronous": True},
    "adapt": {"adapt": 2},
    "cpu_compile": {"cpu_compile": True},
    "mix_strength": {"mix_strength": 0.5},
    "weight": {"weight": None},
    "mix_strength that changes": {"mix_strength": lambda step, rate: rate / (1 + step)},
}
HYPERS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "amsgrad": {"amsgrad": True},
}
GRAPHS = ("static symmetric", "not static symmetric", "not doubly stochastic", "endless", "endless of any degree")
DTYPES = {
    "low_precision": torch.bfloat16,
    "low_precision of fp32": torch.float32,
    "bf16": torch.bfloat16,
    "float64 parameters": torch.float64,
}
STORAGE = ("bf16", "float64 parameters", "FSDP2", "mesh")
PARTS = (*OPTIONS, *HYPERS, *GRAPHS, *STORAGE)


def mixed_together(parts: tuple[str, ...], meshes: dict[str, DeviceMesh]) -> Ingredients:
    made = Ingredients()
    for part in parts:
        made.keywords |= {"weight": 1.0 + dist.get_rank()} if part == "weight" else OPTIONS.get(part, {})
        made.group |= HYPERS.get(part, {})
        if part in GRAPHS:
            made.keywords["topology"] = graphs()[part]
        made.sharded |= part == "FSDP2"
        made.dtype = DTYPES.get(part, made.dtype)
    if made.sharded or "mesh" in parts:
        made.keywords["mesh"] = meshes["machines"]
    return made


def build(family: str, algorithm: str, made: Ingredients, mesh: DeviceMesh) -> tuple[Any, nn.Module]:
    model = nn.Linear(4, 3).to(made.dtype)
    if made.sharded:
        fully_shard(model, mesh=mesh["shard"])
    group: dict[str, Any] = {"params": list(model.parameters()), "lr": 0.1, **made.group}
    if family == "wrapped":
        inner = torch.optim.AdamW if "amsgrad" in made.group else torch.optim.SGD
        return fusedfog.Decentralized(inner([group]), algorithm=algorithm, **made.keywords), model
    return getattr(fusedfog, OPTIMIZERS[family])([group], algorithm=algorithm, **made.keywords), model


@contextmanager
def asked() -> Iterator[list[str | None]]:
    """The texts of the rows that `check` finds inside; compiling, which takes ten seconds a pass, is left out."""
    found: list[str | None] = []

    def look(setup: Setup) -> Refusal | None:
        row = first_refusal(setup)
        found.append(row.text(setup) if row is not None else None)
        return row

    with (
        mock.patch.object(compatibility, "first_refusal", look),
        mock.patch("fusedfog.optim.build.compile_everywhere", lambda *given: False),
    ):
        yield found


def walk(cases: list[tuple[str, str, tuple[str, ...]]]) -> tuple[list[str], int]:
    """The cases that fail without a row, and how many are refused by one."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    wrong, refused = [], 0
    for family, algorithm, parts in cases:
        made, case = mixed_together(parts, {"machines": mesh}), f"{family} {algorithm} {' + '.join(parts)}"
        with asked() as texts:
            try:
                opt, model = build(family, algorithm, made, mesh)
                for _ in range(2):
                    opt.zero_grad()
                    model(torch.ones(2, 4, dtype=made.dtype)).square().mean().backward()
                    opt.step()
                opt.drain()
            except Exception as error:
                if str(error) != (texts[-1] if texts else None):
                    wrong.append(f"{case}: {type(error).__name__}: {error}")
                refused += 1
                continue
        if not texts:
            wrong.append(f"{case}: nobody asked")
        if not all(math.isfinite(p.float().sum().item()) for p in model.parameters() if not made.sharded):
            wrong.append(f"{case}: not finite")
    return wrong, refused


def fits(family: str, parts: tuple[str, ...]) -> bool:
    """Whether the optimizer takes these at all: Adam has no momentum, and a thing is only one thing at a time."""
    foreign = {"SGD": {"amsgrad"}, "wrapped": set()}.get(family, {"momentum", "nesterov", "dampening"})
    single = (
        set(GRAPHS),
        {"bf16", "float64 parameters"},
        {"low_precision", "low_precision of fp32"},
        {"mix_strength", "mix_strength that changes"},
        {"FSDP2", "mesh"},
        set(HYPER),
    )
    return not foreign & set(parts) and all(len(kind & set(parts)) <= 1 for kind in single)


def cases(algorithms: list[tuple[str, str]], count: int) -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        (family, name, parts)
        for family, name in algorithms
        for parts in itertools.combinations(PARTS, count)
        if fits(family, parts)
    ]


def assert_every_case_is_known(ranks: Pool, given: list[tuple[str, str, tuple[str, ...]]]) -> None:
    (wrong, refused), (others, also_refused) = ranks.run(2, walk, given, timeout=600)
    assert wrong == []
    assert others == []
    assert 0 < refused == also_refused < len(given)


@pytest.mark.slow
def test_every_algorithm_with_every_option_topology_and_storage(ranks: Pool) -> None:
    assert_every_case_is_known(ranks, cases(ALGORITHMS, 1))


def test_every_pair_of_options_topologies_and_storages(ranks: Pool) -> None:
    assert_every_case_is_known(ranks, cases([("SGD", "awc"), ("Adam", "atc"), ("SGD", "local")], 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", OPTIMIZERS)
def test_every_pair_with_every_algorithm(ranks: Pool, family: str) -> None:
    assert_every_case_is_known(ranks, cases([one for one in ALGORITHMS if one[0] == family], 2))


# -- the table itself --------------------------------------------------------------------------------------------------


def test_rows_name_features_and_say_what_to_use_instead() -> None:
    for row in ROWS:
        assert row.what in FEATURES, row
        assert row.other in FEATURES, row
        assert row.why, row
        assert row.instead, row
        assert not row.why.endswith("."), row
    pairs = [{row.what, row.other} for row in ROWS]
    assert all(pairs.count(pair) == 1 for pair in pairs)


def test_every_feature_is_walked_or_a_row_knows_it() -> None:
    known = {row.what for row in ROWS} | {row.other for row in ROWS} | {name for name, _, _ in ROWS_OF_ALGORITHMS}
    assert set(FEATURES) <= known | set(PARTS)


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ({"dtypes": {"w": torch.float64}}, "float64 parameter w does not work with cuda:0: the GPU kernel computes in"),
        (
            {"lacking": ("bf16 states", "it cannot", "fp32")},
            "cuda:0 does not work with bf16 states: it cannot; use fp32",
        ),
    ],
)
def test_rows_of_gpus_that_are_not_here(setup: dict[str, Any], says: str) -> None:
    row = algorithm_for("awc", "SGD")
    with pytest.raises(ValueError, match=says):
        check(Setup("SGD", row, place=torch.device("cuda", 0), **setup))
    check(Setup("SGD", row, {"cpu_compile": True, "measure": True}, place=torch.device("cuda", 0)))


def test_a_rank_that_is_alone_makes_the_inner_step_whatever_the_algorithm() -> None:
    for family, name in ALGORITHMS:
        setup = Setup(family, algorithm_for(name, family), {"state_dtype": torch.bfloat16, "capturable": True})
        assert (first_refusal(setup) is None) == (family != "wrapped")


# -- changes ---------------------------------------------------------------------------------------------------------


def changes_that_are_refused() -> list[str]:
    said = []

    def attempt(change: Any) -> None:
        with asked() as texts, pytest.raises(ValueError, match="does not work with") as caught:
            change()
        assert str(caught.value) == texts[-1]
        said.append(str(caught.value))

    def parameter() -> nn.Parameter:
        return nn.Parameter(torch.zeros(3))

    opt = fusedfog.SGD([parameter()], lr=0.1, algorithm="extra")
    attempt(lambda: opt.set_topology(graphs()["not static symmetric"]))
    attempt(lambda: fusedfog.SGD([parameter()], lr=0.1, wire_dtype="int8").set_topology(graphs()["endless"]))
    track = fusedfog.SGD([parameter()], lr=0.1, algorithm="gradient_tracking")
    attempt(lambda: track.add_param_group({"params": [parameter()], "momentum": 0.9}))
    assert len(track.param_groups) == 1
    foreign = torch.optim.SGD([parameter()], lr=0.1, momentum=0.9).state_dict()
    attempt(lambda: track.load_state_dict(foreign))
    assert track.param_groups[0]["momentum"] == 0
    dist.barrier()
    return said


def test_topologies_groups_and_checkpoints_are_checked_as_at_construction(ranks: Pool) -> None:
    first, second = ranks.run(2, changes_that_are_refused)
    assert first == second
    assert len(first) == 4


def mesh_of_local_steps() -> str:
    mesh = init_device_mesh("cpu", (2, 1))
    with pytest.raises(ValueError, match="mesh") as caught:
        fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, algorithm="local", mesh=mesh)
    return str(caught.value)


def test_a_mesh_of_ranks_that_exchange_nothing_is_refused_in_words(ranks: Pool) -> None:
    for text in ranks.run(2, mesh_of_local_steps):
        assert text == (
            "algorithm 'local' does not work with mesh=: it exchanges nothing, so machines have nothing to mix; leave out "
            "mesh=, or use awc or atc"
        )


# -- nobody else asks --------------------------------------------------------------------------------------------------

NAMES = {name for rows in TABLE.values() for name in rows} | {"outer"}


def asks_by_name(node: ast.AST) -> bool:
    """A comparison with, or a look-up of, an algorithm or rule by its name."""
    asked_of: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        asked_of = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and "algorithm_for" in ast.unparse(node.func):
        asked_of = list(node.args)
    elif isinstance(node, ast.MatchValue):
        asked_of = [node.value]
    parts = [
        part for one in asked_of for part in (one.elts if isinstance(one, (ast.Tuple, ast.List, ast.Set)) else [one])
    ]
    return any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts)


def test_algorithms_are_asked_for_by_name_in_their_table_alone() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "algorithms.py" and path.relative_to(PACKAGE).parts[0] not in ("examples", "kernels")
        for node in ast.walk(ast.parse(path.read_text()))
        if hasattr(node, "lineno") and asks_by_name(node)
    ]
    assert found == []


def test_a_question_by_name_would_be_found() -> None:
    for code in ('row.name == "push_sum"', 'row.after.rule in ("outer", "mix")', 'algorithm_for("local", family)'):
        assert any(map(asks_by_name, ast.walk(ast.parse(code)))), code


@pytest.mark.parametrize(
    ("family", "name", "size", "graph"),
    [
        ("Adam", "awc", 8, "one_peer_exponential"),
        ("SGD", "atc", 6, "base_graph"),
        ("Adam", "dag", 8, "symmetric_exponential"),
        ("SGD", "exact_diffusion", 6, "symmetric_exponential"),
    ],
)
def test_the_default_graph_is_one_that_serves_the_algorithm(family: str, name: str, size: int, graph: str) -> None:
    chosen = choose_topology(Setup(family, TABLE[family][name], ranks=size), None, size)
    assert chosen is not None
    assert graph in chosen.name
