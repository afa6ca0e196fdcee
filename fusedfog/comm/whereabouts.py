"""Which call each rank is in, asked over sockets of our own: for the log of a rank that waits, and the errors that end a wait.

Every process that exchanges anything has one thread that listens on a port and answers one question, "where are you?" (see
`calls`). Nothing is sent while all goes well: the address is written into the store once, and read once by every
communicator. A port that refuses is a process that has ended; one that does not answer is stopped, or cut off. (Asking through
the store would need a poll by every rank for as long as it runs, and torch prints pages if the store's host ends first.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

PATIENCE = 1.0
"""Seconds that other ranks have to answer; they do in milliseconds, or not at all."""

QUICKLY = 0.25
"""The same, where nothing depends on an answer, or it can be asked for again."""

_LONGEST = 4096
"""Bytes of a question or answer."""


@dataclass(frozen=True)
class Address:
    """Where a process listens; `token` is its world's, and tells it from an earlier or later one in the same process."""

    host: str
    ip: str
    port: int
    token: str

    def reach(self, name: str) -> tuple[str, int]:
        """What a process on the host called `name` connects to."""
        loopback = self.ip.startswith("127.") or self.ip == "::1"
        return (self.host if loopback and self.host != name else self.ip), self.port


@dataclass(frozen=True)
class State:
    """What a rank says of itself, or what is known of it.

    Attributes:
        call: the call that it is in, or failed in and has made no other since; "" for none.
        last: the last one that it made; "" for none.
        failed: it raises an error of the network out of `call`.
        late: and that after a timeout.
        fate: why it did not answer, in words for one rank; "" if it did.
        count: how many calls it has entered.
        ended: communicators that it has given up, (name, origin's global rank or -1, origin's words, late) each.
    """

    call: str = ""
    last: str = ""
    failed: bool = False
    late: bool = False
    fate: str = ""
    count: int = 0
    ended: tuple[tuple[str, int, str, bool], ...] = ()

    def words(self, several: bool) -> str:
        """What it does, as a sentence goes on after "rank 3" or "ranks 1-3"."""
        if self.fate:
            return _PLURAL[self.fate] if several else self.fate
        be, its = ("are", "their") if several else ("is", "its")
        if self.call:
            return f"{be} in {self.call}"
        if self.last:
            return f"{be} in no call of fusedfog, {its} last was {self.last}"
        return UNHEARD_PLURAL if several else UNHEARD


ENDED = "has ended"
LEFT = "has destroyed its process group"
UNKNOWN = "cannot be asked (the process group's store has gone)"
SILENT = "does not answer (stopped, or cut off)"
UNHEARD = "has made no call of fusedfog yet"
UNHEARD_PLURAL = "have made no call of fusedfog yet"
_PLURAL = {
    ENDED: "have ended",
    LEFT: "have destroyed their process groups",
    UNKNOWN: UNKNOWN,
    SILENT: "do not answer (stopped, or cut off)",
    UNHEARD: UNHEARD_PLURAL,
}


@dataclass
class World:
    """This process' place among those of one default process group, and where the others listen.

    Attributes:
        group: the default group.
        rank: this process' global rank in it.
        own: where this process listens.
        addresses: of others, by global rank, as far as they were needed.
        notes: what ranks said when they failed, or finished, by global rank.
        hear: called with a rank's state when it says, unasked, what it has given up.
        reached: ranks that have answered, so that no firewall is what refuses connections to them.
        refused: ranks whose port refused when they were last asked.
        overseer: told of states that were asked for, (global rank or -1, words) if a wait is in vain by reasons of its own; of
            an elastic run.
    """

    group: dist.ProcessGroup
    rank: int
    own: Address
    hear: Callable[[State], None]
    addresses: dict[int, Address] = field(default_factory=dict)
    notes: dict[int, State] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    overseer: Callable[[Mapping[int, State]], tuple[int, str] | None] | None = None

    def is_gone(self, rank: int) -> bool:
        """Whether this rank's process has ended for certain, when it was last asked."""
        address = self.addresses.get(rank)
        near = address is not None and address.host == self.own.host
        return rank in self.refused and (near or rank in self.reached)

    def is_done(self, rank: int, state: State) -> bool:
        """Whether it has said, before it ended, that it had finished."""
        return state.fate == LEFT or (state.failed and not state.call)

    def exists(self) -> bool:
        """Whether the group has not been destroyed."""
        return dist.is_initialized() and dist.distributed_c10d._get_default_group() is self.group

    def look_up(self, ranks: Iterable[int], store: Store) -> None:
        """Find out where these ranks listen, if they have written it."""
        for rank in ranks:
            key = f"fusedfog/where/{rank}"
            if rank not in self.addresses and store.check([key]):
                self.addresses[rank] = Address(*json.loads(store.get(key)))


def listen(store: Store) -> tuple[socket.socket, str]:
    """A listening socket, and the address by which processes of this store reach it."""
    ip, inside = own_ip(store), _innermost(store)
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    # A host may know its own name by a loopback address, while others ask for it by the same name.
    alone = isinstance(inside, TCPStore) and inside.host in ("localhost", "127.0.0.1", "::1")
    return socket.create_server((ip if alone else "", 0), family=family, backlog=256), ip


