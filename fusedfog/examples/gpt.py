"""A small GPT learns the sources of Python's standard library: decentralized, or with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.gpt
    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.gpt --algorithm ddp
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 4 --max-restarts 3 \\
        -m fusedfog.examples.gpt --checkpoint run --resume

The text is read byte by byte; one file in twenty is kept for validation, the others are dealt out to the ranks. What
differs between the first two commands is `prepare()`. The third goes on after crashes, kill -9 included, bit for bit as an
undisturbed run (where kernels are deterministic; and DistributedDataParallel may sum in another order in its first step).
Its variable has torchrun give restarted ranks a store of their own: in the old one they find the addresses of the dead.
On GPUs nothing changes but the defaults: NCCL, and bf16 autocast. `python -m fusedfog.examples.gpt` trains one rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedfog
from fusedfog.examples import text
from fusedfog.examples.checkpoints import Checkpoints
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss, parameter_groups
from fusedfog.params.precision import WAYS


def option(default: Any, explanation: str) -> Any:
    """A field of `Settings`, which is also a command-line option."""
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class Settings:
    """What defines a run; the same on every rank, and after a restart."""

    algorithm: str = option("awc", "an algorithm of fusedfog.AdamW, or ddp")
    topology: str | None = option(None, "who averages with whom; the default is the algorithm's own")
    precision: str | None = option(None, "fp32 or bf16 (autocast); by default bf16 on GPUs and fp32 on CPUs")
    parameters: str = option("fp32", "how they are kept: fp32, bf16, or bf16 with master, kahan or stochastic")
    wire: str | None = option(None, "send fewer bits: bf16, fp8 or int8")
    steps: int = option(600, "training steps")
    batch: int = option(8, "windows per rank and micro-batch")
    accumulate: int = option(1, "micro-batches per step")
    lr: float = option(4e-3, "highest learning rate; a cosine takes it to 0")
    warm_up: int = option(50, "steps in which the learning rate rises linearly")
    moment_steps: int = option(1, "steps whose mean gradient enters Adam's moments; above 1 takes fusedfog.AccumAdamW")
    weight_decay: float = option(0.1, "of matrices; vectors do not decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    context: int = option(128, "bytes that the model sees")
    width: int = option(128, "of the residual stream")
    heads: int = option(4, "attention heads per layer")
    layers: int = option(4, "transformer blocks")
    dropout: float = option(0.0, "fraction of activations")
    seed: int = option(0, "of the model's start, the batches and dropout")
    evaluate_every: int = option(100, "steps between evaluations of the averaged model")
    windows: int = option(512, "windows of the validation text that an evaluation reads, over all ranks")

    @property
    def shape(self) -> Shape:
        """The model's size."""
        return Shape(256, self.context, self.width, self.heads, self.layers, self.dropout)


@dataclass
class History:
    """One entry of each list per evaluation. Losses are in nats per byte, training losses rank 0's last batch."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    consensus_distance: list[float] = field(default_factory=list)

    def add(self, step: int, train_loss: float, validation_loss: float, consensus_distance: float) -> None:
        """Append an evaluation."""
        self.steps.append(step)
        self.train_loss.append(train_loss)
        self.validation_loss.append(validation_loss)
        self.consensus_distance.append(consensus_distance)

    def last(self) -> str:
        """The last evaluation in words."""
        return f"validation loss {self.validation_loss[-1]:.4f}, consensus distance {self.consensus_distance[-1]:.2g}"


def place() -> tuple[int, int]:
    """This process' rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# -- the line that differs -------------------------------------------------------------------------------------------


def prepare(model: nn.Module, settings: Settings, measure: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What to call in training, and its optimizer; with `measure`, its `stats()` have the ranks' disagreement."""
    groups = parameter_groups(model, settings.weight_decay)
    adam: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, 0.95)}
    if settings.algorithm == "ddp":
        parallel = DistributedDataParallel(model) if place()[1] > 1 else model
        return parallel, torch.optim.AdamW(groups, **adam)
    mixing: dict[str, Any] = {
        "algorithm": settings.algorithm,
        "topology": settings.topology,
        "max_grad_norm": settings.max_grad_norm,
        "wire_dtype": settings.wire,
        "low_precision": None if settings.parameters in ("fp32", "bf16") else settings.parameters,
        "measure": measure,
    }
    if settings.moment_steps > 1:
        return model, fusedfog.AccumAdamW(groups, **adam, **mixing, accum_steps=settings.moment_steps)
    return model, fusedfog.AdamW(groups, **adam, **mixing)


