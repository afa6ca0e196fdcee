"""Every call that ranks make together announces itself, so that a rank which waits can be told who is where.

    with Call("averaged()", view):          # in the process alone: nothing is sent
        ...

A thread of each process logs a call that lasts longer than `FUSEDFOG_WAIT_LOG_S` seconds (20 by default, or half of the process
group's timeout where that is less), with what all ranks are doing, and answers other ranks' questions. An error of the
network that leaves a call, torch's own texts among them, becomes one of ours that says the same.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from types import TracebackType
from typing import ClassVar, ParamSpec, TypeVar

import torch.distributed as dist

from fusedfog.comm import whereabouts
from fusedfog.comm.failures import Origin, Vigil, find, origin_of, set_origin
from fusedfog.comm.group import Ranks, find_group, members_of
from fusedfog.comm.listener import Listener
from fusedfog.comm.membership import is_timeout, torchs_words
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import State, World
from fusedfog.errors import ExchangeError, PeerTimeout, RankLeft
from fusedfog.log import log

_LOG_AFTER, _REMEMBERED = 20.0, 8
_NETWORK = re.compile(
    r"gloo|nccl|tcpstore|filestore|socket|connection (closed|reset|refused|was)|broken pipe|timed out|timeout"
    r"|failed to (recv|send)",
    re.IGNORECASE,
)
"""What torch's texts about the network have in common; a call's own errors are of types of their own, or say other things."""

P = ParamSpec("P")
R = TypeVar("R")


class _Here:
    """What this process is doing.

    Attributes:
        calls: those that it is in, the outermost first.
        last: the last outermost one that it left.
        failed: the last one that an error of the network ended, until another is entered.
        count: how many were entered.
        world, watch: its place among the others, and the thread that answers them; None before the first exchange.
        shortest: the shortest timeout of a group, in seconds.
        ended: the latest communicators that were given up, and why, for `State.ended`.
        listeners: by the name of a communicator, who is to hear that another rank has given it up.
    """

    calls: ClassVar[list[Call]] = []
    last: ClassVar[Call | None] = None
    failed: ClassVar[State | None] = None
    count: ClassVar[int] = 0
    world: ClassVar[World | None] = None
    watch: ClassVar[Listener | None] = None
    shortest: ClassVar[float] = math.inf
    ended: ClassVar[tuple[tuple[str, int, str, bool], ...]] = ()
    listeners: ClassVar[dict[str, weakref.WeakMethod[Callable[[Origin], None]]]] = {}

    @classmethod
    def state(cls) -> State:
        """The same, for others."""
        calls, last = cls.calls[:1], str(cls.last or "")
        own = cls.failed or State(str(calls[0]) if calls else "", last, count=cls.count)
        return replace(own, ended=own.ended + cls.ended)

    @classmethod
    def hear(cls, state: State) -> None:
        """Another rank says what it has given up."""
        for name, rank, words, late in state.ended:
            listener = cls.listeners.get(name, lambda: None)()
            if listener is not None:
                listener(Origin(rank, words, late))


class Call:
    """A call that ranks make together, while it lasts; one inside another counts as the other.

    Args:
        name: as users write it: "averaged()".
        view: the ranks that make it; None for those of the default group.
        detail: which one it is, of many: the number of a step.

    Raises, in place of torch's errors of the network:
        PeerTimeout, ExchangeError: with who is where. An `ExchangeError` is a `PeerTimeout` if another rank has given up first.
    """

    __slots__ = ("detail", "logged", "name", "since", "view")

    def __init__(self, name: str, view: Ranks | None = None, detail: object = "") -> None:
        self.name, self.view, self.detail, self.logged = name, view, detail, 0

    def __str__(self) -> str:
        return f"{self.name} {self.detail}" if self.detail != "" else self.name

    def __enter__(self) -> None:
        self.since, _Here.failed, _Here.count = time.monotonic(), None, _Here.count + 1
        _Here.calls.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        calls = _Here.calls
        try:
            if error is not None and calls[0] is self and isinstance(error, RuntimeError):
                explained = self._explain(error)
                if explained is not None:
                    # Its traceback would keep gloo's works alive, and with them connections.
                    raise explained from error.with_traceback(None)
        finally:
            if self in calls:
                calls.remove(self)
            if not calls:
                _Here.last = self

    def _explain(self, error: RuntimeError) -> RuntimeError | None:
        """Put who is where into an error of ours; or the error that is to be raised instead."""
        if isinstance(error, RankLeft) or not dist.is_initialized():
            return None
        own = error if isinstance(error, (PeerTimeout, ExchangeError)) else None
        if own.explained if own is not None else not is_network_error(error):
            return None
        view = self.view or find_group()
        late = is_timeout(error) or isinstance(error, PeerTimeout)
        _Here.failed = State(str(self), failed=True, late=late, count=_Here.count)
        origin = origin_of(own)
        if origin is not None:
            _Here.failed = replace(_Here.failed, ended=(origin.plain(self.name),))
            states = ask(view, _Here.state())
        else:
            states, origin = ask_why(view, self.name, _Here.failed)
            if origin is not None:
                _Here.failed = replace(_Here.failed, ended=(origin.plain(self.name),))
                ask(view, _Here.state(), whereabouts.QUICKLY)
        where = whereabouts.sentence(view.ranks, states) if states else ""
        late = late or any(state.late for state in states.values())
        text = str(own) if own is not None else f"rank {view.rank}: {self}: {torchs_words(error)}"
        text += f"{'' if text[-1:] in '.?!' else '.'}{_began_with(view, origin)}{f' Who is where: {where}' if where else ''}"
        found = own
        if own is not None and late == isinstance(own, PeerTimeout):
            # The same object is raised again by what else needs the lost message.
            own.args = (text, *own.args[1:])
        else:
            found = PeerTimeout(text) if late else ExchangeError(text)
        assert found is not None
        found.explained = True
        set_origin(found, view, origin)
        return None if found is own else found


def lost(view: Ranks, where: str, origin: Origin) -> PeerTimeout | ExchangeError:
    """The error of a wait that is in vain; `where` says which rank waits for what."""
    kind = PeerTimeout if origin.late else ExchangeError
    found = kind(f"{where}: waited for {_name(view, origin)}, which {origin.words}")
    set_origin(found, view, origin)
    return found


def _name(view: Ranks, origin: Origin) -> str:
    known = origin.rank in view.ranks
    return f"rank {view.ranks.index(origin.rank)}" if known else f"global rank {origin.rank}"


def given_up(view: Ranks, origin: Origin) -> PeerTimeout | ExchangeError:
    """The error of a rank that was told so by another one."""
    call = current_call()
    why = f"{_name(view, origin)} {origin.words}" if origin.rank >= 0 else origin.words
    found = (PeerTimeout if origin.late else ExchangeError)(
        f"rank {view.rank}: {f'{call}: ' if call else ''}no exchange of this group can be complete: {why}"
    )
    set_origin(found, view, origin)
    return found


def _began_with(view: Ranks, origin: Origin | None) -> str:
    """ " It began with rank 2, which has ended."; nothing if it is not known."""
    known = origin is not None and origin.rank in view.ranks
    return f" It began with rank {view.ranks.index(origin.rank)}, which {origin.words}." if origin and known else ""


def collective(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a `Call` of the ranks of its keyword `group`, or `mesh`."""

    def of(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with Call(name, members_of(kwargs.get("mesh", kwargs.get("group")))):
                return function(*args, **kwargs)

        return call

    return of


def current_call() -> str:
    """The outermost call that this process is in; "" for none."""
    return str(_Here.calls[0]) if _Here.calls else ""


def current_ranks() -> Ranks | None:
    """The ranks that make the outermost call that this process is in; None if it does not say."""
    return _Here.calls[0].view if _Here.calls else None


def leave_word(view: Ranks, last: str) -> None:
    """Tell the ranks of `view` what this one did last, for when it has ended by the time they ask."""
    _Here.last = Call(last)
    ask(view, State(last=last, failed=True, count=_Here.count))


def is_network_error(error: BaseException) -> bool:
    """Whether torch raised this because of another rank, the store or what is in between."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_NETWORK.search(str(error))))


def ask(view: Ranks, own: State | None = None, patience: float = whereabouts.PATIENCE) -> dict[int, State]:
    """Where the ranks of `view` are, by global rank; nothing of those whose addresses cannot be had."""
    world = _Here.world
    if world is None or not world.exists():
        return {}
    unknown = {rank: State(fate=whereabouts.UNKNOWN) for rank in _look_up(world, view.ranks)}
    asked = [rank for rank in view.ranks if rank not in unknown]
    return unknown | whereabouts.ask(world, asked, own or _Here.state(), patience)


def _look_up(world: World, ranks: Iterable[int]) -> list[int]:
    """Find out where these ranks listen; those of which it cannot be known, as the store has gone."""
    missing = [rank for rank in ranks if rank not in world.addresses and rank != world.rank]
    try:
        if missing:
            world.look_up(missing, own_store())
    except RuntimeError:
        return [rank for rank in missing if rank not in world.addresses]
    return []


def ask_why(view: Ranks, name: str, own: State, first: Iterable[int] = ()) -> tuple[dict[int, State], Origin | None]:
    """Where ranks are and where the failure began, for an error; if a connection broke, once that is known.

    Args:
        name: of the communicator that failed, or the call.
        own: what this rank says of itself.
        first: global ranks that were waited for.
    """
    deadline = time.monotonic() + whereabouts.PATIENCE
    while True:
        states = ask(view, own)
        if _Here.world is None or not states:
            return states, None
        origin = find(_Here.world, states, name, first)
        others = [state for rank, state in states.items() if rank != _Here.world.rank]
        if origin is None and own.late:
            silent = [rank for rank in first if rank in states and states[rank].fate == whereabouts.SILENT]
            origin = Origin(silent[0], whereabouts.SILENT, late=True) if silent else None
        # Who lost a connection, as this rank did, is not the cause.
        if origin is not None or own.late or any(state.late for state in others) or all(s.failed for s in others):
            return states, origin
        if time.monotonic() > deadline:
            return states, None
        time.sleep(0.05)


def tell(view: Ranks, name: str, origin: Origin) -> None:
    """Say to the ranks of `view`, now and whenever they ask, that the communicator `name` is given up, and why."""
    note_ended(name, origin)
    ask(view, None, whereabouts.QUICKLY)


def note_ended(name: str, origin: Origin) -> None:
    """Say to whoever asks that the communicator `name` is given up, and why; nobody is interrupted."""
    _Here.ended = (*_Here.ended[1 - _REMEMBERED :], origin.plain(name))


def listen(name: str, hear: weakref.WeakMethod[Callable[[Origin], None]]) -> None:
    """Have `hear` called, by another thread, when a rank says that it has given the communicator `name` up."""
    _Here.listeners = {known: old for known, old in _Here.listeners.items() if old() is not None} | {name: hear}


def vigil(communicator: str = "", members: Iterable[int] = ()) -> Vigil | None:
    """For a wait in the communicator of this name and these ranks, or in the current call; None where nobody can be asked."""
    world = _Here.world
    if world is None or not world.exists():
        return None
    call, ranks = _Here.calls[0].name if _Here.calls else "", current_ranks()
    needed = set(ranks.ranks if ranks is not None else ()).difference(members)
    _look_up(world, needed)
    return Vigil(world, communicator or call, _Here.state(), lasting=bool(communicator), needed=needed)


def where(view: Ranks) -> str:
    """Who of these ranks is where, as a sentence; "" where there is nobody to ask. For threads that nobody waits for."""
    with contextlib.suppress(RuntimeError, ValueError, KeyError):  # The group may be destroyed under them.
        states = ask(view)
        return whereabouts.sentence(view.ranks, states) if states else ""
    return ""


def enter_world(timeout: float) -> None:
    """Let the other ranks of the default group know where to ask this one; called before anything is exchanged."""
    group = dist.distributed_c10d._get_default_group()
    _Here.shortest = min(_Here.shortest, timeout)
    if _Here.world is not None and _Here.world.group is group:
        return
    store = own_store()
    _Here.shortest, _Here.failed, _Here.last = timeout, None, None
    _Here.ended, _Here.listeners = (), {}  # Names of communicators begin anew.
    with contextlib.suppress(OSError):  # Without sockets, errors say less.
        if _Here.watch is None:
            _Here.watch = Listener(*whereabouts.listen(store), _answer, _look_at_own_call, lambda: log_after() / 4)
        _Here.world = whereabouts.new_world(group, store, _Here.watch.port, _Here.watch.ip, _Here.hear)


def change_world(timeout: float, overseer: Callable[[Mapping[int, State]], tuple[int, str] | None]) -> None:
    """`enter_world`, where calls that this process is in are those of the ranks that there are now; see `World.overseer`."""
    for call in _Here.calls:
        call.view = None  # The group that it has begun with is no more.
    enter_world(timeout)
    assert _Here.world is not None
    _Here.world.overseer = overseer


def remember_addresses(view: Ranks) -> None:
    """Find out where the ranks of `view` listen, those that have said it, for when the store may have gone."""
    if _Here.world is not None:
        _Here.world.look_up(view.ranks, own_store())


def reach(view: Ranks) -> None:
    """The same, now that all of them have come; and see who can be asked, since a firewall's refusal is nobody's end."""
    remember_addresses(view)
    ask(view)


def log_after() -> float:
    """Seconds after which a call is logged."""
    limit = _LOG_AFTER
    with contextlib.suppress(ValueError):
        limit = float(os.environ.get("FUSEDFOG_WAIT_LOG_S", _LOG_AFTER))
    return min(limit, _Here.shortest / 2)


def _answer(connection: socket.socket) -> None:
    whereabouts.answer(connection, _Here.world, _Here.state())


def _look_at_own_call() -> threading.Thread | None:
    """Log the current call if it is time, in a thread: the listener goes on answering those who ask at the same moment."""
    calls = _Here.calls[:1]
    if not calls or time.monotonic() - calls[0].since < log_after() * 2 ** calls[0].logged:
        return None
    calls[0].logged += 1
    return threading.Thread(target=_log, args=(calls[0],), daemon=True, name="fusedfog-whereabouts-log")


def _log(call: Call) -> None:
    with contextlib.suppress(RuntimeError, ValueError, KeyError):  # The group may be destroyed under this thread.
        view = call.view or find_group()
        if len(view.ranks) > 1:
            text, waited = where(view), time.monotonic() - call.since
            if text and call in _Here.calls:
                log.warning("rank %d has been in %s for %.0f s: %s", view.rank, call, waited, text)


@atexit.register
def _stop() -> None:
    world = _Here.world
    if world is not None and not hasattr(sys, "last_value"):  # Not by an exception that nobody has caught.
        last = State(last=str(_Here.last or ""), failed=True, count=_Here.count)
        whereabouts.ask(world, list(world.addresses), last, whereabouts.QUICKLY)
    if _Here.watch is not None:
        _Here.watch.stop()


def _forget() -> None:
    if _Here.watch is not None:
        _Here.watch.forget()
    _Here.watch = _Here.world = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
