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
import logging
import math
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

import torch.distributed as dist

from fusedfog.comm import whereabouts
from fusedfog.comm.group import find_group
from fusedfog.comm.membership import is_timeout, torchs_words
from fusedfog.comm.whereabouts import State, World
from fusedfog.errors import ExchangeError, PeerTimeout, RankLeft

log = logging.getLogger("fusedfog")

_LOG_AFTER = 20.0
_NETWORK = re.compile(
    r"gloo|nccl|tcpstore|filestore|socket|connection (closed|reset|refused|was)|broken pipe|timed out|timeout"
    r"|failed to (recv|send)",
    re.IGNORECASE,
)
"""What torch's texts about the network have in common; a call's own errors are of types of their own, or say other things."""


class Ranks(Protocol):
    """Some ranks, this one among them; a `GroupView` is that."""

    @property
    def rank(self) -> int:
        """This rank's place."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """All of them, by global rank."""


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
    """

    calls: ClassVar[list[Call]] = []
    last: ClassVar[Call | None] = None
    failed: ClassVar[State | None] = None
    count: ClassVar[int] = 0
    world: ClassVar[World | None] = None
    watch: ClassVar[_Watch | None] = None
    shortest: ClassVar[float] = math.inf

    @classmethod
    def state(cls) -> State:
        """The same, for others."""
        calls, last = cls.calls[:1], str(cls.last or "")
        return cls.failed or State(str(calls[0]) if calls else "", last, count=cls.count)


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
        self.name, self.view, self.detail = name, view, detail
        self.logged = 0

    def __str__(self) -> str:
        return f"{self.name} {self.detail}" if self.detail != "" else self.name

    def __enter__(self) -> None:
        self.since, _Here.failed = time.monotonic(), None
        _Here.count += 1
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
        states = _ask_why(view, _Here.failed)
        where = whereabouts.sentence(view.ranks, states) if states else ""
        late = late or any(state.late for state in states.values())
        text = str(own) if own is not None else f"rank {view.rank}: {self}: {torchs_words(error)}"
        text += f"{'' if text[-1:] in '.?!' else '.'} Who is where: {where}" if where else ""
        if own is not None and late == isinstance(own, PeerTimeout):
            # The same object is raised again by what else needs the lost message.
            own.args, own.explained = (text, *own.args[1:]), True
            return None
        found = PeerTimeout(text) if late else ExchangeError(text)
        found.explained = True
        return found


