"""Ranks that see different digits train one classifier: decentralized (AWC, ATC) beside DistributedDataParallel.

    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.digits      (what `make demo` does)
    python -m fusedfog.examples.digits                                        one process: nothing is exchanged

Nine tenths of the training images are sorted by label and cut into one piece per rank; the rest is dealt out at random.
Of 4 ranks the first sees hardly any digit above 2, the last hardly any below 7. All runs start from the same network and
see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fusedfog

TEST_IMAGES = 360


@dataclass(frozen=True)
class Settings:
    """What the command line chooses; the same on every rank."""

    steps: int = 400
    batch: int = 32
    lr: float = 0.07
    momentum: float = 0.9
    shared: float = 0.1
    seed: int = 0
    measure_every: int = 20
    progress: bool = True
    watch: Path | None = None


@dataclass(frozen=True)
class Digits:
    """The images [N, 1, 8, 8] in 0..1 and labels [N] that one rank trains on, and those everybody is tested on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class History:
    """Measurements of one run, one entry of each list per measured step."""

    label: str
    steps: list[int] = field(default_factory=list)
    averaged_accuracy: list[float] = field(default_factory=list)
    rank_accuracy: list[list[float]] = field(default_factory=list)
    consensus_distance: list[float] = field(default_factory=list)
    bytes_per_step: float = 0.0
    blocked_s: float = 0.0


# -- who is here -----------------------------------------------------------------------------------------------------


def place() -> tuple[int, int]:
    """This process' rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: float) -> list[float]:
    """Every rank's value, by rank. Collective."""
    if place()[1] == 1:
        return [value]
    values: list[Any] = [None] * place()[1]
    dist.all_gather_object(values, value)
    return values


# -- data and network ------------------------------------------------------------------------------------------------


def shard(labels: Tensor, rank: int, size: int, shared: float, seed: int) -> Tensor:
    """Indices of one rank's training images: the fraction `shared` dealt out at random, the others cut up by label."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    dealt, rest = shuffled.tensor_split([round(shared * len(labels))])
    by_label = rest[torch.argsort(labels[rest], stable=True)]
    return torch.cat([dealt.tensor_split(size)[rank], by_label.tensor_split(size)[rank]])


def load(device: torch.device, settings: Settings) -> Digits:
    """scikit-learn's bundled digits: 1,797 handwritten 8x8 images, 360 of them kept for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=settings.seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    mine = shard(train_y, *place(), settings.shared, settings.seed)
    return Digits((train_x[mine].to(device), train_y[mine].to(device)), (test_x.to(device), test_y.to(device)))


def network(seed: int) -> nn.Module:
    """A small convolutional network, 43 thousand parameters, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images that the model names correctly."""
    return float((model(images).argmax(1) == labels).double().mean())


# -- contenders ------------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """One way to train: a model, its optimizer, and what its communication costs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    monitor: fusedfog.Monitor | None

    def update(self, loss: Tensor) -> None:
        """Backward and step."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model is the average over ranks. Collective."""

    def consensus_distance(self) -> float:
        """How far the ranks' parameters are from their mean. Collective."""

    def cost(self) -> tuple[float, float]:
        """Bytes sent, and seconds blocked on communication, by this rank so far."""


class Decentralized:
    """A fusedfog optimizer: each rank averages its parameters with its neighbours'."""

    def __init__(self, model: nn.Module, settings: Settings, algorithm: str, topology: str, **more: Any) -> None:
        self.model = model
        watched = settings.watch is not None and algorithm == "awc"
        keywords: dict[str, Any] = {"lr": settings.lr, "momentum": settings.momentum, "measure": watched, **more}
        optimizer = fusedfog.SGD(model.parameters(), algorithm=algorithm, topology=topology, model=model, **keywords)
        self.optimizer: torch.optim.Optimizer = optimizer
        self.averaged, self.consensus_distance = optimizer.averaged, optimizer.consensus_distance
        self._stats = optimizer.stats
        self.monitor = fusedfog.monitor(optimizer, settings.watch, every=5) if watched else None

    def update(self, loss: Tensor) -> None:
        """Backward and step."""
        loss.backward()
        if self.monitor is not None:
            self.monitor.log(loss=loss)
        self.optimizer.step()

    def cost(self) -> tuple[float, float]:
        """Bytes sent, and seconds blocked on communication, by this rank so far."""
        stats = self._stats()
        return stats["bytes_sent"], stats["blocked_s"]


