"""Time until data-parallel training's loss on the slow networks of `network.py`: steps needed, times their measured length."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

from common import RESULTS
from loss_methods import DATA_PARALLEL, GPT_4, GPT_16, MLP_4, MLP_16, Method
from loss_rows import NEAR, Comparison

STEP_TIMES = "network-full"

NETWORKS = (
    f"Time until the loss of data-parallel training, in parts of the time that it takes itself there, and until {NEAR:g} % "
    "above it, in parts of the time that it takes itself until then. Step times are those of "
    f"[{STEP_TIMES}.md]({STEP_TIMES}.md), with compute that leaves the CPU free; steps are those of the table above. They "
    "were not measured together: the models differ, and where n=16 stands beside hosts, these were the most that were measured."
)

_PLACES = {
    "4 hosts": ((GPT_4, 1), (MLP_4, 1)),
    "8 hosts": ((GPT_16, 1), (MLP_16, 1)),
    "2 x 4 hosts": ((GPT_16, 4), (MLP_16, 4)),
}
"""Networks -> cases whose losses are set beside their step times, and the size of machines."""


def step_name(method: Method) -> str | None:
    """What `network.py` calls the method; None where it has not measured it."""
    if method.wire is not None or method.average_until or method.average_from < 1:
        return None
    if method.machine > 1:
        return "AWC hierarchical" if method.algorithm == "awc" else None
    names = {
        ("awc", "one_peer_exponential"): "AWC one-peer",
        ("atc", "one_peer_exponential"): "ATC one-peer, fused_backward",
        ("awc", "exponential"): "AWC exponential",
    }
    return names.get((method.algorithm, method.graph))


@cache
def _results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{STEP_TIMES}.json").read_text())["results"]
    return [result for result in found if result["kind"] == "device-like"]


def step_ratio(result: dict[str, Any], name: str) -> float | None:
    """The length of a step over that of DistributedDataParallel, median over rounds."""
    turns = result["turns"]
    if name not in turns:
        return None
    return statistics.median(float(a["step_s"] / b["step_s"]) for a, b in zip(turns[name], turns["DDP"], strict=True))


def time_until(one: Comparison, ratio: float, above: float) -> float | None:
    """In parts of the time that the baseline takes until then; steps of a start last as long as the baseline's."""
    steps, base = one.reached(above), Comparison(one.baseline, one.baseline).reached(above)
    if steps is None or base is None:
        return None
    start = min(one.row.method.start, steps)
    return (start + (steps - start) * ratio) / base


def times(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A line for each network, transfer time, case and method that has both a loss and a step time."""
    lines = []
    for result in _results():
        for case, size in _PLACES.get(result["network"], ()):
            for one in found:
                name, method = step_name(one.row.method), one.row.method
                if one.row.case != case or method == DATA_PARALLEL or method.machine != size or name is None:
                    continue
                if (ratio := step_ratio(result, name)) is None:
                    continue
                same, near = time_until(one, ratio, 0.0), time_until(one, ratio, NEAR)
                lines.append(
                    {
                        "network": result["network"],
                        "transfer / step": result["transfer"],
                        "loss of": f"{case.name}, {method.name}",
                        "step": f"{ratio:.2f}",
                        "time to the same loss": "not reached" if same is None else f"{same:.2f}",
                        f"time to {NEAR:g} % above": "not reached" if near is None else f"{near:.2f}",
                    }
                )
    return lines
