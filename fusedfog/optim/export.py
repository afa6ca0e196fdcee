"""The average model over all ranks in one file, for whoever loads it without fusedfog. Collective."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from fusedfog.comm.averaging import broadcast
from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.averaged import averaged, measuring_communicator
from fusedfog.optim.options import Options


def save_averaged(kind: str, engine: Scheduler, options: Options, path: Path, model: torch.nn.Module | None) -> None:
    """Write the average model's `state_dict()` on rank 0; see `Controls.save_averaged`."""
    model = _bare(model if model is not None else options.model, kind)
    _check_model(kind, engine, model)
    failure: Exception | None = None
    with averaged(engine, options, model):
        if engine.sharding is not None:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state, rank = get_model_state_dict(model, options=whole), dist.get_rank()
        else:
            communicator = measuring_communicator(engine, options)
            state, rank = model.state_dict(), communicator.view.rank if communicator is not None else 0
        if rank == 0:
            try:
                _write(path, state)
            except Exception as error:  # Whatever it is, the other ranks have to know.
                failure = error
    # Nobody goes on as if there were a file.
    failed = torch.tensor([float(failure is not None)], device=engine.place)
    if engine.sharding is not None:
        dist.broadcast(failed, 0)
    else:
        broadcast([failed], communicator)
    if failure is not None:
        raise failure
    if rank and failed.item():
        raise RuntimeError(f"rank {rank}: {kind}.save_averaged: rank 0 could not write {path}; its error says why")


def _bare(model: torch.nn.Module | None, kind: str) -> torch.nn.Module:
    """The model without what DistributedDataParallel and torch.compile put around it."""
    if model is None:
        raise ValueError(f"{kind}.save_averaged needs the model: give it, or build the optimizer with model=")
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def _check_model(kind: str, engine: Scheduler, model: torch.nn.Module) -> None:
    own = {id(param) for param in model.parameters()}
    slots = [
        slot.spec.name
        for segment in engine.segments
        for slot, param in zip(segment.layout.slots, segment.owners, strict=True)
        if id(param) not in own
    ]
    if slots:
        more = f" and {len(slots) - 1} more" if len(slots) > 1 else ""
        raise ValueError(
            f"rank {engine.rank}: {kind}.save_averaged: parameter {slots[0]}{more} of the optimizer is not in this "
            f"{type(model).__name__}; pass the model that the optimizer was built on"
        )


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write a state_dict, whole or not at all."""
    kept: dict[tuple[object, ...], torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tied = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if tied not in kept or not value.numel():
                here = value.detach().cpu()
                # torch.save would write all of the storage that a view has.
                kept[tied] = here.clone() if here.untyped_storage().nbytes() > here.nbytes else here
            state[name] = kept[tied]
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is in it
    finally:
        os.close(folder)
