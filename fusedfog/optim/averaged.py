"""The average model over all ranks, to look at or to evaluate, and how far ranks are from it. Collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fusedfog.comm.averaging import average_in_place, consensus_distance
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.build import ranks_to_mix_with
from fusedfog.optim.options import Options
from fusedfog.params.shards import sharding_of


def measuring_communicator(engine: Scheduler, options: Options) -> Communicator | None:
    """The communicator over which averages are taken; `local` optimizers have none of their own and meet here first.

    None where there is nothing to average: for a rank that is alone, and where FSDP keeps all replicas equal.
    """
    if engine.communicator is not None or (options.group is None and not dist.is_initialized()):
        return engine.communicator
    if engine.sharding is not None and engine.sharding.keeps_equal(find_group(options.group)):
        return None
    options, _ = ranks_to_mix_with(sharding_of(engine.groups, options.model), options, alone=False)
    view = find_group(options.group)
    return communicator_for(view, engine.segments[0].param.device) if view.size > 1 else None


@contextmanager
def averaged(engine: Scheduler, options: Options, model: torch.nn.Module | None) -> Iterator[None]:
    """Inside, parameters and `model`'s floating-point buffers are averages; afterwards they are exactly what they were."""
    model = model if model is not None else options.model
    buffers = [b for b in model.buffers() if b.is_floating_point()] if model is not None else []
    tensors = [*_mixed(engine), *buffers]  # Parameters elsewhere would not be the average inside.
    engine.drain(keep_failures=True)
    edits = engine.buckets.count_edits()
    before = [tensor.clone() for tensor in tensors]
    try:
        with torch.no_grad():
            average_in_place(tensors, measuring_communicator(engine, options))
        engine.buckets.bump_versions()
        with engine.block_steps("averaged()"):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        engine.buckets.bump_versions()
        engine.buckets.forget_edits(edits)


def distance_of(engine: Scheduler, options: Options) -> float:
    """Root mean square over ranks of ||x_i - mean||, over all mixed parameters, measured now."""
    flats = _mixed(engine)
    distance = consensus_distance(flats, measuring_communicator(engine, options))
    if engine.sharding is not None:
        own = torch.tensor(distance, dtype=torch.float64, device=engine.segments[0].param.device)
        distance = engine.sharding.norm(own).item()
    return distance


def _mixed(engine: Scheduler) -> list[torch.Tensor]:
    """The flat parameters that are mixed; raises `StorageReplacedError` if any parameter lies elsewhere."""
    for segment in engine.segments:
        segment.check_storage()
    return [segment.param for segment in engine.segments if segment.layout.mix]
