"""The memory of one edge: a header page and a few slots of one tensor each, which sender and receiver hand to each other.

A slot is EMPTY, FULL, WRITING (the sender's) or READING (the receiver's). The states of all slots are one 8-byte word, which
changes only under a lock and by one store: a process that is killed at any moment leaves a word that was meant. What lies in
a slot, values and note, belongs to its owner alone, so it is copied without the lock.

The lock is `lockf`, which the kernel releases when its holder dies. (`flock` would stay with a forked DataLoader worker of a
killed rank.) It drops when its process closes *any* descriptor of the file, so a process opens each region once. The kernel's
lock and unlock also order the copies before and after them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

EMPTY, FULL, WRITING, READING = range(4)

PAGE = 4096
NONCE_AT, NONCE_BYTES = 16, 16
_NOTES_AT, _NOTE_ROOM = 256, 64
_NOTE = struct.Struct("<qqqqdq")

PATIENCE = 0.01
"""Seconds to wait for the lock. Its holder needs microseconds, and longer only where the machine runs something else, or the
process was stopped (SIGSTOP) inside it."""


class Busy(Exception):
    """The lock cannot be had: its holder has been stopped in the middle, or the machine is very busy."""


@dataclass(frozen=True)
class Note:
    """What is known of the message in a slot.

    Attributes:
        sequence: its number among the messages of its edge; those that it replaced or took in have lower ones.
        kind: how it is to be combined with what the inbox holds; see `edge.Kind`.
        puts: how many puts its sender had made on this edge by then.
        stamp: a number of the sender's choice.
        mass: the scalar that travels with the values.
        answered: the last `get` that had been answered by then.
    """

    sequence: int
    kind: int
    puts: int
    stamp: int
    mass: float
    answered: int

    def values(self) -> tuple[int, int, int, int, float, int]:
        """All of them, in order."""
        return self.sequence, self.kind, self.puts, self.stamp, self.mass, self.answered


assert len(fields(Note)) == 6 and _NOTE.size <= _NOTE_ROOM


@dataclass(frozen=True)
class Layout:
    """How a region is cut: `slots` slots of `count` elements of `dtype`, each at the beginning of a page."""

    dtype: torch.dtype
    count: int
    slots: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the values of one message."""
        return self.count * self.dtype.itemsize

    def slot_at(self, slot: int) -> int:
        """Where a slot begins."""
        return PAGE + slot * -(-self.slot_bytes // PAGE) * PAGE

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole region."""
        return self.slot_at(self.slots)


class Region:
    """One end's view of an edge's memory.

    Args:
        layout: the same at both ends.
        memory: mapped, `layout.total_bytes` long.
        descriptor: of the file that is locked; None for memory that only threads of this process use. The region closes it.

    Attributes:
        before_close: called once, before the memory is let go.
    """

    def __init__(self, layout: Layout, memory: mmap.mmap, descriptor: int | None) -> None:
        self.layout, self.descriptor = layout, descriptor
        self.before_close: Callable[[], None] | None = None
        self._memory = memory
        self._words = memoryview(memory).cast("q")
        self._threads = threading.Lock()
        self._patience = PATIENCE
        self._slots = [
            torch.frombuffer(memory, dtype=layout.dtype, count=layout.count, offset=layout.slot_at(slot))
            if layout.count
            else torch.empty(0, dtype=layout.dtype)
            for slot in range(layout.slots)
        ]

    def values(self, slot: int) -> Tensor:
        """The slot's tensor, [count]; for its owner."""
        return self._slots[slot]

    def bytes_of(self, slot: int) -> memoryview:
        """The same as bytes."""
        begin = self.layout.slot_at(slot)
        return memoryview(self._memory)[begin : begin + self.layout.slot_bytes]

    @property
    def extent(self) -> tuple[int, int]:
        """Address and bytes of all slots together."""
        if not self.layout.count:
            return 0, 0
        return self._slots[0].data_ptr(), self.layout.total_bytes - PAGE

    def note(self, slot: int) -> Note:
        """The slot's note; for its owner, or with the lock."""
        return Note(*_NOTE.unpack_from(self._memory, _NOTES_AT + slot * _NOTE_ROOM))

    def write_note(self, slot: int, note: Note) -> None:
        """For the slot's owner."""
        _NOTE.pack_into(self._memory, _NOTES_AT + slot * _NOTE_ROOM, *note.values())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, states may be read and changed.

        Raises:
            Busy: another process holds the lock for too long. The next attempts do not wait at all, until one succeeds.
        """
        with self._threads:
            if self.descriptor is None:
                yield
                return
            self._lock_file(self.descriptor)
            try:
                yield
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1)

    def _lock_file(self, descriptor: int) -> None:
        deadline, pause = time.monotonic() + self._patience, 1e-5
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except OSError:
                if time.monotonic() >= deadline:
                    self._patience = 0.0
                    raise Busy from None
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
            else:
                self._patience = PATIENCE
                return

    def slots_in(self, state: int) -> list[int]:
        """The slots in this state, FULL ones from the oldest to the newest message; with the lock."""
        word = self._words[0]
        found = [slot for slot in range(self.layout.slots) if word >> 2 * slot & 3 == state]
        return sorted(found, key=lambda slot: self.note(slot).sequence) if state == FULL and len(found) > 1 else found

    def change(self, states: dict[int, int]) -> None:
        """Give slots new states, all by one store; with the lock."""
        word = self._words[0]
        for slot, state in states.items():
            word = word & ~(3 << 2 * slot) | state << 2 * slot
        self._words[0] = word

    def close(self) -> None:
        """Let go of memory and descriptor. The memory stays while anybody holds one of its tensors."""
        before, self.before_close = self.before_close, None
        if before is not None:
            before()
        self._slots = []
        self._words.release()
        with contextlib.suppress(BufferError):
            self._memory.close()
        self.close_descriptor()

    def close_descriptor(self) -> None:
        """Close the file alone."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
