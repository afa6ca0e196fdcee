"""Memory that processes of one host share, as flat tensors: anonymous files that live as long as somebody maps them.

Below `shared_buffers`, which passes their descriptors on. Nothing has a name in a file system, so nothing is left over when a
process is killed, and no container's limit on /dev/shm ends a process by SIGBUS. No descriptor is kept open.

A forked process (a DataLoader's worker) finds zeros of its own in their place: it neither writes to what its parent shares, nor
keeps the memory alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref

import torch
from torch import Tensor

SUPPORTED = sys.platform == "linux" and hasattr(os, "memfd_create")
"""Whether this system has such memory; whether this process may make some, only trying tells."""

_FAILED = ctypes.c_void_p(-1).value
_FIXED = 0x10  # MAP_FIXED of Linux

_mapped: dict[int, int] = {}
"""Lengths of this process' mappings, by address."""


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def allocate(nbytes: int) -> tuple[Tensor, int]:
    """New memory of zeros, uint8 [nbytes], and a descriptor that others `attach` it by; the caller closes it.

    Raises:
        OSError: the system refuses, or has not that much memory. All pages are taken now: one that is missing later would end
            the process by a signal.
    """
    import fcntl  # Not on every system.

    descriptor = os.memfd_create("fusedfog", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        # Whoever has the descriptor could otherwise shorten the file under those who map it.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return attach(descriptor, nbytes), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def attach(descriptor: int, nbytes: int) -> Tensor:
    """The first bytes of memory that another process has allocated, uint8 [nbytes]; unmapped with the tensor.

    Raises:
        OSError: there is less of it, or the system refuses.
    """
    size = os.fstat(descriptor).st_size
    if size < nbytes:
        raise OSError(f"{nbytes} bytes of shared memory were announced, and there are {size}")
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc().mmap(None, nbytes, access, mmap.MAP_SHARED | mmap.MAP_POPULATE, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _mapped[address] = nbytes
    # Python's own mmap keeps a descriptor open for each mapping (until 3.13).
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    # Tensors may be in use until the very end of the interpreter.
    weakref.finalize(memory, _unmap, address, nbytes).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def _unmap(address: int, nbytes: int) -> None:
    del _mapped[address]
    _libc().munmap(address, nbytes)


def _replace_in_child() -> None:
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
    with contextlib.suppress(OSError):
        libc = _libc()
        for address, nbytes in _mapped.items():
            libc.mmap(address, nbytes, access, flags, -1, 0)


if SUPPORTED:
    os.register_at_fork(after_in_child=_replace_in_child)
