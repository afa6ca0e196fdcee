"""What windows say over TCP: a greeting, frames of control, headers of messages. All of fixed length, and checked."""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from fusedfog.comm.window.edge import Kind
from fusedfog.comm.window.region import Note

TOKEN_BYTES = 32

_GREETING = struct.Struct("!8s32sBBxxI")
_GREETING_MAGIC = b"ffwindow"
GREETING_BYTES = _GREETING.size
WELCOME = b"\x01"

_FRAME = struct.Struct("!BxxxxxxxQd")
FRAME_BYTES = _FRAME.size

_HEADER = struct.Struct("!4sIqqqqdqq")
_HEADER_MAGIC = b"ffwm"
HEADER_BYTES = _HEADER.size

ACKNOWLEDGEMENT = struct.Struct("!q")


class Malformed(Exception):
    """A peer said something that the protocol does not have."""


class Purpose(IntEnum):
    """What a connection is for."""

    CONTROL = 1
    MESSAGES = 2


@dataclass(frozen=True)
class Greeting:
    """The first words on a connection: from the sender of an edge, to its receiver.

    Attributes:
        sender: its rank.
        purpose: what the connection is for.
        remote: whether the edge's messages come over TCP.
    """

    sender: int
    purpose: Purpose
    remote: bool

    def pack(self, token: bytes) -> bytes:
        """As bytes, with the receiver's token."""
        return _GREETING.pack(_GREETING_MAGIC, token, self.purpose, self.remote, self.sender)


def read_greeting(data: bytes, token: bytes) -> Greeting:
    """The greeting in these bytes.

    Raises:
        Malformed: it is none, or does not show the token.
    """
    magic, shown, purpose, remote, sender = _GREETING.unpack(data)
    # Both are compared in full, so that the time taken tells nothing of the token.
    if not hmac.compare_digest(magic + shown, _GREETING_MAGIC + token):
        raise Malformed("no greeting of this window")
    if purpose not in (Purpose.CONTROL, Purpose.MESSAGES) or remote > 1:
        raise Malformed("a greeting for nothing")
    return Greeting(sender, Purpose(purpose), bool(remote))


class Say(IntEnum):
    """A frame's meaning. The sender of an edge says the upper ones to its receiver, and the receiver the lower ones."""

    GOT = 1
    """Your `get` of this number has been answered."""
    PING = 2
    """Say whether you are there."""
    TAKE = 3
    """I want the edge's mutex."""
    LEAVE = 4
    """I do not want it any more."""
    GET = 5
    """Put your tensor, times this weight."""
    PONG = 6
    """I am here, and have all that was sent before the PING."""
    GRANTED = 7
    """The mutex is yours."""
    BYE = 8
    """(Either.) I close my window."""


@dataclass(frozen=True)
class Frame:
    """A frame of control: what, its number, and a weight where there is one."""

    say: Say
    number: int = 0
    weight: float = 0.0

    def pack(self) -> bytes:
        """As bytes."""
        return _FRAME.pack(self.say, self.number, self.weight)


def read_frame(data: bytes) -> Frame:
    """The frame in these bytes.

    Raises:
        Malformed: it is none.
    """
    say, number, weight = _FRAME.unpack(data)
    try:
        return Frame(Say(say), number, weight)
    except ValueError:
        raise Malformed(f"a frame of unknown kind {say}") from None


def pack_header(note: Note, length: int) -> bytes:
    """The header before a message of `length` bytes."""
    return _HEADER.pack(_HEADER_MAGIC, 0, *note.values(), length)


def read_header(data: bytes, length: int) -> Note:
    """The note in a header.

    Raises:
        Malformed: it is none, or its message has not the `length` of this window's.
    """
    magic, _, sequence, kind, puts, stamp, mass, answered, given = _HEADER.unpack(data)
    if magic != _HEADER_MAGIC or kind not in (Kind.PUT, Kind.ADD, Kind.MEAN):
        raise Malformed("no header of a message")
    if given != length:
        raise Malformed(f"a message of {given} bytes, where the window's have {length}")
    return Note(sequence, kind, puts, stamp, mass, answered)
