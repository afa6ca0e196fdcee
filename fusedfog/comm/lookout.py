"""Whether a wait is in vain, for threads that wait in a loop of their own: for memory, a socket, a window."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from fusedfog.comm import calls
from fusedfog.comm.failures import FIRST_LOOK, LOOK_EVERY, Vigil
from fusedfog.comm.group import Ranks


class Lookout:
    """One wait; nobody is asked anything in its first `FIRST_LOOK` seconds.

    Args:
        view: the ranks of whom some are waited for.
        where: which rank waits for what, for errors.
        communicator: the name of the one that the wait is in; "" for the current call alone.
    """

    def __init__(self, view: Ranks, where: str, communicator: str = "") -> None:
        self._view, self._where, self._communicator = view, where, communicator
        self._vigil: Vigil | None = None
        self._next = time.monotonic() + FIRST_LOOK

    def look(self, peers: Iterable[int] | None = None) -> None:
        """If it is time, ask whether these ranks of the view are still there, all of them for None; takes 0.3 s at most.

        Raises:
            PeerTimeout, ExchangeError: one has ended, or others have given up; names it.
        """
        if time.monotonic() < self._next:
            return
        if self._vigil is None:
            with contextlib.suppress(RuntimeError):  # The store may have gone, and the wait does not need it.
                calls.remember_addresses(self._view)
            self._vigil = calls.vigil(self._communicator, self._view.ranks if self._communicator else ())
        if self._vigil is not None:
            ranks = self._view.ranks
            origin = self._vigil.look(ranks if peers is None else [ranks[peer] for peer in peers], None)
            if origin is not None:
                raise calls.lost(self._view, self._where, origin)
        self._next = time.monotonic() + LOOK_EVERY
