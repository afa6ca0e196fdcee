"""Tables, targets, plot and JSON of the network bench."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine, save, table

Result = Mapping[str, Any]

_OURS, _BASELINES = "AWC one-peer", ("DDP", "decent-dp one-peer")


def efficiencies(result: Result, method: str) -> list[float]:
    """A method's efficiency in each round: the time of a local step over its own."""
    turns = result["turns"]
    return [a["step_s"] / b["step_s"] for a, b in zip(turns["local"], turns[method], strict=True)]


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


def targets(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was reached, for each measurement on a flat network.

    device-like, transfers of up to 0.6 of a step: AWC one-peer at 0.95 or more, DDP at 0.70 or less in the same run.
    real: AWC one-peer ahead of DDP and of decent-dp.
    """
    found = []
    for result in results:
        medians = {method: statistics.median(efficiencies(result, method)) for method in result["turns"]}
        if result["local"] > 1 or _OURS not in medians:
            continue
        others = {method: medians[method] for method in _BASELINES if method in medians}
        if result["kind"] == "real":
            reached = {f"ahead of {method}": medians[_OURS] > value for method, value in others.items()}
        elif result["transfer"] <= 0.6:
            reached = {"AWC >= 0.95": medians[_OURS] >= 0.95}
            reached |= {"DDP <= 0.70": others["DDP"] <= 0.70} if "DDP" in others else {}
        else:
            continue
        found.append(
            {
                "run": result["run"],
                "network": result["network"],
                "compute": result["kind"],
                "transfer / step": result["transfer"],
                _OURS: f"{medians[_OURS]:.3f}",
                "others": ", ".join(f"{method} {value:.3f}" for method, value in others.items()),
                "targets": ", ".join(f"{what}: {'yes' if is_so else 'NO'}" for what, is_so in reached.items()),
            }
        )
    return found


def show_targets(results: Sequence[Result]) -> None:
    """Print the table of targets."""
    if found := targets(results):
        print(table(found), flush=True)


def write(name: str, results: Sequence[Result]) -> None:
    """Write results/NAME.json (measurements included), .md and, for several fractions, .png; print the table."""
    save(name, rows(results), targets=targets(results), results=list(results))
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        f"Scaling efficiency by `bench/network.py` ({words}).",
        table(rows(results)),
        table(targets(results)),
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
