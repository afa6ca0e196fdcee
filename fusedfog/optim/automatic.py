"""`topology="auto"`: the graph, and whether ranks or machines are its nodes, by the machines that the ranks are on.

Between `compatibility`, whose table says what goes with machines as nodes, and `build`. Every rank chooses by itself, from what
all ranks have told each other: the same on each of them.

    all ranks on one machine, or one on each     ranks are nodes
    several machines, as many ranks on each      a machine is a node, as with `mesh=`: its ranks share one link to the others,
                                                 which rounds over ranks load as often as there are ranks (measured: 0.44 and 0.69
                                                 of linear against 0.95, bench/results/network-machines.md)
    anything else                                ranks are nodes, and the reason is told

With `links=` it weighs what there is to choose, nodes, graphs and formats of messages (`ways`), by step time, bytes and loss, and
takes the least time to DistributedDataParallel's loss (`cost.prices`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeAlias

import torch

from fusedfog.comm.agreement import agree, confer, next_agreement
from fusedfog.comm.group import GroupView
from fusedfog.comm.machines import by_machine, this_machine
from fusedfog.comm.two_level import machine_lines, mesh_lines
from fusedfog.cost.links import network_of
from fusedfog.cost.ratio import step_ratio
from fusedfog.cost.workload import Workload
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.log import log
from fusedfog.optim.compatibility import first_refusal, resolve_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.options import EXACT, Options
from fusedfog.optim.ways import Way, alternatives, bytes_of, cheapest, scheme_of
from fusedfog.topology import Topology

GIVEN = "given"

MUCH = 1.25
"""A given way whose steps are so many times as long as auto's is named."""

LARGEST = 512
"""Ranks up to which a given way is compared: on more, simulating it would be felt at construction."""


Find: TypeAlias = Callable[[], tuple[int, str]]
"""Finds the place of the best of some ways, and says why."""


@dataclass(frozen=True)
class Calling:
    """Who agrees on a way.

    Attributes:
        what, call: who asks, for errors, and the call that all ranks must be in; as for `agree`.
        everyone: the ranks that have to agree.
        view: those of them that mix.
        timeout: how long they wait for each other.
    """

    what: str
    call: str
    everyone: GroupView
    view: GroupView
    timeout: timedelta

    def as_rank_0(self, find: Find) -> tuple[int, str]:
        """What rank 0 of those that mix finds. Collective."""
        # Predicted times might differ in the last bit where ranks have different processors.
        own = find() if self.view.rank == 0 else None
        prefix = next_agreement(self.view)
        place, words = confer(self.view, prefix, own, lambda values: values[0], self.timeout, self.what, self.call)
        return int(place), str(words)


def agree_on_way(
    calling: Calling,
    fields: Mapping[str, str],
    setup: Setup,
    options: Options,
    topology: Topology | None,
    *,
    apart: bool,
) -> Way:
    """The way that all ranks go, once they have agreed on `fields` too. Collective; see `way_of`.

    Rank 0 says in the log if the user's way is much slower than auto's.
    """
    prefix = next_agreement(calling.everyone)
    names = agree(calling.everyone, prefix, fields, calling.timeout, calling.what, calling.call, this_machine())
    way = way_of(setup, options, topology, names, calling.as_rank_0, apart=apart)
    slower = slower_than_auto(setup, options, way, names) if calling.view.rank == 0 else ""
    if slower:
        log.warning("%s: %s", calling.what, slower)
    return way


def is_automatic(topology: Topology | str | None) -> bool:
    """Whether the choice is left to fusedfog."""
    return topology is None or (isinstance(topology, str) and topology == "auto")


def way_of(
    setup: Setup,
    options: Options,
    topology: Topology | None,
    names: Sequence[str],
    decide: Callable[[Find], tuple[int, str]],
    *,
    apart: bool = False,
    workload: Workload | None = None,
) -> Way:
    """The user's way, or the choice of auto.

    Args:
        setup: with its ranks; the options in it go together where ranks, or the machines of a given mesh, are nodes.
        options: of the optimizer.
        topology: the given one, or the default of as many nodes as there are.
        names: of each rank's machine.
        decide: makes what rank 0 finds the answer of all ranks; called on all of them, or on none.
        apart: the ranks of a machine have different parameters by now.
        workload: as for `ways.cheapest`.
    """
    if topology is None:
        return Way(None)
    if not is_automatic(options.topology):
        return Way(topology, GIVEN)
    if options.mesh is not None and not setup.sharded:
        return Way(topology, "auto: the machines of mesh=")
    machines = by_machine(names)
    plain = _without_links(setup, options, topology, machines, apart)
    if options.links is None or setup.sharded or options.asynchronous or not predictable(machines):
        return plain
    ways = alternatives(setup, options, plain, topology)
    network = network_of(options.known_links, len(names), len(machines[0]))
    place, words = decide(lambda: cheapest(ways, setup, options, network, workload))
    found = ways[place]
    why = plain.reason if found.machines == plain.machines else "auto: ranks are nodes although they share machines"
    return replace(found, reason=f"{why}; {words}")


