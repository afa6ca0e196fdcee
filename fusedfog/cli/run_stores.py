"""The stores of a run, as `fusedfog run` uses them: host this machine's, write into every one that answers, ask any of them.

A store is a TCPStore on a machine of the run. What a launcher says (`fusedfog/RUN/...`) it says in all of them, so that members
find it in whichever they use: a thread for each store writes, connects anew if the connection breaks, and then writes all
lasting facts again, as the store may be an empty one. torch's store blocks for ever on a host that has gone silent, so that
every exchange with one is a task that is abandoned after a deadline; and it does not say that what was set has arrived, so that
facts are read back.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from fusedfog.comm.waiter import Task
from fusedfog.errors import LaunchError

R = TypeVar("R")
Address = tuple[str, int]

DEADLINE = 5.0
"""Seconds in which a store answers; it does in less than a millisecond, or not at all."""

_HOSTED = 60.0
"""Seconds in which a store that is hosted here comes to answer: those who wait for it keep it busy from its first moment."""

EVERY = 1.0
"""Seconds between heartbeats."""


_begun: weakref.WeakSet[Task[Any]] = weakref.WeakSet()


def _begin(work: Callable[[], R]) -> Task[R]:
    task = Task(work)
    _begun.add(task)
    return task


@atexit.register
def _let_end() -> None:
    """Python unwinds threads when it ends; one that is inside torch's client then aborts the process."""
    deadline = time.monotonic() + 2 * DEADLINE
    for task in list(_begun):
        task.over.wait(max(0.0, deadline - time.monotonic()))


def parse_stores(text: str) -> list[Address]:
    """``"hostA:29400,[fd00::1]:29400"`` as hosts and ports.

    Raises:
        LaunchError: an entry that is no host and port, or is there twice.
    """
    found: list[Address] = []
    for one in (part.strip() for part in text.split(",")):
        host, _, port = one.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise LaunchError(f"--stores: {one!r} is no host and port: write --stores hostA:29400,hostB:29400")
        found.append((host.strip("[]"), int(port)))
    if len(set(found)) < len(found):
        raise LaunchError(f"--stores: {text!r} has the same address twice")
    return found


def show_stores(stores: Sequence[Address]) -> str:
    """As `parse_stores` reads them."""
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in stores)


def host_store(address: Address) -> TCPStore:
    """A new store that listens at this port of this machine, or at a free one for 0, for as long as the object lives.

    Raises:
        LaunchError: somebody listens there already.
    """
    host, port = address
    if port and _listens(port):
        raise LaunchError(
            f"port {port} of this machine is in use: another launcher hosts a store there, for these slots or for another "
            f"run. End that one first, or give this run another port: --stores {host}:PORT"
        )
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_HOSTED))
        store.set_timeout(timedelta(seconds=DEADLINE))
        return store
    except (OSError, RuntimeError) as error:
        first = str(error).split("\n")[0]
        raise LaunchError(
            f"no store can be hosted at {host}:{port}: {first}. Entry number --node-rank of --stores must be a name of this "
            f"machine that the others reach, and a free port"
        ) from None


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), DEADLINE):
        return True
    return False


def connect(address: Address) -> TCPStore:
    """A connection to a store.

    Raises:
        OSError, RuntimeError: nobody answers there.
    """
    socket.create_connection(address, DEADLINE).close()  # torch's client would try until its timeout if nobody listens.
    return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE))


class Stores:
    """All stores of a run, written to in the background.

    Args:
        addresses: of the stores.
        prefix: of all keys.
    """

    def __init__(self, addresses: Sequence[Address], prefix: str) -> None:
        self.addresses = tuple(addresses)
        self._links = [_Link(address, prefix) for address in addresses]

    def state(self, key: str, value: str) -> None:
        """A fact that lasts: set in every store, in those too that answer later only."""
        for link in self._links:
            with link.lock:
                link.facts[key] = value
            link.wake.set()

    def beat(self, key: str, value: str) -> None:
        """A value that the next one replaces: set in every store that answers now."""
        for link in self._links:
            with link.lock:
                link.beats[key] = value
            link.wake.set()

    def watch(self, key: str) -> None:
        """Have `seen` know this key."""
        for link in self._links:
            with link.lock:
                link.watched.append(key)

    def seen(self, key: str) -> list[str]:
        """What each store said last of a key that is watched; nothing from those that do not have it."""
        return [link.seen[key] for link in self._links if key in link.seen]

    def ask(self, question: Callable[[Store, str], R]) -> dict[Address, R]:
        """The answers of the stores that answer within `DEADLINE`, to a function of a store and the prefix; asked at once."""
        tasks = [_begin(partial(link.answer, question)) for link in self._links]
        answers = {}
        for address, task in zip(self.addresses, tasks, strict=True):
            if task.over.wait(DEADLINE):
                with contextlib.suppress(OSError, RuntimeError):
                    answers[address] = task.result()
        return answers

    def read(self, key: str) -> dict[Address, str]:
        """What each store that answers knows of a key; nothing from those that do not have it."""

        def get(store: Store, prefix: str) -> str | None:
            return store.get(prefix + key).decode() if store.check([prefix + key]) else None

        return {address: text for address, text in self.ask(get).items() if text is not None}

    def close(self, patience: float = DEADLINE) -> None:
        """Write what is left to write, if the stores take it within so many seconds, and end the threads."""
        for link in self._links:
            link.closing = True
            link.wake.set()
        for link in self._links:
            link.thread.join(patience)


class _Link:
    """One store, and the thread that writes into it."""

    def __init__(self, address: Address, prefix: str) -> None:
        self.lock, self.wake, self.closing = threading.Lock(), threading.Event(), False
        self.facts: dict[str, str] = {}
        self.beats: dict[str, str] = {}
        self.watched: list[str] = []
        self.seen: dict[str, str] = {}
        self._address, self._prefix = address, prefix
        self._client: TCPStore | None = None
        self._written: set[str] = set()
        self.thread = threading.Thread(target=self._run, daemon=True, name="fusedfog-store")
        self.thread.start()

    def answer(self, question: Callable[[Store, str], R]) -> R:
        """Ask over the connection that there is: torch's server looks up the name of each new one, which may take seconds."""
        return question(self._client or connect(self._address), self._prefix)

    def _run(self) -> None:
        while True:
            self.wake.wait(EVERY)
            self.wake.clear()
            closing = self.closing
            with self.lock:
                facts = {key: value for key, value in self.facts.items() if key not in self._written}
                beats, self.beats = self.beats, {}
                watched = list(self.watched)
            task = _begin(partial(self._exchange, facts, beats, watched))
            failed = not task.over.wait(DEADLINE)
            if not failed:
                try:
                    self.seen.update(task.result())
                    self._written |= facts.keys()
                except (OSError, RuntimeError):
                    failed = True
            if failed:  # A thread may be blocked inside the client; the next one is another store, perhaps.
                self._client, self._written = None, set()
            if closing:
                return

    def _exchange(self, facts: dict[str, str], beats: dict[str, str], watched: list[str]) -> dict[str, str]:
        client = self._client
        if client is None:
            self._client = client = connect(self._address)
        for key, value in {**beats, **facts}.items():
            client.set(self._prefix + key, value)
        for key, value in facts.items():
            if client.get(self._prefix + key).decode() != value:
                raise RuntimeError(f"the store has not kept {key}")
        client.check(
            [self._prefix]
        )  # Nothing else may have asked for an answer, and so noticed that the store is gone.
        here = [key for key in watched if client.check([self._prefix + key])]
        return {key: client.get(self._prefix + key).decode() for key in here}
