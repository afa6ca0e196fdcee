"""A thread that follows NCCL transfers, which nobody else can: `Work.wait` blocks a stream and not the host."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from fusedfog.comm.calls import where
from fusedfog.comm.membership import Membership

log = logging.getLogger("fusedfog")

_LATE = 2.0
"""Seconds after which it is asked whether the sender of a message has left."""

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of the CUDA driver."""


class Watched(Protocol):
    """What the watchdog asks of its communicator."""

    @property
    def ended(self) -> Exception | None:
        """Why nothing can be exchanged any more."""

    @property
    def membership(self) -> Membership:
        """Who is still there."""

    @property
    def timeout(self) -> timedelta:
        """How long a wait may last."""

    @property
    def follows(self) -> bool:
        """Whether the thread that waits looks itself whether somebody has left."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    def failure(self, error: Exception, what: str) -> Exception:
        """The exception for an exchange that will never be complete."""

    def conclude(self, failure: Exception, first: Iterable[int]) -> Exception:
        """End for this failure."""


class Watchdog:
    """Logs transfers that are overdue, naming peers, step and bucket, before torch's own watchdog aborts.

    The thread polls completion events and touches no communicator; it ends with its communicator.
    """

    def __init__(self, communicator: Watched) -> None:
        self._watched: list[tuple[float, str, Sequence[tuple[dist.Work, object]]]] = []
        self._lock = threading.Lock()
        # Half the group's timeout: torch aborts the process at the whole of it.
        self._patience = communicator.timeout.total_seconds() / 2
        self._view = communicator.membership.view
        self._device = communicator.device
        threading.Thread(
            target=self._run, args=(weakref.ref(communicator),), daemon=True, name="fusedfog-watchdog"
        ).start()

    def watch(self, label: str, works: Sequence[tuple[dist.Work, object]]) -> None:
        """Follow a transfer's works, each with whom it is with, until they complete."""
        if works:
            with self._lock:
                self._watched.append((time.monotonic() + self._patience, label, tuple(works)))

    def _run(self, communicator: weakref.ref[Watched]) -> None:
        self._settle_in()
        while (living := communicator()) is not None:
            self._look_for_notes(living)
            del living
            time.sleep(min(1.0, self._patience / 4))
            for label, peers in self._overdue():
                who = where(self._view)
                log.error(
                    "rank %d: %s: %s: still waiting after %.0f s. %s",
                    self._view.rank,
                    label,
                    peers,
                    self._patience,
                    who,
                )

    def _settle_in(self) -> None:
        """Make this thread one that disturbs nobody.

        Its event queries belong to the communicator's device: on device 0, where a thread begins, every rank would have a
        context of half a gigabyte. And queries of one thread end the CUDA graph capture of another, unless that captures in
        its own thread's mode or this one has that mode, as torch's own watchdog has.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            leave_captures_alone()

    def _overdue(self) -> list[tuple[str, object]]:
        now = time.monotonic()
        # Not under the lock: the thread that starts transfers would wait for as many queries as there are transfers.
        with self._lock:
            watched, self._watched = self._watched, []
        pending = [entry for entry in watched if not all(work.is_completed() for work, _ in entry[2])]
        with self._lock:
            self._watched[:0] = [entry for entry in pending if entry[0] >= now]
        return [(label, works[0][1]) for at, label, works in pending if at < now]

    def _look_for_notes(self, communicator: Watched) -> None:
        """End the communicator if somebody has left; the store is asked only while a transfer takes seconds."""
        if communicator.follows:
            return
        with self._lock:
            started = time.monotonic() - _LATE + self._patience
            late = [f"{label}: {works[0][1]}" for at, label, works in self._watched if at < started]
        if late and communicator.ended is None and communicator.membership.left():
            communicator.conclude(communicator.failure(RuntimeError("the message has not come"), late[0]), ())
            log.error("%s", communicator.ended)


def leave_captures_alone() -> None:
    """Put this thread into the driver's thread-local capture mode; torch has no function for it."""
    with contextlib.suppress(OSError, AttributeError):
        mode = ctypes.c_int(_THREAD_LOCAL)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
