"""Where a checkpoint comes from, by the rank, number of ranks and topology that a `state_dict()` carries beside the clock.

Between `base`, which saves and loads, and `scheduler`. A rank's state is good for that rank: it goes on in its own place of
the topology, with its own parameters. Loaded elsewhere it may still be what the user wants (a framework saved rank 0 alone,
the topology is to be another one), so that is a warning; what cannot work is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fusedfog.engine.scheduler import Scheduler
from fusedfog.errors import ForeignCheckpointWarning
from fusedfog.optim.build import name_topology

KEYS = ("rank", "ranks", "topology")
"""What `origin_of` adds to a clock."""


def origin_of(engine: Scheduler) -> dict[str, Any]:
    """What identifies this rank among those it exchanges with; nothing for a rank that is alone."""
    if engine.communicator is None:
        return {}
    view = engine.communicator.view
    return {"rank": view.rank, "ranks": view.size, "topology": name_topology(engine.topology)}


def take_origin(kind: str, engine: Scheduler, clock: dict[str, Any]) -> bool:
    """Remove the origin from a loaded clock; False, with a warning, if it is not this rank's.

    Raises:
        ValueError: push-sum's scalars are of another number of ranks.
    """
    saved, own = {key: clock.pop(key) for key in KEYS if key in clock}, origin_of(engine)
    if not own or not saved or saved == own:
        return True
    found = f"rank {own['rank']}: {kind}: this checkpoint was saved by rank {saved['rank']} of {saved['ranks']}"
    if saved["ranks"] != own["ranks"] and clock.get("push_sum") is not None:
        raise ValueError(
            f"{found} and holds push-sum scalars of as many ranks, but there are {own['ranks']} now: save with "
            f"fusedfog.save_checkpoint and load with fusedfog.load_checkpoint, which averages all ranks' parts"
        )
    if (saved["rank"], saved["ranks"]) != (own["rank"], own["ranks"]):
        found += (
            f", and this is rank {own['rank']} of {own['ranks']}: each rank should resume with the state_dict() it saved; "
            f"fusedfog.save_checkpoint and load_checkpoint see to that, and average where the number of ranks differs"
        )
    if saved["topology"] != own["topology"]:
        found += (
            f" on topology {saved['topology']}, and the optimizer has {own['topology']}: exchanges go on there in round "
            f"{clock.get('exchanges', 0)}; build the optimizer with the saved topology unless the change is meant"
        )
    warnings.warn(found, ForeignCheckpointWarning, stacklevel=4)
    return False


def has_messages(kind: str, engine: Scheduler, states: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether loaded states, by parameter, have all that compressed messages go on from; with a warning if they have a part.

    A checkpoint of exact messages has nothing of it.
    """
    assert engine.channels is not None
    needed = set(engine.channels.names())
    mixed = [owner for segment in engine.segments if segment.layout.mix for owner in segment.owners]
    missing = [needed - states.get(owner, {}).keys() for owner in mixed]
    lacking = sum(map(bool, missing))
    if lacking and any(some < needed for some in missing):
        names = ", ".join(sorted(set().union(*missing)))
        warnings.warn(
            f"rank {origin_of(engine).get('rank', 0)}: {kind}: this checkpoint lacks {names} of {lacking} parameters, so that "
            f"compressed messages cannot go on from it and begin anew on all ranks; the run remains correct, but not bit for "
            f"bit. A state_dict() must be kept whole, and be of the same algorithm, topology and wire_dtype",
            ForeignCheckpointWarning,
            stacklevel=4,
        )
    return not lacking
