"""A run of virtual ranks: options checked as real ranks check them, steps made, figures recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fusedfog import optim
from fusedfog.algorithm import Algorithm, Outer
from fusedfog.algorithms import algorithm_for, alone
from fusedfog.engine.clock import StepSchedule
from fusedfog.engine.mix_strength import Strength
from fusedfog.engine.rank_weights import RankWeights, checked, usable
from fusedfog.engine.rhythm import Rhythm
from fusedfog.optim.compatibility import choose_topology, resolve_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.options import Keywords, Options
from fusedfog.optim.parameters import check_finite
from fusedfog.simulate.problems import Problem
from fusedfog.simulate.ranks import Ranks
from fusedfog.simulate.speeds import Ends, Speeds
from fusedfog.simulate.virtual_time import VirtualRanks
from fusedfog.topology import Topology

Rate: TypeAlias = float | Callable[[int], float]
OptimizerName: TypeAlias = Literal["SGD", "Adam", "AdamW", "AccumAdamW"]


@dataclass
class Trajectory:
    """What a run recorded: one entry of each list per recorded step, and the end.

    Attributes:
        steps: how many steps had been made; with `speeds`, how many units of virtual time had gone by.
        losses: mean of the problem's `loss`, if it has one.
        distances, mean_distances: root mean square over ranks of ||x_i - x*||, and ||mean - x*||, if x* is known.
        consensus: root mean square over ranks of ||x_i - mean||.
        rank_steps: how many steps each rank had made, n numbers.
        X: final parameters [n, N].
        states: the algorithm's final states by name, each [n, N].
        masses, mass_under_way: push-sum's at the end: what each rank holds, n numbers, and what nobody has collected; in sum n.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    mean_distances: list[float] = field(default_factory=list)
    consensus: list[float] = field(default_factory=list)
    rank_steps: list[list[int]] = field(default_factory=list)
    X: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    states: dict[str, Tensor] = field(default_factory=dict)
    masses: list[float] = field(default_factory=list)
    mass_under_way: float = 0.0


def simulate(
    problem: Problem,
    n: int,
    topology: Topology | str | None = None,
    algorithm: str = "awc",
    *,
    optimizer: OptimizerName = "SGD",
    steps: int,
    lr: Rate,
    x0: Tensor | np.ndarray | None = None,
    communicate_every: Rhythm = 1,
    global_average_every: int | None = None,
    outer: Outer | None = None,
    mix_strength: Strength = 1.0,
    weights: Sequence[float] | None = None,
    speeds: Speeds | None = None,
    delay: float = 0.0,
    record_every: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **hyper: Any,
) -> Trajectory:
    """Train `problem` on n virtual ranks with one of fusedfog's optimizers.

    Args:
        problem: see `Problem`.
        n: number of ranks.
        topology, algorithm, communicate_every, global_average_every, outer, mix_strength: as for the optimizers.
        optimizer: the name of the optimizer class.
        weights: each rank's `weight`, [n]. Distances and losses are those of the weighted mean if the problem has `weighted`.
        steps: how many steps to make.
        lr: learning rate, or a function of the step (from 0).
        x0: the start [n, N], or [N] for all ranks alike. None asks the problem's `start`, else draws one standard normal
            row for all ranks from `seed`.
        speeds: let no rank wait for another: steps that each makes in a unit of virtual time, [n], or a function of the rank
            and its step such as `lognormal(sigma, seed)`. The run lasts `steps` units, so many steps of a rank of speed 1, and
            lr is a function of a rank's own step. For awc, push_sum and local, on a static topology (default:
            symmetric_exponential); `fusedfog.simulate.virtual_time` says what a step is, and what comes first at one moment.
        delay: with `speeds`, the time from the end of a step until its messages are there.
        record_every: record after every so many steps; the start and the end are always recorded.
        dtype: of parameters and arithmetic, float64 or float32.
        hyper: the optimizer's own arguments: momentum, weight_decay, betas, ...

    Returns:
        The `Trajectory`.

    Raises:
        ValueError: whatever the optimizers refuse at construction, with their words; shapes that do not fit.
        TypeError: unknown hyper-parameters, and as the optimizers.
    """
    _check_numbers(n, steps, record_every, dtype, delay, waits=speeds is None)
    keywords = Keywords(
        topology=topology,
        algorithm=algorithm,
        communicate_every=communicate_every,
        global_average_every=global_average_every,
        outer=outer,
        mix_strength=mix_strength,
        weight=None if weights is None else next(iter(weights), None),
    )
    rate = _checked(lr)
    family, group = _group(optimizer, rate(0), hyper)
    row, graph, schedule = _resolve(keywords, family, group, n, waits=speeds is None)
    x = _start(problem, n, x0, seed, dtype)
    shares = _weights(weights, n)
    ranks: Ranks | VirtualRanks
    if speeds is None:
        ranks = Ranks(row, graph, schedule, group, x, getattr(problem, "sizes", x.shape[1:]), shares)
    else:
        ranks = VirtualRanks(row, graph, schedule, group, x, Ends(speeds, n), delay, shares)
    measured = problem.weighted(ranks.parts) if ranks.parts is not None and hasattr(problem, "weighted") else problem
    path = Trajectory()
    for step in range(0, steps, record_every):
        _record(path, measured, step, ranks)
        ranks.run_until(min(step + record_every, steps), problem, rate)
    _record(path, measured, steps, ranks)
    path.X, path.states = ranks.flat["param"], {name: ranks.flat[name] for name in ranks.state_names}
    path.masses, path.mass_under_way = ranks.masses, ranks.mass_under_way
    return path


