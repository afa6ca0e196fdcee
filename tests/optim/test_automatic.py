"""`topology="auto"`: machines become nodes where ranks share them. Here each rank is told which machine it is on."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fusedfog
from fusedfog.comm.machines import by_machine, this_machine
from fusedfog.cost.workload import OPTIMIZER_TENSORS, PROFILES
from fusedfog.log import log
from fusedfog.plan import Link, Links, Network, Workload
from fusedfog.plan.auto import explain_auto
from fusedfog.topology import one_peer_exponential

TWO = "abab"
"""The machine of each of four ranks; those of one are not consecutive."""

BOTH = [[0, 2], [1, 3]]
"""The same as a mesh."""

SHARED = "auto: the ranks of a machine share its link"


@contextmanager
def on(machines: str) -> Iterator[None]:
    """Inside, this rank is on machine `machines[rank]`."""
    name = machines[dist.get_rank()]
    with mock.patch("fusedfog.optim.automatic.this_machine", lambda: name):
        yield


def net(width: int = 9) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def build(params: Any, kind: str = "AdamW", **keywords: Any) -> Any:
    if kind == "Decentralized":
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=0.02), **keywords)
    return getattr(fusedfog, kind)(params, lr=0.02, **keywords)


def train(model: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        source = torch.Generator().manual_seed(100 * step + dist.get_rank())
        opt.zero_grad()
        model(torch.randn(4, 5, generator=source)).square().mean().backward()
        opt.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- the choice ------------------------------------------------------------------------------------------------------


def chosen(machines: str, keywords: dict[str, Any]) -> tuple[str, str, str]:
    """What an optimizer says of its graph."""
    keywords = dict(keywords)
    with on(machines):
        opt = build(net(keywords.pop("width", 9)).parameters(), **keywords)
    told = opt.stats()
    return told["topology"], told["topology_reason"], repr(opt).partition("\n")[0]


FLAT = "one_peer_exponential"
NODES = "one_peer_exponential over 2 machines of 2 ranks"
CHOICES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "machines": (TWO, {}, NODES, SHARED),
    "by name": (TWO, {"topology": "auto"}, NODES, SHARED),
    "one machine": ("aaaa", {}, FLAT, "auto: all ranks are on one machine"),
    "a machine each": ("abcd", {}, FLAT, "auto: every rank has a machine of its own"),
    "uneven": ("aaab", {}, FLAT, "auto: ranks are nodes, since machines have 1 or 3 of them"),
    "given": (TWO, {"topology": "ring"}, "ring", "given"),
    "static": (TWO, {"kind": "SGD", "algorithm": "extra"}, "symmetric_exponential over 2 machines of 2 ranks", SHARED),
    "parameters": (TWO, {"inside": "parameters", "sync_init": False}, NODES, SHARED),
    "int8": (TWO, {"wire_dtype": "int8"}, "symmetric_exponential over 2 machines of 2 ranks", SHARED),
    "push_sum": (
        TWO,
        {"algorithm": "push_sum"},
        FLAT,
        "auto: ranks are nodes although they share machines, since algorithm 'push_sum' does not work with mesh=: it works on "
        "the ranks' own edges and not on a mesh",
    ),
    "captured": (
        TWO,
        {"capturable": True},
        FLAT,
        "auto: ranks are nodes although they share machines, since capturable=True does not work with mesh= with "
        "inside='gradients': backward waits for other ranks there",
    ),
    "outer": (
        TWO,
        {"algorithm": "local", "outer": fusedfog.Outer(every=3)},
        FLAT,
        "auto: ranks are nodes, since outer= runs over the steps of each by itself",
    ),
    "apart": (
        TWO,
        {"sync_init": False},
        FLAT,
        "auto: ranks are nodes, since those of a machine may have different parameters",
    ),
    "allreduce": (TWO, {"algorithm": "allreduce"}, "", ""),
    "local": (TWO, {"algorithm": "local"}, "", ""),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice_and_its_reason(ranks: Pool, case: str) -> None:
    machines, keywords, graph, reason = CHOICES[case]
    found = ranks.run(4, chosen, machines, keywords)
    assert found == [found[0]] * 4
    told, why, shown = found[0]
    assert (told, why) == (graph, reason)
    assert (f" on {graph} ({reason}), 4 ranks" in shown) == reason.startswith("auto")
    assert (f" on {graph}, 4 ranks" in shown) == (reason == "given")


SLOW_INSIDE = Links(2, Link(1e-4, 1e7), Link(1e-5, 1e10), 1e10)
SLOW_ACROSS = Links(2, Link(1e-6, 1e10), Link(1e-4, 1e7), 1e10)


def in_words(count: int, time: str, loss: str) -> str:
    """What follows the reason where links are known and DDP's loss is reached."""
    return rf"; the least time to DDP's loss of {count} ways, {time} of DDP's: .* a step, loss {re.escape(loss)}"


