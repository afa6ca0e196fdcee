"""bf16 parameters in every way, against fp32, on the GPT example: python bench/precision.py

Two ranks train `fusedfog.examples.gpt` with AWC from the same starts on the same batches, 3 seeds. Forward and backward are
in the parameters' dtype. What counts is the validation loss of the averaged model. (15 runs; results/precision.json and .md)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table
from gpt import OURS, Report, final_loss, finish, start

WAYS = {
    "fp32": "fp32",
    "bf16, master": "master",
    "bf16, stochastic": "stochastic",
    "bf16, Kahan": "kahan",
    "bf16": "bf16",
}
SEEDS, RANKS = (0, 1, 2), 2
SETTINGS = {"steps": 200, "warm-up": 30, "layers": 2, "width": 64, "windows": 512, "lr": 4e-3}


def train(way: str, seed: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        options = {**SETTINGS, "seed": seed, "evaluate-every": SETTINGS["steps"]}
        return finish(start(OURS, out, options, f"--parameters={way}", ranks=RANKS), out)


def row(name: str, losses: list[float], baseline: list[float], sent: float) -> dict[str, Any]:
    over = [100 * (loss / other - 1) for loss, other in zip(losses, baseline, strict=True)]
    return {
        "parameters": name,
        **{f"seed {seed}": f"{loss:.4f}" for seed, loss in zip(SEEDS, losses, strict=True)},
        "mean": f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}",
        "over fp32, by seed": ", ".join(f"{part:+.2f} %" for part in over),
        "MB sent per step and rank": f"{sent / 1e6:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    begin = time.perf_counter()
    runs = {name: [train(way, seed) for seed in SEEDS] for name, way in WAYS.items()}
    losses = {name: [final_loss(run) for run in found] for name, found in runs.items()}
    rows = [row(name, losses[name], losses["fp32"], found[0]["bytes_per_step"]) for name, found in runs.items()]
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    shown = (
        f"Validation loss (nats per byte) of the averaged model after {SETTINGS['steps']} steps of the GPT example on {RANKS} "
        f"ranks, AWC and AdamW, mean ± sample standard deviation; see bench/precision.py. {words}\n\n{table(rows)}"
    )
    seconds = round(time.perf_counter() - begin)
    print(f"\n{shown}\n\n{seconds} s")
    (folder / "precision.md").write_text(shown + "\n")
    (folder / "precision.json").write_text(
        json.dumps({"machine": machine(), "seconds": seconds, "settings": SETTINGS, "losses": losses}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
