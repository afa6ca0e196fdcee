"""What a step costs the host on the GPU path, measured without a GPU: python bench/host.py [--profile | --no-save]

300 parameters of one element each, so that nothing but the host is at work: the engine's own loops, Triton's launcher down
to a driver library that only counts (tests/support/stub_driver.py), and a neighbour that is silent in the place of NCCL. All
launches of a step are made: those of passes, and where parameters are sent ahead the two that keep and compare samples.
Beside it, in turns in the same run, `torch.optim.AdamW(fused=True)` on 300 such parameters, on the CPU: its loops are those
of the GPU, its launches are not in it. The least of 200 steps counts, since what is more was somebody else's. Targets: one
neighbour in at most 150 us, and in at most half of torch's time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save, table
from support.gpu_checks import among_echoes
from support.stub_driver import StubGpu, stub_gpu
from torch import nn

import fusedfog

PARAMETERS, STEPS, WARM = 300, 200, 5
TARGET_US, TARGET_OF_TORCH = 150.0, 0.5
SETTINGS = {
    "local": ("AdamW", "local", 1),
    "awc, one neighbour": ("AdamW", "awc", 2),
    "awc, two neighbours": ("AdamW", "awc", 4),
    "atc, one neighbour": ("AdamW", "atc", 2),
    "SGD, awc, one neighbour": ("SGD", "awc", 2),
}
"""Kind, algorithm and number of ranks on a ring; the target is for the second."""
AIMED = "awc, one neighbour"
TORCH = "torch.optim.AdamW(fused=True)"


def parameters(count: int) -> list[nn.Parameter]:
    """Parameters of one element, with gradients that stay where they are, as the caching allocator lets them."""
    params = [nn.Parameter(torch.rand(1)) for _ in range(count)]
    for param in params:
        param.grad = torch.rand(1)
    return params


def optimizer_of(name: str, count: int = PARAMETERS) -> Any:
    """The optimizer of a setting, among silent neighbours; inside `stub_gpu(take_gpu_way=True)`."""
    if name == TORCH:
        return torch.optim.AdamW(parameters(count), lr=1e-3, fused=True)
    kind, algorithm, size = SETTINGS[name]
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(fusedfog, kind)(parameters(count), lr=1e-3, algorithm="local", **options)
    return optimizer if size == 1 else among_echoes(optimizer, algorithm, size, silent=True)


def compared(stub: StubGpu, count: int = PARAMETERS, steps: int = STEPS) -> list[dict[str, Any]]:
    """A row for every setting and for torch: least and median us a step, over interleaved steps, and launches a step."""
    runs: dict[str, Callable[[], Any]] = {name: optimizer_of(name, count).step for name in (*SETTINGS, TORCH)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    launches: dict[str, int] = {}
    gc.collect()
    gc.disable()
    try:
        for turn in range(WARM + steps):
            for name, step in runs.items():
                made, begin = stub.made, time.perf_counter()
                step()
                seconds = time.perf_counter() - begin
                launches[name] = stub.made - made
                if turn >= WARM:
                    times[name].append(1e6 * seconds)
    finally:
        gc.enable()
    torchs = min(times[TORCH])
    return [
        {
            "step": name,
            "least us": min(found),
            "median us": statistics.median(found),
            "least / torch's": min(found) / torchs,
            "launches": launches[name],
            "target met": None if name != AIMED else _verdict(min(found), torchs),
        }
        for name, found in times.items()
    ]


def _verdict(ours: float, torchs: float) -> str:
    return "yes" if ours <= min(TARGET_US, TARGET_OF_TORCH * torchs) else "no"


def profile(name: str = AIMED, steps: int = 1000) -> str:
    """Where the time of a setting's steps goes."""
    step, profiler = optimizer_of(name).step, cProfile.Profile()
    for turn in range(WARM + steps):
        if turn >= WARM:
            profiler.enable()
        step()
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(30)
    return text.getvalue()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-save", action="store_true", help="print alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with stub_gpu(take_gpu_way=True, record=False, optimized=True) as stub:
        if args.profile:
            print(profile())
            return
        rows = compared(stub, steps=args.steps)
        if args.no_save:
            print(table(rows))
        else:
            save("host", rows, parameters=PARAMETERS, steps=args.steps)


if __name__ == "__main__":
    main()