def test_given_links_decide_by_time_to_the_loss(ranks: Pool, tmp_path: Path) -> None:
    """With AdamW ranks as nodes are not known to reach DDP's loss, however fast they are; with SGD they are."""
    SLOW_INSIDE.write(tmp_path / "links.json")
    network = Network(4, SLOW_ACROSS.across or Link(0, 1), 2, SLOW_ACROSS.inside)
    apart = "auto: ranks are nodes although they share machines"
    unknown = ", if computing takes as long as these messages"
    for links, kind, graph, reason in (
        (str(tmp_path / "links.json"), "AdamW", NODES, SHARED + in_words(6, "1.05", "+0.5% n=16") + unknown),
        (SLOW_INSIDE, "SGD", FLAT, apart + in_words(6, "0.42", "-0.3% n=4") + unknown),
        (SLOW_ACROSS, "AdamW", NODES, SHARED + in_words(6, "0.40", "+0.5% n=16") + unknown),
        (network, "AdamW", NODES, SHARED + in_words(6, "0.40", "+0.5% n=16") + unknown),
    ):
        for told, why, shown in ranks.run(4, chosen, "aabb", {"links": links, "kind": kind}):
            assert told == graph
            assert re.fullmatch(reason, why), why
            assert why in shown


TIGHT = Links(2, Link(1e-6, 1e10), Link(1e-6, 1e5), 1e10, step_s=1e-3)
"""A message between machines takes several steps."""


@pytest.mark.parametrize(
    ("machines", "keywords", "graph", "wire"),
    [
        ("aabb", {}, NODES, "int8"),
        ("abcd", {}, "one_peer_exponential", "int8"),
        ("aabb", {"wire_dtype": "exact"}, NODES, None),
        ("aabb", {"wire_dtype": "bf16"}, "symmetric_exponential over 2 machines of 2 ranks", "bf16"),
        ("aabb", {"topology": "ring"}, "ring", None),
        ("aabb", {"nonfinite": "heal"}, NODES, None),
        ("aabb", {"kind": "Decentralized"}, NODES, None),
        ("abcd", {"kind": "SGD", "algorithm": "extra"}, "symmetric_exponential", "int8"),
    ],
)
def test_a_tight_link_gets_smaller_messages_unless_the_user_says_otherwise(
    ranks: Pool, machines: str, keywords: dict[str, Any], graph: str, wire: str | None
) -> None:
    for told, codes in ranks.run(4, chosen_messages, machines, {"links": TIGHT, **keywords}):
        assert (told, codes) == (graph, {"int8": "torch.int8", "bf16": "torch.bfloat16", None: "None"}[wire])


def chosen_messages(machines: str, keywords: dict[str, Any]) -> tuple[str, str]:
    with on(machines):
        opt = build(net(50).parameters(), **keywords)
    return opt.stats()["topology"], str(opt._engine.phases.last.codes)


