"""Where regions come from: a memfd that the peer opens through /proc, or memory of this process alone.

A memfd has no name, so nothing is left of it when both ends have ended, however they ended. Its pages are there from the
beginning, so that neither a container's limit on /dev/shm nor a full machine becomes a SIGBUS in mid-run.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fusedfog.comm.window.region import NONCE_AT, NONCE_BYTES, PAGE, Layout, Region

_NAME = "fusedfog-window"


class Sharing:
    """Whether windows try shared memory at all; tests set it to False, so that all edges go over TCP."""

    allowed: ClassVar[bool] = True


@dataclass(frozen=True)
class Invitation:
    """What a peer needs to open a region: `nonce` tells it from another file at that place, on another machine for instance."""

    machine: str
    pid: int
    descriptor: int
    nonce: str


def machine() -> str:
    """This machine until it starts again; "" where that cannot be told."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _available() -> float:
    """Bytes that this process may still take, as far as the system says."""
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as file:
        found += [1024.0 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        found.append(float(int(limit) - int(used)))
    return min(found)


def _check_room(layout: Layout) -> None:
    """Raise MemoryError where taking the pages would have the system kill a process, and not refuse."""
    room = _available()
    if layout.total_bytes > room:
        raise MemoryError(
            f"a window needs {layout.total_bytes / 2**20:.0f} MiB for one edge, and {room / 2**20:.0f} MiB are available here"
        )


def private(layout: Layout) -> Region:
    """A region for threads of this process.

    Raises:
        MemoryError: there is no room for it.
    """
    _check_room(layout)
    try:
        return Region(layout, mmap.mmap(-1, layout.total_bytes), None)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"a window needs {layout.total_bytes / 2**20:.0f} MiB for one edge: {error}") from error


def shared(layout: Layout) -> Region | None:
    """A region that the peer can open; None where the system has no such thing.

    Raises:
        MemoryError: there is no room for it.
    """
    if not (Sharing.allowed and hasattr(os, "memfd_create") and machine()):
        return None
    _check_room(layout)
    try:
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # Containers may forbid it.
        return None
    try:
        os.posix_fallocate(descriptor, 0, layout.total_bytes)
        os.pwrite(descriptor, secrets.token_bytes(NONCE_BYTES), NONCE_AT)
        # A peer that shrinks the file would end this process with SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Region(layout, _map(descriptor, layout), descriptor)
    except OSError as error:
        os.close(descriptor)
        raise MemoryError(
            f"a window needs {layout.total_bytes / 2**20:.0f} MiB of shared memory for one edge: {error}"
        ) from error


def invite(region: Region) -> Invitation | None:
    """How a peer opens a region; None for one that is private."""
    if region.descriptor is None:
        return None
    nonce = os.pread(region.descriptor, NONCE_BYTES, NONCE_AT).hex()
    return Invitation(machine(), os.getpid(), region.descriptor, nonce)


def accept(invitation: Invitation | None, layout: Layout) -> Region | None:
    """The peer's region, if this process can open it and it is the one that is meant."""
    if invitation is None or not Sharing.allowed or invitation.machine != machine():
        return None
    path = f"/proc/{invitation.pid}/fd/{invitation.descriptor}"
    try:
        # Opening something else than a memfd could wait, or do something.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        same = os.pread(descriptor, NONCE_BYTES, NONCE_AT).hex() == invitation.nonce
        if same and os.fstat(descriptor).st_size == layout.total_bytes:
            return Region(layout, _map(descriptor, layout), descriptor)
    except OSError:
        pass
    os.close(descriptor)
    return None


def watch_process(invitation: Invitation) -> int | None:
    """A descriptor that becomes readable when the process that made an invitation ends; None where there are none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(invitation.pid)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        # The number may have gone to another process before it was opened, but not afterwards.
        path = f"/proc/{invitation.pid}/fd/{invitation.descriptor}"
        if os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return descriptor
    os.close(descriptor)
    return None


def _map(descriptor: int, layout: Layout) -> mmap.mmap:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(descriptor, max(layout.total_bytes, PAGE), flags)
