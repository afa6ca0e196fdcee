"""What a window's thread does when a neighbour says something, or has gone. It waits for nobody, its own program included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from fusedfog.comm.window.edge import Kind, Message
from fusedfog.comm.window.gate import Claim
from fusedfog.comm.window.links import InLink, Link, OutLink
from fusedfog.comm.window.service import Service
from fusedfog.comm.window.staging import Staging
from fusedfog.comm.window.wire import Frame, Malformed, Say
from fusedfog.log import log

LEFT = "has closed its window, or ended"
DIED = "has ended"


class Here(Protocol):
    """The rank that answers; an `Endpoint` is that."""

    identity: Any
    lock: Any
    source: Callable[[], tuple[Tensor, float]]
    service: Service
    staging: Staging

    def say(self, link: Link, say: Say, number: int = 0, weight: float = 0.0) -> None:
        """Say something to a peer."""

    def notify(self) -> None:
        """Let those who wait look again."""


def hear(here: Here, link: Link) -> None:
    """Read what a neighbour says, and do what it asks."""
    assert link.control is not None
    try:
        link.control.flush()
        for frame in link.control.read():
            if frame.say is Say.BYE:
                link.left = True
                lose(here, link, LEFT)
                return
            if isinstance(link, OutLink):
                _from_receiver(link, frame)
            elif isinstance(link, InLink):
                _from_sender(here, link, frame)
    except ConnectionError:
        lose(here, link, DIED)
    except Malformed as error:
        log.warning(
            "%s: rank %d says what no window says (%s); its connection is closed", here.identity, link.peer, error
        )
        lose(here, link, f"said what no window says ({error})")
    here.notify()


def _from_receiver(link: OutLink, frame: Frame) -> None:
    if frame.say is Say.GET:
        link.wanted.append((frame.number, frame.weight))
    elif frame.say is Say.PONG:
        link.pong = max(link.pong, frame.number)
    elif frame.say is Say.GRANTED:
        link.granted = frame.number
    else:
        raise Malformed(f"{frame.say.name}, which is its sender's to say")


def _from_sender(here: Here, link: InLink, frame: Frame) -> None:
    if frame.say is Say.GOT:
        link.answered = max(link.answered, frame.number)
    elif frame.say is Say.PING:
        here.say(link, Say.PONG, frame.number)
    elif frame.say is Say.TAKE:
        if link.gate.take(("peer", frame.number)):
            here.say(link, Say.GRANTED, frame.number)
    elif frame.say is Say.LEAVE:
        grant(here, link, link.gate.leave(("peer", frame.number)))
    else:
        raise Malformed(f"{frame.say.name}, which is its receiver's to say")


def grant(here: Here, link: InLink, claim: Claim | None) -> None:
    """Tell whoever holds an edge's mutex now."""
    if claim is not None and claim[0] == "peer":
        here.say(link, Say.GRANTED, claim[1])
    here.notify()


def answer(here: Here, link: OutLink) -> bool:
    """Answer the gets of a neighbour, as far as that goes without waiting; whether something remains for later."""
    if link.gone:
        return False
    if link.wanted and here.lock.acquire(blocking=False):
        try:
            with here.staging.as_program():
                values, mass = here.source()
                values = here.staging.hold(values)
            while link.wanted:
                number, weight = link.wanted.pop(0)
                link.send(Message(Kind.PUT, values, weight, mass * weight, answered=number))
                link.answered = number
        finally:
            here.lock.release()
    published = link.flush()
    if published and link.told < link.answered and link.courier is None:
        link.told = link.answered
        here.say(link, Say.GOT, link.told)
    return bool(link.wanted) or not published


def lose(here: Here, link: Link, why: str) -> None:
    """Nothing comes from this peer any more: note why, and let nobody wait for it. Called in any thread."""
    if not link.gone:
        link.gone = why
        log.debug("%s: rank %d %s", here.identity, link.peer, why)
        if isinstance(link, InLink):
            grant(here, link, link.gate.drop("peer"))
    if link.control is not None:
        here.service.ignore(link.control.connection)
    if isinstance(link, OutLink) and link.process is not None:
        here.service.ignore(link.process)
    if link.courier is not None:
        link.courier.cancel()
    here.notify()


def lose_messages(here: Here, link: Link, why: str) -> None:
    """The connection for messages broke. A peer that has left has said so over the other one, which is read first."""

    def decide() -> None:
        if not link.gone and link.control is not None:
            hear(here, link)
        lose(here, link, f"cannot be reached any more ({why})")

    here.service.do(decide)
