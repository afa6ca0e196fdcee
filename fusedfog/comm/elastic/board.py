"""The run's store: short questions with deadlines, to the first of several servers that answers.

torch's TCPStore blocks for ever on a host that has gone silent, loses what it sets on a connection that breaks, and `get` waits
for keys. So every question is asked by a thread that can be abandoned, what is set is read back where it matters, and nothing
here waits for a key.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from fusedfog.comm.waiter import Task
from fusedfog.errors import StoreLost

R = TypeVar("R")

DEADLINE = 5.0
"""Seconds in which a store answers; it does in less than a millisecond, or not at all."""


def open_store(host: str, port: int, timeout: timedelta = timedelta(seconds=DEADLINE)) -> TCPStore:
    """A connection of its own to the store of this address.

    Few should be made: torch's server looks up the name of whoever connects, and answers nobody meanwhile, for five seconds where
    no resolver answers.

    Raises:
        RuntimeError: nobody answers there.
    """
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


class Board:
    """What the members of a run write for each other; each thread has one of its own.

    Args:
        stores: (host, port) of the servers, in the order in which they are to be used.
        prefix: of all keys.

    Attributes:
        store: the connection that is used now.
        lost: the last question was answered by none of them.
    """

    def __init__(self, stores: tuple[tuple[str, int], ...], prefix: str) -> None:
        self.stores, self._prefix = stores, prefix
        self.store: TCPStore | None = None
        self._at = 0
        self.lost = False

    @property
    def address(self) -> tuple[str, int]:
        """Of the store that is used now."""
        return self.stores[self._at]

    def get(self, key: str) -> str | None:
        """What was set last; None if nothing was."""

        def read(store: Store) -> str | None:
            return store.get(self._prefix + key).decode() if store.check([self._prefix + key]) else None

        return self._ask(read)

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of them were set."""
        return self._ask(lambda store: bool(store.check([self._prefix + key for key in keys])))

    def read(self, key: str) -> Any:
        """The same from JSON; None also for what is none."""
        text = self.get(key)
        with contextlib.suppress(ValueError):
            return json.loads(text) if text is not None else None
        return None

    def set(self, key: str, value: str) -> None:
        """Set it, and see that it is there."""

        def write(store: Store) -> None:
            store.set(self._prefix + key, value)
            if store.get(self._prefix + key).decode() != value:
                raise RuntimeError(f"the store has not kept {key}")

        self._ask(write)

    def swap(self, key: str, old: str | None, new: str) -> str:
        """Set it if it is what it was, or is not there yet for None; what it is then."""

        def change(store: Store) -> str:
            return store.compare_set(self._prefix + key, old or "", new).decode()

        return self._ask(change)

    def count(self, key: str, more: int = 0) -> int:
        """A counter, after adding to it."""
        return self._ask(lambda store: int(store.add(self._prefix + key, more)))

    def delete(self, key: str) -> None:
        """Have it not be there."""
        self._ask(lambda store: store.delete_key(self._prefix + key))

    def _ask(self, question: Callable[[Store], R]) -> R:
        """The answer of the store that is used, or else of the first that answers.

        Raises:
            StoreLost: none does.
        """
        why = ""
        for place in [self._at, *(place for place in range(len(self.stores)) if place != self._at)]:
            if self.store is None or place != self._at:
                self.store, self._at = None, place
            task = Task(lambda place=place: question(self._client(place)))  # type: ignore[misc]
            if task.over.wait(DEADLINE):
                try:
                    answer = task.result()
                except (OSError, RuntimeError) as error:
                    why = str(error).split("\n")[0]
                else:
                    self.lost = False
                    return answer
            else:
                why = f"no answer within {DEADLINE:g} s"
            self.store = None  # A thread may be blocked inside it.
        self._at, self.lost = 0, True
        where = ", ".join(f"{host}:{port}" for host, port in self.stores)
        raise StoreLost(f"no store of this run answers ({where}): {why}")

    def _client(self, place: int) -> TCPStore:
        store = self.store
        if store is None:
            if self.lost:
                # The store's own client tries again until its timeout if nobody listens.
                socket.create_connection(self.stores[place], DEADLINE).close()
            store = open_store(*self.stores[place])
            self.store = store
        return store
