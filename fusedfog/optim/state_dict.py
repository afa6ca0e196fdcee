"""Where a checkpoint comes from, by the rank, number of ranks and topology that a `state_dict()` carries beside the clock.

Between `base`, which saves and loads, and `scheduler`. A rank's state is good for that rank: it goes on in its own place of
the topology, with its own parameters. Loaded elsewhere it may still be what the user wants (a framework saved rank 0 alone,
the topology is to be another one), so that is a warning; what cannot work is an error.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fusedfog.engine.scheduler import Scheduler
from fusedfog.errors import ForeignCheckpointWarning
from fusedfog.gossip.compression import own_states
from fusedfog.log import warn_user
from fusedfog.optim.build import name_topology
from fusedfog.params.flat import FlatSegment

KEYS = ("rank", "ranks", "topology", "weights")
"""What `origin_of` adds to a clock."""

_CLOCK = "fusedfog"


def origin_of(engine: Scheduler) -> dict[str, Any]:
    """What identifies this rank among those it exchanges with; nothing for a rank that is alone."""
    if engine.communicator is None:
        return {}
    view, last = engine.communicator.view, engine.phases.last
    weights = {} if last.weights is None else {"weights": list(last.weights)}
    return {"rank": view.rank, "ranks": view.size, "topology": name_topology(last.topology), **weights}


def take_origin(kind: str, engine: Scheduler, clock: dict[str, Any]) -> bool:
    """Remove the origin from a loaded clock; False, with a warning, if it is not this rank's.

    Other weights of the same ranks are a warning too, but what was saved is this rank's.

    Raises:
        ValueError: push-sum's scalars are of another number of ranks.
    """
    saved, own = {key: clock.pop(key) for key in KEYS if key in clock}, origin_of(engine)
    if not own or not saved or saved == own:
        return True
    weighed, weighs = saved.pop("weights", None), own.pop("weights", None)
    if saved == own:
        warn_user(
            f"rank {own['rank']}: {kind}: this checkpoint was saved by ranks whose shares were {_shares(weighed)}, and now they "
            f"are {_shares(weighs)}: training goes on towards another weighted mean of the losses; build the optimizer with the "
            f"saved weight= unless the change is meant",
            ForeignCheckpointWarning,
        )
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
    warn_user(found, ForeignCheckpointWarning)
    return False


def _shares(weights: Sequence[float] | None) -> str:
    return "all equal" if weights is None else ", ".join(f"{weight / sum(weights):.4g}" for weight in weights)


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
        warn_user(
            f"rank {origin_of(engine).get('rank', 0)}: {kind}: this checkpoint lacks {names} of {lacking} parameters, so that "
            f"compressed messages cannot go on from it and begin anew on all ranks; the run remains correct, but not bit for "
            f"bit. A state_dict() must be kept whole, and be of the same algorithm, topology and wire_dtype",
            ForeignCheckpointWarning,
        )
    return not lacking


def saved_clock(engine: Scheduler, algorithm: str) -> dict[str, Any]:
    """What a `state_dict()` has beside torch's format."""
    return {"algorithm": algorithm, **origin_of(engine), **engine.read_clock()}


@contextmanager
def original_states(optimizer: torch.optim.Optimizer) -> Iterator[dict[Any, Any]]:
    """The states, by key, that a `load_state_dict` inside is given.

    torch casts states to their parameter's dtype on the way; ours are fp32 beside bf16.
    """
    originals: dict[Any, Any] = {}
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, given: originals.update(given["state"]))
    try:
        yield originals
    finally:
        handle.remove()


def loaded_clock(kind: str, engine: Scheduler, algorithm: str, saved: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The clock of a `state_dict()`, and whether this rank saved it.

    Raises:
        ValueError: another algorithm saved it; and as `take_origin`.
    """
    clock = dict(saved.get("fusedfog", {}) or carried_clock(saved))
    saved_by = clock.pop("algorithm", algorithm)
    if saved_by != algorithm:
        raise ValueError(
            f"this checkpoint was saved by algorithm {saved_by!r} but the optimizer runs {algorithm!r}; "
            f"build it with algorithm={saved_by!r}"
        )
    return clock, take_origin(kind, engine, clock)


def state_names(engine: Scheduler, segment: FlatSegment) -> tuple[str, ...]:
    """All states of a segment's parameters that a checkpoint has to hold."""
    group = engine.groups[segment.layout.group]
    return (*engine.algorithm.state_names(group), *own_states(segment, engine.channels))


def load_states(kind: str, engine: Scheduler, saved: Mapping[Any, Mapping[str, Any]], own: bool) -> None:
    """Copy states in torch's format into the flat ones; parameters without a saved state start anew.

    Args:
        own: this rank saved them, on the topology that it has.
    """
    for segment in engine.segments:
        load_states_of(engine, segment, saved)
    if engine.channels is not None:
        engine.exchanges.adopt_channels(engine.buckets.all, own and has_messages(kind, engine, saved))


def clone_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state, in tensors of its own."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def load_states_of(engine: Scheduler, segment: FlatSegment, saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Copy the states of one segment's parameters in, or have them start anew."""
    segment.load_states(state_names(engine, segment), [saved.get(param) or {} for param in segment.owners])


def carry_clock(saved: dict[str, Any]) -> None:
    """Put the clock of a `state_dict()` into a param group too, the first that has parameters.

    torch.distributed.checkpoint's `get_optimizer_state_dict` keeps nothing but states and param groups. To torch.optim it is
    one more entry that nobody reads.
    """
    _holder(saved["param_groups"])[_CLOCK] = repr(saved["fusedfog"])


def carried_clock(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The clock that `carry_clock` put into a state dict in which parameters have names, as torch.distributed.checkpoint's.

    Where they have numbers, the clock was beside the groups, and who took it away goes on without.
    """
    groups = [group for group in state_dict["param_groups"] if any(isinstance(key, str) for key in group["params"])]
    clock: dict[str, Any] = literal_eval(next((group[_CLOCK] for group in groups if group.get(_CLOCK)), "{}"))
    return clock


def make_room_for_clock(groups: Sequence[dict[str, Any]]) -> None:
    """Let a param group have an entry for `carry_clock`: flattened state dicts are read back by the entries it has."""
    for group in groups:
        group.pop(_CLOCK, None)
    _holder(groups)[_CLOCK] = ""


def _holder(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # Flattened, a group's entries are those of its parameters.
    return next((group for group in groups if group["params"]), groups[0])
