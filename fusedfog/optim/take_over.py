"""Taking over from a torch optimizer that somebody else has built, a framework say: its groups, its schedules, its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch.optim.lr_scheduler import ConstantLR

from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.optimizers import SGD, Adam, AdamW
from fusedfog.optim.options import Keywords
from fusedfog.optim.wrapper import Decentralized

_NAMESAKES: dict[type[torch.optim.Optimizer], type[SGD] | type[Adam]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}
_NOT_TAKEN = ("capturable", "decoupled_weight_decay")
"""Defaults of torch's that say how torch computes, or what the class says already."""


def take_over(
    optimizer: torch.optim.Optimizer, schedules: Iterable[Any] = (), **decentralized: Unpack[Keywords]
) -> DecentralizedOptimizer:
    """An optimizer of fusedfog in the place of a torch optimizer: torch's SGD, Adam and AdamW become fusedfog's own, others
    are wrapped in `Decentralized`. Collective.

    The new optimizer has the very param groups of the old one, so what is written to either is seen by both, and the old one's
    states, if it has made steps. The old one must not be stepped any more.

    Args:
        optimizer: built on the parameters where they are trained; one of fusedfog's comes back as it is.
        schedules: learning-rate schedules that were built on it; they go on with the new one.
        decentralized: the keywords of `DecentralizedOptimizer`.

    Raises:
        TypeError: keywords for an optimizer that is fusedfog's own already.
        ValueError: as the optimizers' constructors.
    """
    if isinstance(optimizer, DecentralizedOptimizer):
        if decentralized:
            raise TypeError(
                f"{type(optimizer).__name__} is fusedfog's own already: give {', '.join(decentralized)} where it is built"
            )
        return optimizer
    new = _successor(optimizer, decentralized)
    if optimizer.state and not isinstance(new, Decentralized):
        new.load_state_dict(optimizer.state_dict())
    schedules = [schedule for schedule in schedules if getattr(schedule, "optimizer", None) is optimizer]
    if schedules:
        # Schedules count an optimizer's steps by a wrapper around its step(), which torch only puts there when one is built.
        ConstantLR(new, factor=1.0)
    for schedule in schedules:
        schedule.optimizer = new
    return new


def _successor(optimizer: torch.optim.Optimizer, decentralized: Any) -> DecentralizedOptimizer:
    namesake = _NAMESAKES.get(type(optimizer))
    if namesake is None:
        return Decentralized(optimizer, **decentralized)
    defaults: dict[str, Any] = {name: value for name, value in optimizer.defaults.items() if name not in _NOT_TAKEN}
    return namesake(optimizer.param_groups, **defaults, **decentralized)
