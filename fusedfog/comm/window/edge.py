"""Both ends of an edge: a sender that never waits for its receiver, and an inbox that never shows half a message.

Sender: takes an EMPTY slot. If there is none, a put takes the oldest FULL one, which it replaces anyway, and what is to be
added takes back the newest FULL one and goes into it. Three slots suffice: the receiver holds two at most.

Inbox: takes the *oldest* FULL slot only, one after another; one that took all of them would leave none to the sender. A put
becomes the front, the inbox' value without a copy, and the old front becomes EMPTY. What is to be added goes into the
front, or becomes it where that was cleared.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor

from fusedfog.comm.window.region import EMPTY, FULL, READING, WRITING, Busy, Note, Region
from fusedfog.comm.window.staging import AtOnce, Copies

SLOTS = 3


class Kind(IntEnum):
    """How a message is combined with what was there.

    PUT replaces values and mass; ADD adds both; MEAN adds the masses, and takes the mean of the values by mass.
    """

    PUT = 0
    ADD = 1
    MEAN = 2


@dataclass(frozen=True)
class Message:
    """Values times a weight, and what goes with them; see `Note`.

    Values on a GPU are multiplied and added up there, on the current stream; slots are in the CPU's memory.
    """

    kind: Kind
    values: Tensor
    weight: float
    mass: float
    stamp: int = 0
    answered: int = 0

    def fill(self, target: Tensor) -> None:
        """Write the values into a slot."""
        if self.weight == 1:
            target.copy_(self.values, non_blocking=True)
        elif self.values.device == target.device:
            torch.mul(self.values, factor(self.weight, target), out=target)
        else:
            target.copy_(self.values * factor(self.weight, target), non_blocking=True)

    def joined(self, mass: float) -> float:
        """The mass of this message and one of that mass that nobody has read."""
        return self.mass if self.kind is Kind.PUT else mass + self.mass

    def join(self, target: Tensor, mass: float) -> None:
        """Combine the values with those of a message, of that mass, that nobody has read."""
        if self.kind is Kind.PUT:
            self.fill(target)
            return
        total = self.joined(mass)
        here = target.to(self.values.device, non_blocking=True)  # Itself, where that is its device.
        if self.kind is Kind.ADD:
            here.add_(self.values, alpha=factor(self.weight, here))
        elif total:
            here.lerp_(self.values, self.mass / total)
        if here is not target:
            target.copy_(here, non_blocking=True)


def factor(weight: float, like: Tensor) -> float:
    """The weight as torch wants it: integer tensors take integers only."""
    return weight if like.is_floating_point() else int(weight)


class Sender:
    """The sending end; any thread may use it.

    A message that cannot be published, since the receiver was stopped while it held the lock or the own GPU has not copied
    it yet, waits here, takes in or gives way to those that follow, and is published by the next one or by `flush`.

    Attributes:
        sent: how many messages were given to it.
        copies: of values into slots.
    """

    def __init__(self, region: Region, copies: Copies | None = None) -> None:
        self.region, self.copies = region, copies if copies is not None else AtOnce()
        self._mutex = threading.Lock()
        self._sequence = self._puts = self._answered = 0
        self.sent = 0
        # What waits: its slot, or None with values of its own, and its note.
        self._waiting: tuple[int | None, Tensor, Note] | None = None

    @property
    def waits(self) -> bool:
        """Whether a message waits to be published."""
        return self._waiting is not None

    def send(self, message: Message) -> bool:
        """Send; False if the message waits. Returns within `region.PATIENCE` seconds and the time of a copy of the CPU, or of
        what the own GPU still has to do for the message before this one."""
        self.copies.wait()  # Without the mutex: the window's thread, which calls `flush`, waits for nobody.
        with self._mutex:
            self.sent += 1
            self._puts += message.kind is Kind.PUT
            self._answered = max(self._answered, message.answered)
            if not self._publish_waiting():
                assert self._waiting is not None
                slot, values, note = self._waiting
                self.copies.start(partial(message.join, values, note.mass))
                self._waiting = slot, values, self._note(message, message.joined(note.mass), note)
                return False
            try:
                slot, old = self._claim(message.kind)
            except Busy:
                values = torch.empty_like(self.region.values(0))
                self.copies.start(partial(message.fill, values))
                self._waiting = None, values, self._note(message, message.mass, None)
                return False
            self._write(slot, old, message)
            return self._publish_waiting()

    def flush(self) -> bool:
        """Publish what waits, if it can be; whether nothing waits any more."""
        with self._mutex:
            return self._publish_waiting()

    def _note(self, message: Message, mass: float, old: Note | None) -> Note:
        kind = message.kind if old is None or message.kind is Kind.PUT else old.kind
        return Note(0, kind, self._puts, message.stamp, mass, self._answered)

    def _claim(self, kind: Kind) -> tuple[int, Note | None]:
        """A slot to write into, and the note of the message in it if the new one is to join that."""
        with self.region.lock():
            empty, full = self.region.slots_in(EMPTY), self.region.slots_in(FULL)
            slot = empty[0] if empty else full[0] if kind is Kind.PUT else full[-1]
            self.region.change({slot: WRITING})
            return slot, None if empty or kind is Kind.PUT else self.region.note(slot)

    def _write(self, slot: int, old: Note | None, message: Message) -> None:
        values = self.region.values(slot)
        if old is None:
            self.copies.start(partial(message.fill, values))
            mass = message.mass
        else:
            self.copies.start(partial(message.join, values, old.mass))
            mass = message.joined(old.mass)
        self._waiting = slot, values, self._note(message, mass, old)

    def _publish_waiting(self) -> bool:
        """Make what waits FULL; a put makes others EMPTY, which it replaces."""
        if self._waiting is None:
            return True
        if not self.copies.over():
            return False
        slot, values, note = self._waiting
        try:
            if slot is None:
                message = Message(Kind(note.kind), values, 1.0, note.mass, note.stamp)
                slot, old = self._claim(message.kind)
                self._write(slot, old, message)
                return self._publish_waiting()
            # Numbered last: what waited must come before the message that found it waiting.
            self._sequence += 1
            self.region.write_note(slot, replace(note, sequence=self._sequence))
            with self.region.lock():
                replaced = self.region.slots_in(FULL) if note.kind == Kind.PUT else []
                self.region.change({**dict.fromkeys(replaced, EMPTY), slot: FULL})
        except Busy:
            return False
        self._waiting = None
        return True


class Inbox:
    """The receiving end, for one thread at a time.

    Attributes:
        front: what the inbox holds, [count]; its elements count as zeros while `blank`. Valid until the next `take`.
        mass: the scalar that goes with it.
        stamp: of the newest message taken.
        seen: how many puts had been made on this edge by the newest message taken.
        copies: of values out of slots.
    """

    def __init__(self, region: Region, values: Tensor | None, mass: float, copies: Copies | None = None) -> None:
        """Begin with these values; with zeros if None."""
        self.copies = copies if copies is not None else AtOnce()
        self.region, self.mass, self.blank = region, mass, values is None
        self.stamp = self.seen = 0
        self._front = 0
        self._to_release: list[int] = []
        if values is not None:
            region.values(0).copy_(values)
        region.change({0: READING})

    @property
    def front(self) -> Tensor:
        """See the class."""
        return self.region.values(self._front)

    def take(self) -> bool:
        """Take in what has arrived; whether there was anything. Keeps what it has while the lock cannot be had."""
        self.copies.wait()  # The front becomes the sender's, or changes.
        found = False
        # More may arrive meanwhile; it is for the next time.
        for _ in range(self.region.layout.slots):
            if not self._take_oldest():
                break
            found = True
        return found

    def read(self, target: Tensor) -> None:
        """Copy the front to a tensor like it, on a GPU perhaps; the copy is over before the front changes."""
        self.copies.start(partial(target.copy_, self.front, non_blocking=True))

    def clear(self) -> None:
        """Hold zeros, of mass zero."""
        self.blank, self.mass = True, 0.0

    def puts(self) -> int:
        """How many puts had been made by the newest message that has arrived, taken or not."""
        try:
            with self.region.lock():
                return max([self.seen, *(self.region.note(slot).puts for slot in self.region.slots_in(FULL))])
        except Busy:
            return self.seen

    def has_news(self) -> bool:
        """Whether something has arrived that was not taken, as far as can be told without a wait."""
        try:
            with self.region.lock():
                return bool(self.region.slots_in(FULL))
        except Busy:
            return False

    def newest_stamp(self) -> int:
        """The highest stamp that has arrived, taken or not."""
        try:
            with self.region.lock():
                return max([self.stamp, *(self.region.note(slot).stamp for slot in self.region.slots_in(FULL))])
        except Busy:
            return self.stamp

    def _take_oldest(self) -> bool:
        try:
            with self.region.lock():
                self._release()
                full = self.region.slots_in(FULL)
                if not full:
                    return False
                slot, note = full[0], self.region.note(full[0])
                becomes_front = note.kind == Kind.PUT or self.blank
                self.region.change({slot: READING} | ({self._front: EMPTY} if becomes_front else {}))
        except Busy:
            return False
        self.stamp, self.seen = max(self.stamp, note.stamp), max(self.seen, note.puts)
        if becomes_front:
            self._front, self.mass, self.blank = slot, note.mass, False
            return True
        message = Message(Kind(note.kind), self.region.values(slot), 1.0, note.mass)
        message.join(self.front, self.mass)
        self.mass = message.joined(self.mass)
        self._to_release.append(slot)
        try:
            with self.region.lock():
                self._release()
        except Busy:
            pass  # It stays READING until the lock can be had; the sender has another slot.
        return True

    def _release(self) -> None:
        self.region.change(dict.fromkeys(self._to_release, EMPTY))
        self._to_release.clear()


ARRIVAL_SLOTS = 4


class Arrivals:
    """The sending end of an inbox in this process, into which a network thread receives.

    With four slots there is always one to receive into, whether or not the program reads: the inbox holds two at most, and
    messages that nobody has read are made one here. (Back pressure on what is to be added would leave the peer's `fence`
    waiting for this rank's program.)
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._sequence = 0

    def reserve(self) -> int:
        """A slot to receive into."""
        with self.region.lock():
            slot = self.region.slots_in(EMPTY)[0]
            self.region.change({slot: WRITING})
            return slot

    def give_back(self, slot: int) -> None:
        """Nothing was received."""
        with self.region.lock():
            self.region.change({slot: EMPTY})

    def publish(self, slot: int, note: Note) -> None:
        """Show the inbox what was received."""
        self._sequence += 1
        note = replace(note, sequence=self._sequence)
        with self.region.lock():
            full = self.region.slots_in(FULL)
            if note.kind == Kind.PUT or not full:
                self.region.write_note(slot, note)
                self.region.change({**dict.fromkeys(full, EMPTY), slot: FULL})
                return
            old = full[-1]
            self.region.change({old: WRITING})
        values, before = self.region.values(old), self.region.note(old)
        message = Message(Kind(note.kind), self.region.values(slot), 1.0, note.mass)
        message.join(values, before.mass)
        self.region.write_note(old, replace(note, kind=before.kind, mass=message.joined(before.mass)))
        with self.region.lock():
            self.region.change({old: FULL, slot: EMPTY})
