"""Living with DistributedDataParallel: frameworks wrap the model in it under torchrun, and it would average gradients.

model = fusedfog.local_gradients(DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from fusedfog.engine.scheduler import Scheduler
from fusedfog.log import warn_user
from fusedfog.optim.compatibility import first_refusal
from fusedfog.optim.features import Setup
from fusedfog.params.instances import instances

Module = TypeVar("Module", bound=nn.Module)


def local_gradients(ddp: Module) -> Module:
    """Make a DistributedDataParallel leave each rank its own gradients, by a communication hook that sends nothing.

    Call it once DDP is built, before the first backward. Two things that DDP sends besides remain: at every forward the
    module's buffers (rank 0's BatchNorm statistics overwrite the others'), unless it is built with `broadcast_buffers=False`
    (HF `TrainingArguments(ddp_broadcast_buffers=False)`, accelerate `DistributedDataParallelKwargs(broadcast_buffers=False)`,
    Lightning `DDPStrategy(broadcast_buffers=False)`), and with `find_unused_parameters=True` a small all-reduce at every
    backward. Either makes all ranks wait for the slowest. `gradient_as_bucket_view=True` saves DDP's copies of gradients.

    Returns:
        `ddp`. A second call does nothing, nor does one in a world of one rank, where frameworks wrap nothing.

    Raises:
        TypeError: not a DistributedDataParallel (a plain module's gradients are local already).
        RuntimeError: another communication hook is there, or backward has begun.
    """
    if not isinstance(ddp, DistributedDataParallel):
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return ddp
        raise TypeError(
            f"local_gradients takes a DistributedDataParallel, got {type(ddp).__name__}; gradients of a module that is in "
            f"none are local already"
        )
    if all(hook is not noop_hook for hook, _ in ddp._comm_hooks):
        ddp.register_comm_hook(None, noop_hook)
    return ddp


def check(kind: str, engine: Scheduler, setup: Setup) -> None:
    """Look, once, whether parameters are in a DistributedDataParallel that gets in the way.

    Args:
        kind: the optimizer's name, for the texts.
        engine, setup: the optimizer's.

    Raises:
        RuntimeError: it is there and the setup does not go with it, as the table of `compatibility` says.
    """
    exchanges = engine.phases.last.algorithm.exchanges == "parameters" and engine.communicator is not None
    ranks = engine.communicator.view.ranks if exchanges and engine.communicator is not None else ()
    params = (param for segment in engine.segments for param in segment.params)
    found = _holders(params) if dist.is_initialized() else []
    inside = replace(setup, data_parallel=bool(found))
    row = first_refusal(inside) if found else None
    if row is not None:
        raise RuntimeError(f"rank {dist.get_rank()}: {kind}: {row.text(inside)}")
    if ranks and any(_averages_gradients(ddp, ranks) for ddp in found):
        warn_user(
            f"rank {dist.get_rank()}: {kind}: its parameters are in a DistributedDataParallel that averages gradients over all "
            f"ranks in every backward, so nothing is saved by averaging with neighbours. Call "
            f"fusedfog.local_gradients(ddp) right after building it, or train the bare module",
            UserWarning,
        )


def _holders(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    own = set(map(id, params))
    # torch keeps no list of them, and they may be built after the optimizer.
    found = instances(DistributedDataParallel)
    return [ddp for ddp in found if any(id(param) in own for param in ddp.parameters())]


def _averages_gradients(ddp: DistributedDataParallel, ranks: Iterable[int]) -> bool:
    # One over fewer ranks, those of a machine, is somebody's hierarchy; what a foreign hook does cannot be known.
    return not ddp._comm_hooks and set(ranks) <= set(dist.get_process_group_ranks(ddp.process_group))
