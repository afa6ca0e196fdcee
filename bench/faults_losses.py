"""What three kills and returns change of what is learned: python bench/faults_losses.py

Four processes of an elastic run train with AWC on the one-peer exponential graph, on data from `fusedfog.elastic_sampler`:

    digits    the network and images of the digits example, dealt out at random; the test accuracy of the average
    GPT       the model, text and optimizer of the GPT example, in the setting of bench/gpt.py; the validation loss of the average

Once nobody is killed; once, with the same start and order of samples, slots 2, 0 and 3 are killed (SIGKILL, with a batch drawn)
after a quarter, a half and three quarters of the steps, and started again at once. (By a fork: a restarted Python would import
for seconds, while the others make more steps.) Seeds are paired: what counts is the mean difference with its standard error.
What has been run is kept and not run again. (results/faults-losses.json and .md)

    --seeds 0 1 2 3 4    of the start, the split into training and test images, and the order of samples
    --part 0.1           a tenth of the steps, into files of its own: does it work?
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from common import table
from faults_common import Run, prepare, run_missing
from faults_processes import Processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fusedfog
from fusedfog.examples import digits, text
from fusedfog.examples.gpt import Settings as GPTSettings
from fusedfog.examples.gpt_model import GPT, next_token_loss, parameter_groups

SLOTS = 4
KILLS = {2: 0.25, 0: 0.5, 3: 0.75}
"""Slots whose first process is killed, and after which part of the steps."""

LIMIT = 600.0
"""Seconds of a run, at most."""

STEPS = {"digits": 1000, "GPT": 500}
DIGITS = digits.Settings()
TEXT = GPTSettings(layers=1, width=32, context=64, batch=64, lr=0.064, warm_up=100, windows=1024)


@dataclass
class Training:
    """What a task is to a process.

    Attributes:
        model, opt: as in the example.
        samples, batch: of the training set, and for each rank and step.
        loss: of the samples of these numbers.
        rate: the learning rate, by the part of the steps that has been made.
        score: of the model as it is now.
    """

    model: nn.Module
    opt: Any
    samples: int
    batch: int
    loss: Callable[[list[int]], Tensor]
    rate: Callable[[float], float]
    score: Callable[[], float]


@cache
def _digits(seed: int) -> digits.Digits:
    """All images, before there is a process group that would say which are a rank's."""
    return digits.load(torch.device("cpu"), digits.Settings(seed=seed))


@cache
def _text() -> text.Text:
    return text.load(text.standard_library(), 0, 1)


def train_digits(seed: int, steps: int) -> Training:
    """See the module."""
    data, model = _digits(seed), digits.network(seed)
    images, labels = data.train
    opt = fusedfog.SGD(
        model.parameters(), lr=DIGITS.lr, momentum=DIGITS.momentum, topology="one_peer_exponential", model=model
    )
    return Training(
        model,
        opt,
        len(labels),
        DIGITS.batch,
        lambda chosen: cross_entropy(model(images[chosen]), labels[chosen]),
        lambda part: DIGITS.lr * 0.5 * (1 + math.cos(math.pi * part)),
        lambda: digits.accuracy(model, *data.test),
    )


