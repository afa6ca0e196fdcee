"""Compressed messages against exact ones: python bench/wires.py [--costs]

Quadratics in fp64 (each rank has a minimiser of its own), where the limit can be told apart from exact messages' to the
last digit, and the digits example, whose ranks see different digits; bytes are those that were handed to the network.
Four ranks over gloo; six minutes. (results/wires.json and .md)

With --costs, what they cost the CPU instead: a rank's CPU time of a step, all of its threads, gloo's included, with AdamW and 25M
parameters on two ranks of one machine, one thread for computation. Three minutes. (results/wires-cpu.json and .md)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, table
from support.pool import Pool
from torch import Tensor

import fusedfog
from fusedfog.examples import digits

RANKS, STEPS, SIZE = 4, 400, 4096
LIMIT = 300.0
FORMATS = (None, "bf16", "fp8", "int8")
WAYS: dict[str, dict[str, Any]] = {
    "AWC, ring": {"algorithm": "awc", "topology": "ring"},
    "AWC, one-peer exponential": {"algorithm": "awc", "topology": "one_peer_exponential"},
    "ATC, ring": {"algorithm": "atc", "topology": "ring"},
}
EXACT = "fp64 / fp32"
COSTLY, COST_STEPS = 25_000_000, 12


def limit(wire: str | None, keywords: dict[str, Any]) -> tuple[Tensor, float]:
    """The rank's parameters at the end, and bytes sent in a step."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(SIZE, dtype=torch.float64))
    torch.manual_seed(1 + rank)
    aim, curve = torch.randn(SIZE, dtype=torch.float64), torch.rand(SIZE, dtype=torch.float64) + 0.5
    opt = fusedfog.SGD([x], lr=0.2, wire_dtype=wire, **keywords)
    for _ in range(STEPS):
        x.grad = curve * (x.detach() - aim)
        opt.step()
    return x.detach(), opt.stats()["bytes_sent"] / opt.stats()["exchanges"]


def classify(wire: str | None, keywords: dict[str, Any], seed: int) -> tuple[float, float]:
    """Test accuracy of the averaged model, and bytes sent in a step."""
    settings = digits.Settings(progress=False, seed=seed, measure_every=digits.Settings.steps)
    data = digits.load(torch.device("cpu"), settings)
    contender = digits.Decentralized(digits.network(seed), settings, **keywords, wire_dtype=wire)
    history = digits.train("", contender, data, settings)
    return history.averaged_accuracy[-1], history.bytes_per_step


def cost(wire: str | None, compiled: bool) -> list[float]:
    """CPU time of each step in ms."""
    torch.set_num_threads(1)
    x = torch.nn.Parameter(torch.rand(COSTLY))
    x.grad = torch.rand(COSTLY)
    opt = fusedfog.AdamW([x], lr=1e-3, wire_dtype=wire, cpu_compile=compiled)
    found = []
    for step in range(COST_STEPS + 2):
        begin = time.process_time()
        opt.step()
        opt.drain()
        if step >= 2:
            found.append(1e3 * (time.process_time() - begin))
    return found


def costs(folder: Path) -> None:
    """The table of `cost`."""
    pool, rows = Pool(), []
    for compiled in (False, True):
        for wire in FORMATS:
            found = sorted(pool.run(2, cost, wire, compiled, timeout=LIMIT)[0])
            lower, middle, upper = statistics.quantiles(found, n=4)
            passes = "compiled" if compiled else "default"
            rows.append({"passes": passes, "messages": wire or "fp32", "ms of CPU a step": (middle, lower, upper)})
    pool.close()
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    shown = f"Two ranks, AdamW, awc, {COSTLY:,} parameters; median and quartiles of {COST_STEPS} steps. {words}\n\n{table(rows)}"
    print(shown)
    (folder / "wires-cpu.md").write_text(shown + "\n")
    (folder / "wires-cpu.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    parser.add_argument("--costs", action="store_true", help="measure CPU time")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(exist_ok=True)
    if args.costs:
        costs(folder)
        return
    pool, rows = Pool(), []
    for name, keywords in WAYS.items():
        exact = [x for x, _ in pool.run(RANKS, limit, None, keywords, timeout=LIMIT)]
        for wire in FORMATS:
            ends = pool.run(RANKS, limit, wire, keywords, timeout=LIMIT)
            apart = max(float((x - y).abs().max()) for (x, _), y in zip(ends, exact, strict=True))
            found = [pool.run(RANKS, classify, wire, keywords, seed, timeout=LIMIT)[0] for seed in (0, 1, 2)]
            rows.append(
                {
                    "method": name,
                    "messages": wire or EXACT,
                    "quadratics: from the exact limit": f"{apart:.1e}" if wire else "0",
                    "bytes an element and neighbour": f"{ends[0][1] / SIZE / (1 if 'one-peer' in name else 2):.3f}",
                    "digits: accuracy, seeds 0-2": ", ".join(f"{accuracy:.3f}" for accuracy, _ in found),
                    "kB sent per step and rank": f"{found[0][1] / 1e3:.1f}",
                }
            )
    pool.close()
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    shown = f"{RANKS} ranks; quadratics after {STEPS} steps in fp64, digits in fp32; see bench/wires.py. {words}\n\n{table(rows)}"
    print(f"\n{shown}")
    (folder / "wires.md").write_text(shown + "\n")
    (folder / "wires.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    import wires  # by this name the ranks' processes find its functions

    wires.main()
