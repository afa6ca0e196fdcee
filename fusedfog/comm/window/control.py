"""A connection for frames of control, on which nobody ever waits."""

from __future__ import annotations

import socket
import threading

from fusedfog.comm.window.wire import FRAME_BYTES, Frame, Say, read_frame

_MOST_BYTES_KEPT = 1 << 20


class Control:
    """Frames to and from one peer.

    Attributes:
        connection: the socket; closed and of no use after `close`.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._lock = threading.Lock()
        self._outgoing, self._incoming = bytearray(), bytearray()

    def say(self, say: Say, number: int = 0, weight: float = 0.0) -> bool:
        """Send a frame, or as much of it as goes now; whether all has gone (else call `flush` when it can be written)."""
        with self._lock:
            if (
                len(self._outgoing) < _MOST_BYTES_KEPT
            ):  # A peer that reads nothing, for so long, will not answer either.
                self._outgoing += Frame(say, number, weight).pack()
            return self._send()

    def flush(self) -> bool:
        """Send what remained; whether all has gone."""
        with self._lock:
            return self._send()

    @property
    def wants_to_write(self) -> bool:
        """Whether anything remained."""
        return bool(self._outgoing)

    def _send(self) -> bool:
        try:
            while self._outgoing:
                del self._outgoing[: self.connection.send(self._outgoing)]
        except BlockingIOError:
            return False
        except OSError:  # Its end is noticed where it is read.
            self._outgoing.clear()
        return True

    def read(self) -> list[Frame]:
        """The frames that have arrived.

        Raises:
            ConnectionError: the peer has gone.
            Malformed: it says what the protocol does not have.
        """
        try:
            while data := self.connection.recv(4096):
                self._incoming += data
                if len(self._incoming) >= 1 << 16:
                    break
            else:
                if not self._incoming:
                    raise ConnectionResetError("connection closed")
        except BlockingIOError:
            pass
        except OSError as error:
            raise ConnectionResetError(str(error)) from error
        whole = len(self._incoming) // FRAME_BYTES * FRAME_BYTES
        frames = [
            read_frame(bytes(self._incoming[begin : begin + FRAME_BYTES])) for begin in range(0, whole, FRAME_BYTES)
        ]
        del self._incoming[:whole]
        return frames

    def close(self) -> None:
        """Close the socket."""
        self.connection.close()
