"""Methods of optimizers that all ranks call together announce themselves; see `comm.calls`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from fusedfog.comm.calls import Call
from fusedfog.comm.group import GroupView
from fusedfog.engine.scheduler import Scheduler


class Announcing(Protocol):
    """What this needs of an optimizer."""

    _scheduler: Scheduler | None


Owner = TypeVar("Owner", bound=Announcing)
P = ParamSpec("P")
R = TypeVar("R")


def ranks_of(engine: Scheduler | None) -> GroupView | None:
    """The ranks that an optimizer exchanges with; None for those of the default group."""
    return engine.communicator.view if engine is not None and engine.communicator is not None else None


def announced(
    name: str,
) -> Callable[[Callable[Concatenate[Owner, P], R]], Callable[Concatenate[Owner, P], R]]:
    """Make a method a `Call` of the optimizer's ranks."""

    def of(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
        @wraps(method)
        def call(self: Owner, *args: P.args, **kwargs: P.kwargs) -> R:
            with Call(name, ranks_of(self._scheduler)):
                return method(self, *args, **kwargs)

        return cast(Callable[Concatenate[Owner, P], R], call)

    return of
