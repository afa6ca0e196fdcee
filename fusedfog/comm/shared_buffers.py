"""Buffers that ranks of one host share, and local sockets over which they tell each other what is to be found in them.

Each rank has a buffer of each key, which all others map. What travels is a record of 13 bytes that says how far its owner has
come with it ("what you wait for is written", "I have read yours"). So a record is at once the counter, what wakes the one who
waits and, by the system call that it takes, the memory barrier; and a connection that ends is a rank that has ended. No core
spins, and nothing outlives the processes.

An `Operation` on a buffer is a generator that says what it waits for. One thread reads records and moves operations on, in
any order that records come in: callers go on with what they do, and torch's kernels leave the GIL to them.
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from fusedfog.comm import shared_memory

_RECORD = struct.Struct("<BIQ")
_DESCRIPTOR = struct.Struct("i")


class Kind(enum.IntEnum):
    """What a record says of its sender's buffer, in the operation of a number."""

    OPEN = 0
    """Here it is; the number is that of its bytes."""
    READY = 1
    """What others need of it is written."""
    SUMMED = 2
    """This rank's shard of it holds the sum."""
    READ = 3
    """This rank needs the others' no more."""
    CLOSE = 4
    """It is gone."""


Steps = Generator[tuple[Kind, Sequence[int]], None, None]
"""What an operation does; it yields which records, of which ranks, it needs to go on."""


