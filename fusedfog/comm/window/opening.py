"""How a window's ends find each other: one agreement over the default store, then connections of their own.

First all ranks compare what they were given, and where they are. Each then makes the memory of its in-edges, listens, and
writes its address into the store; the sender of an edge connects to its receiver, shows the window's token, opens the memory
if it can, and says whether it did. At the end all ranks say who could not reach whom. Nothing needs the store afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from torch import Tensor

from fusedfog.comm.agreement import absent, confer, differences, next_agreement
from fusedfog.comm.failures import LOOK_EVERY
from fusedfog.comm.group import GroupView, store_timeout
from fusedfog.comm.lookout import Lookout
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import own_ip
from fusedfog.comm.window import answers, memory
from fusedfog.comm.window.control import Control
from fusedfog.comm.window.courier import IncomingCourier, OutgoingCourier, keep_alive
from fusedfog.comm.window.edge import ARRIVAL_SLOTS, Inbox, Sender
from fusedfog.comm.window.endpoint import Endpoint, Identity, Source
from fusedfog.comm.window.links import InLink, OutLink
from fusedfog.comm.window.listener import Listener, interface_of_gloo, is_loopback, network, route_to
from fusedfog.comm.window.memory import Invitation
from fusedfog.comm.window.region import Layout, Note, Region
from fusedfog.comm.window.staging import Staging
from fusedfog.comm.window.wire import TOKEN_BYTES, WELCOME, Greeting, Malformed, Purpose
from fusedfog.errors import ExchangeError, MismatchError, PeerTimeout

_DESCRIPTORS_OF_EDGE = 4
"""Memory or connection for messages, connection for control, the peer's process, and one while it is opened."""

_DESCRIPTORS = 16
"""Of a window itself: listener, bell, selector, and some for what else the process does."""

_SHARE_OF_TIMEOUT = 0.4
"""For connecting: the others must still be waiting when this rank says who did not come."""


@dataclass(frozen=True)
class Plan:
    """What one rank wants of a window.

    Attributes:
        name: of the window.
        fields: name -> value, what must be the same on all ranks, as a user would want to read it.
        problem: what is wrong with this rank's arguments; the other ranks are told.
        sends, recvs: the ranks that it sends to, and receives from.
        dtype, count: of the values, as they lie in memory.
        initial, mass: what inboxes begin with, [count]; zeros if None.
        source, staging: see `Endpoint`.
    """

    name: str
    fields: Mapping[str, str]
    problem: Exception | None
    sends: Sequence[int]
    recvs: Sequence[int]
    layout: Layout
    initial: Tensor | None
    mass: float
    source: Source
    staging: Staging


