"""Asynchronous steps beside synchronous ones, where ranks differ in speed: python bench/async.py

Digits split by label, and the byte GPT of the examples, on 4 and 8 ranks: asynchronous AWC and push-sum, synchronous AWC, and
DistributedDataParallel. A step is its computation and a sleep, as while a GPU computes, so that few cores carry many ranks.
Rank 0 sleeps 1, 2, 3 or 4 times as long as the others, or every sleep of every rank is drawn from a log-normal distribution.
In a round all methods have the same seconds, one after another, after one process alone. Ranks keep their parameters every
second; what their averages are good for is found out afterwards.

    python bench/async.py --tasks digits --ranks 4 --speeds 3x --rounds 3    # adds rounds to what is there
    python bench/async.py --rounds 0                                         # the table and the plot of what is there

A round of one case takes two and a half minutes, of all twenty fifty. (results/async.json, .md and .png)
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from async_ranks import ALONE, METHODS, SPEEDS, TASKS, run
from async_report import draw, report
from common import RESULTS, machine
from support.pool import Pool

RANKS, SECONDS, SECONDS_ALONE = (4, 8), 30.0, 8.0


def one_round(pool: Pool, case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """All methods of a case, one after another: by method the steps a second of each rank, and what was found when."""
    names = case["task"], case["speeds"], case["ranks"]
    found: dict[str, Any] = {"machine": machine(), "seconds": seconds}
    for method in (ALONE, *METHODS):
        size, limit = (1, SECONDS_ALONE) if method == ALONE else (case["ranks"], seconds)
        key = "/".join(map(str, (*names, method)))
        ranks = pool.run(size, run, case["task"], method, case["speeds"], limit, key, timeout=300, pg_timeout=120)
        rates = [one["steps"] / one["seconds"] for one in ranks]
        found[method] = {"rates": rates, "found": ranks[0]["found"]}
        print(*names, method, f"{sum(rates):.1f} steps/s", flush=True)
    return found


def add(rows: list[dict[str, Any]], case: dict[str, Any]) -> dict[str, Any]:
    """The row of this case, which is added if there is none."""
    for row in rows:
        if all(row[key] == value for key, value in case.items()):
            return row
    rows.append({**case, "rounds": []})
    return rows[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--speeds", nargs="+", choices=SPEEDS, default=list(SPEEDS))
    parser.add_argument("--rounds", type=int, default=1, help="to add to each case (default 1)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of every run (default {SECONDS:g})")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are (default bench/results)")
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    kept = given.folder / "async.json"
    rows = json.loads(kept.read_text())["rows"] if kept.exists() else []
    pool = Pool()
    try:
        for _ in range(given.rounds):
            for task in given.tasks:
                for ranks in given.ranks:
                    for speeds in given.speeds:
                        case = {"task": task, "ranks": ranks, "speeds": speeds}
                        result = one_round(pool, case, given.seconds)
                        add(rows, case)["rounds"].append(result)
                        kept.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    finally:
        pool.close()
    if rows:
        rows.sort(key=lambda row: (list(TASKS).index(row["task"]), row["ranks"], SPEEDS.index(row["speeds"])))
        kept.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        text = report(rows)
        (given.folder / "async.md").write_text(text)
        draw(rows, given.folder / "async.png")
        print(text)


if __name__ == "__main__":
    importlib.import_module("async").main()  # by this name the ranks' processes find its functions
