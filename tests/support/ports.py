"""Ports for what a test starts later, perhaps seconds later, in other processes."""

from __future__ import annotations

import random
import socket

_SYSTEM = random.SystemRandom()


def free_port() -> int:
    """A port at which nothing listens, and which the system gives to nobody by itself.

    One that it gave, as for port 0, would be given to some other connection as soon as it is closed.
    """
    while True:
        port = _SYSTEM.randrange(10_000, 20_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
