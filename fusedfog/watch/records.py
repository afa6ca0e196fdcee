"""What a record of a watched run says: plain dictionaries, made from an optimizer, fit for a line of JSON.

| kind | when | what |
|---|---|---|
| run | once, by rank 0 | `ranks`, `version` |
| rank | each rank, with each graph | `node` (of the graph), `host`, `pid`, `device` |
| graph | first, and when it changes | `method`, `nodes` (how many), `rounds` (of [from, to]), `endless`, `bytes` |
| sample | every so many steps a rank | `step`, `exchange`, `step_s`, `values` (logged), `stats` (`stats()`), `waited_for` |
| end | once a rank | `how`: "finished", or the error that ended it |

`waited_for` is {rank: seconds} that this one's host was blocked until a message to or from that rank was over, the last one that
it needed (gloo; on GPUs streams wait). All have `kind`, `rank` and `time` (seconds since 1970, by the rank's own clock). Numbers
that are not finite, which JSON has no words for, are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.description import bytes_of_exchange, method
from fusedfog.topology import Topology

Record = dict[str, Any]

_LONGEST = 64
"""Rounds of a topology that a record lists; of a longer or endless one, the first."""


def stamped(kind: str, rank: int, **fields: Any) -> Record:
    """A record of this moment."""
    return {"kind": kind, "rank": rank, "time": time.time(), **fields}


def rank_record(rank: int, engine: Scheduler) -> Record:
    """Where a rank is. A machine of a mesh is one node of the graph."""
    hierarchy = engine.phase.hierarchy
    node = hierarchy.machine if hierarchy is not None else rank
    return stamped("rank", rank, node=node, host=socket.gethostname(), pid=os.getpid(), device=str(engine.place))


def graph_record(rank: int, optimizer: DecentralizedOptimizer, topology: Topology | None) -> Record:
    """Who sends to whom; without a topology, nobody to anybody, or all to all by collectives."""
    engine = optimizer._engine
    return stamped(
        "graph",
        rank,
        method=method(engine, optimizer._options),
        nodes=topology.size if topology is not None else 0,
        rounds=_rounds(topology) if topology is not None else [],
        endless=topology is not None and topology.period is None,
        bytes=bytes_of_exchange(engine),
    )


def _rounds(topology: Topology) -> list[list[list[int]]]:
    found = []
    for step in range(min(topology.period or _LONGEST, _LONGEST)):
        sends = [topology.round(node, step).send for node in range(topology.size)]
        found.append([[node, peer] for node, send in enumerate(sends) for peer in send])
    return found


def plain(value: Any) -> Any:
    """Numbers, texts and containers of them as JSON takes them; a tensor of one element is waited for."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
