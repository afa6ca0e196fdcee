"""What tests of windows have in common: edges that are forced over TCP, and a wait that all ranks end together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import torch.distributed as dist

from fusedfog.comm.window.memory import Sharing
from fusedfog.comm.window.region import Region

TRANSPORTS = ["memory", "tcp"]


@contextlib.contextmanager
def transport(name: str) -> Iterator[None]:
    """Inside, windows of this rank use shared memory where they can, or TCP for all of their edges."""
    before, Sharing.allowed = Sharing.allowed, name == "memory"
    try:
        yield
    finally:
        Sharing.allowed = before


def held_by_process() -> tuple[int, int]:
    """Descriptors and threads (of Python) of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


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
