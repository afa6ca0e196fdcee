"""A thread that follows NCCL messages, which nobody else can: `Work.wait` blocks a stream and not the host."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from fusedfog.exchange import Link

log = logging.getLogger("fusedfog")

_LATE = 2.0
"""Seconds after which it is asked whether the sender of a message has left."""

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of the CUDA driver."""


class Watchdog:
    """Logs messages that are overdue, naming peers, step and bucket, before torch's own watchdog aborts.

    The thread polls completion events and touches no communicator; it ends with its link.
    """

    def __init__(self, link: Link) -> None:
        self._watched: list[tuple[float, str, Sequence[tuple[dist.Work, object]]]] = []
        self._lock = threading.Lock()
        # Half the group's timeout: torch aborts the process at the whole of it.
        self._patience = link.timeout.total_seconds() / 2
        self._rank = link.world.rank
        self._device = link.device
        threading.Thread(target=self._run, args=(weakref.ref(link),), daemon=True, name="fusedfog-watchdog").start()

    def watch(self, label: str, works: Sequence[tuple[dist.Work, object]]) -> None:
        """Follow a message's works, each with whom it is with, until they complete."""
        if works:
            with self._lock:
                self._watched.append((time.monotonic() + self._patience, label, tuple(works)))

    def _run(self, link: weakref.ref[Link]) -> None:
        self._settle_in()
        while (living := link()) is not None:
            self._look_for_notes(living)
            del living
            time.sleep(min(1.0, self._patience / 4))
            for label, peers in self._overdue():
                log.error("rank %d: %s: %s: still waiting after %.0f s", self._rank, label, peers, self._patience)

    def _settle_in(self) -> None:
        """Make this thread one that disturbs nobody.

        Its event queries belong to the link's device: on device 0, where a thread begins, every rank would have a context of
        half a gigabyte. And queries of one thread end the CUDA graph capture of another, unless that captures in its own
        thread's mode or this one has that mode, as torch's own watchdog has.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            leave_captures_alone()

    def _overdue(self) -> list[tuple[str, object]]:
        now = time.monotonic()
        # Not under the lock: the thread that starts messages would wait for as many queries as there are messages.
        with self._lock:
            watched, self._watched = self._watched, []
        pending = [entry for entry in watched if not all(work.is_completed() for work, _ in entry[2])]
        with self._lock:
            self._watched[:0] = [entry for entry in pending if entry[0] >= now]
        return [(label, works[0][1]) for at, label, works in pending if at < now]

    def _look_for_notes(self, link: Link) -> None:
        """End the link if somebody has left; the store is asked only while a message takes seconds."""
        with self._lock:
            started = time.monotonic() - _LATE + self._patience
            late = [f"{label}: {works[0][1]}" for at, label, works in self._watched if at < started]
        if late and link.ended is None and link._read_notes():
            link.give_up(link.failure(RuntimeError("the message has not come"), late[0]))
            log.error("%s", link.ended)


def leave_captures_alone() -> None:
    """Put this thread into the driver's thread-local capture mode; torch has no function for it."""
    with contextlib.suppress(OSError, AttributeError):
        mode = ctypes.c_int(_THREAD_LOCAL)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
