"""Who answers at the ports of members, and what they say; and a file that one of them hands over."""

from __future__ import annotations

import contextlib
import errno
import json
import selectors
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedfog.comm.elastic.handing import HEAD
from fusedfog.comm.elastic.record import Seat

_LONGEST = 4096
"""Bytes of a question or answer."""


@dataclass(frozen=True)
class Heard:
    """What became of a question to a seat.

    Attributes:
        dead: nobody listens there, or somebody else does.
        said: the answer; None where there was none in time.
    """

    dead: bool = False
    said: dict[str, Any] | None = None


def question(seat: Seat, what: str) -> bytes:
    """As it is sent."""
    return json.dumps({"token": seat.token, "ask": what}).encode()


def ask(seats: Iterable[Seat], patience: float) -> dict[str, Heard]:
    """Ask these seats who they are, all at once; takes `patience` seconds at most."""
    own, deadline, found = socket.gethostname(), time.monotonic() + patience, {}
    with selectors.DefaultSelector() as waiting:
        for seat in seats:
            connection = socket.socket(socket.AF_INET6 if ":" in seat.ip else socket.AF_INET)
            connection.setblocking(False)
            found[seat.uid] = Heard()
            with contextlib.suppress(OSError):
                if connection.connect_ex(reach(seat, own)) == errno.ECONNREFUSED:
                    found[seat.uid] = Heard(dead=True)
                    connection.close()
                    continue
                waiting.register(connection, selectors.EVENT_WRITE, (seat, False))
                continue
            connection.close()
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                heard = _proceed(waiting, key)
                if heard is not None:
                    found[key.data[0].uid] = heard
        for key in list(waiting.get_map().values()):
            _close(key.fileobj)
    return found


def reach(seat: Seat, own: str) -> tuple[str, int]:
    """What a process on the host called `own` connects to."""
    loopback = seat.ip.startswith("127.") or seat.ip == "::1"
    return (seat.host if loopback and seat.host != own else seat.ip), seat.port


def _proceed(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> Heard | None:
    connection, (seat, asked) = key.fileobj, key.data
    assert isinstance(connection, socket.socket)
    heard = Heard()
    try:
        if not asked:
            connection.sendall(question(seat, "who"))
            waiting.modify(connection, selectors.EVENT_READ, (seat, True))
            return None
        said = json.loads(connection.recv(_LONGEST))
        heard = Heard(dead=said.get("uid") != seat.uid, said=said)
    except ConnectionRefusedError:
        heard = Heard(dead=True)
    except (OSError, ValueError, AttributeError):  # It ends just now; the next question will tell.
        pass
    waiting.unregister(connection)
    connection.close()
    return heard


def _close(connection: Any) -> None:
    connection.close()


def fetch(seat: Seat, into: Path, timeout: float) -> tuple[int, int] | None:
    """Write what a member hands over into a file; its size and checksum, or None if there is nothing to hand over yet.

    Raises:
        OSError: it does not answer, or ends on the way.
    """
    with socket.create_connection(reach(seat, socket.gethostname()), timeout) as connection:
        connection.settimeout(timeout)
        connection.sendall(question(seat, "state"))
        with connection.makefile("rb") as stream:
            head = stream.read(HEAD.size)
            if len(head) < HEAD.size:
                raise ConnectionError(f"{seat.uid} has ended")
            size, checksum = HEAD.unpack(head)
            if size == 0:
                return None
            with into.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            if into.stat().st_size != size:
                raise ConnectionError(f"{seat.uid} ended while it handed over its state")
    return size, checksum