class Buffer:
    """This rank's buffer of a key; `number` counts the operations on it."""

    def __init__(self, shared: SharedBuffers, key: int) -> None:
        self.shared, self.key, self.number = shared, key, 0
        self._flat = torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, shared.drop, key).atexit = False

    def room(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Its first elements, [numel]; it grows where it is too short, and then holds zeros. Not while an operation is under way.

        Raises:
            MemoryError: the system has not that much.
        """
        nbytes = max(1, numel * dtype.itemsize)
        if nbytes > self._flat.numel():
            try:
                self._flat, descriptor = shared_memory.allocate(nbytes)
            except OSError as error:
                raise MemoryError(
                    f"rank {self.shared.rank}: no {nbytes / 2**20:.1f} MB more of memory to share with the other ranks: {error}"
                ) from error
            try:
                self.shared.open(self.key, nbytes, descriptor)
            finally:
                os.close(descriptor)
        return as_elements(self._flat, numel, dtype)


def as_elements(flat: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """The first elements of a buffer, [numel]."""
    return flat[: numel * dtype.itemsize].view(dtype)


class Operation:
    """An operation under way, and what it waits for.

    Attributes:
        failure: why it will never end.
    """

    def __init__(self, buffer: Buffer, steps: Steps) -> None:
        self.buffer, self.steps, self.number = buffer, steps, buffer.number
        self.failure: Exception | None = None
        self.kind, self.ranks = next(steps)
        self.over = threading.Event()

    def fail(self, error: Exception) -> None:
        """It will never end."""
        self.failure = error
        self.steps.close()
        self.over.set()


class SharedBuffers:
    """The buffers of some ranks, as one of them has them.

    Args:
        rank: this one; sockets: the connection to each other one.
        timeout: seconds until a rank that takes no record has failed.

    Attributes:
        others: the other ranks, the next one first: not all of them read the same memory at once.
    """

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket], timeout: float) -> None:
        self.rank, self.size = rank, len(sockets) + 1
        self.others = [(rank + distance) % self.size for distance in range(1, self.size)]
        self._sockets, self._timeout = dict(sockets), timeout
        self._bell, self._rope = socket.socketpair()
        for end in (*self._sockets.values(), self._bell, self._rope):
            end.setblocking(False)
        self._beside = socket.CMSG_SPACE(_DESCRIPTOR.size)
        self._keys = 0
        self._peers: dict[tuple[int, int], Tensor] = {}
        self._told: dict[tuple[int, int, int], int] = {}
        self._gone: set[int] = set()
        self._new: deque[Operation] = deque()
        self._operations: list[Operation] = []
        self._dropped: deque[int] = deque()
        self._closed_by: dict[int, set[int]] = {}
        self._closed = False
        _all.add(self)
        self._thread = threading.Thread(target=self._run, daemon=True, name="fusedfog-shared")
        self._thread.start()

    # -- for callers -------------------------------------------------------------------------------------------------

    def buffer(self) -> Buffer:
        """A buffer of the next key, without memory yet; ranks make them in the same order."""
        self._keys += 1
        return Buffer(self, self._keys - 1)

    def open(self, key: int, nbytes: int, descriptor: int) -> None:
        """Tell the others where the buffer of this key is."""
        self._tell(Kind.OPEN, key, nbytes, descriptor)

    def start(self, buffer: Buffer, steps: Steps) -> Operation:
        """Tell the others that what is in the buffer is written, and go on with these steps in the thread."""
        buffer.number += 1
        operation = Operation(buffer, steps)
        self.tell(Kind.READY, buffer)
        self._new.append(operation)
        if self._closed:
            operation.fail(ConnectionError("the connection was closed"))
        # Another rank's record wakes the thread too, and most operations begin before the last rank has written.
        elif self._missing(operation) <= self._gone:
            self._ring()
        return operation

    def missing(self, operation: Operation) -> list[int]:
        """The ranks that an operation waits for."""
        return sorted(self._missing(operation))

    def give_up(self) -> None:
        """Exchange nothing more: operations under way fail here, and on ranks that need this one."""
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def drop(self, key: int) -> None:
        """The buffer of this key is no longer used; from any thread."""
        if not self._closed:
            self._dropped.append(key)
            self._ring()

    def close(self) -> None:
        """The same as `give_up`, and end the thread."""
        if not self._closed:
            self._closed = True
            self.give_up()
            self._ring()
            # Garbage that closes a communicator may be collected in any thread.
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def forget(self) -> None:
        """Let go of the connections: at the end of the thread, and in a forked process, whose parent's they are."""
        self._closed = True
        for end in (*self._sockets.values(), self._bell, self._rope):
            end.close()

    # -- for steps, in the thread -----------------------------------------------------------------------------

    def tell(self, kind: Kind, buffer: Buffer) -> None:
        """Tell all other ranks how far this one has come."""
        self._tell(kind, buffer.key, buffer.number)

    def peer(self, rank: int, buffer: Buffer, numel: int, dtype: torch.dtype) -> Tensor:
        """The first elements of another rank's buffer of the same key, once that rank has said that it is ready."""
        return as_elements(self._peers[rank, buffer.key], numel, dtype)

    def _tell(self, kind: Kind, key: int, number: int, descriptor: int | None = None) -> None:
        record = _RECORD.pack(kind, key, number)
        for rank, connection in self._sockets.items():
            if rank not in self._gone and not self._closed:
                self._send(connection, record, descriptor)

    def _send(self, connection: socket.socket, record: bytes, descriptor: int | None) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                if descriptor is None:
                    connection.send(record)
                else:
                    socket.send_fds(connection, [record], [descriptor])
                return
            except BlockingIOError:
                # Hundreds of records lie unread: that process is stopped.
                if not _writable(connection, deadline):
                    self.give_up()
                    return
            except OSError:
                return  # It has ended; whoever needs it finds out by its end of the connection.

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # Full of rings that have not been heard yet, or closed.
            self._rope.send(b"!")

    def _missing(self, operation: Operation) -> set[int]:
        key, kind, number = operation.buffer.key, operation.kind, operation.number
        return {rank for rank in operation.ranks if self._told.get((key, kind, rank), 0) < number}

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self.give_up()
            self._closed = True
            for operation in (*self._operations, *self._new):
                if not operation.over.is_set():
                    operation.fail(ConnectionError("the connection was closed"))
            self.forget()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as waiting, torch.no_grad():
            waiting.register(self._bell, selectors.EVENT_READ, None)
            for rank, connection in self._sockets.items():
                waiting.register(connection, selectors.EVENT_READ, rank)
            while not self._closed:
                for key, _ in waiting.select():
                    if key.data is None:
                        self._bell.recv(4096)
                    elif not self._hear(key.data):
                        waiting.unregister(key.fileobj)
                        self._gone.add(key.data)
                self._move()

    def _hear(self, rank: int) -> bool:
        """Read a record that a rank has sent; whether there will be more."""
        try:
            record, passed, _, _ = self._sockets[rank].recvmsg(_RECORD.size, self._beside)
        except OSError:
            return False
        if len(record) < _RECORD.size:
            return False
        kind, key, number = _RECORD.unpack(record)
        if kind == Kind.OPEN:
            return self._attach(rank, key, number, [_DESCRIPTOR.unpack(data)[0] for _, _, data in passed])
        if kind == Kind.CLOSE:
            self._close_buffer(key, rank)
        else:
            self._told[key, kind, rank] = number
        return True

    def _attach(self, rank: int, key: int, nbytes: int, descriptors: Sequence[int]) -> bool:
        try:
            self._peers[rank, key] = shared_memory.attach(descriptors[0], nbytes)
        except (OSError, IndexError):  # Too many mappings, or descriptors: without it nobody can go on.
            self.give_up()
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _close_buffer(self, key: int, rank: int) -> None:
        """Forget a key once no rank uses it: one that needs it no more may be ahead of this one."""
        ranks = self._closed_by.setdefault(key, set())
        ranks.add(rank)
        if len(ranks) == self.size:
            del self._closed_by[key]
            for other in self.others:
                self._peers.pop((other, key), None)
                for kind in (Kind.READY, Kind.SUMMED, Kind.READ):
                    self._told.pop((key, kind, other), None)

    def _move(self) -> None:
        """Take every operation as far as it goes."""
        while self._dropped:
            key = self._dropped.popleft()
            self._tell(Kind.CLOSE, key, 0)
            self._close_buffer(key, self.rank)
        while self._new:
            self._operations.append(self._new.popleft())
        self._operations = [operation for operation in self._operations if self._under_way(operation)]

    def _under_way(self, operation: Operation) -> bool:
        try:
            while not (missing := self._missing(operation)):
                operation.kind, operation.ranks = next(operation.steps)
        except StopIteration:
            operation.over.set()
            return False
        except Exception as error:  # Whatever it is, it is for the one who waits.
            operation.fail(error)
            return False
        if missing & self._gone:
            operation.ranks = sorted(missing & self._gone)
            operation.fail(ConnectionError("the connection was closed"))
            return False
        return True


def _writable(connection: socket.socket, deadline: float) -> bool:
    with selectors.DefaultSelector() as waiting:
        waiting.register(connection, selectors.EVENT_WRITE)
        return bool(waiting.select(max(0.0, deadline - time.monotonic())))


_all: weakref.WeakSet[SharedBuffers] = weakref.WeakSet()


def _forget() -> None:
    for shared in list(_all):
        shared.forget()
    _all.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
