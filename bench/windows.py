"""Put, get and accumulate of windows against gloo's isend and irecv: python bench/windows.py

Two ranks on this machine, over shared memory and over TCP (loopback), in turns in the same processes. For each: what the caller
waits, what it takes until the receiver has confirmed, and the CPU time of both processes for one message, taken in by its
receiver. Three minutes. (results/windows.json and .md)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from support.pool import Pool
from support.windows import transport
from torch import Tensor

import fusedfog

SIZES = {"8 kB": 1 << 10, "1 MB": 1 << 17, "25 MB": 25 << 17}
"""Elements of 8 bytes."""

Action = Callable[[], None]


def nothing() -> None:
    """The receiver's part where it has none."""


@contextmanager
def ways(elements: int) -> Iterator[dict[str, tuple[Action, Action, Action]]]:
    """By name: the sender's call, its wait for the arrival, and what the receiver does with what came."""
    x, buffer = torch.ones(elements, dtype=torch.float64), torch.empty(elements, dtype=torch.float64)
    found: dict[str, tuple[Action, Action, Action]] = {}
    windows = []
    for how in ("memory", "tcp"):
        with transport(how):
            window = fusedfog.Window(x.clone(), [(0, 1), (1, 0)], name=how)
        windows.append(window)
        found[f"put, {how}"] = (window.put, window.fence, lambda w=window: w.update(0.0, {0: 1.0}))  # type: ignore[misc]
        found[f"accumulate, {how}"] = (window.accumulate, window.fence, window.collect)  # type: ignore[assignment]
        found[f"get, {how}"] = (window.get, nothing, nothing)
    found["gloo isend, irecv"] = gloo(x, buffer)
    try:
        yield found
    finally:
        dist.barrier()
        for window in windows:
            window.close()


def gloo(x: Tensor, buffer: Tensor) -> tuple[Action, Action, Action]:
    """The same by torch.distributed."""
    works: list[Any] = []

    def send() -> None:
        works.append(dist.isend(x, 1))

    def wait() -> None:
        works.pop().wait()

    return send, wait, lambda: dist.irecv(buffer, 0).wait()


def measure(rounds: int, messages: int, size: str) -> list[dict[str, Any]]:
    """Medians of this rank, by way."""
    rank, times = dist.get_rank(), {}
    with ways(SIZES[size]) as all_ways:
        barrier = [(lambda: None, lambda: None, lambda: None)]
        for turn in range(rounds + 1):
            for name, (call, wait, take) in {"barrier": barrier[0], **all_ways}.items():
                one = [message(rank, call, wait, take, receives="gloo" in name) for _ in range(messages)]
                if turn:
                    times.setdefault(name, []).append([statistics.median(part) for part in zip(*one, strict=True)])
    idle = statistics.median(cpu for *_, cpu in times.pop("barrier"))
    return [
        {
            "way": name,
            "size": size,
            **{key: [one[k] for one in found] for k, key in enumerate(("call", "arrival"))},
            "cpu": [one[2] - idle for one in found],
        }
        for name, found in times.items()
    ]


def message(rank: int, call: Action, wait: Action, take: Action, receives: bool) -> tuple[float, float, float]:
    """One message: seconds of the call, seconds until it has arrived, CPU seconds of this process."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    called = begin
    if rank == 0:
        call()
        called = time.perf_counter()
        wait()
    elif receives:
        take()
    arrived = time.perf_counter()
    dist.barrier()
    if rank == 1 and not receives:
        take()
    return called - begin, arrived - begin, time.process_time() - cpu


def spread(values: list[float], unit: float) -> str:
    """Median and range over rounds."""
    low, high = min(values) / unit, max(values) / unit
    return f"{statistics.median(values) / unit:.3g} ({low:.3g}..{high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    given = parser.parse_args()
    pool, rows, shown = Pool(), [], []
    try:
        for size in SIZES:
            messages = 10 if size == "25 MB" else 60
            sender, receiver = pool.run(2, measure, given.rounds, messages, size, timeout=280, pg_timeout=250)
            for one, other in zip(sender, receiver, strict=True):
                rows.append({**one, "cpu of the receiver": other["cpu"]})
                megabytes = SIZES[size] * 8 / 2**20
                shown.append(
                    {
                        "way": one["way"],
                        "message": size,
                        "caller waits, ms": spread(one["call"], 1e-3),
                        "until confirmed, ms": spread(one["arrival"], 1e-3),
                        "MB/s": f"{megabytes / statistics.median(one['arrival']):.0f}",
                        "CPU of the sender, ms": spread(one["cpu"], 1e-3),
                        "CPU of the receiver, ms": spread(other["cpu"], 1e-3),
                    }
                )
    finally:
        pool.close()
    words = machine()
    text = (
        "# Windows against gloo\n\nTwo ranks on one machine; medians and ranges over rounds of the medians of a round. Rank 0 "
        "sends, and for get fetches. CPU times are of whole processes, less those of the barriers around a message; small "
        f"ones are noise.\n\n{', '.join(f'{key} {value}' for key, value in words.items())}\n\n{table(shown)}\n"
    )
    given.folder.mkdir(exist_ok=True)
    (given.folder / "windows.json").write_text(json.dumps({"machine": words, "rows": rows}, indent=1) + "\n")
    (given.folder / "windows.md").write_text(text)
    print(text)


if __name__ == "__main__":
    import windows  # by this name the ranks' processes find its functions

    windows.main()
