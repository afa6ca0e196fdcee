"""What a member hands over to newcomers: a file that its program writes between two steps, and another thread sends."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

HEAD = struct.Struct("<QQ")
"""What is sent before the file: how many bytes it has, 0 if there is none, and its checksum."""

_PATIENCE = 60.0
"""Seconds in which the program comes to the beginning of a step; a newcomer asks again."""


class Hand:
    """Asks the program's own thread for a file, and sends it."""

    def __init__(self) -> None:
        self.wanted = False
        self._one_at_a_time = threading.Lock()
        self._written = threading.Event()
        self._path: Path | None = None
        self._checksum = 0

    def give(self, write: Callable[[Path], int]) -> None:
        """Write the file that is wanted, with a function that returns a checksum; for the program, as it begins a step."""
        path = Path(tempfile.mkdtemp(prefix="fusedfog-")) / "state"
        self._checksum = write(path)
        self.wanted, self._path = False, path
        self._written.set()

    def send(self, connection: socket.socket, has_state: bool) -> None:
        """Send a file that is written from now on, or nothing if there is none to be had."""
        with connection, self._one_at_a_time:
            connection.settimeout(_PATIENCE)
            path = self._await_file() if has_state else None
            if path is None:
                connection.sendall(HEAD.pack(0, 0))
                return
            try:
                with path.open("rb") as file:
                    connection.sendall(HEAD.pack(os.fstat(file.fileno()).st_size, self._checksum))
                    connection.sendfile(file)
            finally:
                shutil.rmtree(path.parent, ignore_errors=True)

    def _await_file(self) -> Path | None:
        self._written.clear()
        self.wanted = True
        if not self._written.wait(_PATIENCE):
            self.wanted = False
            return None
        return self._path
