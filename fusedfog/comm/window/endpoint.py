"""One rank's end of a window: its edges, the thread that answers neighbours, and the waits that name who does not answer."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from fusedfog.comm.failures import LOOK_EVERY
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.comm.window import answers
from fusedfog.comm.window.edge import Message
from fusedfog.comm.window.links import InLink, Link, OutLink
from fusedfog.comm.window.region import Layout
from fusedfog.comm.window.service import OFTEN, Service
from fusedfog.comm.window.staging import Staging
from fusedfog.comm.window.wire import Say
from fusedfog.errors import ExchangeError, PeerTimeout

LAST_MOMENT = 5.0
"""Seconds that messages in flight get when a window is closed."""

L = TypeVar("L", bound=Link)

Source = Callable[[], tuple[Tensor, float]]
"""The rank's own values, [count], and their mass."""


@dataclass(frozen=True)
class Identity:
    """Who this is, for errors: its rank, and the window's name."""

    rank: int
    name: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.name}"


def _see_nothing() -> None:
    """Where nobody looks: the wait ends as its links say, or by its timeout."""


def _failure(text: str, gone: Sequence[Link]) -> ExchangeError:
    """An error that says, for programs, with which rank it began."""
    found = ExchangeError(text)
    for link in gone[:1]:
        found.origin, found.origin_words = link.peer, link.gone
    return found


