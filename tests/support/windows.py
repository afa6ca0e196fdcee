"""What tests of windows have in common: edges that are forced over TCP, and a wait that all ranks end together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch.distributed as dist

from fusedfog.comm.window.memory import Sharing
from fusedfog.comm.window.region import Region
from fusedfog.comm.window.staging import OnDevice
from support import fake_cuda

TRANSPORTS = ["memory", "tcp"]


@contextlib.contextmanager
def transport(name: str) -> Iterator[None]:
    """Inside, windows of this rank use shared memory where they can, or TCP for all of their edges."""
    before, Sharing.allowed = Sharing.allowed, name == "memory"
    try:
        yield
    finally:
        Sharing.allowed = before


class Late:
    """`Copies` of a GPU that makes them when it is told to, or waited for."""

    def __init__(self) -> None:
        self._queued: list[Callable[[], object]] = []

    def start(self, copy: Callable[[], object]) -> None:
        """See `Copies`."""
        self._queued.append(copy)

    def over(self) -> bool:
        """See `Copies`."""
        return not self._queued

    def wait(self) -> None:
        """See `Copies`; makes them."""
        while self._queued:
            self._queued.pop(0)()


class Slow(Late):
    """Those of a GPU that needs some milliseconds for each."""

    seconds = 0.005

    def __init__(self) -> None:
        super().__init__()
        self._until = 0.0
        self._one_at_a_time = threading.Lock()

    def start(self, copy: Callable[[], object]) -> None:
        """See `Copies`."""
        super().start(copy)
        self._until = time.monotonic() + self.seconds

    def over(self) -> bool:
        """See `Copies`."""
        with self._one_at_a_time:
            if time.monotonic() >= self._until:
                super().wait()
            return super().over()

    def wait(self) -> None:
        """See `Copies`."""
        time.sleep(max(0.0, self._until - time.monotonic()))
        with self._one_at_a_time:
            super().wait()


@contextlib.contextmanager
def slow_gpu() -> Iterator[fake_cuda.Gpu]:
    """Inside, tensors are a GPU's, whose copies into slots come late."""
    with fake_cuda.pretend() as gpu, mock.patch.object(OnDevice, "outgoing", lambda self: Slow()):
        yield gpu


def held_by_process() -> tuple[int, int]:
    """Descriptors and threads (of Python) of this process; the least that it has of each in some milliseconds.

    A rank that waits for this one, as it does where this one is late, asks it where it is, over a connection that lasts a moment.
    """
    seen = []
    for _ in range(5):
        seen.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
        time.sleep(0.003)
    return min(descriptors for descriptors, _ in seen), min(threads for _, threads in seen)


def settle(window: object) -> None:
    """All that was sent has arrived, everywhere."""
    window.fence(20.0)  # type: ignore[attr-defined]
    dist.barrier()


def die_inside_lock() -> None:
    """From now on this process kills itself the next time that it holds the lock of memory that it shares."""
    original = Region.lock

    @contextlib.contextmanager
    def lock(region: Region) -> Iterator[None]:
        with original(region):
            if region.descriptor is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            yield

    Region.lock = lock  # type: ignore[method-assign]
