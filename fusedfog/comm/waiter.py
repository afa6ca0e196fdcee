"""Threads that wait inside gloo, so that no caller has to.

A gloo work never says that it is complete (`is_completed` is false until it has been waited for); a wait that times out closes
all connections of its group; and a message whose peer dies in the middle of it is never completed and never fails. So a thread
waits, without a limit, and callers wait for an event, with limits of their own. A message that came during backward is then
found complete without a wait. What can never complete keeps its thread until the process ends, and nobody waits for that.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch

from fusedfog.comm.failures import FIRST_LOOK, LOOK_EVERY, Origin, Vigil

R = TypeVar("R")

_A_MOMENT = 0.1
"""Seconds in which a task may still end by itself, when a rank that it waits for is found to have ended."""

_beginning = threading.Lock()


class Waited(Protocol):
    """What a waiter is given."""

    begun: bool

    def await_works(self) -> None:
        """Return when all is complete, or has failed."""


class Waiter:
    """One thread that waits for what it is given, in that order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Waited | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, waited: Waited) -> None:
        """Wait for this, too."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._queue,), daemon=True, name="fusedfog-waiter")
            self._thread.start()
        self._queue.put(waited)

    def stop(self, patience: float) -> bool:
        """End the thread, which gets so many seconds for what it still waits for; whether it has ended."""
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()


def _run(queue: SimpleQueue[Waited | None]) -> None:
    while (waited := queue.get()) is not None:
        wait_here(waited)
        del waited  # Or it, and its communicator, would live until the next one comes.


def wait_here(waited: Waited) -> None:
    """Wait in this thread, unless another one has begun to: of two that wait for a gloo work, one never returns."""
    with _beginning:
        if waited.begun:
            return
        waited.begun = True
    waited.await_works()


def leak(group: object) -> None:
    """Never free a process group, in which an operation waits for ever.

    Its destructor would wait for that one, and hold Python's lock meanwhile: now, or when the process ends.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class Task(Generic[R]):
    """A function that may block for ever, carried out by a thread of its own.

    Attributes:
        over: set when it has returned or raised.
    """

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self.over = threading.Event()
        self._error: BaseException | None = None
        self._result: R
        self._grad = torch.is_grad_enabled()
        threading.Thread(target=self._run, daemon=True, name="fusedfog-task").start()

    def _run(self) -> None:
        try:
            with torch.set_grad_enabled(self._grad):
                self._result = self._function()
        except BaseException as error:
            self._error = error
        self.over.set()

    def result(self) -> R:
        """What it returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


def await_task(task: Task[R], vigil: Vigil | None, ranks: tuple[int, ...]) -> Origin | None:
    """Return when a task is over, or with the reason why it never will be: a rank of these global ones has ended."""
    if task.over.wait(FIRST_LOOK):
        return None
    while True:
        origin = vigil.look(ranks, None) if vigil is not None else None
        if origin is not None and not task.over.wait(_A_MOMENT):
            return origin
        if task.over.wait(LOOK_EVERY):
            return None