@pytest.mark.parametrize("machines", ["aabb", "abcd"])
@pytest.mark.parametrize("links", [TIGHT, replace(TIGHT, across=Link(1e-6, 1e9)), SLOW_INSIDE])
def test_optimizers_and_the_command_choose_alike(ranks: Pool, machines: str, links: Links) -> None:
    local = 2 if machines == "aabb" else 1
    size, step_s = sum(p.numel() for p in net(50).parameters()) * 4.0, 1e-3
    links = replace(links, step_s=step_s, memory_bandwidth=math.inf)
    network = Network(4, links.across or Link(0, 1), local, links.inside if local > 1 else None)
    for kind, tensors in (("SGD", "momentum"), ("AdamW", "adam")):
        workload = Workload.profiled(PROFILES["even"](), size, step_s, optimizer_tensors=OPTIMIZER_TENSORS[tensors])
        words, _ = explain_auto(workload, network, optimizer=kind)
        keywords = {"links": links, "kind": kind, "width": 50}
        for told, why, _ in ranks.run(4, chosen, machines, keywords):
            assert words.startswith(f"topology='auto' takes {told}")
            assert words.endswith(f": {why.removeprefix('auto: ')}")


def small_as_given() -> tuple[bool, bool, str, str]:
    """Whether auto's messages train as given ones to the last bit, whether a resume goes on so, and what a given graph ends."""
    one, other, third = net(50), net(50), net(50)
    with on("aabb"):
        automatic, again = (build(model.parameters(), links=TIGHT) for model in (one, third))
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    given = build(other.parameters(), mesh=mesh, topology="one_peer_exponential", wire_dtype="int8")
    train(one, automatic, range(5))
    train(other, given, range(5))
    equal = same(values(one), values(other))
    saved, weights = copy.deepcopy(automatic.state_dict()), values(one)
    with again.paused(), torch.no_grad():
        for p, value in zip(third.parameters(), weights, strict=True):
            p.copy_(value)
    again.load_state_dict(saved)
    train(one, automatic, range(5, 9))
    train(third, again, range(5, 9))
    resumed = same(values(one), values(third))
    automatic.set_topology("ring")
    after = str(automatic._engine.phases.last.codes)
    train(one, automatic, range(9, 12))
    with on("aabb"):
        again.switch(algorithm="atc")
    train(third, again, range(9, 12))
    return equal, resumed, after, str(again._engine.phases.last.codes)


def test_autos_messages_are_those_of_wire_dtype_and_end_with_its_graph(ranks: Pool) -> None:
    assert ranks.run(4, small_as_given) == [(True, True, "None", "torch.int8")] * 4


