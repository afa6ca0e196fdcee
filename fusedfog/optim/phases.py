"""What the options make of a run: its phases, and the weights of its ranks. Beside `build` and `switching`, which ask."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import torch

from fusedfog.algorithm import Algorithm
from fusedfog.algorithms import data_parallel
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.group import GroupView
from fusedfog.engine.clock import StepSchedule
from fusedfog.engine.phases import Phase, Phases
from fusedfog.engine.rank_weights import RankWeights, usable
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.kernels.wire import wire_format
from fusedfog.optim.options import Options
from fusedfog.optim.ways import Way


def weights_of(view: GroupView, options: Options, timeout: timedelta, kind: str, call: str) -> RankWeights | None:
    """All ranks' `weight=`, if they differ; all ranks together, if they have one.

    Raises:
        ValueError: one is nothing beside another; on all ranks.
        PeerTimeout: another rank did not come.
    """
    if options.weight is None:
        return None
    return usable(confer(view, next_agreement(view), options.weight, list, timeout, kind, call))


def phases_of(
    family: str,
    algorithm: Algorithm,
    way: Way,
    options: Options,
    hierarchy: Hierarchy | None,
    weights: RankWeights | None,
    *,
    alone: bool,
) -> Phases:
    """What the options make of a run: `data_parallel_steps`, then the algorithm; one phase for a rank that is alone."""
    schedule = _schedule(options)
    if alone:
        return Phases.of(Phase(algorithm, way.topology, schedule, reason=way.reason))
    first = Phase(
        data_parallel(family),
        None,
        dataclasses.replace(schedule, communicate_every=1, global_average_every=None),
        weights=weights,
    )
    gradients = hierarchy.gradients if hierarchy is not None else None
    last = Phase(
        algorithm,
        way.topology,
        schedule,
        codes_of(way, options),
        hierarchy,
        options.lr_scale,
        gradients,
        way.reason,
        weights,
    )
    return Phases.of(last, first, options.data_parallel_steps)


def codes_of(way: Way, options: Options) -> torch.dtype | None:
    """dtype of compressed messages, as the user or auto has chosen it; None for exact ones."""
    return wire_format(way.wire) if way.wire is not None else options.codes


def _schedule(options: Options) -> StepSchedule:
    return StepSchedule(
        communicate_every=options.outer.every if options.outer is not None else options.communicate_every,
        global_average_every=options.global_average_every,
        fused_backward=options.fused_backward,
        max_grad_norm=options.max_grad_norm,
        measure=options.measure,
        nonfinite=options.nonfinite,
        mix_strength=options.strength,
        asynchronous=options.asynchronous,
        max_lag=options.max_lag,
        adapt=options.adapt,
    )