class Endpoint:
    """What one rank has of a window.

    Args:
        identity: for errors.
        layout: of every edge that is shared memory.
        timeout: seconds that a wait may last, if it is given no other.
        source: what peers get; called with `lock`.
        staging: what the device of these values needs.

    Attributes:
        lock: held while own values or inboxes are read or changed.
        changed: notified whenever a wait may have ended.
        out: by receiver, the edges on which this rank sends.
        into: by sender, those on which it receives.
    """

    _all: ClassVar[weakref.WeakSet[Endpoint]] = weakref.WeakSet()

    def __init__(self, identity: Identity, layout: Layout, timeout: float, source: Source, staging: Staging) -> None:
        self.identity, self.layout, self.timeout, self.source, self.staging = identity, layout, timeout, source, staging
        self.lock = threading.RLock()
        self.changed = threading.Condition()
        self.out: dict[int, OutLink] = {}
        self.into: dict[int, InLink] = {}
        self.service = Service(f"fusedfog-window-{identity.rank}", self._tick, staging.settle_in)
        self.closed = ""
        self._changes = 0
        self._forked = False
        Endpoint._all.add(self)

    # What the program calls.

    def check(self) -> None:
        """Raise RuntimeError in a window that is closed, or in a process that was forked from the window's."""
        if self._forked:
            raise RuntimeError(
                f"{self.identity}: this process was forked from the one that built the window, and has no part in it; use the "
                f"window in the process that built it"
            )
        if self.closed:
            raise RuntimeError(f"{self.identity}: {self.closed}")

    def hold(self, values: Tensor) -> Tensor:
        """The values as they are now, to be sent, to several neighbours perhaps; for the window's user."""
        self.staging.follow()
        return self.staging.hold(values)

    def send(self, peer: int, message: Message) -> None:
        """Send what `hold` has returned to a neighbour; never waits for it."""
        link = self.out[peer]
        link.send(message)
        if link.sender.waits:
            self.service.ring()

    def alive(self) -> dict[int, bool]:
        """By neighbour, whether its process lives and has its window open, as far as is known by now."""
        found: dict[int, bool] = {}
        for link in self.links():
            found[link.peer] = found.get(link.peer, True) and not link.gone
        return dict(sorted(found.items()))

    def links(self) -> list[Link]:
        """All edges."""
        return [*self.out.values(), *self.into.values()]

    def fence(
        self, timeout: float | None, peers: Iterable[int] | None = None, look: Callable[[], object] = _see_nothing
    ) -> None:
        """Wait until all that was sent lies where its receiver's program finds it, and the receivers have said so.

        Args:
            timeout: in seconds; None for the window's.
            peers: the receivers; None for all.
            look: called now and then; raises if the wait is in vain.

        Raises:
            PeerTimeout: a receiver did not confirm in time.
            ExchangeError: one died before it confirmed; once for the same messages.
        """
        links = [self.out[peer] for peer in (self.out if peers is None else peers)]
        sent = {link.peer: link.sender.sent for link in links}
        pinged: dict[int, int] = {}

        def confirmed(link: OutLink) -> bool:
            if link.peer not in pinged and link.delivered:
                with self.changed:
                    link.pings += 1
                    pinged[link.peer] = link.pings
                self.say(link, Say.PING, pinged[link.peer])
            return link.peer in pinged and link.pong >= pinged[link.peer]

        try:
            gone = self.wait("fence", links, confirmed, timeout, look)
        finally:
            lost = [link.peer for link in links if link.gone and not link.left and link.confirmed < sent[link.peer]]
            for link in links:
                if link.gone or confirmed(link):
                    link.confirmed = max(link.confirmed, sent[link.peer])
        if lost:
            those = [link for link in gone if link.peer in lost]
            raise _failure(
                f"{self.identity}: fence: {name_ranks(lost)} ended before what was sent there had been confirmed "
                f"({'; '.join(link.gone for link in those)}); all others have it",
                those,
            )

    def get(self, weights: Mapping[int, float]) -> None:
        """Ask neighbours for their values times a weight, and wait until they lie in the inboxes.

        Raises:
            PeerTimeout: a neighbour did not answer in time.
            ExchangeError: one has gone.
        """
        links = [self.into[peer] for peer in weights]
        numbers = {}
        for link in links:
            with self.changed:
                link.asked += 1
                numbers[link.peer] = link.asked
            self.say(link, Say.GET, numbers[link.peer], weights[link.peer])
        gone = self.wait("get", links, lambda link: link.answered >= numbers[link.peer], None)
        self._all_there("get", gone)

    @contextlib.contextmanager
    def mutex(self, out: Iterable[int], into: Iterable[int], timeout: float | None) -> Iterator[None]:
        """Hold the mutexes of these edges inside. They are taken in one order by all ranks, so that none waits in a circle.

        Raises:
            PeerTimeout: another rank holds one for too long, or did not answer.
            ExchangeError: a receiver of an edge has gone.
        """
        me = self.identity.rank
        edges = sorted([(peer, me) for peer in out] + [(me, peer) for peer in into])
        with contextlib.ExitStack() as held:
            for receiver, sender in edges:
                held.enter_context(
                    self._own_mutex(self.into[sender], timeout)
                    if receiver == me
                    else self._peers_mutex(self.out[receiver], timeout)
                )
            yield

    @contextlib.contextmanager
    def _peers_mutex(self, link: OutLink, timeout: float | None) -> Iterator[None]:
        with self.changed:
            link.claims += 1
            number = link.claims
        self.say(link, Say.TAKE, number)
        try:
            gone = self.wait("mutex", [link], lambda one: one.granted == number, timeout)
            self._all_there("mutex", gone)
            yield
        finally:
            if not link.gone:
                self.say(link, Say.LEAVE, number)

    @contextlib.contextmanager
    def _own_mutex(self, link: InLink, timeout: float | None) -> Iterator[None]:
        with self.changed:
            link.claims += 1
            claim = ("own", link.claims)
        link.gate.take(claim)
        try:
            # A peer that has gone holds nothing.
            self.wait("mutex", [link], lambda one: one.gate.holds(claim), timeout)
            yield
        finally:
            answers.grant(self, link, link.gate.leave(claim))

    def wait(
        self,
        what: str,
        links: Sequence[L],
        done: Callable[[L], bool],
        timeout: float | None,
        look: Callable[[], object] = _see_nothing,
    ) -> list[L]:
        """Wait until `done` is true of each link, or its peer has gone; returns those of the second kind.

        Raises:
            PeerTimeout: some are neither in time; names them.
            RuntimeError: the window was closed meanwhile.
        """
        limit = self.timeout if timeout is None else timeout
        deadline, left, gone = time.monotonic() + limit, list(links), []
        while True:
            seen = self._changes
            self.check()
            left = [link for link in left if not done(link)]
            gone += [link for link in left if link.gone]
            left = [link for link in left if not link.gone]
            if not left:
                return gone
            now = time.monotonic()
            if now >= deadline:
                raise PeerTimeout(
                    f"{self.identity}: {what}: nothing from {name_ranks(link.peer for link in left)} within {limit:g} s: "
                    f"{_WHY[what]}"
                )
            look()
            busy = any(isinstance(link, OutLink) and link.sender.waits for link in left)
            with self.changed:
                if seen == self._changes:
                    self.changed.wait(min(deadline - now, OFTEN if busy else LOOK_EVERY))

    def _all_there(self, what: str, gone: Sequence[Link]) -> None:
        if gone:
            reasons = "; ".join(f"rank {link.peer} {link.gone}" for link in gone)
            raise _failure(f"{self.identity}: {what} cannot be: {reasons}", gone)

    def notify(self) -> None:
        """Something has changed: let those who wait look again."""
        with self.changed:
            self._changes += 1
            self.changed.notify_all()

    def say(self, link: Link, say: Say, number: int = 0, weight: float = 0.0) -> None:
        """Say something to a peer; never waits for it."""
        if link.control is not None and not link.gone and not link.control.say(say, number, weight):
            self.service.ring()

    # Ends.

    def close(self, patience: float = LAST_MOMENT) -> None:
        """Close this end; what is in flight gets `patience` seconds. Other ranks need not close theirs."""
        if self.closed or self._forked:
            return
        self.closed = "the window is closed"
        self.notify()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not all(link.gone or link.delivered for link in self.out.values()):
            time.sleep(OFTEN / 10)
        for link in self.links():
            self.say(link, Say.BYE)
        self.service.stop()
        # Another thread may be in the middle of a put.
        held = self.lock.acquire(timeout=patience)
        for link in self.links():
            if link.courier is not None:
                link.courier.stop()
            link.close_connections()
        if held:
            for out in self.out.values():
                out.sender.copies.wait()
                out.sender.region.close()
            for into in self.into.values():
                into.inbox.copies.wait()
                into.region.close()
            self.lock.release()

    def forget(self) -> None:
        """In a forked process: close the descriptors, and nothing else. The threads and the locks are the parent's."""
        self._forked = True
        if not self.closed:
            self.service.close_descriptors()
            for link in self.links():
                link.close_connections()

    @classmethod
    def forget_all(cls) -> None:
        """The same for all of this process."""
        for endpoint in list(cls._all):
            endpoint.forget()

    def _tick(self) -> bool:
        return any([answers.answer(self, link) for link in list(self.out.values())])


_WHY = {
    "fence": "it is stopped, cut off, or very busy, and may lack what was sent last",
    "get": "it is stopped, cut off, or very busy, or its program holds the window's lock",
    "mutex": "a rank holds it for longer than that, or is stopped or cut off",
}

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Endpoint.forget_all)
