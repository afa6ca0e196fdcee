"""Calls that all members of an elastic run make together: when the members change meanwhile, they are made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from fusedfog.comm.elastic.run import Run

P = ParamSpec("P")
R = TypeVar("R")


def together(call: Callable[[], R], undo: Callable[[R], object] = lambda result: None) -> R:
    """What a call returns; in an elastic run, once all members have completed it, and otherwise all of them make it again.

    Args:
        call: leaves nothing changed when it raises.
        undo: takes back what it has returned, since another member has not completed it.
    """
    run = Run.current()
    return call() if run is None or run.again is None else run.again(call, undo)


def made_again(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one that is called by all members together."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return together(lambda: function(*args, **kwargs))

    return call
