"""The one thread of a window that answers its neighbours: it reads connections and never waits for any of them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedfog.log import log

OFTEN = 0.01


@dataclass(frozen=True)
class _Watch:
    """What to call when a file can be read, and whether it is to be written to (then also when that goes)."""

    ready: Callable[[], None]
    wants_to_write: Callable[[], bool]


def _never() -> bool:
    return False


class Service:
    """Calls others when their files can be read.

    Args:
        name: of the thread.
        tick: called between two waits; whether it wants to be called again soon, whatever happens.
        settle_in: called first in the thread.
    """

    def __init__(self, name: str, tick: Callable[[], bool], settle_in: Callable[[], None]) -> None:
        self._tick, self._settle_in = tick, settle_in
        self._watches: dict[Any, _Watch] = {}
        self._lock = threading.Lock()
        self._errands: list[tuple[Callable[[], None], threading.Event]] = []
        self._stopped = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self) -> None:
        """Begin."""
        self.watch(self._bell, self._silence)
        self._thread.start()

    def watch(self, file: Any, ready: Callable[[], None], wants_to_write: Callable[[], bool] = _never) -> None:
        """Call `ready` whenever the file (a socket or descriptor) can be read."""
        with self._lock:
            self._watches[file] = _Watch(ready, wants_to_write)
        self.ring()

    def ignore(self, file: Any) -> None:
        """Watch it no more; called in the service's thread, or when that has ended, before the file is closed."""
        with self._lock, contextlib.suppress(KeyError, ValueError, OSError):
            self._watches.pop(file, None)
            self._selector.unregister(file)

    def do(self, errand: Callable[[], None]) -> None:
        """Have the thread call this, and wait until it has; called here if there is no thread."""
        if not self._thread.is_alive():
            errand()
            return
        done = threading.Event()
        self._errands.append((errand, done))
        self.ring()
        while not done.wait(0.1) and self._thread.is_alive():
            pass

    def ring(self) -> None:
        """Have the thread look at what has changed."""
        with contextlib.suppress(OSError):
            self._rope.send(b"!")

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self.ring()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close what the thread waits with; in a forked process, where there is no thread, only this."""
        self._selector.close()
        self._bell.close()
        self._rope.close()

    def _silence(self) -> None:
        with contextlib.suppress(OSError):
            self._bell.recv(4096)

    def _run(self) -> None:
        self._guarded(self._settle_in)
        while not self._stopped:
            while self._errands:
                errand, done = self._errands.pop(0)
                self._guarded(errand)
                done.set()
            self._register()
            again = self._guarded(self._tick)
            for key, _ in self._selector.select(OFTEN if again else None):
                watch = self._watches.get(key.fileobj)
                if watch is not None and not self._stopped:
                    self._guarded(watch.ready)

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception:
            # Others must be answered, whatever went wrong with one.
            log.exception("in the thread %s", self._thread.name)
            return None

    def _register(self) -> None:
        with self._lock:
            known = self._selector.get_map()
            for file, watch in self._watches.items():
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if watch.wants_to_write() else 0)
                if file not in known:
                    self._selector.register(file, events)
                elif known[file].events != events:
                    self._selector.modify(file, events)