def own_ip(store: Store) -> str:
    """This host's address on the way to the one that hosts the store."""
    inside = _innermost(store)
    if not isinstance(inside, TCPStore):
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, end in socket.getaddrinfo(inside.host, inside.port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:  # Connecting it sends nothing.
                probe.connect(end)
                return str(probe.getsockname()[0])
    return "127.0.0.1"


def _innermost(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def new_world(group: dist.ProcessGroup, store: Store, port: int, ip: str, hear: Callable[[State], None]) -> World:
    """This process' place in a new default group, written into its store."""
    own = Address(socket.gethostname(), ip, port, secrets.token_hex(8))
    store.set(f"fusedfog/where/{dist.get_rank()}", json.dumps([own.host, own.ip, own.port, own.token]))
    return World(group, dist.get_rank(), own, hear)


def answer(connection: socket.socket, world: World | None, here: State) -> None:
    """Answer one question, and take note of what the asker says of itself."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), connection:
        connection.settimeout(0.2)
        question = json.loads(connection.recv(_LONGEST))
        known = world is not None and question["token"] == world.own.token
        if known and world is not None:
            asker = read_state(question["state"])
            if asker.failed:
                world.notes[int(question["rank"])] = asker
            if asker.ended:
                world.hear(asker)
        known = known and world is not None and world.exists()
        connection.sendall(json.dumps(vars(here if known else State(fate=LEFT))).encode())


def read_state(said: Mapping[str, Any]) -> State:
    """A state that has travelled as JSON."""
    return State(**{**said, "ended": tuple(tuple(one) for one in said.get("ended", ()))})


def ask(world: World, ranks: Iterable[int], own: State, patience: float = PATIENCE) -> dict[int, State]:
    """Where these global ranks are, each told where this one is; takes `patience` seconds at most."""
    me = world.rank
    name, deadline = socket.gethostname(), time.monotonic() + patience
    found: dict[int, State] = {}
    with selectors.DefaultSelector() as waiting:
        for rank in ranks:
            if rank == me:
                found[rank] = own
            elif rank not in world.addresses:
                found[rank] = State(fate=UNHEARD)
            else:
                address = world.addresses[rank]
                question = json.dumps({"rank": me, "token": address.token, "state": vars(own)}).encode()
                _knock(waiting, rank, address.reach(name), question, found)
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                _proceed(waiting, key, found)
        for key in list(waiting.get_map().values()):
            found[key.data[0]] = State(fate=SILENT)
            _hang_up(waiting, key.fileobj)
    world.reached |= {rank for rank, state in found.items() if not state.fate or state.fate == LEFT}
    for rank, state in found.items():
        (world.refused.add if state.fate == ENDED else world.refused.discard)(rank)
    for rank, state in found.items():
        if state.fate:
            # A rank that failed and has ended since is told about as it was then.
            found[rank] = world.notes.get(rank, state)
        elif rank in world.notes and world.notes[rank].count < state.count:
            del world.notes[rank]
    return dict(sorted(found.items()))


def _knock(
    waiting: selectors.BaseSelector, rank: int, end: tuple[str, int], question: bytes, found: dict[int, State]
) -> None:
    connection = socket.socket(socket.AF_INET6 if ":" in end[0] else socket.AF_INET)
    connection.setblocking(False)
    try:
        refused = connection.connect_ex(end) == errno.ECONNREFUSED
    except OSError:
        refused = False
    else:
        if not refused:
            waiting.register(connection, selectors.EVENT_WRITE, (rank, question))
            return
    connection.close()
    found[rank] = State(fate=ENDED if refused else SILENT)


def _proceed(waiting: selectors.BaseSelector, key: selectors.SelectorKey, found: dict[int, State]) -> None:
    """Ask over a connection that is open now, or read what it brought."""
    connection, (rank, question) = key.fileobj, key.data
    assert isinstance(connection, socket.socket)
    try:
        if question:
            connection.sendall(question)
            waiting.modify(connection, selectors.EVENT_READ, (rank, b""))
            return
        found[rank] = read_state(json.loads(connection.recv(_LONGEST)))
    except ConnectionRefusedError:  # Nobody listens there any more.
        found[rank] = State(fate=ENDED)
    except (OSError, ValueError):  # It ends just now, or has given up waiting for the question on a busy machine.
        found[rank] = State(fate=SILENT)
    _hang_up(waiting, connection)


def _hang_up(waiting: selectors.BaseSelector, connection: Any) -> None:
    waiting.unregister(connection)
    connection.close()


def sentence(ranks: Sequence[int], states: Mapping[int, State]) -> str:
    """Who is where, by places among these global ranks: "rank 0 is in averaged(), ranks 1-3 are in step() 120: every ..."."""
    groups: dict[State, list[int]] = {}
    for place, rank in enumerate(ranks):
        if rank in states:
            state = states[rank]
            # A rank that failed in a call was there, and what it did before is of no interest.
            seen = State(state.call, "" if state.call else state.last, fate=state.fate)
            groups.setdefault(seen, []).append(place)
    parts = [f"{name_ranks(places)} {state.words(len(places) > 1)}" for state, places in groups.items()]
    text = ", ".join(parts)
    if list(ranks) != list(range(len(ranks))):
        text += f" (ranks of the group of global ranks {list(ranks)})"
    if len(groups) == 1 and next(iter(groups)).call:
        return f"{text}: nobody is missing, so a rank or the network between them is slow, or stuck"
    return f"{text}: every rank must call it"


def name_ranks(ranks: Iterable[int]) -> str:
    """In words: "rank 2", "ranks 1-3", "ranks 0-1,3"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}"
