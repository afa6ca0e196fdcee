"""`topology="auto"`: the graph, and whether ranks or machines are its nodes, by the machines that the ranks are on.

Between `compatibility`, whose table says what goes with machines as nodes, and `build`. Every rank chooses by itself, from what
all ranks have told each other: the same on each of them.

    all ranks on one machine, or one on each     ranks are nodes
    several machines, as many ranks on each      a machine is a node, as with `mesh=`: its ranks share one link to the others,
                                                 which rounds over ranks load as often as there are ranks (measured: 0.44 and 0.69
                                                 of linear against 0.95, bench/results/network-machines.md)
    anything else                                ranks are nodes, and the reason is told
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fusedfog.comm.group import GroupView
from fusedfog.comm.machines import by_machine
from fusedfog.comm.two_level import machine_lines, mesh_lines
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.optim.compatibility import first_refusal, resolve_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.options import Options
from fusedfog.topology import Topology

GIVEN = "given"


@dataclass(frozen=True)
class Way:
    """Where exchanges go.

    Attributes:
        topology: between ranks, or between machines; None where nothing goes to neighbours.
        reason: why, for people; "given" for what the user has chosen.
        machines: the ranks of each machine, where auto has made them nodes.
    """

    topology: Topology | None
    reason: str = ""
    machines: tuple[tuple[int, ...], ...] | None = None


def is_automatic(topology: Topology | str | None) -> bool:
    """Whether the choice is left to fusedfog."""
    return topology is None or (isinstance(topology, str) and topology == "auto")


def way_of(
    setup: Setup, options: Options, topology: Topology | None, names: Sequence[str], *, apart: bool = False
) -> Way:
    """The user's way, or the choice of auto.

    Args:
        setup: with its ranks; the options in it go together where ranks, or the machines of a given mesh, are nodes.
        options: of the optimizer.
        topology: the given one, or the default of as many nodes as there are.
        names: of each rank's machine.
        apart: the ranks of a machine have different parameters by now.
    """
    if topology is None:
        return Way(None)
    if not is_automatic(options.topology):
        return Way(topology, GIVEN)
    if options.mesh is not None and not setup.sharded:
        return Way(topology, "auto: the machines of mesh=")
    machines = by_machine(names)
    flat = _why_flat(setup, options, machines, apart)
    if flat:
        return Way(topology, f"auto: {flat}")
    trial = replace(setup, options={**setup.options, "mesh": machines})
    between = resolve_topology(setup.algorithm, None, len(machines), static=bool(setup.value("wire_dtype")))
    refusal = first_refusal(replace(trial, topology=between))
    if refusal is not None:
        return Way(topology, f"auto: ranks are nodes although they share machines, since {refusal.reason(trial)}")
    assert between is not None
    return Way(
        between.lazy() if setup.algorithm.lazy else between, "auto: the ranks of a machine share its link", machines
    )


def _why_flat(setup: Setup, options: Options, machines: Sequence[Sequence[int]], apart: bool) -> str:
    """Why ranks are the nodes, whatever the table of `compatibility` says; nothing if they need not be."""
    sizes = sorted({len(members) for members in machines})
    if setup.sharded:
        return "ranks with the same shard are nodes"
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


def hierarchy_of(way: Way, options: Options, view: GroupView, place: torch.device) -> Hierarchy | None:
    """This rank's place among machines, where they are nodes. Collective."""
    if way.topology is None or (way.machines is None and options.mesh is None):
        return None
    lines = mesh_lines(options.mesh) if options.mesh is not None else machine_lines(view, way.machines or ())
    return Hierarchy(lines, place, options.comm_sms, equal=options.inside == "gradients")
