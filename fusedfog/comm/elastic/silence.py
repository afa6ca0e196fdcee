"""Since when members have not answered, as one process knows it: those that have not for too long count as lost."""

from __future__ import annotations

import contextlib
import threading
import time

from fusedfog.comm.elastic.board import Board
from fusedfog.comm.elastic.record import launched
from fusedfog.errors import StoreLost


class Silence:
    """See the module; for several threads, each with a board of its own.

    Args:
        dead_after: seconds without an answer after which a member counts as lost.
    """

    def __init__(self, dead_after: float) -> None:
        self._dead_after = dead_after
        self._since: dict[str, float] = {}
        self._beats: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def lasts(self, uid: str, answered: bool, board: Board) -> bool:
        """Take note that a member has answered, or has not; whether it counts as lost.

        Lost, too, is one of which the launcher says that it has ended. A process whose launcher counts on is not lost, as in a
        long call that holds Python's lock.
        """
        now = time.monotonic()
        with self._lock:
            if answered:
                self._since.pop(uid, None)
                return False
            since = self._since.setdefault(uid, now)
        with contextlib.suppress(StoreLost):
            beat = board.get(f"beat/{launched(uid)}")
            with self._lock:
                if beat != self._beats.setdefault(uid, beat):
                    self._beats[uid], self._since[uid] = beat, now
                    return False
            if board.get(f"dead/{launched(uid)}") is not None:
                return True
        return now - since >= self._dead_after

    def lost(self, board: Board) -> tuple[str, ...]:
        """All that count as lost."""
        with self._lock:
            silent = list(self._since)
        return tuple(uid for uid in silent if self.lasts(uid, False, board))

    def forget(self) -> None:
        """Other members begin: nobody has been silent."""
        with self._lock:
            self._since.clear()