def _check_numbers(n: int, steps: int, record_every: int, dtype: torch.dtype, delay: float, *, waits: bool) -> None:
    if n < 1 or steps < 0 or record_every < 1:
        raise ValueError(f"need n >= 1, steps >= 0, record_every >= 1; got {n}, {steps}, {record_every}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, which are the arithmetic's, got {dtype}")
    if not 0 <= delay < math.inf or (delay and waits):
        raise ValueError(f"delay must be finite and not negative, and 0 without speeds=, got {delay!r}")


def _checked(lr: Rate) -> Callable[[int], float]:
    """The learning rate of a step, once it is found to be one."""

    def rate(step: int) -> float:
        group = {"lr": float(lr(step) if callable(lr) else lr)}
        check_finite(group, ("lr",))
        return group["lr"]

    return rate


def _group(optimizer: str, lr: float, hyper: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The optimizer's family and its param group, checked and defaulted by the optimizer itself, built for one rank."""
    faces: dict[str, Any] = {face.__name__: face for face in (optim.SGD, optim.Adam, optim.AdamW, optim.AccumAdamW)}
    if optimizer not in faces:
        raise ValueError(f"unknown optimizer {optimizer!r}; there are {', '.join(faces)}")
    foreign = [name for name in hyper if name in Keywords.__annotations__]
    if foreign:
        raise TypeError(f"{', '.join(foreign)} means nothing to simulated ranks")
    face = faces[optimizer]([nn.Parameter(torch.zeros(1))], lr=lr, algorithm="local", **hyper)
    return face._family, face.param_groups[0]


def _resolve(
    keywords: Keywords, family: str, group: dict[str, Any], n: int, *, waits: bool
) -> tuple[Algorithm, Topology | None, StepSchedule]:
    """What `fusedfog.optim.build` decides for n real ranks, which wait for each other or do not."""
    options = Options.of(keywords)
    row = algorithm_for(options.algorithm, family, options.outer)
    given = options.topology if waits else resolve_topology(row, options.topology, n, static=True)
    graph = choose_topology(Setup(family, row, vars(options), [group], ranks=n), given, n)
    if not waits:
        _check_asynchronous(row, graph, options)
    if n == 1:
        row, graph = alone(family), None
    every = options.outer.every if options.outer is not None else options.communicate_every
    return row, graph, StepSchedule(every, options.global_average_every, mix_strength=options.strength)


def _check_asynchronous(row: Algorithm, graph: Topology | None, options: Options) -> None:
    """Refuse what makes ranks wait for each other."""
    if not row.asynchronous and row.exchanges != "nothing":
        raise ValueError(
            f"algorithm {row.name!r} does not work with speeds=: its step needs what all neighbours sent in the same step; use "
            f"awc or push_sum, or leave it out"
        )
    if options.global_average_every is not None:
        raise ValueError(
            "global_average_every does not work with speeds=: in an average all ranks wait; leave one of them out"
        )
    if graph is not None and not graph.is_static:
        raise ValueError(
            f"topology {graph.name} does not work with speeds=: ranks that do not wait are in different rounds; use a static "
            f"one such as 'exponential' or 'symmetric_exponential'"
        )


def _weights(given: Sequence[float] | None, n: int) -> RankWeights | None:
    if given is None:
        return None
    known = [weight for weight in map(checked, given) if weight is not None]
    if not len(known) == len(given) == n:
        raise ValueError(f"weights must be one number for each of {n} ranks, got {given!r}")
    return usable(known)


def _start(problem: Problem, n: int, x0: Tensor | np.ndarray | None, seed: int, dtype: torch.dtype) -> Tensor:
    if x0 is None and hasattr(problem, "start"):
        x0 = problem.start()
    elif x0 is None and hasattr(problem, "dim"):
        x0 = torch.randn(problem.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif x0 is None:
        raise ValueError("pass x0, or a problem that has `dim` or `start()`")
    x = torch.as_tensor(x0).detach()
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != n):
        raise ValueError(f"x0 must be [N] or [n, N] with n = {n}, got {tuple(x.shape)}")
    return x.expand(n, -1).to(dtype, copy=True).contiguous()


def _record(path: Trajectory, problem: Problem, step: int, ranks: Ranks | VirtualRanks) -> None:
    x = ranks.flat["param"]
    wide = x.double()
    mean = wide.mean(0)
    path.steps.append(step)
    path.rank_steps.append(ranks.rank_steps)
    path.consensus.append(float((wide - mean).norm()) / len(x) ** 0.5)
    if hasattr(problem, "loss"):
        path.losses.append(float(problem.loss(x).double().mean()))
    if hasattr(problem, "minimiser"):
        path.distances.append(float((wide - problem.minimiser).norm()) / len(x) ** 0.5)
        path.mean_distances.append(float((mean - problem.minimiser).norm()))
