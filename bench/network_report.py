"""Tables, targets, plot and JSON of the network bench."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine, save, table

Result = Mapping[str, Any]

_BASELINES = ("DDP", "decent-dp one-peer")
_AUTO = "AWC auto"
_OURS = ("AWC one-peer", "AWC one-peer pairs")
_OURS_ON_MACHINES = (*_OURS, "AWC one-peer pairs, fused_backward", "AWC hierarchical")


def time_over(result: Result, method: str, other: str) -> list[float]:
    """A method's time for a step over another's, round by round."""
    turns = result["turns"]
    return [a["step_s"] / b["step_s"] for a, b in zip(turns[method], turns[other], strict=True)]


def efficiencies(result: Result, method: str) -> list[float]:
    """A method's efficiency in each round: the time of a local step over its own."""
    return time_over(result, "local", method)


def measured_transfer(result: Result) -> float:
    """Time of one transfer of the model over that of a local step, as it was in the rounds themselves."""
    return result["transfer_s"] / statistics.median(turn["step_s"] for turn in result["turns"]["local"])


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per network, kind of compute, transfer (asked and measured) and method; the rounds of all runs together."""
    found = []
    for network, kind, transfer in dict.fromkeys((r["network"], r["kind"], r["transfer"]) for r in results):
        same = [r for r in results if (r["network"], r["kind"], r["transfer"]) == (network, kind, transfer)]
        for method in same[0]["turns"]:
            values = [value for result in same for value in efficiencies(result, method)]
            turns = [turn for result in same for turn in result["turns"][method]]
            measured = statistics.median(map(measured_transfer, same))
            found.append(
                {
                    "network": network,
                    "compute": kind,
                    "transfer / step": f"{transfer} ({measured:.2f})",
                    "method": method,
                    "efficiency": f"{statistics.median(values):.2f}",
                    "range": f"{min(values):.2f} .. {max(values):.2f}",
                    "ms per step": round(1e3 * statistics.median(turn["step_s"] for turn in turns)),
                    "CPU ms": round(1e3 * statistics.median(turn["cpu_s"] for turn in turns)),
                    "blocked ms": round(1e3 * statistics.median(turn["blocked_s"] for turn in turns)),
                }
            )
    return found


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    print(table(rows(results)), flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """What holds the median of the values' distribution with a confidence of at least 95 %, by order statistics.

    With fewer than six values there is no such interval, and this is their range.
    """
    n = len(values)
    outside, below = 0, 0.0
    while (below := below + math.comb(n, outside) / 2**n) <= 0.025:
        outside += 1
    ordered = sorted(values)
    left_out = max(outside - 1, 0)
    return ordered[left_out], ordered[n - 1 - left_out]


def device_like_targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Flat networks, transfers of up to 0.6 of a step: AWC one-peer at 0.95 or more, DDP at 0.70 or less in the same run."""
    found = []
    for result in results:
        if result["kind"] != "device-like" or result["local"] > 1 or result["transfer"] > 0.6:
            continue
        line = _case(result)
        for method, limit in ((_OURS[0], ">= 0.95"), ("DDP", "<= 0.70")):
            if method in result["turns"]:
                middle = statistics.median(efficiencies(result, method))
                line[method] = f"{middle:.3f}"
                line[limit] = _yes(middle >= 0.95 if method in _OURS else middle <= 0.70)
        found.append(line)
    return found