def _without_links(
    setup: Setup, options: Options, topology: Topology, machines: tuple[tuple[int, ...], ...], apart: bool
) -> Way:
    """The choice between ranks and machines where nothing is known of links."""
    flat = _why_flat(setup, options, machines, apart)
    if flat:
        return Way(topology, f"auto: {flat}")
    trial = replace(setup, options={**setup.options, "mesh": machines})
    between = resolve_topology(setup.algorithm, None, len(machines), static=setup.compresses)
    refusal = first_refusal(replace(trial, topology=between))
    if refusal is not None:
        return Way(topology, f"auto: ranks are nodes although they share machines, since {refusal.reason(trial)}")
    assert between is not None
    between = between.lazy() if setup.algorithm.lazy else between
    return Way(between, "auto: the ranks of a machine share its link", machines)


def _why_flat(setup: Setup, options: Options, machines: Sequence[Sequence[int]], apart: bool) -> str:
    """Why ranks are the nodes, whatever the table of `compatibility` says; nothing if they need not be."""
    sizes = sorted({len(members) for members in machines})
    if setup.sharded:
        return "ranks with the same shard are nodes"
    if setup.elastic:
        return "ranks are nodes in an elastic run"
    if len(machines) == 1:
        return "all ranks are on one machine"
    if sizes == [1]:
        return "every rank has a machine of its own"
    if len(sizes) > 1:
        return f"ranks are nodes, since machines have {' or '.join(map(str, sizes))} of them"
    if setup.algorithm.outer:
        return "ranks are nodes, since outer= runs over the steps of each by itself"
    if options.inside == "gradients" and apart:
        return "ranks are nodes, since those of a machine may have different parameters"
    return ""


def slower_than_auto(setup: Setup, options: Options, way: Way, names: Sequence[str]) -> str:
    """That the given way is predicted to be much slower than auto's, in words; nothing if it is not, or if that is unknown.

    It is known where the user gives links, or where ranks share machines: then ways differ whatever the links are.
    """
    machines = by_machine(names)
    known = predictable(machines) and len(machines) > 1 and len(names) <= LARGEST
    if way.topology is None or not known or setup.sharded:
        return ""
    if (options.links is None and len(machines[0]) == 1) or is_automatic(options.topology):
        return ""
    if options.mesh is not None:
        if tuple(map(tuple, options.mesh.mesh.tolist())) != machines:
            return ""
        way = replace(way, machines=machines)
    # Of ways alone: smaller messages can be had on any.
    left_out = replace(options, topology=None, mesh=None, wire_dtype=options.wire_dtype or EXACT)
    setup = replace(setup, options=vars(left_out))
    flat = resolve_topology(setup.algorithm, None, len(names), static=setup.compresses)
    auto = way_of(setup, left_out, flat, names, lambda find: find())
    ratio = _ratio(way, auto, setup, options, machines)
    if ratio <= MUCH:
        return ""
    return (
        f"a step on {way.name} is predicted to take {ratio:.1f} times as long as on {auto.name}, which topology='auto' "
        f"chooses here ({auto.reason.removeprefix('auto: ')}), if computing takes as long as auto's messages; "
        f"`fusedfog plan` compares ways on your links"
    )


def predictable(machines: Sequence[Sequence[int]]) -> bool:
    """Whether machines have equally many ranks, numbered machine by machine, as simulated networks have them."""
    ranks = [rank for members in machines for rank in members]
    return ranks == sorted(ranks) and len({len(members) for members in machines}) == 1


def _ratio(one: Way, other: Way, setup: Setup, options: Options, machines: Sequence[Sequence[int]]) -> float:
    """See `step_ratio`."""
    network = network_of(options.known_links, sum(map(len, machines)), len(machines[0]))
    return step_ratio(scheme_of(one, setup, options), scheme_of(other, setup, options), network, bytes_of(setup))


def hierarchy_of(way: Way, options: Options, view: GroupView, place: torch.device) -> Hierarchy | None:
    """This rank's place among machines, where they are nodes. Collective."""
    if way.topology is None or (way.machines is None and options.mesh is None):
        return None
    lines = mesh_lines(options.mesh) if options.mesh is not None else machine_lines(view, way.machines or ())
    return Hierarchy(lines, place, options.comm_sms, equal=options.inside == "gradients")
