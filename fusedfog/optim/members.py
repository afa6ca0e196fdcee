"""What the members of an elastic run are to an optimizer that is being built, or goes over to others: their topology."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusedfog.comm.elastic.run import Run
from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.compatibility import choose_topology
from fusedfog.optim.features import Setup
from fusedfog.topology import Topology


def topology_of_members(setup: Setup, given: Topology | str | None) -> Topology | None:
    """The topology of as many ranks as there are members now; of one that is given, what is left of it. None for one member.

    Args:
        given: for as many ranks as the run has slots, or a name, or the default.

    Raises:
        ValueError: as `choose_topology`; the given one has another size, or cannot be resized.
    """
    run = Run.current()
    assert run is not None
    slots = [seat.slot for seat in run.record.seats] if run.record is not None else [run.identity.slot]
    places = run.identity.slots
    whole = choose_topology(replace(setup, ranks=places), given, places) if places > 1 else None
    if isinstance(given, Topology):
        given.resized(1)  # Whether it can be is known before the run begins.
        given = given.resized(len(slots), slots)
    if len(slots) == places or len(slots) == 1:
        return whole if len(slots) == places else None
    return choose_topology(replace(setup, ranks=len(slots)), given, len(slots))


def of_members(engine: Scheduler) -> dict[str, Any]:
    """What `stats()` tells of the members; nothing where they cannot change."""
    run = Run.current()
    if run is None or engine.members is None:
        return {}
    return {
        "epoch": run.record.epoch if run.record is not None else -1,
        "members": run.record.uids if run.record is not None else (),
        "reforms": run.reforms,
        "reform_s": run.reform_s,
    }
