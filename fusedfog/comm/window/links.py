"""One edge of a window as one of its ends has it: memory, connections, and what the two have told each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from fusedfog.comm.window.control import Control
from fusedfog.comm.window.courier import Courier, OutgoingCourier
from fusedfog.comm.window.edge import Inbox, Message, Sender
from fusedfog.comm.window.gate import Gate
from fusedfog.comm.window.region import Region


@dataclass(eq=False)
class Link:
    """What both ends have.

    Attributes:
        peer: the rank at the other end.
        control: for frames of control.
        courier: carries messages, if they go over TCP.
        gone: why nothing comes from the peer any more; "" as long as it is there.
        left: it has gone by closing its window, and not by dying.
    """

    peer: int
    control: Control | None = None
    courier: Courier | None = None
    gone: str = ""
    left: bool = False

    def close_connections(self) -> None:
        """Close sockets and descriptors without a word; for a forked process."""
        if self.control is not None:
            self.control.close()
        if self.courier is not None:
            self.courier.connection.close()


@dataclass(eq=False)
class OutLink(Link):
    """The sending end.

    Attributes:
        sender: what puts messages into the edge's memory.
        process: a descriptor that says when the peer's process has ended; None over TCP.
        pings, pong: the last PING said, and the last that was answered.
        claims, granted: the last claim to the edge's mutex, and the one that was granted.
        wanted: gets that have not been answered: number and weight.
        answered: the last get whose answer waits to be published, or was; 0 for none.
        told: the last get that the peer was told about.
        confirmed: how many of the messages given to the sender the last `fence` had confirmed.
    """

    sender: Sender = None  # type: ignore[assignment]
    process: int | None = None
    pings: int = 0
    pong: int = 0
    claims: int = 0
    granted: int = 0
    wanted: list[tuple[int, float]] = field(default_factory=list)
    answered: int = 0
    told: int = 0
    confirmed: int = 0

    def send(self, message: Message) -> None:
        """Send, without waiting for anybody. What is for a peer that has gone is dropped."""
        if not self.gone:
            self.sender.send(message)
            if isinstance(self.courier, OutgoingCourier):
                self.courier.hurry()

    def flush(self) -> bool:
        """Publish what waits, if it can be; whether nothing waits any more."""
        waited = self.sender.waits
        if not self.sender.flush():
            return False
        if waited and isinstance(self.courier, OutgoingCourier):
            self.courier.hurry()
        return True

    @property
    def delivered(self) -> bool:
        """Whether all that was sent lies in the peer's memory."""
        if not self.flush():
            return False
        return not isinstance(self.courier, OutgoingCourier) or self.courier.idle

    def close_connections(self) -> None:
        """See `Link`; and the descriptors of memory and process."""
        super().close_connections()
        self.sender.region.close_descriptor()
        self.close_process()

    def close_process(self) -> None:
        """Close the descriptor of the peer's process."""
        process, self.process = self.process, None
        if process is not None:
            os.close(process)


@dataclass(eq=False)
class InLink(Link):
    """The receiving end.

    Attributes:
        inbox: what has arrived.
        region: where.
        gate: the edge's mutex.
        claims: the last claim to it from this end.
        asked, answered: the last `get`, and the last that was answered.
    """

    inbox: Inbox = None  # type: ignore[assignment]
    region: Region = None  # type: ignore[assignment]
    gate: Gate = field(default_factory=Gate)
    claims: int = 0
    asked: int = 0
    answered: int = 0

    def close_connections(self) -> None:
        """See `Link`; and the descriptor of the memory."""
        super().close_connections()
        self.region.close_descriptor()