def auto_targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What a user gets who says nothing is level with the best of all other methods: at most 1.02 of its time, round by round."""
    found = []
    for result in results:
        others = [method for method in result["turns"] if method not in (_AUTO, "local")]
        if _AUTO not in result["turns"] or not others:
            continue
        ratios = {other: time_over(result, _AUTO, other) for other in others}
        best = max(others, key=lambda other: statistics.median(ratios[other]))
        line = _case(result) | {"best of the others": best, f"time of {_AUTO} over its": _with_interval(ratios[best])}
        found.append(line | {"level (<= 1.02)": _yes(statistics.median(ratios[best]) <= 1.02)})
    return found


def real_targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """AWC takes less time than DDP and than decent-dp, in the median over rounds."""
    found = []
    for result in results:
        for ours in _OURS if result["local"] == 1 else _OURS_ON_MACHINES:
            if result["kind"] != "real" or ours not in result["turns"]:
                continue
            efficiency = statistics.median(efficiencies(result, ours))
            line = _case(result) | {"method": ours, "efficiency": f"{efficiency:.3f}"}
            for other in (baseline for baseline in _BASELINES if baseline in result["turns"]):
                ratios = time_over(result, ours, other)
                line[f"time over that of {other} (95 %)"] = _with_interval(ratios)
                line[f"ahead of {other}"] = _yes(statistics.median(ratios) < 1)
            found.append(line)
    return found


def real_together(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The same over all rounds on flat networks: single cases tell little apart where two methods are within 0.05."""
    flat = [result for result in results if result["kind"] == "real" and result["local"] == 1]
    found = []
    for ours in _OURS:
        for other in _BASELINES:
            having = [result for result in flat if {ours, other} <= result["turns"].keys()]
            if ratios := [ratio for result in having for ratio in time_over(result, ours, other)]:
                label = "all rounds on flat networks, real compute"
                line = {label: f"{ours} over {other}", "rounds": len(ratios), "time (95 %)": _with_interval(ratios)}
                found.append(line)
    return found


def _case(result: Result) -> dict[str, Any]:
    names = {"run": "run", "network": "network", "kind": "compute", "transfer": "transfer / step"}
    return {column: result[key] for key, column in names.items()}


def _with_interval(ratios: Sequence[float]) -> str:
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.3f} .. {high:.3f})"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


def _target_tables(results: Sequence[Result]) -> list[str]:
    tables = (device_like_targets(results), auto_targets(results), real_targets(results), real_together(results))
    return [table(lines) for lines in tables if lines]


def show_targets(results: Sequence[Result]) -> None:
    """Print what was aimed at, and whether it was reached."""
    for text in _target_tables(results):
        print(text, flush=True)


def write(name: str, results: Sequence[Result]) -> None:
    """Write results/NAME.json (measurements included), .md and, for several fractions, .png; print the table."""
    targets = device_like_targets(results) + real_targets(results)
    save(name, rows(results), targets=targets, results=list(results))
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        f"Scaling efficiency by `bench/network.py` ({words}).",
        table(rows(results)),
        *_target_tables(results),
    ]
    (RESULTS / f"{name}.md").write_text("\n\n".join(parts) + "\n")
    if len({r["transfer"] for r in results}) > 1:  # a curve needs points
        _plot(RESULTS / f"{name}.png", results)


def _plot(path: Path, results: Sequence[Result]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks, kinds = ([*dict.fromkeys(r[key] for r in results)] for key in ("network", "kind"))
    methods = [*dict.fromkeys(method for r in results for method in r["turns"] if method != "local")]
    size = (4.2 * len(networks), 3.4 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), len(networks), figsize=size, squeeze=False, sharex=True, sharey=True)
    for line, kind in zip(axes, kinds, strict=True):
        for axis, network in zip(line, networks, strict=True):
            for number, method in enumerate(methods):
                _draw(axis, [r for r in results if (r["network"], r["kind"]) == (network, kind)], method, number)
            axis.set_title(f"{network}, {kind} compute", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("transfer of the model / local step")
    for line in axes:
        line[0].set_ylabel("efficiency (median, range)")
    axes[0][0].set_ylim(0, 1.05)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


def _draw(axis: Any, results: Sequence[Result], method: str, number: int) -> None:
    by_transfer: dict[float, list[float]] = {}
    for result in results:
        if method in result["turns"]:
            by_transfer.setdefault(result["transfer"], []).extend(efficiencies(result, method))
    if not by_transfer:
        return
    middles = [statistics.median(values) for values in by_transfer.values()]
    low = [m - min(values) for m, values in zip(middles, by_transfer.values(), strict=True)]
    high = [max(values) - m for m, values in zip(middles, by_transfer.values(), strict=True)]
    # Methods would hide each other's ranges: a small shift for each.
    at = [transfer + 0.006 * (number - 4) for transfer in by_transfer]
    style = "--" if method in _BASELINES else "-"
    axis.errorbar(at, middles, yerr=[low, high], label=method, marker="o", ms=3, lw=1, ls=style, color=f"C{number}")
