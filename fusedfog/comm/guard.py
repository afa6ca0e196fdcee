"""Calls of torch's that block until all ranks have come, made so that a rank that has ended is noticed within a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fusedfog.comm.calls import current_call, lost, remember_addresses, vigil
from fusedfog.comm.group import Ranks
from fusedfog.comm.waiter import Task, await_task

R = TypeVar("R")


def guarded(view: Ranks, function: Callable[[], R], what: str = "") -> R:
    """What `function` returns, which waits for the ranks of `view` by the default group, or another one of torch's.

    gloo alone would wait for the whole timeout for a rank that has ended in the middle of a message, and several times that while
    a group is made. On GPUs `function` is simply called: threads have devices of their own, and NCCL has its watchdog.

    Args:
        what: what is done, for errors; the current call by default.

    Raises:
        ExchangeError: one of these ranks has ended; names it.
    """
    if len(view.ranks) == 1 or dist.get_backend() != "gloo":
        return function()
    remember_addresses(view)
    task = Task(function)
    origin = await_task(task, vigil(), tuple(view.ranks))
    if origin is None:
        return task.result()
    raise lost(view, f"rank {view.rank}: {what or current_call()}", origin)
