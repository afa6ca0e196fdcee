"""The option table row by row: what each algorithm accepts, what it refuses and what it says to use instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog import topology
from fusedfog.algorithm import Algorithm, Outer
from fusedfog.algorithms import TABLE, algorithm_for
from fusedfog.optim.compatibility import check, choose_topology
from fusedfog.optim.features import Setup

KINDS = {"SGD": "SGD", "Adam": "AdamW", "AccumAdam": "AccumAdamW"}
ROWS = [(family, name) for family, rows in TABLE.items() for name in rows]
GOSSIPING = [(family, name) for family, name in ROWS if TABLE[family][name].exchanges == "parameters"]

REFUSED: dict[str, dict[str, str]] = {
    "decentlam": {
        "nesterov": "part of",
        "dampening": "part of",
        "communicate_every": "diverges",
        "global_average_every": "same",
    },
    "quasi_global": {"dampening": "part of"},
    "exact_diffusion": {"communicate_every": "diverges", "global_average_every": "same"},
    "extra": {"communicate_every": "diverges", "global_average_every": "same"},
    "gradient_tracking": {"momentum": "momentum_tracking", "nesterov": "part of", "dampening": "part of"},
    "momentum_tracking": {"nesterov": "part of", "dampening": "part of"},
    "push_sum": {"global_average_every": "use atc", "mix_strength": "do not sum to one"},
    "allreduce": {"mix_strength": "averages gradients"},
    "local": {"mix_strength": "nothing to mix"},
}
OPTIONS = {
    "momentum": 0.9,
    "nesterov": True,
    "dampening": 0.1,
    "weight_decay": 0.1,
    "communicate_every": 2,
    "global_average_every": 5,
    "mix_strength": 0.5,
}


def test_the_table_has_every_algorithm_of_both_families() -> None:
    assert set(TABLE["SGD"]) == {
        "awc", "atc", "decentlam", "quasi_global", "exact_diffusion", "extra", "gradient_tracking", "momentum_tracking",
        "push_sum", "allreduce", "local",
    }  # fmt: skip
    assert set(TABLE["Adam"]) == {
        "awc", "atc", "dag", "quasi_global", "gradient_tracking", "push_sum", "allreduce", "local",
    }  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", TABLE["SGD"])
def test_every_sgd_option_is_accepted_or_refused_with_a_reason(name: str, option: str) -> None:
    values: dict[str, Any] = {**dict.fromkeys(OPTIONS), "communicate_every": 1, "mix_strength": 1.0}
    values[option] = OPTIONS[option]
    setup = Setup("SGD", TABLE["SGD"][name], values)
    reason = REFUSED.get(name, {}).get(option)
    if reason is None:
        check(setup)
    else:
        with pytest.raises(ValueError, match=f"'{name}' does not work with {option}=.*{reason}"):
            check(setup)


def chosen_for(family: str, name: str, given: topology.Topology | str | None, n: int) -> topology.Topology | None:
    return choose_topology(Setup(family, algorithm_for(name, family), ranks=n), given, n)


def refused_by_every_rank(kind: str, keywords: dict[str, Any]) -> str:
    p = nn.Parameter(torch.zeros(3))
    home = p.data_ptr()
    with pytest.raises(ValueError, match=r"\w+") as caught:
        getattr(fusedfog, kind)([p], lr=0.1, **keywords)
    assert p.data_ptr() == home
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        (
            "SGD",
            {"algorithm": "decentlam", "momentum": 0.9, "communicate_every": 4},
            "quasi_global or gradient_tracking",
        ),
        ("SGD", {"algorithm": "exact_diffusion", "topology": "one_peer_exponential"}, "'symmetric_exponential'"),
        ("SGD", {"algorithm": "extra", "topology": "exponential"}, "static symmetric"),
        ("SGD", {"algorithm": "decentlam", "topology": "one_peer_hypercube"}, "static symmetric"),
        ("AdamW", {"algorithm": "quasi_global", "amsgrad": True}, "amsgrad"),
        ("SGD", {"algorithm": "extra", "mix_strength": math.cos}, "give a number, or use quasi_global"),
        (
            "AdamW",
            {"algorithm": "push_sum", "mix_strength": math.cos},
            "with mix_strength=a function: it uses edges alone",
        ),
        ("AdamW", {"algorithm": "local", "mix_strength": 0.0}, "with mix_strength=0.0: it exchanges nothing"),
        ("AdamW", {"algorithm": "decentlam"}, "unknown algorithm 'decentlam' for Adam"),
        ("AdamW", {"algorithm": "atc", "outer": Outer(every=3)}, "use algorithm='local'"),
        ("AdamW", {"algorithm": "local", "outer": Outer(every=3), "communicate_every": 2}, "outer= has a rhythm"),
    ],
)
def test_refusals_come_at_construction_and_name_a_way_out(
    ranks: Pool, kind: str, keywords: dict[str, Any], message: str
) -> None:
    for text in ranks.run(4, refused_by_every_rank, kind, keywords):
        assert message in text


@pytest.mark.parametrize(("family", "name"), GOSSIPING)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 12])
def test_every_algorithm_has_a_legal_default_topology_for_every_size(family: str, name: str, n: int) -> None:
    row = algorithm_for(name, family)
    chosen = chosen_for(family, name, None, n)
    assert chosen is not None
    assert chosen.size == n
    assert chosen.is_doubly_stochastic()
    if row.graph == "symmetric":
        assert chosen.is_static
        assert chosen.is_symmetric()


def needs(row: Algorithm, graph: topology.Topology) -> bool:
    if row.graph == "any":
        return True
    return graph.is_doubly_stochastic() and (row.graph != "symmetric" or (graph.is_static and graph.is_symmetric()))


@pytest.mark.parametrize(("family", "name"), GOSSIPING)
@pytest.mark.parametrize(
    "graph", ["ring", "exponential", "symmetric_exponential", "one_peer_exponential", "base_graph", "grid", "star"]
)
def test_topologies_are_accepted_exactly_where_the_theory_covers_them(family: str, name: str, graph: str) -> None:
    row = algorithm_for(name, family)
    if needs(row, topology.named(graph, 8)):
        assert chosen_for(family, name, graph, 8) is not None
    else:
        with pytest.raises(ValueError, match=f"{name} needs a"):
            chosen_for(family, name, graph, 8)


def test_a_merely_row_stochastic_graph_is_for_push_sum_alone() -> None:
    graph = topology.one_peer(topology.star(6))
    for family, name in GOSSIPING:
        row = algorithm_for(name, family)
        if row.graph == "any":
            assert chosen_for(family, name, graph, 6) is graph
        else:
            with pytest.raises(ValueError, match="push_sum" if row.graph == "doubly_stochastic" else "needs a"):
                chosen_for(family, name, graph, 6)


@pytest.mark.parametrize("bad", [{"every": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"lr": float("nan")}])
def test_outer_checks_its_numbers(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="outer: "):
        Outer(**bad)


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_one_rank_is_torch_whatever_the_algorithm(family: str, name: str) -> None:
    if family == "AccumAdam":
        pytest.skip("torch has no AccumAdamW; with accum_steps=1 it is AdamW, tested with the kernels")
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    options = {"momentum": 0.9} if family == "SGD" and name != "gradient_tracking" else {}
    ours = getattr(fusedfog, KINDS[family])([p], lr=0.1, algorithm=name, **options)
    theirs = getattr(torch.optim, KINDS[family])([q], lr=0.1, **options)
    for _ in range(10):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
