"""Where a window's neighbours connect while it is built. It is closed once all have come."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time

from fusedfog.comm.window.memory import machine
from fusedfog.comm.window.wire import GREETING_BYTES, Greeting, Malformed, read_greeting

_STRANGERS = 64
"""Connections that have not shown the token yet; beyond that the oldest is closed."""

_GREETING_WITHIN = 10.0
"""Seconds for the greeting."""


class Listener:
    """Reads what those who connect say first, for a thread that never waits.

    Args:
        address: of the interface to listen on.
        token: what a peer must show.

    Attributes:
        server: the listening socket.
        port: where it listens.
    """

    def __init__(self, address: str, token: bytes) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.server = socket.create_server((address, 0), family=family, backlog=128)
        self.server.setblocking(False)
        self.token = token
        self.port = int(self.server.getsockname()[1])
        self._strangers: dict[socket.socket, tuple[float, bytearray]] = {}

    def accept(self) -> socket.socket | None:
        """A new connection, of which nothing is known yet; the caller calls `hear` whenever it can be read."""
        try:
            connection, _ = self.server.accept()
        except OSError:  # It has gone again, or this process has no more descriptors.
            return None
        connection.setblocking(False)
        self._strangers[connection] = time.monotonic(), bytearray()
        return connection

    def hear(self, connection: socket.socket) -> Greeting | None:
        """The greeting on this connection, which is no stranger's then; None while it is not complete.

        Raises:
            Malformed, OSError: it is none; call `dismiss`.
        """
        heard = self._strangers[connection][1]
        try:
            data = connection.recv(GREETING_BYTES - len(heard))
        except BlockingIOError:
            return None
        if not data:
            raise Malformed("closed")
        heard += data
        if len(heard) < GREETING_BYTES:
            return None
        greeting = read_greeting(bytes(heard), self.token)
        del self._strangers[connection]
        return greeting

    def overdue(self) -> list[socket.socket]:
        """Connections that have been strangers for too long, or are too many."""
        now = time.monotonic()
        late = [one for one, (since, _) in self._strangers.items() if now - since > _GREETING_WITHIN]
        return late or list(self._strangers)[: max(0, len(self._strangers) - _STRANGERS)]

    @property
    def strangers(self) -> list[socket.socket]:
        """The connections that have not shown the token, from the oldest."""
        return list(self._strangers)

    def dismiss(self, connection: socket.socket) -> None:
        """Close a stranger's connection."""
        self._strangers.pop(connection, None)
        connection.close()

    def close(self) -> None:
        """Listen no more."""
        self.server.close()
        for connection in self.strangers:
            self.dismiss(connection)


def interface_of_gloo() -> str:
    """The IPv4 address of the interface that GLOO_SOCKET_IFNAME names; "" where it names none."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if not name:
        return ""
    get_address = 0x8915  # SIOCGIFADDR
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return ""


def route_to(address: str, port: int = 9) -> str:
    """This host's address on the way to another; "" where there is no way."""
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # Connecting it sends nothing.
            probe.connect((address, port))
            return str(probe.getsockname()[0])
    return ""


def network() -> str:
    """What processes have in common that reach each other over the loopback interface."""
    try:
        return f"{socket.gethostname()} {machine()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{socket.gethostname()} {machine()}"


def is_loopback(ip: str) -> bool:
    """Whether an address reaches nothing but its own host."""
    return ip.startswith("127.") or ip == "::1"
