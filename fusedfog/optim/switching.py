"""`switch`: another algorithm, topology or rhythm in mid-run. Beside `build`, whose checks it makes again; collective."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from fusedfog.comm.agreement import agree, next_agreement
from fusedfog.comm.group import find_group
from fusedfog.engine.phases import Phases
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.optim import build as construction
from fusedfog.optim.compatibility import choose_topology
from fusedfog.optim.options import Keywords, Options


def switched(options: Options, changes: Keywords) -> Options:
    """The options after a switch.

    Raises:
        ValueError: a value makes no sense by itself.
    """
    Options.of(changes)
    given: dict[str, Any] = {**changes, "data_parallel_steps": 0}
    return dataclasses.replace(options, **given)


def switch(kind: str, family: str, engine: Scheduler, options: Options) -> None:
    """Have a running scheduler do what these options say from the next step on.

    Raises:
        ValueError: they do not go together, or there is no communicator, as the optimizer was built with algorithm="local".
        MismatchError: ranks switch to different things; nothing has changed then.
    """
    setup = construction.running_setup(family, engine, options)
    communicator, mesh = engine.communicator, options.mesh if engine.sharding is None else None
    if communicator is None and dist.is_initialized() and find_group(options.group).size > 1:
        raise ValueError(
            f"{kind}.switch: an optimizer that was built with algorithm='local' has nothing to exchange with: build it with "
            f"algorithm={options.algorithm!r}, and switch that one to 'local' for a while"
        )
    topology = choose_topology(setup, options.topology, setup.ranks if mesh is None else mesh.size(0))
    hierarchy = engine.phases.last.hierarchy
    if communicator is not None:
        fields = {
            "algorithm": options.algorithm,
            "topology": construction.name_topology(topology),
            "communicate_every": str(options.communicate_every),
        }
        view = communicator.view
        agree(view, next_agreement(view), fields, communicator.timeout, f"{kind}.switch", "switch()")
        if mesh is not None and topology is not None and hierarchy is None:
            hierarchy = Hierarchy(mesh, engine.place, options.comm_sms, equal=options.inside == "gradients")
    phases = construction.phases_of(family, setup.running, topology, options, hierarchy, alone=communicator is None)
    engine.take_edits()
    engine.phases = Phases.of(phases.last)
    engine.change_phase(phases.last)
