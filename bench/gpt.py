"""The GPT example, decentralized against data-parallel: python bench/gpt.py --tune, then python bench/gpt.py

Four ranks train `fusedfog.examples.gpt` with AWC on the one-peer exponential graph and with DistributedDataParallel, from
the same starts, on the same batches, for equally many steps, with 3 seeds. What counts is the validation loss of the
averaged model; the target is a mean within 2 % of DistributedDataParallel's. One more AWC run loses a rank to kill -9
halfway, is restarted by torchrun, and has to measure what the run that was left alone measured, to the last bit.

Each method uses the learning rate that suits it: the one of a grid with the least validation loss for a seed of its own
(`--tune`: 8 runs, writes results/gpt.tuning.json). It need not be the same for both: where gradients are mostly noise,
Adam's second moment of one rank's gradient is up to n times that of the mean over n ranks, so that the same learning rate
takes steps shorter by up to sqrt(n). The tuning runs, shown below the table, have AWC with the other's learning rate too. (7
runs, 3 minutes each on two cores; results/gpt.json and .md)

That second moment is also why ranks need batches of some size, and steps, to come near: each rank divides by a root mean
square that is mostly its own noise, which averaging parameters afterwards does not undo. Exact averaging after each local
Adam step is as far from DistributedDataParallel as AWC is. See the README for what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine, table
from support.processes import ranks_of, wait_for_step

RANKS = 4
SEEDS = (0, 1, 2)
TUNING_SEED, GRID = 9, (16e-3, 32e-3, 64e-3, 128e-3)
TUNING_STEPS = 500
SETTINGS = {"steps": 1500, "warm-up": 100, "layers": 1, "width": 32, "context": 64, "batch": 64, "windows": 1024}
METHODS = {
    "AWC, one-peer exponential": ("--algorithm=awc", "--topology=one_peer_exponential"),
    "DistributedDataParallel": ("--algorithm=ddp",),
}
OURS, BASELINE = METHODS
TARGET = 0.02

Report = dict[str, Any]
Settings = Mapping[str, float]


def start(
    method: str, out: Path, settings: Settings, *more: str, restarts: int = 0, ranks: int = RANKS
) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    example = [f"--max-restarts={restarts}", "-m", "fusedfog.examples.gpt"]
    options = [*METHODS[method], *(f"--{name}={value}" for name, value in settings.items()), f"--out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see the example
    return subprocess.Popen([*launcher, *example, *options, *more], cwd=ROOT, env=environment)


def finish(process: subprocess.Popen[bytes], out: Path) -> Report:
    if process.wait() != 0:
        raise RuntimeError(f"a run ended with status {process.returncode}; its messages are above")
    report: Report = json.loads(out.read_text())
    return report


def train(method: str, settings: Settings) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        return finish(start(method, out, settings), out)


def train_with_a_kill(method: str, settings: Settings) -> Report:
    """The same run, but halfway rank 1 gets SIGKILL; torchrun then starts all ranks again, and they resume."""
    half, every = int(settings["steps"]) // 2, max(1, int(settings["steps"]) // 10)
    with tempfile.TemporaryDirectory() as folder:
        out, saved = Path(folder, "out.json"), Path(folder, "saved")
        checkpoints = (f"--checkpoint={saved}", f"--checkpoint-every={every}", "--resume")
        process = start(method, out, settings, *checkpoints, restarts=1)
        wait_for_step(saved, half, process)
        os.kill(next(pid for pid, rank in ranks_of(process) if rank == 1), signal.SIGKILL)
        return finish(process, out)


def final_loss(report: Report) -> float:
    return report["history"]["validation_loss"][-1]


def row(name: str, runs: Sequence[Report], baseline: Sequence[Report]) -> dict[str, Any]:
    losses = [final_loss(run) for run in runs]
    over = [100 * (loss / final_loss(other) - 1) for loss, other in zip(losses, baseline, strict=True)]
    distances = [run["history"]["consensus_distance"] for run in runs]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return {
        f"{RANKS} ranks": name,
        "lr": f"{runs[0]['settings']['lr']:g}",
        **{f"seed {run['settings']['seed']}": f"{loss:.4f}" for run, loss in zip(runs, losses, strict=True)},
        "mean": f"{statistics.mean(losses):.4f}{spread}",
        "over DDP, by seed": "" if runs is baseline else ", ".join(f"{part:+.1f} %" for part in over),
        "largest consensus distance": f"{max(map(max, distances)):.2g}",
        "MB sent per step and rank": f"{runs[0]['bytes_per_step'] / 1e6:.2f}",
    }


def verdicts(ours: Sequence[Report], baseline: Sequence[Report], killed: Report) -> list[str]:
    excess = statistics.mean(map(final_loss, ours)) / statistics.mean(map(final_loss, baseline)) - 1
    same = killed["history"] == ours[0]["history"]
    return [
        f"Mean validation loss of AWC over DistributedDataParallel's: {100 * excess:+.2f} %, "
        f"{'within' if excess <= TARGET else 'NOT within'} the target of {100 * TARGET:.0f} %.",
        f"Seed {ours[0]['settings']['seed']} again, with rank 1 killed halfway and all ranks resumed: "
        f"{'all losses and distances are' if same else 'losses or distances are NOT'} those of the run left alone, "
        f"to the last bit.",
    ]


def tune(settings: Settings, folder: Path) -> None:
    losses = {
        method: {lr: final_loss(train(method, {**settings, "seed": TUNING_SEED, "lr": lr})) for lr in GRID}
        for method in METHODS
    }
    best = {method: min(by_lr, key=by_lr.__getitem__) for method, by_lr in losses.items()}
    found = {"machine": machine(), "settings": settings, "seed": TUNING_SEED, "validation_loss": losses, "lr": best}
    (folder / "gpt.tuning.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(losses, indent=1))


def compare(settings: Settings, seeds: Sequence[int], folder: Path) -> None:
    begin = time.perf_counter()
    tuning = json.loads((folder / "gpt.tuning.json").read_text())
    lr = tuning["lr"]
    runs: dict[str, list[Report]] = {method: [] for method in METHODS}
    for seed in seeds:
        for method in METHODS:
            runs[method].append(train(method, {**settings, "lr": lr[method], "seed": seed}))
    killed = train_with_a_kill(OURS, {**settings, "lr": lr[OURS], "seed": seeds[0]})
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    one = runs[OURS][0]
    note = (
        f"Validation loss (nats per byte) of the averaged model after {one['settings']['steps']} steps of the GPT example "
        f"({one['parameters'] / 1e6:.2f} million parameters), mean ± sample standard deviation; see bench/gpt.py. {words}"
    )
    rows = [row(name, found, runs[BASELINE]) for name, found in runs.items()]
    tried = "; ".join(
        f"{method}: " + ", ".join(f"{loss:.4f} at {rate}" for rate, loss in losses.items())
        for method, losses in tuning["validation_loss"].items()
    )
    judged = verdicts(runs[OURS], runs[BASELINE], killed)
    words = f"Learning rates tried with seed {tuning['seed']} and {tuning['settings']['steps']} steps: {tried}."
    shown = "\n\n".join([note, table(rows), *judged, words])
    seconds = round(time.perf_counter() - begin)
    print(f"\n{shown}\n\n{seconds} s")
    (folder / "gpt.md").write_text(shown + "\n")
    figures = {"machine": machine(), "seconds": seconds, "runs": runs, "killed": killed}
    (folder / "gpt.json").write_text(json.dumps(figures) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tune", action="store_true", help="look for the methods' learning rates")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="training steps (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    options = parser.parse_args()
    settings = {**SETTINGS, "steps": options.steps}
    options.folder.mkdir(exist_ok=True)
    if options.tune:
        tune({**settings, "steps": TUNING_STEPS}, options.folder)
    else:
        compare(settings, options.seeds, options.folder)


if __name__ == "__main__":
    main()
