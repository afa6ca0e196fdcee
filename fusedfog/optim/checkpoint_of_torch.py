"""Folders of `torch.distributed.checkpoint` that others wrote: read by torch, on the user's word that nothing in them is hostile.

Below `checkpoint`. Their `.metadata`, and all that is no tensor, are pickles, which torch executes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fusedfog.errors import CheckpointError
from fusedfog.optim.base import DecentralizedOptimizer


def is_of_torch(path: Path) -> bool:
    """Whether a folder is one of `torch.distributed.checkpoint`."""
    return (path / ".metadata").exists()


def refuse(path: Path) -> None:
    """Raise CheckpointError that says what reading such a folder would do."""
    raise CheckpointError(
        f"{path} is a folder of torch.distributed.checkpoint, in which anything may be pickled that is executed when it is read. "
        f"If nobody else could write to it, pass trusted=True"
    )


class OfTorch:
    """A folder in which `dcp.save({"model": ..., "optimizer": ...})` has put what `dcp.state_dict` gives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: dict[str, Any] = {}

    def read(self, model: nn.Module, opt: DecentralizedOptimizer) -> None:
        """Read what this rank needs, into tensors of its own; DTensors as they are cut here.

        Raises:
            CheckpointError: it holds something else, or is damaged; torch has no checksums, so not all damage is noticed.
        """
        own = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
        room: dict[str, Any] = _room(own)
        groups = room["optimizer"]["param_groups"]
        try:
            stored = FileSystemReader(self._path).read_metadata().state_dict_metadata
            # Entries that only this optimizer has stay as they are.
            lacking = [
                {key: group.pop(key) for key in list(group) if f"optimizer.param_groups.{place}.{key}" not in stored}
                for place, group in enumerate(groups)
            ]
            with warnings.catch_warnings():
                # Ranks read different parts, each alone: nothing to plan together.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                state_dict_loader.load(room, checkpoint_id=self._path, no_dist=True)
            for group, rest in zip(groups, lacking, strict=True):
                group.update(rest)
        except (CheckpointException, Exception) as error:  # The former is no Exception.
            raise CheckpointError(
                f"{self._path} has no 'model' and 'optimizer' of get_state_dict() that fit, or is damaged ({_cause(error)})"
            ) from None
        self._loaded = room

    def adopt(self, model: nn.Module, opt: DecentralizedOptimizer) -> None:
        """Load what was read. Collective; the optimizer checks before anything is changed."""
        set_optimizer_state_dict(model, opt, self._loaded["optimizer"])
        with opt.paused():
            set_model_state_dict(model, self._loaded["model"])


def _room(value: Any) -> Any:
    """The same, with new tensors."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, requires_grad=False)
    if isinstance(value, dict):
        return {key: _room(one) for key, one in value.items()}
    return value


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        # By rank: the exception, and where it was raised.
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"