# -- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """One rank's model, optimizer, schedule and place in its data: what a checkpoint holds."""

    def __init__(
        self, model: nn.Module, data: text.Text, settings: Settings, device: torch.device, measure: bool = False
    ) -> None:
        rank, size = place()
        self.model, self.settings, self.device = model, settings, device
        self.parallel, self.optimizer = prepare(model, settings, measure)
        self.decentralized = self.optimizer if isinstance(self.optimizer, fusedfog.AdamW) else None
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        window = settings.context + 1
        self.batches = text.RandomWindows(data.train, window, seed=1000 * settings.seed + rank)
        self.validation = text.evenly_spaced(data.validation, settings.windows, window)[rank::size].to(device)
        self.history = History()
        self.monitor: fusedfog.Monitor | None = None
        self.step = 0
        self._identity = {**asdict(settings), "train_bytes": len(data.train), "validation_bytes": len(data.validation)}
        # All ranks started from one model; from here on each has its own dropout.
        torch.manual_seed(1000 * settings.seed + rank)

    def _lr_factor(self, step: int) -> float:
        warm_up, steps = self.settings.warm_up, self.settings.steps
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    def _loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return next_token_loss(model, windows)

    def update(self) -> Tensor:
        """One step; returns the mean loss of this rank's batch, on the device."""
        settings = self.settings
        micro_batches = self.batches.draw(settings.accumulate * settings.batch).to(self.device).split(settings.batch)
        total = torch.zeros((), device=self.device)
        for number, windows in enumerate(micro_batches, 1):
            with self._without_all_reduce() if number < len(micro_batches) else nullcontext():
                loss = self._loss(self.parallel, windows) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        if self.decentralized is None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        if self.monitor is not None:
            self.monitor.log(loss=total)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    def _without_all_reduce(self) -> AbstractContextManager[None]:
        # fusedfog needs nothing here: what it sends leaves in step().
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def evaluate(self, train_loss: float) -> None:
        """Append to the history, with the validation loss of the average of all ranks' models. Collective."""
        # DistributedDataParallel keeps all models equal: their average is any of them.
        distance = self.decentralized.consensus_distance() if self.decentralized else 0.0
        with self.decentralized.averaged() if self.decentralized else nullcontext():
            loss = self._validate()
        self.history.add(self.step, train_loss, loss, distance)

    @torch.no_grad()
    def _validate(self) -> float:
        """Each rank reads its share of the validation windows. Collective."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for windows in self.validation.split(self.settings.batch):
            total += self._loss(self.model, windows) * len(windows)
        self.model.train()
        if place()[1] > 1:
            dist.all_reduce(total)
        return float(total) / self.settings.windows

    def bytes_per_step(self, steps: int) -> float:
        """Sent by this rank in each of the `steps` made by this process; of an all-reduce, those of a ring."""
        if self.decentralized:
            return float(self.decentralized.stats()["bytes_sent"] / max(1, steps))
        size = place()[1]
        return 2 * (size - 1) / size * sum(p.numel() * p.element_size() for p in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on. Local."""
        return {
            "run": self._identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "history": asdict(self.history),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved. Collective.

        Raises:
            ValueError: a run with other settings or another text saved it; names what differs.
        """
        mine, saved = self._identity, state["run"]
        if differing := [name for name in mine if mine[name] != saved.get(name)]:
            listed = ", ".join(f"{name} {saved.get(name)!r} (now {mine[name]!r})" for name in differing)
            raise ValueError(f"the checkpoint is of a run with {listed}; resume with the same settings and text")
        # Nothing may be in flight while parameters are replaced.
        with self.decentralized.paused() if self.decentralized else nullcontext():
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        self.history, self.step = History(**state["history"]), state["step"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


@contextmanager
def progress(trainer: Trainer, tokens_per_step: int) -> Iterator[Any]:
    """A progress bar, in tokens of all ranks, on rank 0; an invisible one elsewhere."""
    from tqdm import tqdm

    with tqdm(
        total=trainer.settings.steps * tokens_per_step,
        initial=trainer.step * tokens_per_step,
        desc=trainer.settings.algorithm,
        unit="token",
        unit_scale=True,
        disable=place()[0] > 0,
    ) as bar:
        yield bar


def train(trainer: Trainer, checkpoints: Checkpoints | None, checkpoint_every: int) -> dict[str, Any]:
    """Train to the end; returns the history and what the run cost, evaluations and checkpoints included. Collective."""
    settings, first = trainer.settings, trainer.step
    tokens_per_step = place()[1] * settings.accumulate * settings.batch * settings.context
    begin = time.perf_counter()
    with progress(trainer, tokens_per_step) as bar:
        while trainer.step < settings.steps:
            loss = trainer.update()
            bar.update(tokens_per_step)
            ended = trainer.step == settings.steps
            if ended or trainer.step % settings.evaluate_every == 0:
                trainer.evaluate(loss.item())
                bar.set_postfix_str(trainer.history.last())
            if checkpoints and (ended or trainer.step % checkpoint_every == 0):
                checkpoints.save(trainer.step, trainer.state_dict())
    made, seconds = trainer.step - first, time.perf_counter() - begin
    return {
        "settings": asdict(settings),
        "history": asdict(trainer.history),
        "ranks": place()[1],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_per_s": made * tokens_per_step / seconds,
        "bytes_per_step": trainer.bytes_per_step(made),
    }


# -- command line ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The settings of the run, and what else the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for setting in fields(Settings):
        kind, explanation = str if setting.default is None else type(setting.default), setting.metadata["help"]
        shown = "" if setting.default is None else f" (default {setting.default})"
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default, help=explanation + shown
        )
    parser.add_argument("--text", type=Path, default=text.standard_library(), help="folder of Python files to learn")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="save checkpoints there, the last two are kept"
    )
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--watch", type=Path, metavar="FILE", help="record the run there, for `fusedfog watch FILE`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the history and figures there, as JSON")
    options = parser.parse_args(arguments)
    settings = Settings(**{setting.name: getattr(options, setting.name) for setting in fields(Settings)})
    counts = (
        "steps",
        "batch",
        "accumulate",
        "context",
        "width",
        "heads",
        "layers",
        "evaluate_every",
        "windows",
        "moment_steps",
    )
    if min(options.checkpoint_every, *(getattr(settings, name) for name in counts)) < 1:
        parser.error("steps, sizes and counts must be at least 1")
    if settings.precision not in (None, "fp32", "bf16"):
        parser.error(f"--precision must be fp32 or bf16, not {settings.precision}")
    if settings.parameters not in ("fp32", "bf16", *WAYS):
        parser.error(f"--parameters must be fp32, bf16 or one of {', '.join(WAYS)}, not {settings.parameters}")
    if settings.algorithm == "ddp" and (settings.parameters != "fp32" or settings.wire):
        parser.error("--parameters and --wire need an algorithm of fusedfog")
    if settings.algorithm == "ddp" and options.watch:
        parser.error("--watch needs an algorithm of fusedfog")
    if settings.width % settings.heads:
        parser.error(f"--width {settings.width} cannot be cut into {settings.heads} heads")
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return settings, options


def resume(trainer: Trainer, checkpoints: Checkpoints, wanted: bool) -> None:
    """Load the newest checkpoint if there is one and it is wanted. Collective.

    Raises:
        ValueError: there is one and it is not wanted, or it is of another run.
    """
    step = checkpoints.newest()
    if step is not None and not wanted:
        raise ValueError(f"{checkpoints.folder} holds a checkpoint of step {step}: add --resume, or use another folder")
    if step is not None:
        trainer.load_state_dict(checkpoints.load(step))
    if wanted and place()[0] == 0:
        print(f"going on after step {step}" if step else f"no checkpoint in {checkpoints.folder} yet: a new run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; rank 0 prints what came out."""
    settings, options = parse(arguments)
    device = fusedfog.init()
    settings = replace(settings, precision=settings.precision or ("bf16" if device.type == "cuda" else "fp32"))
    torch.manual_seed(settings.seed)
    dtype = torch.float32 if settings.parameters == "fp32" else torch.bfloat16
    model = GPT(settings.shape).to(device, dtype)
    trainer = Trainer(model, text.load(options.text, *place()), settings, device, measure=options.watch is not None)
    checkpoints = Checkpoints(options.checkpoint) if options.checkpoint else None
    if checkpoints:
        resume(trainer, checkpoints, options.resume)
    watched = trainer.decentralized if options.watch else None
    with fusedfog.monitor(watched, options.watch) if watched else nullcontext() as trainer.monitor:
        report = train(trainer, checkpoints, options.checkpoint_every)
    if place()[0] == 0:
        print(
            f"{settings.algorithm}, {report['ranks']} ranks, {settings.steps} steps: {trainer.history.last()}, "
            f"{report['bytes_per_step'] / 1e6:.2f} MB sent per step and rank, {report['tokens_per_s']:,.0f} tokens/s"
        )
        if options.out:
            options.out.write_text(json.dumps(report) + "\n")
    if dist.is_initialized():
        del trainer, model
        gc.collect()  # DDP is part of reference cycles, and holds the group that is about to be destroyed
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
