"""How ranks of one host find out, all together, whether they can share memory, and connect their `SharedBuffers`.

Each rank makes a page of shared memory and listens on a local socket of a name that nobody can guess, which goes through the
store with a description of the host. Only if all could, and are on one host, they connect, and pass each other the page as
buffers are passed later. So whatever a system forbids is found here, and the ranks go on by messages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from fusedfog.comm import calls, shared_memory
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.calls import current_call
from fusedfog.comm.failures import LOOK_EVERY
from fusedfog.comm.group import GroupView
from fusedfog.comm.shared_buffers import SharedBuffers
from fusedfog.errors import ExchangeError

log = logging.getLogger("fusedfog")

_PATIENCE = 30.0
"""Seconds that the others have to connect, once all have said that they are on this host."""

_WHAT = "looking for memory to share"
_TOKEN = 16
_HELLO = struct.Struct(f"<I{_TOKEN}s")
_CREDENTIALS = struct.Struct("3i")


def open_shared(view: GroupView, timeout: timedelta) -> SharedBuffers | None:
    """Shared buffers of these ranks; None, on all of them, if they cannot share memory. Collective.

    Raises:
        MismatchError, PeerTimeout, ExchangeError: as `confer`.
    """
    patience = min(_PATIENCE, timeout.total_seconds() / 4)
    with contextlib.ExitStack() as stack:
        listener, page, offer = _offer(stack)
        verdict = _ask(view, offer, _compare, timeout)
        connections: dict[int, socket.socket] = {}
        if "why" not in verdict:
            problem = ""
            try:
                assert listener is not None
                listener.settimeout(patience)
                _connect(view, verdict["ends"], listener, page, connections, patience)
            except (OSError, ValueError) as error:
                problem = f"rank {view.rank}: {error}"
            except ExchangeError:
                _close(connections)
                raise
            verdict = {"why": _ask(view, problem, _first, timeout)}
        if verdict["why"]:
            _close(connections)
    if view.rank == 0:
        how = f"by messages ({verdict['why']})" if verdict["why"] else "through shared memory"
        log.debug("ranks %s exchange with each other %s", list(view.ranks), how)
    return None if verdict["why"] else SharedBuffers(view.rank, connections, timeout.total_seconds())


def _ask(view: GroupView, value: Any, judge: Any, timeout: timedelta) -> Any:
    return confer(view, next_agreement(view), value, judge, timeout, _WHAT, current_call() or _WHAT)


def _offer(stack: contextlib.ExitStack) -> tuple[socket.socket | None, int, dict[str, Any]]:
    """Where this rank listens, the descriptor of its page, which holds its token, and what others need to know of both."""
    if not shared_memory.SUPPORTED:
        return None, -1, {"why": "this system has no memfd"}
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Local sockets are found inside a network namespace alone.
        host = [boot, str(Path("/proc/self/ns/net").readlink()), os.getuid()]
        name, token = f"fusedfog-{secrets.token_hex(16)}", secrets.token_bytes(_TOKEN)
        memory, page = shared_memory.allocate(_TOKEN)
        stack.callback(os.close, page)
        memory.copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(f"\0{name}")
        listener.listen(256)
    except OSError as error:
        return None, -1, {"why": f"this system refuses: {error}"}
    return listener, page, {"host": host, "name": name, "token": token.hex()}


def _compare(offers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for rank, offer in enumerate(offers):
        if "why" in offer:
            return {"why": f"rank {rank}: {offer['why']}"}
        if offer["host"] != offers[0]["host"]:
            return {"why": f"ranks 0 and {rank} are on different hosts, or in containers apart"}
    return {"ends": [[offer["name"], offer["token"]] for offer in offers]}


def _first(problems: Sequence[str]) -> str:
    return next(filter(None, problems), "")


def _close(connections: Mapping[int, socket.socket]) -> None:
    for connection in connections.values():
        connection.close()


def _connect(
    view: GroupView,
    ends: Sequence[tuple[str, str]],
    listener: socket.socket,
    page: int,
    connections: dict[int, socket.socket],
    patience: float,
) -> None:
    """Connect to all lower ranks, and let all higher ones connect.

    Raises:
        OSError: somebody did not, or what was passed is not what it should be.
        ExchangeError: one of them has ended.
    """
    rank, deadline = view.rank, time.monotonic() + patience
    for other in range(rank):
        name, token = ends[other]
        connection = connections[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(patience)
        connection.connect(f"\0{name}")
        socket.send_fds(connection, [_HELLO.pack(rank, bytes.fromhex(token))], [page])
    tokens = [bytes.fromhex(token) for _, token in ends]
    while len(connections) < len(ends) - 1:
        connection = _accept(listener, view, deadline)
        connection.settimeout(patience)
        higher = _recognise(connection, rank, tokens)
        if higher is None or higher in connections:
            connection.close()  # Somebody else's program.
            continue
        connections[higher] = connection


def _accept(listener: socket.socket, view: GroupView, deadline: float) -> socket.socket:
    """The next one that connects; raises as `_connect`."""
    vigil = calls.vigil()
    while True:
        listener.settimeout(max(0.001, min(LOOK_EVERY, deadline - time.monotonic())))
        try:
            return listener.accept()[0]
        except TimeoutError:
            origin = vigil.look(view.ranks, None) if vigil is not None else None
            if origin is not None:
                raise calls.lost(view, f"rank {view.rank}: {_WHAT}", origin) from None
            if time.monotonic() >= deadline:
                raise


def _recognise(connection: socket.socket, rank: int, tokens: Sequence[bytes]) -> int | None:
    """Which higher rank has connected; None for strangers."""
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.getuid():
        return None
    hello, descriptors, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
    try:
        if len(hello) < _HELLO.size:
            return None
        higher, token = _HELLO.unpack(hello)
        if not secrets.compare_digest(token, tokens[rank]) or not rank < higher < len(tokens):
            return None
        if not descriptors or bytes(shared_memory.attach(descriptors[0], _TOKEN).tolist()) != tokens[higher]:
            raise OSError(f"the memory that rank {higher} passed on is another one here")
        return int(higher)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
