"""`switch` and `set_topology`: another algorithm, topology or rhythm in mid-run. Beside `build`, whose checks they make again."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from fusedfog.comm.group import find_group
from fusedfog.engine.phases import Phases
from fusedfog.engine.rhythm import described
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.optim import build as construction
from fusedfog.optim.automatic import Calling, agree_on_way, hierarchy_of, is_automatic
from fusedfog.optim.compatibility import choose_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.options import Keywords, Options
from fusedfog.optim.phases import codes_of, phases_of, weights_of
from fusedfog.optim.ways import Way


def switched(options: Options, changes: Keywords) -> Options:
    """The options after a switch.

    Raises:
        ValueError: a value makes no sense by itself.
    """
    weight = Options.of(changes).weight
    given: dict[str, Any] = {
        **changes,
        "data_parallel_steps": 0,
        "weight": options.weight if weight is None else weight,
    }
    return dataclasses.replace(options, **given)


def switch(kind: str, family: str, engine: Scheduler, options: Options) -> None:
    """Have a running scheduler do what these options say from the next step on.

    Raises:
        ValueError: they do not go together, or there is no communicator, as the optimizer was built with algorithm="local".
        MismatchError: ranks switch to different things; nothing has changed then.
    """
    setup = construction.running_setup(family, engine, options)
    communicator = engine.communicator
    if communicator is None and dist.is_initialized() and find_group(options.group).size > 1:
        raise ValueError(
            f"{kind}.switch: an optimizer that was built with algorithm='local' has nothing to exchange with: build it with "
            f"algorithm={options.algorithm!r}, and switch that one to 'local' for a while"
        )
    fields = {
        "algorithm": options.algorithm,
        "communicate_every": described(options.communicate_every),
        "weight": "none" if options.weight is None else "given",
    }
    (way, hierarchy), weights = _agree_on_way(kind, engine, setup, options, fields, "switch"), None
    if communicator is not None:
        weights = weights_of(communicator.view, options, communicator.timeout, f"{kind}.switch", "switch()")
    phases = phases_of(family, setup.running, way, options, hierarchy, weights, alone=communicator is None)
    engine.take_edits()
    engine.phases = Phases.of(phases.last)
    engine.change_phase(phases.last)


def change_topology(kind: str, family: str, engine: Scheduler, options: Options) -> None:
    """Give a running scheduler the topology that these options have; all ranks together.

    Raises:
        ValueError: as at construction.
        MismatchError: ranks were given different topologies; nothing has changed then.
    """
    way, hierarchy = _agree_on_way(
        kind, engine, construction.running_setup(family, engine, options), options, {}, "set_topology"
    )
    engine.replace_topology(way.topology, way.reason, hierarchy, codes_of(way, options))


def _agree_on_way(
    kind: str, engine: Scheduler, setup: Setup, options: Options, fields: dict[str, str], call: str
) -> tuple[Way, Hierarchy | None]:
    """The way that these options mean for a running scheduler, and its machines. Collective.

    Machines that auto has made nodes remain so while the topology is left to it. They become nodes only while ranks of a machine
    have the same parameters: after data-parallel steps.
    """
    if engine.sharding is not None:
        options = dataclasses.replace(options, mesh=None)  # There it only says where shards lie.
    nodes = setup.ranks if options.mesh is None else options.mesh.size(0)
    topology = choose_topology(setup, options.topology, nodes)
    communicator, last = engine.communicator, engine.phases.last
    if communicator is None:
        return Way(topology), None
    fields["topology"] = "auto" if is_automatic(options.topology) else construction.name_topology(topology)
    calling = Calling(f"{kind}.{call}", f"{call}()", communicator.view, communicator.view, communicator.timeout)
    apart = not engine.phase.data_parallel and last.hierarchy is None
    way = agree_on_way(calling, fields, setup, options, topology, apart=apart)
    kept = last.hierarchy if way.machines is not None or options.mesh is not None else None
    return way, kept or hierarchy_of(way, options, communicator.view, engine.place)