def check_descriptors(edges: int) -> None:
    """Raise ValueError if so many edges need more descriptors than this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        used = len(os.listdir("/proc/self/fd"))
        needed = edges * _DESCRIPTORS_OF_EDGE + _DESCRIPTORS
        if soft != resource.RLIM_INFINITY and used + needed > soft:
            raise ValueError(
                f"a window with {edges} edges at this rank needs up to {needed} descriptors, but {used} of the {soft} that this "
                f"process may have are in use: raise the limit (ulimit -n), or use a topology with fewer neighbours"
            )


def open_endpoint(view: GroupView, plan: Plan) -> Endpoint:
    """This rank's end of a new window; all ranks of the group call this together.

    Raises:
        MismatchError: ranks differ in `plan.fields`, or another one has a problem.
        PeerTimeout, ExchangeError: a rank did not come, or two cannot reach each other; names them and the address.
        MemoryError: there is no room.
        plan.problem, if there is one.
    """
    identity = Identity(view.rank, plan.name)
    if view.group is None or view.size == 1:
        if plan.problem is not None:
            raise plan.problem
        return Endpoint(identity, plan.layout, 0.0, plan.source, plan.staging)
    timeout = store_timeout(view)
    endpoint = Endpoint(identity, plan.layout, timeout.total_seconds(), plan.source, plan.staging)
    prefix = next_agreement(view)
    address = _agree(view, prefix, plan, timeout)
    opening = _Opening(view, plan, endpoint, prefix)
    failures: list[str] = []
    try:
        opening.open(address, timeout, failures)
        _conclude(view, f"{prefix}/opened", plan, failures, timeout)
        # All have read it by now.
        own_store().delete_key(f"{prefix}/at/{view.rank}")
    except BaseException:
        opening.close_listener()
        endpoint.close(0.0)
        raise
    opening.close_listener()
    return endpoint


def _agree(view: GroupView, prefix: str, plan: Plan, timeout: timedelta) -> str:
    """Compare arguments; returns the address of the interface to listen on."""
    store = own_store()
    ip = interface_of_gloo() or own_ip(store)
    value = {
        "problem": str(plan.problem) if plan.problem is not None else "",
        "fields": dict(plan.fields),
        "host": network(),
        "ip": ip,
    }
    verdict = confer(view, prefix, value, _judge, timeout, plan.name, "Window()")
    if plan.problem is not None:
        raise plan.problem
    if verdict["faults"]:
        raise MismatchError(f"rank {view.rank}: {plan.name}: {verdict['faults']}")
    if verdict["local"]:
        return "127.0.0.1"
    if is_loopback(ip):  # This host is the store's, and knows the way to it as the way to itself.
        routes = (route_to(other) for other in verdict["ips"] if not is_loopback(other))
        ip = next((route for route in routes if route and not is_loopback(route)), ip)
    return ip


def _judge(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    faults = [f"rank {rank} has bad arguments: {one['problem']}" for rank, one in enumerate(values) if one["problem"]]
    different = differences([one["fields"] for one in values]) if not faults else ""
    return {
        "faults": "; ".join(faults[:4]) or (f"it differs between ranks: {different}" if different else ""),
        "local": len({one["host"] for one in values}) == 1,
        "ips": [one["ip"] for one in values],
    }


def _conclude(view: GroupView, prefix: str, plan: Plan, failures: Sequence[str], timeout: timedelta) -> None:
    """Hear from all ranks who could not reach whom."""

    def judge(values: Sequence[Sequence[str]]) -> list[str]:
        return [failure for value in values for failure in value]

    found = confer(view, prefix, list(failures), judge, timeout, plan.name, "Window()")
    if found:
        text = f"rank {view.rank}: {plan.name}: {'; '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
        raise (PeerTimeout if any("within" in failure for failure in found) else ExchangeError)(text)


class _Opening:
    """A window while it is opened: its listener, and what has come."""

    def __init__(self, view: GroupView, plan: Plan, endpoint: Endpoint, prefix: str) -> None:
        self.view, self.plan, self.endpoint, self.prefix = view, plan, endpoint, prefix
        self.listener: Listener | None = None
        self._lookout = Lookout(view, str(endpoint.identity))

    def open(self, address: str, timeout: timedelta, failures: list[str]) -> None:
        """Make what this end consists of; what cannot be is said in `failures`."""
        store = own_store()
        own = f"{self.prefix}/at/{self.view.rank}"
        limit = _SHARE_OF_TIMEOUT * timeout.total_seconds()
        deadline = time.monotonic() + limit
        try:
            store.set(own, json.dumps(self._prepare(address)))
            self._connect_all(store, deadline, limit, failures)
        except (MemoryError, OSError) as error:
            failures.append(f"rank {self.view.rank}: {error}")
            store.set(own, "{}")
        if failures:
            store.set(f"{self.prefix}/failed", "")  # Nobody waits for the connections of a window that cannot be.
        else:
            self._await_senders(store, deadline, limit, failures)

    def _connect_all(self, store: Any, deadline: float, limit: float, failures: list[str]) -> None:
        """Open the edges to all receivers."""
        for peer in self.plan.sends:
            key = f"{self.prefix}/at/{peer}"
            if absent(store, [key], timedelta(seconds=max(0.001, deadline - time.monotonic())), self.view):
                failures.append(f"rank {peer} wrote no address within {limit:g} s")
                continue
            there = json.loads(store.get(key))
            if there:
                self._connect(peer, there, deadline, failures)

    def _prepare(self, address: str) -> dict[str, Any]:
        """Make memory and listener; returns what peers must know."""
        plan, endpoint = self.plan, self.endpoint
        edges: dict[int, Invitation | None] = {}
        for peer in plan.recvs:
            region = memory.shared(plan.layout) or memory.private(self._arrival_layout)
            endpoint.into[peer] = InLink(peer, inbox=self._inbox(region), region=region)
            edges[peer] = memory.invite(region)
        endpoint.service.start()
        if plan.recvs:
            self.listener = Listener(address, secrets.token_bytes(TOKEN_BYTES))
            endpoint.service.watch(self.listener.server, partial(self._accept, self.listener))
        return {
            "ip": address,
            "port": self.listener.port if self.listener is not None else 0,
            "token": self.listener.token.hex() if self.listener is not None else "",
            "edges": {peer: asdict(one) if one is not None else None for peer, one in edges.items()},
        }

    @property
    def _arrival_layout(self) -> Layout:
        return Layout(self.plan.layout.dtype, self.plan.layout.count, ARRIVAL_SLOTS)

    def _connect(self, peer: int, there: Mapping[str, Any], deadline: float, failures: list[str]) -> None:
        """Open the edge to a receiver."""
        offered = there["edges"].get(str(self.view.rank))
        invitation = Invitation(**offered) if offered is not None else None
        region = memory.accept(invitation, self.plan.layout)
        room = region or memory.private(self.plan.layout)
        self.plan.staging.pin(room)
        link = OutLink(peer, sender=Sender(room, self.plan.staging.outgoing()))
        self.endpoint.out[peer] = link
        where, token = (there["ip"], there["port"]), bytes.fromhex(there["token"])
        try:
            greeting = Greeting(self.view.rank, Purpose.CONTROL, region is None)
            link.control = Control(self._dial(where, greeting.pack(token), deadline))
            if region is None:
                greeting = Greeting(self.view.rank, Purpose.MESSAGES, True)
                self._carry_out(link, self._dial(where, greeting.pack(token), deadline))
        except OSError as error:
            late = f"nothing within {_SHARE_OF_TIMEOUT * self.endpoint.timeout:g} s"
            why = late if isinstance(error, TimeoutError) else str(error)
            failures.append(f"rank {self.view.rank} cannot reach rank {peer} at {where[0]}:{where[1]}: {why}")
            return
        self._hear(link)
        if region is not None and invitation is not None:
            link.process = memory.watch_process(invitation)
            if link.process is not None:
                self.endpoint.service.watch(link.process, partial(answers.lose, self.endpoint, link, answers.DIED))

    def _dial(self, where: tuple[str, int], greeting: bytes, deadline: float) -> socket.socket:
        """A connection to a listener that has taken this greeting."""
        connection = socket.create_connection(where, max(0.001, deadline - time.monotonic()))
        try:
            keep_alive(connection, self.endpoint.timeout)
            connection.sendall(greeting)
            connection.settimeout(LOOK_EVERY)
            if self._read_answer(connection, deadline) != WELCOME:
                raise ConnectionRefusedError("it is not accepted there")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_answer(self, connection: socket.socket, deadline: float) -> bytes:
        while True:
            try:
                return connection.recv(1)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise
                self._lookout.look()

    def _carry_out(self, link: OutLink, connection: socket.socket) -> None:
        endpoint = self.endpoint
        link.courier = OutgoingCourier(
            connection,
            f"fusedfog-window-{self.view.rank}-to-{link.peer}",
            link.sender.region,
            partial(answers.lose_messages, endpoint, link),
            endpoint.notify,
        )
        link.courier.start()

    def _hear(self, link: InLink | OutLink) -> None:
        control = link.control
        assert control is not None
        self.endpoint.service.watch(
            control.connection, partial(answers.hear, self.endpoint, link), lambda: control.wants_to_write
        )

    def _await_senders(self, store: Any, deadline: float, limit: float, failures: list[str]) -> None:
        """Wait until the senders of all in-edges have connected, or it is certain that they will not."""
        for turn in itertools.count(1):
            missing = [link.peer for link in self.endpoint.into.values() if not self._complete(link)]
            if not missing or (turn % 10 == 0 and store.check([f"{self.prefix}/failed"])):
                return
            if time.monotonic() >= deadline:
                break
            self._lookout.look()
            with self.endpoint.changed:
                self.endpoint.changed.wait(0.02)
        assert self.listener is not None
        for peer in missing:
            where = f"{self.listener.server.getsockname()[0]}:{self.listener.port}"
            failures.append(f"rank {peer} did not reach rank {self.view.rank} at {where} within {limit:g} s")

    def _complete(self, link: InLink) -> bool:
        return link.control is not None and (link.region.descriptor is not None or link.courier is not None)

    # In the window's thread.

    def _accept(self, listener: Listener) -> None:
        connection = listener.accept()
        if connection is not None:
            self.endpoint.service.watch(connection, partial(self._listen_to, listener, connection))
        for stranger in listener.overdue():
            self._dismiss(listener, stranger)

    def _listen_to(self, listener: Listener, connection: socket.socket) -> None:
        try:
            greeting = listener.hear(connection)
        except (OSError, Malformed):
            self._dismiss(listener, connection)
            return
        if greeting is not None:
            self.endpoint.service.ignore(connection)
            if self._admit(connection, greeting):
                connection.sendall(WELCOME)
            else:
                connection.close()

    def _dismiss(self, listener: Listener, connection: socket.socket) -> None:
        self.endpoint.service.ignore(connection)
        listener.dismiss(connection)

    def _admit(self, connection: socket.socket, greeting: Greeting) -> bool:
        """Take a connection that showed the token, if it is one that this end waits for."""
        link = self.endpoint.into.get(greeting.sender)
        if link is None:
            return False
        keep_alive(connection, self.endpoint.timeout)
        if greeting.purpose is Purpose.CONTROL and link.control is None:
            if greeting.remote and link.region.descriptor is not None:
                self._make_private(link)
            link.control = Control(connection)
            self._hear(link)
        elif greeting.purpose is Purpose.MESSAGES and link.courier is None and link.region.descriptor is None:
            self._carry_in(link, connection)
        else:
            return False
        self.endpoint.notify()
        return True

    def _make_private(self, link: InLink) -> None:
        """The sender cannot open this inbox' memory, so a thread of this process will fill it."""
        link.region.close()
        link.region = memory.private(self._arrival_layout)
        link.inbox = self._inbox(link.region)

    def _inbox(self, region: Region) -> Inbox:
        self.plan.staging.pin(region)
        return Inbox(region, self.plan.initial, self.plan.mass, self.plan.staging.incoming())

    def _carry_in(self, link: InLink, connection: socket.socket) -> None:
        endpoint = self.endpoint

        def arrived(note: Note) -> None:
            link.answered = max(link.answered, note.answered)
            endpoint.notify()

        link.courier = IncomingCourier(
            connection,
            f"fusedfog-window-{self.view.rank}-from-{link.peer}",
            link.region,
            partial(answers.lose_messages, endpoint, link),
            arrived,
        )
        link.courier.start()

    def close_listener(self) -> None:
        """Listen no more."""
        listener, self.listener = self.listener, None
        if listener is not None:
            self.endpoint.service.do(partial(self._close, listener))

    def _close(self, listener: Listener) -> None:
        for one in (listener.server, *listener.strangers):
            self.endpoint.service.ignore(one)
        listener.close()
