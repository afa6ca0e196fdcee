"""What the benches share: interleaved timing, the machine in words, tables and JSON, imports from this source tree."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class KernelsFolder:
    """Imports `kernels/` under the name that an installation gives it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "fusedfog.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def use_source_tree() -> None:
    """Make `fusedfog` importable where it is not installed, and the tests' table of rules and GPU checks everywhere."""
    try:
        installed = importlib.util.find_spec("fusedfog.kernels") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        # Behind bench/, whose kernels.py would be hidden by the folder kernels/.
        sys.path.append(str(ROOT))
        sys.meta_path.insert(0, KernelsFolder)
    sys.path.append(str(ROOT / "tests"))


use_source_tree()


def machine() -> dict[str, str]:
    """The machine and the versions that numbers belong to."""
    words = {
        "day": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
    }
    if torch.cuda.is_available():
        import triton

        words |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    return words


def measure(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, once per round, all runs interleaved so that drift hits them alike; two rounds warm up.

    On a CPU by `clock`: `time.thread_time` does not count what other processes of a busy machine take.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            seconds = _once(run, device, clock)
            if turn >= 2:
                times[name].append(seconds)
    return times


def _once(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        begin = clock()
        run()
        return clock() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The GPU idles for about a millisecond while the host queues the run, so that the host's time is not measured.
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> tuple[float, float, float]:
    """Median, smallest and largest of time(one) / time(other) over the rounds; a table shows it as 1.23 (1.10..1.40)."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, (tuple, list)) and len(value) == 3 and all(isinstance(part, float) for part in value):
        return "{:.2f} ({:.2f}..{:.2f})".format(*value)
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write `bench/results/NAME.json` and print the table with the machine's description."""
    RESULTS.mkdir(exist_ok=True)
    words = machine()
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": words, **more, "rows": list(rows)}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in words.items()))
    print(table(rows), flush=True)
