"""The messages of an edge between hosts: a thread at each end carries them from outbox to inbox, one at a time.

While a message travels, what the program sends meanwhile replaces or joins what waits in the outbox, so a slow link carries
the newest values and no queue. Each message is acknowledged once its receiver's program can see it, and sent once: a
connection that breaks is the end of the edge, so nothing arrives twice.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from fusedfog.comm.window.edge import Arrivals
from fusedfog.comm.window.region import EMPTY, FULL, READING, Note, Region
from fusedfog.comm.window.wire import ACKNOWLEDGEMENT, HEADER_BYTES, Malformed, pack_header, read_header

_IDLE = 60
_INTERVAL = 10
_PROBES = 6


def keep_alive(connection: socket.socket, timeout: float) -> None:
    """Have a connection end when nothing of its peer was heard, or taken by it, for about so many seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE),
        ("TCP_KEEPINTVL", _INTERVAL),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", max(1000, int(1000 * min(timeout, 3600.0)))),
    ):
        if hasattr(socket, name):  # Not all systems have all of them.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Courier:
    """A thread of one end of a connection for messages.

    Args:
        lost: called once, in the thread, with the reason why nothing can travel any more.
    """

    def __init__(self, connection: socket.socket, name: str, lost: Callable[[str], None]) -> None:
        self.connection = connection
        connection.setblocking(True)
        self._lost, self._closed = lost, False
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """Have the thread end, whatever it waits for."""
        self._closed = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self._wake()

    def stop(self) -> None:
        """End the thread."""
        self.cancel()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.connection.close()

    def _wake(self) -> None:
        pass

    def _run(self) -> None:
        try:
            while not self._closed:
                self._carry()
        except (OSError, EOFError, Malformed) as error:
            if not self._closed:
                self._lost(str(error) or type(error).__name__)

    def _carry(self) -> None:
        raise NotImplementedError

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, room: memoryview) -> None:
        while room:
            got = self.connection.recv_into(room)
            if not got:
                raise EOFError("connection closed")
            room = room[got:]


class OutgoingCourier(Courier):
    """Sends what is in an outbox.

    Args:
        changed: called when the outbox has become emptier.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        outbox: Region,
        lost: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        super().__init__(connection, name, lost)
        self._outbox, self._changed = outbox, changed
        self._more = threading.Event()

    @property
    def idle(self) -> bool:
        """Whether all that was put into the outbox has been acknowledged."""
        with self._outbox.lock():
            return not (self._outbox.slots_in(FULL) or self._outbox.slots_in(READING))

    def hurry(self) -> None:
        """There is something in the outbox."""
        self._more.set()

    def _wake(self) -> None:
        self._more.set()

    def _carry(self) -> None:
        self._more.wait()
        self._more.clear()
        while not self._closed:
            with self._outbox.lock():
                full = self._outbox.slots_in(FULL)
                if not full:
                    return
                slot = full[0]
                self._outbox.change({slot: READING})
            self._send(self._outbox.note(slot), self._outbox.bytes_of(slot))
            with self._outbox.lock():
                self._outbox.change({slot: EMPTY})
            self._changed()

    def _send(self, note: Note, values: memoryview) -> None:
        self.connection.sendall(pack_header(note, len(values)))
        self.connection.sendall(values)
        (sequence,) = ACKNOWLEDGEMENT.unpack(self._receive(ACKNOWLEDGEMENT.size))
        if sequence != note.sequence:
            raise Malformed(f"message {sequence} was acknowledged, where {note.sequence} was sent")


class IncomingCourier(Courier):
    """Receives into an inbox.

    Args:
        arrived: called with the note of each message that has become visible.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        inbox: Region,
        lost: Callable[[str], None],
        arrived: Callable[[Note], None],
    ) -> None:
        super().__init__(connection, name, lost)
        self._arrivals, self._arrived = Arrivals(inbox), arrived

    def _carry(self) -> None:
        length = self._arrivals.region.layout.slot_bytes
        note = read_header(self._receive(HEADER_BYTES), length)
        slot = self._arrivals.reserve()
        try:
            self._receive_into(self._arrivals.region.bytes_of(slot))
        except (OSError, EOFError):
            self._arrivals.give_back(slot)
            raise
        self._arrivals.publish(slot, note)
        self._arrived(note)
        self.connection.sendall(ACKNOWLEDGEMENT.pack(note.sequence))
