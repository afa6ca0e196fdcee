"""What strangers can do to a window that is being built: nothing."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedfog.comm.window import memory
from fusedfog.comm.window.courier import IncomingCourier
from fusedfog.comm.window.edge import ARRIVAL_SLOTS, Inbox, Kind
from fusedfog.comm.window.listener import _STRANGERS, Listener, route_to
from fusedfog.comm.window.region import Layout, Note
from fusedfog.comm.window.wire import (
    ACKNOWLEDGEMENT,
    FRAME_BYTES,
    GREETING_BYTES,
    HEADER_BYTES,
    Frame,
    Greeting,
    Malformed,
    Purpose,
    Say,
    pack_header,
    read_frame,
    read_greeting,
    read_header,
)

TOKEN = bytes(range(32))


def hear_all(listener: Listener, sent: bytes) -> Greeting | None:
    """Connect, say this, and let the listener read it to the end."""
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        connection = None
        while connection is None:
            connection = listener.accept()
        try:
            for _ in range(1000):
                greeting = listener.hear(connection)
                if greeting is not None:
                    connection.close()
                    return greeting
                threading.Event().wait(0.001)
            raise AssertionError("it waits for more after the end")
        except (Malformed, OSError):
            listener.dismiss(connection)
            return None


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=3 * GREETING_BYTES))
def test_random_bytes_are_no_greeting(noise: bytes) -> None:
    listener = Listener("127.0.0.1", TOKEN)
    try:
        assert hear_all(listener, noise) is None
        assert hear_all(listener, Greeting(3, Purpose.CONTROL, False).pack(TOKEN)) == Greeting(
            3, Purpose.CONTROL, False
        )
        assert not listener.strangers
    finally:
        listener.close()


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, GREETING_BYTES - 1), change=st.integers(1, 255))
def test_a_greeting_with_one_wrong_byte_is_none_or_another(place: int, change: int) -> None:
    right = bytearray(Greeting(1, Purpose.MESSAGES, True).pack(TOKEN))
    right[place] ^= change
    with contextlib.suppress(Malformed):
        read_greeting(bytes(right), TOKEN)
        assert place >= 40  # Beyond magic and token: who, what for.
        return
    assert place < 42


def test_strangers_who_say_nothing_are_few() -> None:
    listener = Listener("127.0.0.1", TOKEN)
    others = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(_STRANGERS + 5)]
    while len(listener.strangers) < len(others):
        listener.accept()
    assert listener.overdue() == listener.strangers[:5]
    for one in listener.overdue():
        listener.dismiss(one)
    assert len(listener.strangers) == _STRANGERS and not listener.overdue()
    listener.close()
    for other in others:
        other.close()


@given(noise=st.binary(min_size=FRAME_BYTES, max_size=FRAME_BYTES))
def test_random_bytes_are_a_frame_only_by_its_kind(noise: bytes) -> None:
    try:
        assert read_frame(noise).say == noise[0]
    except Malformed:
        assert noise[0] not in list(Say)


def test_frames_and_headers_come_back_as_they_were() -> None:
    frame = Frame(Say.GET, 2**40, -0.25)
    assert read_frame(frame.pack()) == frame
    note = Note(7, Kind.ADD, 5, -3, 0.125, 2)
    assert read_header(pack_header(note, 80), 80) == note


@settings(max_examples=50, deadline=None)
@given(noise=st.binary(min_size=HEADER_BYTES, max_size=4 * HEADER_BYTES))
def test_random_bytes_never_reach_memory(noise: bytes) -> None:
    check_dropped(noise)


@pytest.mark.parametrize("length", [0, 39, 41, 2**31, 2**62])
def test_a_message_of_another_length_never_reaches_memory(length: int) -> None:
    check_dropped(pack_header(Note(1, Kind.PUT, 1, 0, 1.0, 0), length) + secrets.token_bytes(40))


def check_dropped(sent: bytes) -> None:
    region = memory.private(Layout(torch.float64, 5, ARRIVAL_SLOTS))
    inbox = Inbox(region, torch.ones(5, dtype=torch.float64), 1.0)
    theirs, ours = socket.socketpair()
    why: list[str] = []
    courier = IncomingCourier(ours, "test", region, why.append, lambda note: why.append("arrived"))
    courier.start()
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    courier._thread.join(20)
    assert len(why) == 1 and why != ["arrived"]
    assert not inbox.take() and inbox.front.tolist() == [1.0] * 5 and not region.values(1).any()
    courier.stop()
    theirs.close()
    region.close()


def test_half_a_message_is_never_seen() -> None:
    region = memory.private(Layout(torch.float64, 5, ARRIVAL_SLOTS))
    inbox = Inbox(region, torch.zeros(5, dtype=torch.float64), 0.0)
    theirs, ours = socket.socketpair()
    lost = threading.Event()
    courier = IncomingCourier(ours, "test", region, lambda why: lost.set(), lambda note: None)
    courier.start()
    values = torch.full((5,), 2.0, dtype=torch.float64).numpy().tobytes()
    header = pack_header(Note(1, Kind.ADD, 0, 0, 0.5, 0), len(values))
    theirs.sendall(header + values + header + values[:24])
    assert ACKNOWLEDGEMENT.unpack(theirs.recv(ACKNOWLEDGEMENT.size)) == (1,)
    theirs.close()
    assert lost.wait(20)
    inbox.take()
    assert inbox.front.tolist() == [2.0] * 5 and inbox.mass == 0.5
    courier.stop()
    region.close()


def test_the_way_to_this_host_is_the_loopback_interface() -> None:
    assert route_to("127.0.0.1") == "127.0.0.1"
    assert route_to("no address") == ""