@pytest.mark.parametrize(
    ("links", "error", "message"),
    [
        (3, TypeError, "links is the path of a file that `fusedfog calibrate` writes"),
        ("/no/such/file", OSError, "/no/such/file"),
        (__file__, ValueError, "is not a file that `fusedfog calibrate` writes"),
    ],
)
def test_links_that_are_none_are_named(links: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(net().parameters(), links=links)


def said(machines: str, keywords: dict[str, Any]) -> list[str]:
    """The warnings in the log when an optimizer is built, and makes two steps."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    if "mesh" in keywords:
        keywords = {**keywords, "mesh": DeviceMesh("cpu", keywords["mesh"])}
    model = net(50_000)  # Smaller ones cost latency alone, which is the same for all graphs.
    with on(machines):
        opt = build(model.parameters(), **keywords)
    train(model, opt, range(2))
    log.removeHandler(handler)
    return lines


def test_a_given_graph_that_is_much_slower_than_autos_is_named_once(ranks: Pool) -> None:
    first, *others = ranks.run(4, said, "aabb", {"topology": "exponential"})
    assert others == [[]] * 3
    (line,) = first
    assert line == (
        "AdamW: a step on exponential is predicted to take 2.8 times as long as on one_peer_exponential over 2 machines, which "
        "topology='auto' chooses here (the ranks of a machine share its link), if computing takes as long as auto's messages; "
        "`fusedfog plan` compares ways on your links"
    )


QUIET: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("aabb", {}),
    "the same machines": ("aabb", {"topology": "ring", "mesh": [[0, 1], [2, 3]]}),
    "other machines": ("aabb", {"topology": "ring", "mesh": [[0, 2], [1, 3]]}),
    "a machine each": ("abcd", {"topology": "exponential"}),
    "one machine": ("aaaa", {"topology": "exponential", "links": SLOW_ACROSS}),
    "not in order": ("abab", {"topology": "exponential"}),
}


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_said_of_a_graph_that_is_as_good_or_of_which_too_little_is_known(ranks: Pool, case: str) -> None:
    assert ranks.run(4, said, *QUIET[case]) == [[]] * 4


def test_with_links_a_flat_network_is_known_too(ranks: Pool) -> None:
    first, *_ = ranks.run(4, said, "abcd", {"topology": "exponential", "links": SLOW_ACROSS})
    assert len(first) == 1 and "take 2.0 times as long as on one_peer_exponential, which" in first[0]


def test_machines_are_those_of_a_name() -> None:
    assert by_machine("abacb") == ((0, 2), (1, 4), (3,))
    assert this_machine() == this_machine() != ""


def test_a_rank_that_is_alone_has_no_graph() -> None:
    opt = build(net().parameters(), topology="auto")
    assert (opt.stats()["topology"], opt.stats()["topology_reason"]) == ("", "")
    assert repr(opt).startswith("AdamW (awc, 1 rank\n")


def asked_for(topology: str | None) -> str:
    """The error that follows where rank 1 asks for `topology` and the others leave it to auto."""
    with pytest.raises(fusedfog.MismatchError) as caught:
        build(net().parameters(), topology=topology if dist.get_rank() == 1 else None)
    return str(caught.value)


def test_ranks_that_do_not_all_leave_it_to_auto_are_told(ranks: Pool) -> None:
    for text in ranks.run(2, asked_for, "one_peer_exponential"):
        assert "topology is one_peer_exponential (" in text and "on rank 1 but auto: one_peer_exponential (" in text


# -- it trains as with mesh= -----------------------------------------------------------------------------------------

SETUPS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD atc hooks": {"kind": "SGD", "algorithm": "atc", "fused_backward": True, "momentum": 0.9},
    "decentlam": {"kind": "SGD", "algorithm": "decentlam", "momentum": 0.9},
    "start": {"data_parallel_steps": 3, "communicate_every": 2},
    "Decentralized": {"kind": "Decentralized"},
}


def both_ways(keywords: dict[str, Any]) -> bool:
    """Whether auto trains as the mesh of the same machines does, to the last bit, in buckets of the same size."""
    one, other = net(), net()
    with on(TWO):
        automatic = build(one.parameters(), **keywords)
    given = build(other.parameters(), mesh=DeviceMesh("cpu", BOTH), **keywords)
    assert len(automatic._engine.buckets.all) == len(given._engine.buckets.all)
    train(one, automatic, range(9))
    train(other, given, range(9))
    return same(values(one), values(other))


@pytest.mark.parametrize("name", SETUPS)
def test_auto_on_machines_trains_as_the_mesh_of_these_machines(ranks: Pool, name: str) -> None:
    assert ranks.run(4, both_ways, SETUPS[name]) == [True] * 4


def in_a_part(machines: str) -> tuple[str, list[Tensor]]:
    """Training among ranks 1, 2, 3, 5 of six, of which the others build nothing."""
    members = (1, 2, 3, 5)
    if dist.get_rank() not in members:
        dist.barrier()
        return "", []
    group, model = fusedfog.new_group(members), net()
    with on(machines):
        opt = build(model.parameters(), group=group)
    train(model, opt, range(6))
    opt.drain()
    dist.barrier()
    return opt.stats()["topology"], values(model)


def test_a_group_that_is_a_part_of_the_world_has_machines_of_its_own(ranks: Pool) -> None:
    found = ranks.run(6, in_a_part, "xabaxb")
    assert {graph for graph, _ in found} == {"", NODES}
    assert same(found[1][1], found[3][1]) and same(found[2][1], found[5][1])
    assert not same(found[1][1], found[2][1])


# -- it goes on ------------------------------------------------------------------------------------------------------


def resumed() -> bool:
    one, other = net(), net()
    with on(TWO):
        opt, again = build(one.parameters()), build(other.parameters())
    train(one, opt, range(5))
    saved, weights = opt.state_dict(), values(one)
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
    train(one, opt, range(5, 9))
    with again.paused(), torch.no_grad():
        for p, value in zip(other.parameters(), weights, strict=True):
            p.copy_(value)
    again.load_state_dict(saved)
    train(other, again, range(5, 9))
    return same(values(one), values(other))


def test_a_resume_is_the_uninterrupted_run(ranks: Pool) -> None:
    assert ranks.run(4, resumed) == [True] * 4


def copied() -> tuple[str, bool]:
    model = net()
    with on(TWO):
        opt = build(model.parameters())
        train(model, opt, range(3))
        opt.drain()
        other, twin = copy.deepcopy((model, opt))
        train(other, twin, range(3, 6))
    train(model, opt, range(3, 6))
    return twin.stats()["topology"], same(values(model), values(other))


def test_a_copy_keeps_its_machines(ranks: Pool) -> None:
    assert ranks.run(4, copied) == [(NODES, True)] * 4


def changed(changes: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """The graph after each change, its reason, and whether the ranks of a machine are equal some steps later."""
    model, found = net(), []
    with on(TWO):
        opt = build(model.parameters(), kind="SGD")
        train(model, opt, range(2))
        for number, change in enumerate(changes, 1):
            opt.set_topology(change["set"]) if "set" in change else opt.switch(**change)
            train(model, opt, range(2 * number, 2 * number + 2))
            own = values(model)[0]
            everyone = [torch.empty_like(own) for _ in range(4)]
            dist.all_gather(everyone, own)
            told = opt.stats()
            found.append((told["topology"], told["topology_reason"], torch.equal(everyone[0], everyone[2])))
    return found


APART = "auto: ranks are nodes, since those of a machine may have different parameters"


def test_a_graph_that_is_set_is_one_of_ranks(ranks: Pool) -> None:
    changes = [{"set": "auto"}, {"set": one_peer_exponential(4)}, {"set": "auto"}]
    expected = [(NODES, SHARED, True), (FLAT, "given", False), (FLAT, APART, False)]
    assert ranks.run(4, changed, changes) == [expected] * 4


def test_a_switch_keeps_the_machines_and_an_allreduce_brings_them_back(ranks: Pool) -> None:
    changes: list[dict[str, Any]] = [
        {"algorithm": "atc"},
        {"algorithm": "allreduce"},
        {"algorithm": "awc"},
        {"topology": "ring"},
        {"algorithm": "allreduce", "topology": "auto"},
        {"algorithm": "awc"},
    ]
    expected = [
        (NODES, SHARED, True),
        ("", "", True),
        (NODES, SHARED, True),
        ("ring", "given", False),
        ("", "", True),
        (NODES, SHARED, True),
    ]
    assert ranks.run(4, changed, changes) == [expected] * 4


def set_in_a_start() -> tuple[str, str]:
    model = net()
    with on(TWO):
        opt = build(model.parameters(), data_parallel_steps=3)
        train(model, opt, range(2))
        opt.set_topology("ring")
        train(model, opt, range(2, 5))
    return opt.stats()["topology"], repr(opt).partition("\n")[0]


def test_a_graph_that_is_set_in_a_data_parallel_start_holds_after_it(ranks: Pool) -> None:
    for graph, shown in ranks.run(4, set_in_a_start):
        assert graph == "ring" and shown.endswith("awc on ring, after 3 data-parallel steps, 4 ranks")