class DataParallel:
    """torch's DistributedDataParallel (nothing around the model if there is one rank): gradients are all-reduced."""

    monitor: fusedfog.Monitor | None = None

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        size = place()[1]
        self.model = DistributedDataParallel(model) if size > 1 else model
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum
        )
        gradient = sum(p.numel() * p.element_size() for p in model.parameters())
        self._bytes_per_step = 2 * (size - 1) / size * gradient
        self._steps, self._blocked = 0, 0.0
        self._last_gradient = last_gradient = [0.0]

        def note(param: Tensor) -> None:
            last_gradient[0] = time.perf_counter()

        for param in model.parameters() if size > 1 else ():
            param.register_post_accumulate_grad_hook(note)

    def update(self, loss: Tensor) -> None:
        """Backward and step. What backward does after the last gradient is waiting for the all-reduces."""
        loss.backward()
        if place()[1] > 1:
            self._blocked += time.perf_counter() - self._last_gradient[0]
        self._steps += 1
        self.optimizer.step()

    def averaged(self) -> AbstractContextManager[None]:
        """Nothing to do: all ranks have the same model."""
        return nullcontext()

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """How far the ranks' parameters are from their mean: measured, though it should be 0. Collective."""
        mine = nn.utils.parameters_to_vector(self.model.parameters())
        mean = mine.clone()
        if place()[1] > 1:
            dist.all_reduce(mean)
        squares = gather((mean / place()[1] - mine).square().sum().item())
        return float((sum(squares) / len(squares)) ** 0.5)

    def cost(self) -> tuple[float, float]:
        """Bytes sent (a ring all-reduce sends 2 (n-1)/n of the gradient), and seconds blocked, by this rank so far."""
        return self._steps * self._bytes_per_step, self._blocked


CONTENDERS: dict[str, Callable[[nn.Module, Settings], Contender]] = {
    "AWC, one-peer exponential": lambda model, s: Decentralized(model, s, "awc", "one_peer_exponential"),
    "ATC, ring": lambda model, s: Decentralized(model, s, "atc", "ring"),
    "DistributedDataParallel": DataParallel,
}


# -- training --------------------------------------------------------------------------------------------------------


