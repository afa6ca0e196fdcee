"""Checkpoints of all ranks in one `torch.distributed.checkpoint` folder, to be resumed on as many ranks or on others.

    fusedfog.save_checkpoint("run/step1000", model, opt, epoch=3)
    extra = fusedfog.load_checkpoint("run/step1000", model, opt)

Ranks of a decentralized run differ, so every rank writes its own model and states under its own prefix: `rank3/model/...`
and `rank3/state/...` tensor by tensor, `rank3/rest` for param groups, clock and what the user adds. On the same number of
ranks a run goes on bit for bit. On another number every rank starts from the average of the saved ranks.

Of parameters that FSDP2 shards (`shards`), the ranks of a machine write one replica together, under the machine's number;
"rank" then means that, here and below. They may be other numbers of ranks on resume: DTensors are read as they are cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fusedfog.comm.calls import collective
from fusedfog.comm.group import GroupView, find_group
from fusedfog.gossip.compression import is_wire_state
from fusedfog.optim import state_dict as origin
from fusedfog.optim.averaged import measuring_communicator
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.params.precision import COMPENSATION


@collective("save_checkpoint()")
def save_checkpoint(path: str | Path, model: nn.Module, opt: DecentralizedOptimizer, **extra: Any) -> None:
    """Write this rank's model, optimizer states and clock. Collective over the default process group.

    Messages in flight are waited for and kept; training goes on undisturbed.

    Args:
        path: a folder that all ranks see; made if it is not there.
        extra: anything picklable that `load_checkpoint` shall return, for instance a scheduler's state_dict.

    Raises:
        CheckpointException: a rank could not write (from torch.distributed.checkpoint; names rank and cause).
    """
    rank = _replicas(opt).rank
    saved = opt.state_dict()
    states = saved.pop("state")
    entries: dict[str, Any] = {f"rank{rank}/model/{name}": value for name, value in model.state_dict().items()}
    for key, state in states.items():
        entries |= {f"rank{rank}/state/{key}/{name}": value for name, value in state.items()}
    entries[f"rank{rank}/rest"] = {"optimizer": saved, "extra": extra}
    state_dict_saver.save(
        entries,
        checkpoint_id=path,
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=not dist.is_initialized(),
    )


@collective("load_checkpoint()")
def load_checkpoint(path: str | Path, model: nn.Module, opt: DecentralizedOptimizer) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into a model and its optimizer. Collective; discards messages in flight.

    With as many ranks as were saved, each takes up its own part, bit for bit. With another number, all ranks start from
    the mean over the saved ranks of parameters, float buffers and states (of push_sum weighed by its scalars, which then
    start anew at 1), with rank 0's counters and param groups; every saved rank is read by one rank.

    Returns:
        `extra` as it was saved by this rank (of a sharded replica: by one of its ranks), or by rank 0 where numbers differ.

    Raises:
        ValueError: the folder holds no fusedfog checkpoint, or one of another model or algorithm.
        CheckpointException: a part cannot be read (from torch.distributed.checkpoint).
    """
    view = _replicas(opt)
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    ranks = sum(key.endswith("/rest") for key in stored)
    if not ranks:
        raise ValueError(f"{path} holds no checkpoint written by fusedfog.save_checkpoint")
    like = _shards(model, opt)
    if ranks == view.size:
        entries = _read(path, stored, view.rank, like)
    else:
        # A rank of a sharded replica holds a part that no other reads, so it averages by itself.
        readers = GroupView(0, 1, None) if like else view
        entries = _average(path, stored, ranks, readers, next(model.parameters()).device, like)
    remainder = entries.pop("rest")
    states: dict[int, dict[str, Any]] = {}
    for name, value in entries.items():
        if name.startswith("state/"):
            _, key, state = name.split("/", 2)
            states.setdefault(int(key), {})[state] = value
    weights = {name.removeprefix("model/"): value for name, value in entries.items() if name.startswith("model/")}
    _check_model(path, model, weights)
    # First the optimizer, which checks before it changes anything.
    opt.load_state_dict({**remainder["optimizer"], "state": states})
    with opt.paused():
        model.load_state_dict(weights)
    extra: dict[str, Any] = remainder["extra"]
    return extra


def _check_model(path: str | Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*own, *saved]:
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"{path} is a checkpoint of another model: {name} has shape {saved.get(name, 'none')} there and "
                f"{own.get(name, 'none')} here"
            )