def train_gpt(seed: int, steps: int) -> Training:
    """See the module; samples are the windows of the text that follow each other."""
    torch.manual_seed(seed)
    model, data, window = GPT(TEXT.shape), _text(), TEXT.context + 1
    groups, betas = parameter_groups(model, TEXT.weight_decay), (0.9, 0.95)
    opt = fusedfog.AdamW(
        groups, lr=TEXT.lr, betas=betas, max_grad_norm=TEXT.max_grad_norm, topology="one_peer_exponential"
    )
    validation = text.evenly_spaced(data.validation, TEXT.windows, window)
    warm_up = min(TEXT.warm_up, steps // 3) / steps

    def rate(part: float) -> float:
        if part < warm_up:
            return TEXT.lr * (part + 1 / steps) / warm_up
        return TEXT.lr * 0.5 * (1 + math.cos(math.pi * (part - warm_up) / (1 - warm_up)))

    @torch.no_grad()
    def score() -> float:
        parts = [next_token_loss(model, windows).item() for windows in validation.split(TEXT.batch)]
        return statistics.fmean(parts)

    return Training(
        model,
        opt,
        len(data.train) // window,
        TEXT.batch,
        lambda chosen: next_token_loss(model, text.cut(data.train, window * torch.tensor(chosen), window)),
        rate,
        score,
    )


TASKS: dict[str, Callable[[int, int], Training]] = {"digits": train_digits, "GPT": train_gpt}


@dataclass(frozen=True)
class Plan:
    """One run."""

    number: int
    task: str
    seed: int
    steps: int
    kills: bool
    megabytes: float = 0.2

    @classmethod
    def of(cls, task: str, seed: int, kills: bool, part: float) -> Plan:
        """The same number for the same run."""
        return cls(4 * seed + 2 * list(TASKS).index(task) + kills, task, seed, round(part * STEPS[task]), kills)

    def gigabytes(self) -> float:
        """Memory that all processes take together, at most."""
        return 0.5 * SLOTS


def work(plan: Plan, slot: int, incarnation: int) -> Run:
    """What a process does."""
    torch.set_num_threads(1)
    fusedfog.init(elastic=True, timeout=LIMIT, dead_after=30.0)
    own = TASKS[plan.task](plan.seed, plan.steps)
    opt, began, away = own.opt, own.opt.steps, 0
    dies_at = round(KILLS[slot] * plan.steps) if plan.kills and incarnation == 0 and slot in KILLS else plan.steps
    sampler = fusedfog.elastic_sampler(own.samples, opt, own.batch, seed=plan.seed)
    while opt.steps < plan.steps:
        for chosen in sampler:
            if opt.steps >= plan.steps:
                break
            if opt.steps >= dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            for group in opt.param_groups:
                group["lr"] = own.rate(opt.steps / plan.steps)
            opt.zero_grad()
            own.loss(chosen).backward()
            opt.step()
            away += SLOTS - fusedfog.world_size()
    distance = opt.consensus_distance()
    with opt.averaged():
        score = own.score()
    return {
        "score": score,
        "began": began,
        "steps": opt.steps,
        "away": away,
        "distance": distance,
        "epoch": opt.stats()["epoch"],
    }


def make(plan: Plan) -> Run:
    """One run as it is kept."""
    if plan.task == "digits":
        _digits(plan.seed)  # Once, for all processes that are forked.
    else:
        _text()
    begin = time.monotonic()
    with Processes(SLOTS, partial(work, plan)) as processes:
        for slot in range(SLOTS):
            processes.start(slot)

        def over() -> bool:
            for slot in processes.ended():
                processes.start(slot)
            return processes.all_reported()

        in_time = processes.wait(over, LIMIT)
        failed = [f"{uid}: {report['error']}" for uid, report in processes.reports.items() if "error" in report]
        if not in_time or failed:
            raise RuntimeError(f"{plan}: {failed or 'it has not ended'}: {processes.logs()}")
        reports = processes.reports
    seconds = time.monotonic() - begin
    first = reports["1.0"]  # Which is never killed.
    scores = {report["score"] for report in reports.values()}
    assert len(scores) == 1, f"{plan}: averages differ: {reports}"
    returned = sorted(report["began"] for uid, report in reports.items() if not uid.endswith(".0"))
    tqdm.write(
        f"{plan.task}, seed {plan.seed}, {'kills' if plan.kills else 'no kill'}: {first['score']:.4f}, {seconds:.0f} s"
    )
    return asdict(plan) | {
        "score": first["score"],
        "steps of ranks that were away": first["away"],
        "came back at": returned,
        "distance": first["distance"],
        "epochs": first["epoch"] + 1,
        "seconds": seconds,
    }


def tables_of(runs: Sequence[Run]) -> str:
    """A row for each task, over the seeds that have been run both ways."""
    rows = []
    for task in TASKS:
        with_, without = (
            {run["seed"]: run for run in runs if run["task"] == task and run["kills"] is kills}
            for kills in (True, False)
        )
        seeds = sorted(set(with_) & set(without))
        if not seeds:
            continue
        differences = [with_[seed]["score"] - without[seed]["score"] for seed in seeds]
        error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else math.nan
        away = statistics.fmean(with_[seed]["steps of ranks that were away"] for seed in seeds)
        rows.append(
            {
                "": f"{task}, {'accuracy' if task == 'digits' else 'validation loss'}",
                "steps": with_[seeds[0]]["steps"],
                "seeds": len(seeds),
                "nobody is killed": f"{statistics.fmean(without[seed]['score'] for seed in seeds):.4f}",
                "three kills and returns": f"{statistics.fmean(with_[seed]['score'] for seed in seeds):.4f}",
                "difference": f"{statistics.fmean(differences):+.4f} ± {error:.4f}",
                "of each seed": ", ".join(f"{one:+.4f}" for one in differences),
                "part of all ranks' steps that was not made": f"{away / SLOTS / with_[seeds[0]]['steps']:.1%}",
            }
        )
    return table(rows) if rows else ""


def main() -> None:
    """Make the runs that are missing, write and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--part", type=float, default=1.0, help="of the steps")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    given = parser.parse_args()
    prepare()
    plans = [
        Plan.of(task, seed, kills, given.part)
        for task in given.tasks
        for seed in given.seeds
        for kills in (False, True)
    ]
    name = "faults-losses" if given.part == 1 else f"faults-losses-{given.part:g}"
    run_missing(name, plans, make, tables_of, seed=0, minutes=given.minutes)


if __name__ == "__main__":
    main()
