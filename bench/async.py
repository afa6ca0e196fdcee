"""Asynchronous steps beside synchronous ones, with one rank slower: python bench/async.py

The digits example, whose ranks see different digits. A step is its computation and a sleep, as while a GPU computes; rank 0's
sleep is 1, 2 or 4 times as long. All methods get the same seconds. Ranks keep their parameters every half second, and
the averages of these are tested afterwards. Four minutes. (results/async.json and .md)
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from support.pool import Pool
from torch import Tensor, nn

from fusedfog.examples import digits

RANKS, SLEEP, EVERY, GOAL = 4, 0.08, 0.5, 0.95
SLOWER = (1, 2, 4)
METHODS: dict[str, dict[str, Any] | None] = {
    "asynchronous AWC, ring": {"algorithm": "awc", "topology": "ring", "asynchronous": True},
    "asynchronous push-sum, ring": {"algorithm": "push_sum", "topology": "ring", "asynchronous": True},
    "AWC, ring": {"algorithm": "awc", "topology": "ring"},
    "DistributedDataParallel": None,
}


def contender(method: str, settings: digits.Settings) -> digits.Contender:
    keywords, model = METHODS[method], digits.network(settings.seed)
    return (
        digits.DataParallel(model, settings) if keywords is None else digits.Decentralized(model, settings, **keywords)
    )


class End:
    """When to stop: synchronous ranks after the same step, which rank 0 chooses; others by the clock."""

    def __init__(self, name: str, seconds: float, together: bool) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._key, self._together, self._last = f"bench/{name}/last", together, -1
        dist.barrier()
        self.begin = time.perf_counter()
        self._seconds = seconds

    def reached(self, step: int) -> bool:
        over = time.perf_counter() - self.begin > self._seconds
        if not self._together:
            return over
        if self._last < 0 and dist.get_rank() == 0 and over:
            self._store.set(self._key, str(step + RANKS))
        if self._last < 0 and self._store.check([self._key]):
            self._last = int(self._store.get(self._key))
        return 0 <= self._last <= step


def run(method: str, slower: int, seconds: float) -> dict[str, Any]:
    """One rank's run: its steps, and what the average of all ranks' parameters was good for, every half second."""
    settings, rank = digits.Settings(progress=False), dist.get_rank()
    one, data = contender(method, settings), digits.load(torch.device("cpu"), settings)
    pause = SLEEP * (slower if rank == 0 else 1)
    keywords = METHODS[method]
    end = End(f"{method}/{slower}", seconds, keywords is None or not keywords.get("asynchronous"))
    steps, kept = 0, []
    for images, labels in digits.batches(data.train, settings):
        if end.reached(steps):
            break
        one.optimizer.zero_grad()
        one.update(nn.functional.cross_entropy(one.model(images), labels))
        time.sleep(pause)
        steps += 1
        while time.perf_counter() - end.begin > EVERY * (len(kept) + 1) and len(kept) < seconds / EVERY:
            kept.append(nn.utils.parameters_to_vector(one.model.parameters()).detach().clone())
    took = time.perf_counter() - end.begin
    finish = getattr(one.optimizer, "finish", None)
    if keywords is not None and keywords.get("asynchronous") and finish is not None:
        finish()
    return {"steps": steps, "seconds": took, "accuracy": tested(kept, one.model, data.test)}


@torch.no_grad()
def tested(kept: list[Tensor], model: nn.Module, test: tuple[Tensor, Tensor]) -> list[float]:
    """The accuracy of the average over ranks of each of the kept parameters. Collective."""
    count = torch.tensor([len(kept)])
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    found = []
    for vector in kept[: int(count)]:
        dist.all_reduce(vector)
        nn.utils.vector_to_parameters(vector / RANKS, model.parameters())
        found.append(digits.accuracy(model, *test))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=14.0, help="of every run (default 14)")
    parser.add_argument("--slower", type=int, nargs="+", default=list(SLOWER), help="how many times longer rank 0 sleeps")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default bench/results)")
    given = parser.parse_args()
    pool, rows, shown = Pool(), [], []
    try:
        for slower in given.slower:
            for method in METHODS:
                ranks = pool.run(RANKS, run, method, slower, given.seconds, timeout=250, pg_timeout=120)
                accuracy = ranks[0]["accuracy"]
                rates = [one["steps"] / one["seconds"] for one in ranks]
                there = next((EVERY * (k + 1) for k, found in enumerate(accuracy) if found >= GOAL), None)
                rows.append({"method": method, "slower": slower, "ranks": ranks})
                shown.append(
                    {
                        "rank 0 sleeps": f"{slower}x",
                        "method": method,
                        "steps/s, all ranks": f"{sum(rates):.1f}",
                        "rank 0": f"{rates[0]:.1f}",
                        "others": f"{min(rates[1:]):.1f}..{max(rates[1:]):.1f}",
                        f"s to {GOAL}": "not reached" if there is None else f"{there:g}",
                        "accuracy at the end": f"{accuracy[-1]:.3f}",
                    }
                )
                print(shown[-1], flush=True)
    finally:
        pool.close()
    words = machine()
    about = f"Digits split by label, {RANKS} ranks, {given.seconds:g} s each, one run. A step is its computation and a sleep"
    about += f" of {1e3 * SLEEP:g} ms, rank 0's longer. Accuracies are those of the average model."
    where = ", ".join(f"{key} {value}" for key, value in words.items())
    text = f"# Asynchronous steps beside synchronous ones\n\n{about}\n\n{where}\n\n{table(shown)}\n"
    given.folder.mkdir(exist_ok=True)
    (given.folder / "async.json").write_text(json.dumps({"machine": words, "rows": rows}, indent=1) + "\n")
    (given.folder / "async.md").write_text(text)
    print(text)


if __name__ == "__main__":
    importlib.import_module("async").main()  # by this name the ranks' processes find its functions
