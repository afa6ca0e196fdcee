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
    "Time until the loss of data-parallel training, in parts of the time that it takes itself there; in brackets, until "
    f"{NEAR:g} % above it, in parts of the time that it takes itself until then. A dash: not reached. Methods that never come "
    f"within {NEAR:g} % are left out. Columns are transfer times of the model in parts of a step. Step times are those of "
    f"[{STEP_TIMES}.md]({STEP_TIMES}.md), with compute that leaves the CPU free; steps are those of the table above. They "
    "were not measured together: the models differ, and 8 hosts are the most that were measured, n=16 beside them too."
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


def step_ratio(result: dict[str, Any], name: str) -> float:
    """The length of a step over that of DistributedDataParallel, median over rounds."""
    turns = result["turns"]
    return statistics.median(float(a["step_s"] / b["step_s"]) for a, b in zip(turns[name], turns["DDP"], strict=True))


def time_until(one: Comparison, ratio: float, above: float) -> float | None:
    """In parts of the time that the baseline takes until then; steps of a start last as long as the baseline's."""
    steps, base = one.reached(above), Comparison(one.baseline, one.baseline).reached(above)
    if steps is None or base is None:
        return None
    start = min(one.row.method.start, steps)
    return (start + (steps - start) * ratio) / base


def times(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A line for each network, case and method that has both a loss and step times, with a column for each transfer time."""
    lines = []
    for network, places in _PLACES.items():
        for one in found:
            method, name = one.row.method, step_name(one.row.method)
            if method == DATA_PARALLEL or name is None or (one.row.case, method.machine) not in places:
                continue
            results = [result for result in _results() if result["network"] == network]
            if one.reached(NEAR) is None or not all(name in result["turns"] for result in results):
                continue
            line = {"network": network, "loss of": f"{one.row.case.name}, {method.name}"}
            lines.append(line | {f"{result['transfer']}": _cell(one, step_ratio(result, name)) for result in results})
    return lines


def _cell(one: Comparison, ratio: float) -> str:
    same, near = time_until(one, ratio, 0.0), time_until(one, ratio, NEAR)
    return f"{_part(same)} ({_part(near)})"


def _part(part: float | None) -> str:
    return "-" if part is None else f"{part:.2f}"
