"""What `async.py` found, as a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from async_ranks import ALONE, EVERY, LOG_NORMAL, METHODS, SLEEP, SPREAD, TASKS
from common import table

SYNCHRONOUS = "AWC"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Everything in words and a table."""
    machines = {
        ", ".join(f"{key} {value}" for key, value in one["machine"].items()) for row in rows for one in row["rounds"]
    }
    about = (
        f"A step is its computation and a sleep of {1e3 * SLEEP:g} ms, rank 0's so many times longer; log-normal: every sleep "
        f"of every rank is drawn anew, with that mean and a deviation of {SPREAD} of its logarithm. All graphs are rings. "
        f"Medians and ranges over rounds; ratios are taken within a round. *Of alone* is the speed of ranks that are not slower "
        f"over that of one process alone. Accuracies and losses are those of the average model, looked at every {EVERY:g} s."
    )
    return f"# Asynchronous steps beside synchronous ones\n\n{about}\n\n{'; '.join(sorted(machines))}\n\n{table(lines(rows))}\n"


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table's lines."""
    found = []
    for row in rows:
        goal = TASKS[row["task"]]
        for method in METHODS:
            rounds = row["rounds"]
            found.append(
                {
                    "task": row["task"],
                    "ranks": str(row["ranks"]),
                    "rank 0 sleeps": row["speeds"],
                    "method": method,
                    "rounds": str(len(rounds)),
                    "steps/s, all ranks": spread([sum(one[method]["rates"]) for one in rounds], 1),
                    "of AWC's": spread(
                        [sum(one[method]["rates"]) / sum(one[SYNCHRONOUS]["rates"]) for one in rounds], 2
                    ),
                    "of alone": spread([of_alone(one, method) for one in rounds], 2),
                    f"s to {goals()}": seconds_to_goal(row, method),
                    "at the end": spread([one[method]["found"][-1] for one in rounds], 3) + f" ({goal.what})",
                }
            )
    return found


def goals() -> str:
    """Both tasks' goals."""
    return ", ".join(f"{goal.what} {goal.value:g}" for goal in TASKS.values())


def of_alone(one: dict[str, Any], method: str) -> float:
    """The median speed of all ranks but rank 0, over that of a process alone."""
    return statistics.median(one[method]["rates"][1:]) / one[ALONE]["rates"][0]


def seconds_to_goal(row: dict[str, Any], method: str) -> str:
    """When the average model was first good enough, in each round."""
    goal = TASKS[row["task"]]
    when = []
    for one in row["rounds"]:
        there = [EVERY * (k + 1) for k, value in enumerate(one[method]["found"]) if goal.reached(value)]
        when.append(min(there) if there else None)
    reached = sorted(one for one in when if one is not None)
    if not reached:
        return f"over {row['rounds'][0]['seconds']:g}"
    missing = len(when) - len(reached)
    return spread(reached, 1) + (f"; {missing} of {len(when)} rounds ended before" if missing else "")


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the range if there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Above: steps a second by method and speeds. Below: what the average model was good for, by time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["speeds"] in ("1x", "3x", LOG_NORMAL)]
    columns = sorted({(row["ranks"], row["speeds"]) for row in shown})
    figure, axes = pyplot.subplots(
        1 + len(TASKS), len(columns), figsize=(3.2 * len(columns), 8.5), squeeze=False, layout="constrained"
    )
    for column, (ranks, speeds) in enumerate(columns):
        here = [row for row in shown if (row["ranks"], row["speeds"]) == (ranks, speeds)]
        title = "log-normal sleeps" if speeds == LOG_NORMAL else f"rank 0 sleeps {speeds}"
        axes[0][column].set_title(f"{ranks} ranks, {title}", fontsize=10)
        for place, method in enumerate(METHODS):
            rates = [sum(one[method]["rates"]) for row in here for one in row["rounds"]]
            axes[0][column].bar(place, statistics.median(rates), color=f"C{place}", label=method)
            axes[0][column].plot([place] * len(rates), rates, "k.", markersize=3)
        axes[0][column].set_xticks([])
        for line, task in enumerate(TASKS, 1):
            for row in [row for row in here if row["task"] == task]:
                for place, method in enumerate(METHODS):
                    values = row["rounds"][0][method]["found"]
                    times = [EVERY * (k + 1) for k in range(len(values))]
                    axes[line][column].plot(times, values, color=f"C{place}", linewidth=1.2)
            axes[line][column].axhline(TASKS[task].value, color="0.6", linewidth=0.8, linestyle=":")
            axes[line][column].set_xlabel("seconds")
    axes[0][0].set_ylabel("steps/s, all ranks")
    for line, (task, goal) in enumerate(TASKS.items(), 1):
        axes[line][0].set_ylabel(f"{task}: {goal.what}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=len(METHODS), fontsize=9)
    figure.savefig(path, dpi=80)