def _replicas(opt: DecentralizedOptimizer) -> GroupView:
    """This rank's replica among all replicas of the model: itself among all ranks, unless parameters are sharded."""
    engine = opt._engine
    if engine.sharding is None:
        return find_group()
    communicator = measuring_communicator(engine, opt._options)
    return communicator.view if communicator is not None else GroupView(0, 1, None)


def _shards(model: nn.Module, opt: DecentralizedOptimizer) -> dict[str, DTensor]:
    """What is sharded of a rank's part, by its name there."""
    if opt._engine.sharding is None:
        return {}
    entries = {f"model/{name}": value for name, value in model.state_dict().items()}
    for key, state in opt.state_dict()["state"].items():
        entries |= {f"state/{key}/{name}": value for name, value in state.items()}
    return {name: value for name, value in entries.items() if isinstance(value, DTensor)}


def _empty(about: TensorStorageMetadata, like: DTensor | None) -> Tensor:
    if like is not None and like.shape == about.size:
        return torch.empty_like(like, dtype=about.properties.dtype)
    return torch.empty(about.size, dtype=about.properties.dtype)


def _read(path: str | Path, stored: Mapping[str, Any], rank: int, like: Mapping[str, DTensor]) -> dict[str, Any]:
    """What rank `rank` saved, without its prefix; what is in `like` is sharded as it is there."""
    prefix = f"rank{rank}/"
    entries: dict[str, Any] = {
        key: _empty(about, like.get(key.removeprefix(prefix))) if isinstance(about, TensorStorageMetadata) else None
        for key, about in stored.items()
        if key.startswith(prefix)
    }
    _load(path, entries)
    return {key.removeprefix(prefix): value for key, value in entries.items()}


def _load(path: str | Path, entries: dict[str, Any]) -> None:
    # Ranks read different parts, each alone: nothing to plan together, and nothing amiss, as torch would warn. Flattened,
    # the planner would put what is no tensor into a copy of `entries`.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_loader.load(entries, checkpoint_id=path, planner=planner, no_dist=True)


def _average(
    path: str | Path,
    stored: Mapping[str, Any],
    ranks: int,
    view: GroupView,
    device: torch.device,
    like: Mapping[str, DTensor],
) -> dict[str, Any]:
    """The mean of all saved ranks' floating-point tensors; the rest is rank 0's."""
    result = {name: value for name, value in _read(path, stored, 0, like).items() if _has_a_mean(name)}
    scalars = result["rest"]["optimizer"]["fusedfog"].get("push_sum") or [1.0] * ranks
    # A parameter that had no gradient on rank 0 may have states on others.
    tensors = {key.split("/", 1)[1]: about for key, about in stored.items() if isinstance(about, TensorStorageMetadata)}
    names = {name: about for name, about in tensors.items() if _has_a_mean(name)}
    sums = {
        name: torch.zeros_like(_empty(about, like.get(name)), dtype=_wide(about.properties.dtype))
        for name, about in sorted(names.items())
        if about.properties.dtype.is_floating_point and not name.endswith("/step")
    }
    for rank in range(view.rank, ranks, view.size):
        for name, value in _read(path, stored, rank, like).items():
            if name in sums:
                sums[name].add_(value, alpha=scalars[rank] / sum(scalars))
    for name, total in sums.items():
        if view.size > 1:
            moved = total.to(device)
            dist.all_reduce(moved)
            total = moved.cpu()
        result[name] = total.to(names[name].properties.dtype)
        state = name.rsplit("/", 1)[0]
        if name.startswith("state/") and f"{state}/step" not in result:
            result[f"{state}/step"] = _most_steps(path, stored, state)
    clock = result["rest"]["optimizer"]["fusedfog"]
    clock |= {"push_sum": None, "encoded": False}
    for key in origin.KEYS:
        clock.pop(key, None)
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_a_mean(name: str) -> bool:
    """Replicas and encoded messages belong to the old ranks' exchanges, a compensation to the parameters before averaging."""
    state = name.rsplit("/", 1)[1] if name.startswith("state/") else ""
    return state != COMPENSATION and not is_wire_state(state)


def _most_steps(path: str | Path, stored: Mapping[str, Any], state: str) -> Tensor:
    """The largest step count that any rank has for a parameter that rank 0 has none for."""
    keys = [key for key in stored if key.split("/", 1)[1] == f"{state}/step"]
    entries: dict[str, Any] = {key: torch.zeros(()) for key in keys}
    if entries:
        _load(path, entries)
    return torch.stack([*entries.values(), torch.ones(())]).max()
