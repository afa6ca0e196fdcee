"""What a rank of `async.py` does: it trains for some seconds, sleeps after every step, and keeps its parameters now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedfog
from fusedfog.examples import digits, text
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss

SLEEP, EVERY, SPREAD = 0.2, 1.0, 0.6
"""Seconds of a sleep; seconds between moments at which parameters are kept; the deviation of a log-normal sleep's logarithm."""

LOG_NORMAL = "log-normal"
SPEEDS = ("1x", "2x", "3x", "4x", LOG_NORMAL)

METHODS: dict[str, dict[str, Any] | None] = {
    "asynchronous AWC": {"algorithm": "awc", "topology": "ring", "asynchronous": True},
    "asynchronous push-sum": {"algorithm": "push_sum", "topology": "ring", "asynchronous": True},
    "AWC": {"algorithm": "awc", "topology": "ring"},
    "DistributedDataParallel": None,
}
ALONE = "alone"
"""One process with nobody to talk to, as fast as the ranks that are not slower."""


class Task(Protocol):
    """A model, its data, and when it is good enough.

    Attributes:
        model: the same on all ranks in the beginning.
    """

    model: nn.Module

    def losses(self) -> Iterator[Tensor]:
        """The loss of each of this rank's batches."""

    def optimizer(self, keywords: dict[str, Any] | None) -> torch.optim.Optimizer:
        """Of this library, or torch's if None."""

    def test(self) -> float:
        """What the model is good for. Collective."""


def summed(value: float) -> float:
    """The sum over ranks. Collective."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


class Digits:
    """The digits example, whose ranks see different digits; tested by accuracy."""

    def __init__(self) -> None:
        self.settings = digits.Settings(progress=False)
        self.model = digits.network(self.settings.seed)
        self.data = digits.load(torch.device("cpu"), self.settings)

    def losses(self) -> Iterator[Tensor]:
        for images, labels in digits.batches(self.data.train, self.settings):
            yield nn.functional.cross_entropy(self.model(images), labels)

    def optimizer(self, keywords: dict[str, Any] | None) -> torch.optim.Optimizer:
        params, numbers = self.model.parameters(), {"lr": self.settings.lr, "momentum": self.settings.momentum}
        if keywords is None:
            return torch.optim.SGD(params, **numbers)
        return fusedfog.SGD(params, **numbers, **keywords)

    def test(self) -> float:
        rank, size = digits.place()
        images, labels = self.data.test
        right = digits.accuracy(self.model, images[rank::size], labels[rank::size]) * len(labels[rank::size])
        return summed(right) / len(labels)


@cache
def _text(rank: int, size: int) -> text.Text:
    return text.load(text.standard_library(), rank, size)


class Bytes:
    """A byte GPT of the examples, one layer of width 32, on the standard library; tested by the loss in nats a byte."""

    context, batch, rate, windows = 32, 4, 8e-3, 64

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = GPT(Shape(context=self.context, width=32, layers=1))
        rank, size = digits.place()
        self.data = _text(rank, size)
        self.held_out = text.evenly_spaced(self.data.validation, self.windows, self.context + 1)[rank::size]

    def losses(self) -> Iterator[Tensor]:
        windows = text.RandomWindows(self.data.train, self.context + 1, seed=digits.place()[0])
        while True:
            yield next_token_loss(self.model, windows.draw(self.batch))

    def optimizer(self, keywords: dict[str, Any] | None) -> torch.optim.Optimizer:
        params, numbers = self.model.parameters(), {"lr": self.rate, "betas": (0.9, 0.95)}
        if keywords is None:
            return torch.optim.AdamW(params, **numbers)
        return fusedfog.AdamW(params, **numbers, **keywords)

    def test(self) -> float:
        return summed(next_token_loss(self.model, self.held_out).item() * len(self.held_out)) / self.windows


@dataclass(frozen=True)
class Goal:
    """What a run of a task is to reach: at least `value`, or at most where less is better."""

    build: type[Digits] | type[Bytes]
    what: str
    value: float
    less: bool

    def reached(self, found: float) -> bool:
        return found <= self.value if self.less else found >= self.value


TASKS = {
    "digits": Goal(Digits, "accuracy", 0.95, less=False),
    "GPT": Goal(Bytes, "loss", 2.7, less=True),
}


class End:
    """When to stop: synchronous ranks after the same step, which rank 0 chooses; others by the clock."""

    def __init__(self, name: str, seconds: float, together: bool) -> None:
        self._seconds, self._together, self._last = seconds, together and dist.is_initialized(), -1
        self._key = f"bench/{name}/last"
        if dist.is_initialized():
            self._store: Any = dist.distributed_c10d._get_default_store()
            dist.barrier()
        self.begin = time.perf_counter()

    def passed(self) -> float:
        return time.perf_counter() - self.begin

    def reached(self, step: int) -> bool:
        over = self.passed() > self._seconds
        if not self._together:
            return over
        if self._last < 0 and dist.get_rank() == 0 and over:
            # Nobody is further ahead than the ring is long.
            self._store.set(self._key, str(step + dist.get_world_size()))
        if self._last < 0 and self._store.check([self._key]):
            self._last = int(self._store.get(self._key))
        return 0 <= self._last <= step


def sleeps(speeds: str, rank: int, first: float = SLEEP) -> Iterator[float]:
    """Seconds to sleep after each step."""
    if speeds != LOG_NORMAL:
        while True:
            yield first * (float(speeds.removesuffix("x")) if rank == 0 else 1.0)
    source = torch.Generator().manual_seed(1000 + rank)
    while True:  # Their mean is `first`.
        yield first * math.exp(SPREAD * torch.randn(1, generator=source).item() - SPREAD**2 / 2)


def run(task: str, method: str, speeds: str, seconds: float, name: str) -> dict[str, Any]:
    """One rank's run: its steps, and what the average of all ranks' parameters was good for at every moment."""
    rank, size = digits.place()
    one = TASKS[task].build()
    keywords = METHODS.get(method)
    if method == "DistributedDataParallel":
        bare, one.model = one.model, DistributedDataParallel(one.model)
    else:
        bare = one.model
    optimizer = one.optimizer(keywords)
    asynchronous = keywords is not None and keywords.get("asynchronous", False)
    end = End(name, seconds, not asynchronous)
    steps, kept = 0, []
    # Alone, a process is as fast as those that are not rank 0.
    for loss, pause in zip(one.losses(), sleeps("1x" if method == ALONE else speeds, rank), strict=False):
        if end.reached(steps):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(pause)
        steps += 1
        while end.passed() > EVERY * (len(kept) + 1) and len(kept) < seconds / EVERY:
            kept.append(nn.utils.parameters_to_vector(bare.parameters()).detach().clone())
    took = end.passed()
    if asynchronous:
        optimizer.finish()  # type: ignore[attr-defined]
    one.model = bare
    return {"steps": steps, "seconds": took, "found": tested(kept, one, size) if size > 1 else []}


@torch.no_grad()
def tested(kept: list[Tensor], task: Task, size: int) -> list[float]:
    """What the average over ranks of each of the kept parameters is good for. Collective."""
    count = torch.tensor([len(kept)])
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    found = []
    for vector in kept[: int(count)]:
        dist.all_reduce(vector)
        nn.utils.vector_to_parameters(vector / size, task.model.parameters())
        found.append(task.test())
    return found