def collective(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a `Call` of the ranks of its keyword `group`."""

    def of(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            group = kwargs.get("group")
            with Call(name, find_group(group) if isinstance(group, dist.ProcessGroup) else None):
                return function(*args, **kwargs)

        return call

    return of


def current_call() -> str:
    """The outermost call that this process is in; "" for none."""
    return str(_Here.calls[0]) if _Here.calls else ""


def leave_word(view: Ranks, last: str) -> None:
    """Tell the ranks of `view` what this one did last, for when it has ended by the time they ask."""
    _Here.last = Call(last)
    ask(view, State(last=last, failed=True, count=_Here.count))


def is_network_error(error: BaseException) -> bool:
    """Whether torch raised this because of another rank, the store or what is in between."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_NETWORK.search(str(error))))


def ask(view: Ranks, own: State | None = None) -> dict[int, State]:
    """Where the ranks of `view` are, by global rank; nothing of those whose addresses cannot be had."""
    world = _Here.world
    if world is None or not world.exists():
        return {}
    missing = [rank for rank in view.ranks if rank not in world.addresses and rank != dist.get_rank()]
    unknown = {}
    try:
        if missing:
            # Another thread may be blocked inside the client that all use.
            store: Any = dist.distributed_c10d._get_default_store()
            world.look_up(missing, store.clone())
    except (RuntimeError, NotImplementedError):
        unknown = {rank: State(fate=whereabouts.UNKNOWN) for rank in missing if rank not in world.addresses}
    asked = [rank for rank in view.ranks if rank not in unknown]
    return unknown | whereabouts.ask(world, asked, own or _Here.state())


def _ask_why(view: Ranks, own: State) -> dict[int, State]:
    """The same, for an error; if it was a connection that broke, once it is known who ended, or gave up and closed it."""
    deadline = time.monotonic() + whereabouts.PATIENCE
    while True:
        states = ask(view, own)
        others = [state for state in states.values() if state is not own]
        # Who lost a connection, as this rank did, is not the cause.
        known = any(state.fate or state.late for state in others) or all(state.failed for state in others)
        if own.late or known or time.monotonic() > deadline:
            return states
        time.sleep(0.05)


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
    store = dist.distributed_c10d._get_default_store()
    _Here.shortest, _Here.failed, _Here.last = timeout, None, None
    with contextlib.suppress(OSError):  # Without sockets, errors say less.
        if _Here.watch is None:
            _Here.watch = _Watch(*whereabouts.listen(store))
        _Here.world = whereabouts.new_world(group, store, _Here.watch.port, _Here.watch.ip)


def remember_addresses(view: Ranks) -> None:
    """Find out where the ranks of `view` listen, now that all of them have come, for when the store may have gone."""
    if _Here.world is not None:
        _Here.world.look_up(view.ranks, dist.distributed_c10d._get_default_store())


def log_after() -> float:
    """Seconds after which a call is logged."""
    try:
        limit = float(os.environ.get("FUSEDFOG_WAIT_LOG_S", _LOG_AFTER))
    except ValueError:
        limit = _LOG_AFTER
    return min(limit, _Here.shortest / 2)


class _Watch:
    """The thread that answers other ranks, and logs this one's long calls. It never waits for anybody.

    Attributes:
        port, ip: where it listens.
    """

    def __init__(self, listener: socket.socket, ip: str) -> None:
        self.port, self.ip = int(listener.getsockname()[1]), ip
        self._listener = listener
        self._bell, self._rope = socket.socketpair()
        self._threads = [threading.Thread(target=self._run, daemon=True, name="fusedfog-whereabouts")]
        self._threads[0].start()

    def stop(self) -> None:
        """End the thread; for the end of the process."""
        self._rope.close()
        for thread in self._threads:
            thread.join(2 * whereabouts.PATIENCE)

    def forget(self) -> None:
        """In a forked process: there is no thread, and whoever asks at this port must hear that nobody listens."""
        for end in (self._listener, self._bell, self._rope):
            end.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._listener, selectors.EVENT_READ)
            waiting.register(self._bell, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select(max(0.05, min(1.0, log_after() / 4))):
                    if key.fileobj is self._bell:
                        return
                    with contextlib.suppress(OSError):
                        whereabouts.answer(self._listener.accept()[0], _Here.world, _Here.state())
                self._look_at_own_call()

    def _look_at_own_call(self) -> None:
        calls = _Here.calls[:1]
        if not calls or time.monotonic() - calls[0].since < log_after() * 2 ** calls[0].logged:
            return
        calls[0].logged += 1
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        # This thread goes on answering those who ask at the same moment.
        self._threads.append(
            threading.Thread(target=_log, args=(calls[0],), daemon=True, name="fusedfog-whereabouts-log")
        )
        self._threads[-1].start()


def _log(call: Call) -> None:
    with contextlib.suppress(RuntimeError, ValueError, KeyError):  # The group may be destroyed under this thread.
        view = call.view or find_group()
        if len(view.ranks) > 1:
            text, waited = where(view), time.monotonic() - call.since
            if text and call in _Here.calls:
                log.warning("rank %d has been in %s for %.0f s: %s", view.rank, call, waited, text)


@atexit.register
def _stop() -> None:
    if _Here.watch is not None:
        _Here.watch.stop()


def _forget() -> None:
    if _Here.watch is not None:
        _Here.watch.forget()
    _Here.watch = _Here.world = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