def batches(data: tuple[Tensor, Tensor], settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches of this rank's images; the same ones for every contender."""
    images, labels = data
    source = torch.Generator().manual_seed(1000 * settings.seed + place()[0])
    while True:
        chosen = torch.randint(len(labels), (settings.batch,), generator=source).to(labels.device)
        yield images[chosen], labels[chosen]


def measure(history: History, step: int, contender: Contender, test: tuple[Tensor, Tensor]) -> None:
    """Append to `history`. Collective."""
    history.steps.append(step)
    history.rank_accuracy.append(gather(accuracy(contender.model, *test)))
    history.consensus_distance.append(contender.consensus_distance())
    with contender.averaged():
        history.averaged_accuracy.append(accuracy(contender.model, *test))


@contextmanager
def progress(label: str, settings: Settings) -> Iterator[Any]:
    """A progress bar on rank 0, an invisible one elsewhere."""
    from tqdm import tqdm

    with tqdm(
        total=settings.steps, desc=f"{label:<26}", unit="step", disable=not settings.progress or place()[0] > 0
    ) as bar:
        yield bar


def train(label: str, contender: Contender, data: Digits, settings: Settings) -> History:
    """Train for `settings.steps` steps, measuring on the way. Collective."""
    history = History(label)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(contender.optimizer, settings.steps)
    measure(history, 0, contender, data.test)
    cost: list[tuple[float, float]] = []  # of the steps alone: measuring waits for messages too
    with progress(label, settings) as bar, contender.monitor or nullcontext():
        for step, (images, labels) in zip(range(1, settings.steps + 1), batches(data.train, settings), strict=False):
            before = contender.cost()
            contender.update(cross_entropy(contender.model(images), labels))
            contender.optimizer.zero_grad()
            schedule.step()
            after = contender.cost()
            cost.append((after[0] - before[0], after[1] - before[1]))
            if step % settings.measure_every == 0 or step == settings.steps:
                measure(history, step, contender, data.test)
                bar.set_postfix(accuracy=f"{history.averaged_accuracy[-1]:.3f}")
            bar.update()
    # The first AWC step sends twice: its own message and the next step's, which then is always under way.
    running = cost[1:] or cost
    history.bytes_per_step = sum(gather(sum(sent for sent, _ in running) / len(running))) / place()[1]
    history.blocked_s = sum(gather(sum(blocked for _, blocked in cost))) / place()[1]
    return history


def compete(settings: Settings, device: torch.device) -> list[History]:
    """Train every contender, one after the other. Collective."""
    data = load(device, settings)
    return [
        train(label, build(network(settings.seed).to(device), settings), data, settings)
        for label, build in CONTENDERS.items()
    ]


# -- showing ---------------------------------------------------------------------------------------------------------


def table(histories: Sequence[History]) -> str:
    """The final figures of each run as aligned text."""
    head = ("", "averaged model", "each rank", "consensus", "sent per step", "blocked on")
    units = ("", "test accuracy", "test accuracy", "distance", "and rank", "communication")
    rows = [head, units]
    for run in histories:
        ranks = run.rank_accuracy[-1]
        rows.append(
            (
                run.label,
                f"{run.averaged_accuracy[-1]:.3f}",
                f"{min(ranks):.3f} .. {max(ranks):.3f}",
                f"{run.consensus_distance[-1]:.2g}",
                f"{run.bytes_per_step / 1e3:,.1f} kB",
                f"{run.blocked_s:.2f} s",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
        for row in rows
    ]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def draw(histories: Sequence[History], path: Path) -> None:
    """Accuracy and consensus distance over time, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, colour in zip(histories, ("#0072b2", "#d55e00", "#4d4d4d"), strict=True):
        lowest, highest = [min(a) for a in run.rank_accuracy], [max(a) for a in run.rank_accuracy]
        left.fill_between(run.steps, lowest, highest, color=colour, alpha=0.18, linewidth=0)
        left.plot(run.steps, run.averaged_accuracy, color=colour, label=f"{run.label}, averaged model")
        # Zero, as DistributedDataParallel's always is, has no place on a logarithmic axis.
        distances = [d if d > 0 else float("nan") for d in run.consensus_distance]
        label = run.label if any(run.consensus_distance) else f"{run.label}: 0 throughout"
        right.plot(run.steps, distances, color=colour, label=label)
    lowest_shown = 0.7 if min(run.averaged_accuracy[-1] for run in histories) > 0.8 else 0.0  # where runs differ
    left.set(title="Test accuracy (shade: range over ranks)", xlabel="step", ylim=(lowest_shown, 1.0))
    right.set(
        title="Consensus distance", xlabel="step", yscale="log" if any(histories[0].consensus_distance) else "linear"
    )
    for axes, corner in ((left, "lower right"), (right, "lower left")):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(loc=corner, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison; rank 0 prints the table and writes the picture and the figures."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="images a rank and step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="rate, cosine to 0 (default %(default)s)")
    parser.add_argument(
        "--shared",
        type=float,
        default=defaults.shared,
        help="fraction of the training images dealt out at random instead of by label (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of data and network (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="picture; figures go beside it as .json")
    parser.add_argument("--watch", type=Path, metavar="FILE", help="record the AWC run for `fusedfog watch FILE`")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.batch < 1 or not 0 <= options.shared <= 1:
        parser.error("--steps and --batch must be at least 1 and --shared within 0..1")
    settings = Settings(
        options.steps, options.batch, options.lr, shared=options.shared, seed=options.seed, watch=options.watch
    )
    device = fusedfog.init()
    histories = compete(settings, device)
    if place()[0] == 0:
        print(f"\n{table(histories)}\n")
        draw(histories, options.out)
        figures = options.out.with_suffix(".json")
        figures.write_text(json.dumps([asdict(run) for run in histories]) + "\n")
        print(f"wrote {options.out} and {figures}")
    if dist.is_initialized():
        gc.collect()  # DDP is part of reference cycles, and holds the group that is about to be destroyed
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
