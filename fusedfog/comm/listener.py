"""The thread of each process that answers the other ranks, and now and then looks at what its own process does."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable

from fusedfog.comm.whereabouts import PATIENCE


class Listener:
    """Answers questions at a port. Its thread never waits for anybody.

    Args:
        listener, ip: the listening socket, and the address by which others reach it.
        answer: called with a connection that somebody has made.
        look: called between answers; a thread that it returns is started, and joined at the end.
        every: how many seconds apart at most.

    Attributes:
        port, ip: where it listens.
    """

    def __init__(
        self,
        listener: socket.socket,
        ip: str,
        answer: Callable[[socket.socket], None],
        look: Callable[[], threading.Thread | None],
        every: Callable[[], float],
    ) -> None:
        self.port, self.ip = int(listener.getsockname()[1]), ip
        self._listener, self._answer, self._look, self._every = listener, answer, look, every
        self._bell, self._rope = socket.socketpair()
        self._threads = [threading.Thread(target=self._run, daemon=True, name="fusedfog-whereabouts")]
        self._threads[0].start()

    def stop(self) -> None:
        """End the thread; for the end of the process."""
        self._rope.close()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def forget(self) -> None:
        """In a forked process: there is no thread, and whoever asks at this port must hear that nobody listens."""
        for end in (self._listener, self._bell, self._rope):
            end.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._listener, selectors.EVENT_READ)
            waiting.register(self._bell, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select(max(0.05, min(1.0, self._every()))):
                    if key.fileobj is self._bell:
                        return
                    with contextlib.suppress(OSError):
                        self._answer(self._listener.accept()[0])
                self._start(self._look())

    def _start(self, thread: threading.Thread | None) -> None:
        if thread is not None:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()
