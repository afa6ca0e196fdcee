"""A running optimizer in a line: for the log at construction, and for `repr`."""

from __future__ import annotations

import logging
import re

import torch
import torch.distributed as dist

from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.delivery import Rounds
from fusedfog.kernels.wire import ELEMENTS_PER_SCALE, FORMATS
from fusedfog.log import log
from fusedfog.optim.options import Options
from fusedfog.params.flat import FlatSegment


def announce(kind: str, engine: Scheduler, options: Options) -> None:
    """Log one INFO line about an optimizer that has just been built, on rank 0 of its group."""
    if log.isEnabledFor(logging.INFO) and _speaks(engine):
        log.info("%s", line(kind, engine, options))


def _speaks(engine: Scheduler) -> bool:
    if engine.communicator is not None and engine.sharding is None:
        return engine.communicator.view.rank == 0
    return not dist.is_initialized() or dist.get_rank() == 0


def line(kind: str, engine: Scheduler, options: Options) -> str:
    """Such as "4 ranks, gloo, AdamW awc on one_peer_exponential, 25.6M parameters in 4 buckets, 102 MB a step".

    The bytes are those that this rank sends: the average over a topology's rounds, without what `global_average_every` adds.
    """
    words = [_counted(ranks_of(engine), "rank")]
    if engine.communicator is not None and engine.communicator.view.group is not None:
        words.append(engine.communicator.view.group._get_backend(engine.communicator.device).name())
    words.append(f"{kind} {method(engine, options)}")
    count = sum(param.numel() for segment in engine.segments for param in segment.owners)
    words.append(f"{_short(count)} parameters in {_counted(len(engine.buckets.all), 'bucket')}")
    return ", ".join([*words, *_traffic(engine, options)])


def brief(kind: str, engine: Scheduler | None, options: Options) -> str:
    """Such as "AdamW (awc on one_peer_exponential, 4 ranks": how a `repr` begins.

    Without an engine, as a copied or unpickled optimizer before its first use, it says what is known without building one.
    """
    if engine is None:
        given = (
            options.topology if options.topology is None or isinstance(options.topology, str) else options.topology.name
        )
        graph = f" on {given}" if given is not None else ""
        return f"{kind} ({options.algorithm}{graph}, not started"
    return f"{kind} ({method(engine, options)}, {_counted(ranks_of(engine), 'rank')}"


def without_clock(groups: str) -> str:
    """torch's `repr` of param groups without the room that `state_dict.make_room_for_clock` made in them."""
    return re.sub(r"^ +fusedfog: .*\n", "", groups, flags=re.MULTILINE)


def ranks_of(engine: Scheduler) -> int:
    """How many ranks train together: those that exchange, or, where none do, those of the default group."""
    if engine.communicator is not None:
        return engine.communicator.view.size
    return dist.get_world_size() if dist.is_initialized() and engine.phases.last.algorithm.exchanges == "nothing" else 1


def method(engine: Scheduler, options: Options) -> str:
    """Algorithm and topology, such as "awc on ring", with the machines of a mesh, and the reason of auto."""
    outer = f" with outer every {options.outer.every} steps" if options.outer is not None else ""
    graph, reason = graph_of(engine), engine.phases.last.reason
    if not graph:
        return options.algorithm + outer
    (begins, _) = engine.phases.begins[-1]
    first = f", after {begins} data-parallel steps" if begins else ""
    return f"{options.algorithm}{outer} on {graph}{f' ({reason})' if reason.startswith('auto') else ''}{first}"


def graph_of(engine: Scheduler) -> str:
    """The topology of a running optimizer, such as "ring", or "ring over 2 machines of 4 ranks"; "" if it has none."""
    topology, hierarchy = engine.phases.last.topology, engine.phases.last.hierarchy
    if engine.communicator is None or topology is None:
        return ""
    over = (
        f" over {hierarchy.machines} machines of {_counted(hierarchy.locals, 'rank')}" if hierarchy is not None else ""
    )
    return topology.name + over


def _traffic(engine: Scheduler, options: Options) -> list[str]:
    if engine.communicator is None:
        return ["nothing is sent"]
    schedule = engine.phases.last.schedule
    every, average = schedule.communicate_every, schedule.global_average_every
    codes = _codes_of(engine)
    words = [f"{str(codes).removeprefix('torch.')} messages"] if codes is not None else []
    when = "in steps that exchange" if callable(every) else "a step" if every == 1 else f"every {every} steps"
    words.append(f"{_bytes(bytes_of_exchange(engine))} {when}")
    return words + ([f"an average over all ranks every {average} steps"] if average is not None else [])


def bytes_of_exchange(engine: Scheduler) -> float:
    """What this rank sends in an exchange, on average over the topology's rounds, in bytes."""
    phase = engine.phases.last
    if engine.communicator is None:
        return 0.0
    if phase.data_parallel:
        n = engine.communicator.view.size
        return sum(2.0 * segment.param.nbytes * (n - 1) / n for segment in engine.segments if segment.layout.mix)
    mixed = [segment for segment in engine.segments if segment.layout.mix]
    messages = sum(_message_bytes(engine, segment, name) for segment in mixed for name in phase.algorithm.messages)
    rounds = Rounds(phase.hierarchy.machine if phase.hierarchy is not None else engine.communicator.view.rank)
    rounds.use(phase.topology)
    counts = [len(round_.send) for round_ in rounds.ahead()]
    sends = sum(counts) / len(counts) if counts else 0.0
    if phase.hierarchy is None:
        return sends * messages
    share = messages / phase.hierarchy.locals
    # Inside a machine gradients are reduced, or parameters collected; mixed ones, or codes of all neighbours, are handed round;
    # across goes this rank's share.
    gradients = sum(segment.param.nbytes for segment in mixed) if phase.hierarchy.equal else messages / 2
    own = 1 - 1 / phase.hierarchy.locals
    handed = messages * (1 if _codes_of(engine) is None else sends)
    return (2 * gradients + handed) * own + sends * share


def _codes_of(engine: Scheduler) -> torch.dtype | None:
    phase = engine.phases.last
    return phase.codes if engine.communicator is not None and phase.algorithm.exchanges == "parameters" else None


def _message_bytes(engine: Scheduler, segment: FlatSegment, name: str) -> float:
    codes = _codes_of(engine)
    if codes is not None:
        return segment.layout.numel * (codes.itemsize + (1 / ELEMENTS_PER_SCALE if FORMATS[codes] is not None else 0))
    # The tensor itself may not have been made yet.
    itemsize = segment.layout.dtype.itemsize
    precise = name not in ("param", "message") or (name == "message" and segment.storage.way is not None)
    return segment.layout.numel * (max(itemsize, 4) if precise else itemsize)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _bytes(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
