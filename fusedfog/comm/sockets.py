"""The TCP connections of one gloo group, found among the process' descriptors, to be shut down when the group has failed.

Destroying a group closes none of them while a thread waits in it (2.13), and a group may not be destroyed by force: `abort()`
wakes nobody. A connection that is shut down wakes this rank's waits and those of the rank at its other end, at once, except for
messages of which a part has travelled.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable


class Sockets:
    """Connections that are made between this object's own making and `keep`.

    Attributes:
        port: where the group listens for its connections; 0 where that cannot be told.
    """

    def __init__(self) -> None:
        self.port, self._kept = 0, False
        self._known = _sockets()
        self._own: set[tuple[int, int]] = set()

    def take_new(self) -> None:
        """What is open now, and was not before, may be the group's."""
        self._own = _sockets() - self._known
        self._known = set()
        ports = [port for number, _ in self._own if (port := _listening_port(number))]
        self.port = ports[0] if len(ports) == 1 else 0

    def keep(self, ports: Iterable[int]) -> None:
        """Of these, keep the connections to or from ports where the group's ranks listen: threads open sockets, too."""
        known, self._kept = set(ports) - {0}, True
        self._own = {one for one in self._own if known & set(_ends(one[0]))}

    def shut_down(self) -> None:
        """End these connections, both ways; those that are closed already are left alone, whoever has their numbers now.

        Before `keep`, those that others have made to the group's own port: what else is new may be anybody's, or the port itself.
        """
        if not self._kept:
            self.keep([self.port])
        for number, inode in self._own:
            with contextlib.suppress(OSError):
                copy = os.dup(number)
                with socket.socket(fileno=copy) as end:
                    if os.fstat(copy).st_ino == inode:
                        end.shutdown(socket.SHUT_RDWR)
        self._own = set()


def _listening_port(number: int) -> int:
    """The port where this socket listens; 0 if it does not."""
    with contextlib.suppress(OSError, AttributeError), socket.socket(fileno=os.dup(number)) as end:
        if end.family in (socket.AF_INET, socket.AF_INET6) and end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return int(end.getsockname()[1])
    return 0


def _ends(number: int) -> list[int]:
    """The ports at both ends of this connection; none if it is not one, as a listener, whose end gloo's thread takes badly."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as end:
        if end.family in (socket.AF_INET, socket.AF_INET6):
            return [int(end.getsockname()[1]), int(end.getpeername()[1])]
    return []


def _sockets() -> set[tuple[int, int]]:
    """(descriptor, inode) of this process' TCP sockets; none where /dev/fd is not there."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                about = os.fstat(int(name))
                if stat.S_ISSOCK(about.st_mode):
                    found.add((int(name), about.st_ino))
    return found
