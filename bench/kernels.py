"""One fused pass against the same work in torch calls, on the CPU or, where there is one, the GPU.

    python bench/kernels.py [--all] [--numel N] [--rounds R]

By default on a CPU: torch's own rules, fp32, up to two neighbours (K), one thread and two, and the target: mixing with one
neighbour and AdamW on 25M parameters in at most 1.10 (compiled: 1.05) of the time of a loop with the same traffic and next
to no arithmetic, which shows what the memory allows (medians with quartiles; --targets makes that table alone). On a GPU,
or with --all: every rule, up to four neighbours, fp32 and bf16.

Columns: bytes an element that the pass must move (each tensor that the rule reads or writes, once each); GB/s of those
bytes; the same as a share of a same-size `copy_` in the same rounds; how many times longer torch's fused optimizer and
`lerp_` mixing take, the operations of Decent-DP's step (re-enacted with torch calls), and the step of the `decent-dp`
package where it is installed, its all-reduce left out. Ratios are medians over interleaved rounds (smallest..largest).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import measure, save, table
from kernel_cases import TORCH, USES, Pass, rows, silent_world, torch_runs
from torch import Tensor

from fusedfog.kernels import compile_now

TARGET_NUMEL = 25_000_000
FLOOR = "same traffic, sums only"
"""What the memory allows: a compiled loop that reads and writes what the pass does, with next to no arithmetic."""
TARGETS = {"default": 1.10, "compiled": 1.05}
"""Time over that of `FLOOR`, by CPU path."""


def targets(numel: int, rounds: int) -> list[dict[str, Any]]:
    """The CPU target: AdamW with one neighbour, fp32, non-finite values left out, against what the memory allows.

    One thread by its CPU time, two by the clock.
    """
    device, lines = torch.device("cpu"), []
    for threads in thread_counts():
        torch.set_num_threads(threads)
        runs = {"torch": torch_runs("adamw", 1, torch.float32, numel, device)["torch"]}
        plain, alarm = Pass("adamw", 1, torch.float32, numel, device), torch.zeros(4)
        runs["default, not looked at"] = plain
        runs["default"] = functools.partial(plain, alarm=alarm)
        if compiles():
            region = dataclasses.replace(plain.arguments["region"], compiled=True)
            runs["compiled, not looked at"] = functools.partial(plain, region=region)
            runs["compiled"] = functools.partial(plain, region=region, alarm=alarm)
            runs[FLOOR] = bare_loop(plain, threads)
        times = measure(runs, rounds, device, time.thread_time if threads == 1 else time.perf_counter)
        for path in times:
            limit = TARGETS.get(path) if FLOOR in times else None
            found = quartiles(times, path, FLOOR) if FLOOR in times else None
            lines.append(
                {
                    "path": path,
                    "threads": threads,
                    "numel": numel,
                    "ms": 1e3 * statistics.median(times[path]),
                    "over torch": quartiles(times, path, "torch"),
                    "over the floor": found,
                    "target": limit,
                    "target met": None if limit is None or found is None else "yes" if found[0] <= limit else "no",
                }
            )
    return lines


def quartiles(times: dict[str, list[float]], one: str, other: str) -> tuple[float, float, float]:
    """Median and quartiles of time(one) / time(other) over the rounds."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    return middle, lower, upper


def bare_loop(like: Pass, threads: int) -> Callable[[], Any]:
    """`FLOOR` on the tensors of an AdamW pass with one neighbour."""

    def add_up(x: Tensor, g: Tensor, m: Tensor, v: Tensor, received: Tensor) -> None:
        m.copy_(0.5 * (m + g))
        v.copy_(0.5 * (v + g))
        x.copy_(0.25 * (x + g + received + m))

    loop = torch.compile(add_up, dynamic=True, options={"cpp.threads": threads, "cpp.min_chunk_size": 1})
    tensors = (like.param, like.grad, *like.states, like.inbox[0][0])
    loop(*(tensor[:96].clone() for tensor in tensors))
    return lambda: loop(*tensors)


def compiles() -> bool:
    """Whether the compiled path works here; says why not."""
    try:
        compile_now()
    except Exception as error:  # whatever torch raises, for instance without a C++ compiler
        print(f"no compiled path here: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
        return False
    return True


def thread_counts() -> list[int]:
    """One thread and, where there are two cores, two."""
    return [1, 2][: os.cpu_count() or 1]


def main() -> None:
    """Measure and print, then save, the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every rule, fp32 and bf16, up to four neighbours")
    parser.add_argument(
        "--targets", action="store_true", help="only the target's table, kept in kernels-cpu-targets.json"
    )
    parser.add_argument("--numel", type=int, help="elements; default 4M on a CPU, 128M on a GPU")
    parser.add_argument("--rounds", type=int, help="default 7 on a CPU, 15 on a GPU")
    args = parser.parse_args()
    if args.targets:
        save("kernels-cpu-targets", targets(args.numel or TARGET_NUMEL, args.rounds or 20))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    numel, rounds = args.numel or (1 << 27 if on_gpu else 1 << 22), args.rounds or (15 if on_gpu else 7)
    whole = args.all or on_gpu
    names, counts = (USES, (0, 1, 2, 4)) if whole else (list(TORCH), (0, 1, 2))
    dtypes = (torch.float32, torch.bfloat16) if whole else (torch.float32,)
    found: list[dict[str, Any]] = []
    with silent_world():
        for threads in [1] if on_gpu else thread_counts():
            torch.set_num_threads(threads)
            label = {} if on_gpu else {"threads": threads}
            found += [label | line for line in rows(names, counts, dtypes, numel, device, rounds)]
    goal = [] if on_gpu else targets(args.numel or TARGET_NUMEL, rounds)
    save(f"kernels-{device.type}", found, numel=numel, rounds=rounds, targets=goal)
    if goal:
        print(table(goal), flush=True)


if __name__ == "__main__":
    main()
