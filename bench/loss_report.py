"""Tables, targets and plot of the loss bench, from rows as they become complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table
from loss_methods import Case
from loss_rows import NEAR, Comparison, Row, comparisons, sent
from loss_time import NETWORKS, times


def line(one: Comparison) -> dict[str, Any]:
    """A line of the table."""
    row = one.row
    scale = "" if row.start_rate is None else f"{row.start_rate:g}, then x{row.rate / row.start_rate:g}"
    return {
        "case": row.case.name,
        "method": row.method.name,
        "sent": f"{sent(row):.2f}",
        "rate": scale or f"{row.rate:g}",
        "seeds": len(one.gaps),
        "loss": f"{row.final:.4f}",
        "above data-parallel, %": "0" if row is one.baseline else f"{one.mean:+.1f} ± {one.error:.1f}",
        "its loss after": _part(one.reached(0.0)),
        f"within {NEAR:g} % after": _part(one.reached(NEAR)),
    }


def _part(part: float | None) -> str:
    return "not reached" if part is None else f"{part:.0%}"


@dataclass(frozen=True)
class Target:
    """What a method should show: so many percent above data-parallel training at most, with so many copies sent."""

    words: str
    task: str
    ranks: int
    limit: float
    machine: int = 1
    start: float | None = None
    """None: any start, or none."""

    def concerns(self, row: Row) -> bool:
        case, method = row.case, row.method
        return (
            case == Case(self.task, self.ranks)
            and method.algorithm in ("awc", "atc")
            and method.machine == self.machine
            and (self.start is None or method.start == self.start)
            and not (method.average_until or method.average_from < 1)
            and sent(row) < 1.1
        )


TARGETS = (
    Target("GPT, n=4, 10 % start", "GPT", 4, 0.5, start=0.1),
    Target("MLP, n=16, flat", "MLP", 16, 1.5),
    Target("GPT, n=16, flat", "GPT", 16, 2.5),
    Target("MLP, 4 machines of 4", "MLP", 16, 0.5, machine=4),
    Target("GPT, 4 machines of 4, 10 % start", "GPT", 16, 1.0, machine=4, start=0.1),
)


def targets(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Every method that a target speaks of."""
    return [
        {
            "target": target.words,
            "at most, %": f"{target.limit:g}",
            "method": one.row.method.name,
            "above data-parallel, %": f"{one.mean:+.1f} ± {one.error:.1f}",
            "met": "yes" if one.mean <= target.limit else "NO",
        }
        for target in TARGETS
        for one in found
        if target.concerns(one.row)
    ]


def write(rows: Sequence[Row]) -> None:
    """Write results/loss.json, loss.md and loss.png."""
    found = comparisons(rows)
    if not found:
        return
    words = machine()
    parts: dict[str, list[dict[str, Any]]] = {
        "rows": [line(one) for one in found],
        "targets": targets(found),
        "times": times(found),
    }
    (RESULTS / "loss.json").write_text(json.dumps({"machine": words, **parts}, indent=1) + "\n")
    texts = [
        f"Loss by `bench/loss.py` ({', '.join(f'{key} {value}' for key, value in words.items())}). *Sent*: copies of the "
        "model in fp32 that a rank sends in a step of gossip; machines of 4 send theirs once a machine. *Its loss after*: "
        "the part of all steps after which the averaged model is where data-parallel training ends.",
        table(parts["rows"]),
    ]
    if parts["targets"]:
        texts += ["Targets, and methods of one fp32 message a step:", table(parts["targets"])]
    if parts["times"]:
        texts += [NETWORKS, table(parts["times"])]
    (RESULTS / "loss.md").write_text("\n\n".join(texts) + "\n")
    plot(RESULTS / "loss.png", found)


def plot(path: Path, found: Sequence[Comparison]) -> None:
    """Gaps with their standard errors, a panel for each case with at least three methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_case = {
        case: [one for one in found if one.row.case == case and one.row is not one.baseline]
        for case in dict.fromkeys(one.row.case for one in found)
    }
    panels = {case: some for case, some in by_case.items() if len(some) >= 2}
    if not panels:
        return
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(10, sum(1 + 0.25 * len(some) for some in panels.values())),
        height_ratios=[1 + 0.25 * len(some) for some in panels.values()],
        squeeze=False,
    )
    for axis, (case, some) in zip(axes.flat, panels.items(), strict=True):
        places = range(len(some), 0, -1)
        axis.errorbar([c.mean for c in some], places, xerr=[c.error for c in some], fmt="o", ms=4, lw=1.2)
        if max(c.mean for c in some) > 50:
            axis.set_xscale("symlog", linthresh=10)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_ylim(0.5, len(some) + 0.5)
        axis.set_yticks(places, [c.row.method.name for c in some], fontsize=7)
        axis.set_title(f"{case.name}: loss above data-parallel training's, % (standard error)", fontsize=9)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
