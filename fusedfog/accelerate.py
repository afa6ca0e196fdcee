"""Hugging Face accelerate, decentralized: `prepare` in the place of `accelerator.prepare`.

    from fusedfog.accelerate import prepare

    model, optimizer, loader, schedule = prepare(accelerator, model, optimizer, loader, schedule, topology="ring")

It stands on `optim`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint import load_checkpoint, save_checkpoint
from fusedfog.optim.options import Keywords
from fusedfog.optim.take_over import take_over

_RANKS = "ranks"
"""The folder inside a checkpoint of accelerate's that has every rank's own state."""


def prepare(accelerator: Accelerator, *objects: Any, **decentralized: Unpack[Keywords]) -> Any:
    """`accelerator.prepare` for decentralized training: the same objects come back in the same order. Collective.

    The model is placed and wrapped in nothing. The torch optimizer becomes one of fusedfog's (`take_over`), in accelerate's
    wrapper, whose `optimizer.optimizer` has what is fusedfog's own, such as `averaged()`. Schedules and loaders are prepared as
    usual. `accelerator.save_state` writes the average over all ranks as the model, and beside it every rank's own state, from
    which `accelerator.load_state` goes on. Both are called by all ranks.

    Args:
        objects: one model, one optimizer on its parameters, and any loaders and schedules.
        decentralized: the keywords of `fusedfog.DecentralizedOptimizer`; `model` is known.

    Raises:
        ValueError: not one model and one optimizer; or as the optimizers' constructors.
        TypeError: keywords for an optimizer that is fusedfog's own already.
    """
    models = [one for one in objects if isinstance(one, nn.Module)]
    optimizers = [one for one in objects if isinstance(one, torch.optim.Optimizer)]
    if len(models) != 1 or len(optimizers) != 1:
        raise ValueError(
            f"prepare takes one model and one optimizer, and was given {len(models)} and {len(optimizers)}: call it once for "
            f"each pair"
        )
    (model,), (optimizer,) = models, optimizers
    model = accelerator.prepare_model(model, evaluation_mode=True)
    schedules = [one for one in objects if isinstance(one, torch.optim.lr_scheduler.LRScheduler)]
    own = isinstance(optimizer, DecentralizedOptimizer) and not decentralized
    keywords: Keywords = decentralized if own else {"model": model, **decentralized}
    gossip = take_over(optimizer, schedules, **keywords)
    prepared = _Prepared(gossip, accelerator, model)
    accelerator._optimizers.append(prepared)
    accelerator.register_save_state_pre_hook(functools.partial(_save, prepared))
    accelerator.register_load_state_pre_hook(functools.partial(_load, prepared))
    others = iter(_all(accelerator.prepare(*(one for one in objects if one is not models[0] and one is not optimizer))))
    return tuple(model if one is models[0] else prepared if one is optimizer else next(others) for one in objects)


def _all(prepared: Any) -> tuple[Any, ...]:
    return prepared if isinstance(prepared, tuple) else () if prepared is None else (prepared,)


class _Prepared(AcceleratedOptimizer):
    """accelerate's wrapper, which loads every rank's own state where there is one."""

    def __init__(self, gossip: DecentralizedOptimizer, accelerator: Accelerator, model: nn.Module) -> None:
        super().__init__(gossip, device_placement=False, scaler=accelerator.scaler)
        self.gossip, self.model = gossip, model
        self.folder: Path | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rank 0's, which is what accelerate has saved, or this rank's own from beside it."""
        if self.folder is None:
            super().load_state_dict(state_dict)
        else:
            load_checkpoint(self.folder, self.model, self.gossip)
            self.folder = None


def _save(prepared: _Prepared, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    with prepared.gossip.averaged(prepared.model):
        for number, one in enumerate(models):
            if one is prepared.model and number < len(weights):
                weights[number] = _copies(one.state_dict())
    save_checkpoint(Path(folder, _RANKS), prepared.model, prepared.gossip)


def _copies(state: dict[str, Any]) -> OrderedDict[str, Any]:
    """Copies that share storages as the tensors do: accelerate saves what has two names once, of an `OrderedDict`."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for value in state.values():
        made.setdefault((value.data_ptr(), value.shape), value.detach().clone())
    return OrderedDict((name, made[value.data_ptr(), value.shape]) for name, value in state.items())


def _load(prepared: _Prepared, models: list[nn.Module], folder: str) -> None:
    if Path(folder, _RANKS).exists():
        prepared.folder = Path(folder, _RANKS)
        # Its parameters come with the optimizer's state; others are loaded as usual.
        models[:] = [one for one in models if one is not prepared.model]
