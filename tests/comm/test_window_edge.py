"""One edge of a window: three slots, one word of states, and what happens when the other end stops in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedfog.comm.window import memory
from fusedfog.comm.window.edge import ARRIVAL_SLOTS, SLOTS, Arrivals, Inbox, Kind, Message, Sender
from fusedfog.comm.window.gate import Gate
from fusedfog.comm.window.region import EMPTY, FULL, READING, WRITING, Layout, Note, Region

LAYOUT = Layout(torch.float64, 5, SLOTS)


@dataclass
class Model:
    """An edge as its users see it: all that is sent arrives at once; each number is kept as its sums by mass."""

    value: float = 0.0
    mass: float = 0.0

    def apply(self, kind: Kind, value: float, mass: float) -> None:
        if kind is Kind.PUT:
            self.value, self.mass = value, mass
        elif kind is Kind.ADD:
            self.value, self.mass = self.value + value, self.mass + mass
        else:
            total = self.mass + mass
            self.value = (self.value * self.mass + value * mass) / total
            self.mass = total


def message(kind: Kind, value: float, mass: float) -> Message:
    return Message(kind, torch.full((5,), value, dtype=torch.float64), 1.0, mass)


@pytest.fixture
def region() -> Iterator[Region]:
    made = memory.private(LAYOUT)
    yield made
    made.close()


KINDS = st.sampled_from([(Kind.PUT, Kind.ADD), (Kind.PUT, Kind.MEAN)])
SENDS = st.tuples(st.sampled_from([0, 1]), st.integers(-8, 8), st.sampled_from([0.25, 0.5, 1.0, 2.0]))


@settings(max_examples=200, deadline=None)
@given(kinds=KINDS, actions=st.lists(st.one_of(SENDS, st.sampled_from(["take", "clear"])), max_size=40))
def test_whenever_the_inbox_looks_it_has_all_that_was_sent(kinds: tuple[Kind, Kind], actions: list) -> None:
    region = memory.private(LAYOUT)
    sender, inbox, model = Sender(region), Inbox(region, None, 0.0), Model()
    puts = 0
    for action in [*actions, "take"]:
        if action in ("take", "clear"):
            assert inbox.puts() == puts
            inbox.take()
            value = torch.zeros(5, dtype=torch.float64) if inbox.blank else inbox.front
            torch.testing.assert_close(value, torch.full_like(value, model.value), rtol=1e-12, atol=1e-12)
            assert inbox.mass == pytest.approx(model.mass)
            assert inbox.seen == puts
            if action == "clear":
                inbox.clear()
                model = Model()
        else:
            which, value, mass = action
            assert sender.send(message(kinds[which], value, mass))
            model.apply(kinds[which], value, mass)
            puts += kinds[which] is Kind.PUT
    region.close()


@settings(max_examples=100, deadline=None)
@given(actions=st.lists(st.one_of(SENDS, st.just("take")), max_size=40))
def test_a_network_thread_always_has_a_slot_and_loses_nothing(actions: list) -> None:
    region = memory.private(Layout(torch.float64, 5, ARRIVAL_SLOTS))
    arrivals, inbox, model = Arrivals(region), Inbox(region, None, 0.0), Model()
    for number, action in enumerate([*actions, "take"]):
        # The slot is taken before anything is known of the message, and held while the inbox looks.
        slot = arrivals.reserve()
        if action == "take":
            inbox.take()
            arrivals.give_back(slot)
            assert (0.0 if inbox.blank else inbox.front[0].item()) == pytest.approx(model.value)
            assert inbox.mass == pytest.approx(model.mass)
            continue
        which, value, mass = action
        kind = (Kind.PUT, Kind.ADD)[which]
        if number % 3 == 0:
            inbox.take()
        region.values(slot).fill_(value)
        arrivals.publish(slot, Note(number, kind, 0, 0, mass, 0))
        model.apply(kind, value, mass)
    region.close()


def test_a_put_is_read_where_it_lies(region: Region) -> None:
    sender, inbox = Sender(region), Inbox(region, torch.zeros(5, dtype=torch.float64), 1.0)
    places = {inbox.front.data_ptr()}
    for value in range(6):
        sender.send(message(Kind.PUT, value, 1.0))
        assert inbox.take() and inbox.front.tolist() == [float(value)] * 5
        places.add(inbox.front.data_ptr())
    assert len(places) == 2  # What was read, and what was written meanwhile.


def test_the_front_is_never_written_to(region: Region) -> None:
    sender, inbox = Sender(region), Inbox(region, torch.zeros(5, dtype=torch.float64), 1.0)
    for kind in (Kind.PUT, Kind.ADD, Kind.ADD, Kind.PUT, Kind.ADD, Kind.ADD, Kind.ADD):
        sender.send(message(kind, 3.0, 1.0))
        assert inbox.front.tolist() == [0.0] * 5


def test_weights_are_applied_by_the_sender_and_integers_stay_integers() -> None:
    region = memory.private(Layout(torch.int64, 3, SLOTS))
    sender, inbox = Sender(region), Inbox(region, None, 0.0)
    big = torch.tensor([2**60, -1, 7])
    sender.send(Message(Kind.PUT, big, 2.0, 1.0))
    sender.send(Message(Kind.ADD, big, -1.0, 1.0))
    inbox.take()
    assert torch.equal(inbox.front, big)
    region.close()


def test_an_empty_tensor_has_messages_too() -> None:
    region = memory.private(Layout(torch.float32, 0, SLOTS))
    sender, inbox = Sender(region), Inbox(region, None, 0.0)
    sender.send(Message(Kind.ADD, torch.empty(0), 1.0, 0.25))
    assert inbox.take() and inbox.mass == 0.25 and inbox.front.shape == (0,)
    region.close()


@dataclass
class Holder:
    """Another process that holds the lock of a shared region, as one would that was stopped inside it."""

    region: Region
    process: subprocess.Popen = field(init=False)

    def __enter__(self) -> Holder:
        script = (
            "import fcntl, os, sys, time\n"
            f"fd = os.open('/proc/{os.getpid()}/fd/{self.region.descriptor}', os.O_RDWR)\n"
            "fcntl.lockf(fd, fcntl.LOCK_EX, 1)\n"
            "print('held', flush=True)\n"
            "time.sleep(600)\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


@needs_memfd
@pytest.mark.parametrize("first", [Kind.PUT, Kind.ADD])
def test_what_cannot_be_published_waits_and_takes_in_what_follows(first: Kind) -> None:
    region = memory.shared(LAYOUT)
    assert region is not None
    sender, inbox = Sender(region), Inbox(region, torch.ones(5, dtype=torch.float64), 1.0)
    with Holder(region):
        assert not sender.send(message(first, 5.0, 1.0))
        assert not sender.send(message(Kind.ADD, 2.0, 0.5))
        assert sender.waits and not sender.flush()
        assert not inbox.take() and inbox.front.tolist() == [1.0] * 5
        assert inbox.puts() == 0
    # The kernel gives back the lock of a holder that was killed.
    assert sender.flush() and not sender.waits
    assert inbox.take()
    begin = 0.0 if first is Kind.PUT else 1.0
    assert inbox.front.tolist() == [begin + 7.0] * 5 and inbox.mass == begin + 1.5
    region.close()


@needs_memfd
def test_a_put_replaces_what_waits() -> None:
    region = memory.shared(LAYOUT)
    assert region is not None
    sender, inbox = Sender(region), Inbox(region, None, 0.0)
    sender.send(message(Kind.ADD, 1.0, 1.0))
    with Holder(region):
        sender.send(message(Kind.ADD, 2.0, 1.0))
        sender.send(message(Kind.PUT, 9.0, 3.0))
    assert sender.send(message(Kind.ADD, 1.0, 1.0))
    inbox.take()
    assert inbox.front.tolist() == [10.0] * 5 and inbox.mass == 4.0 and inbox.seen == 1
    region.close()


@needs_memfd
def test_a_region_is_only_opened_if_it_is_the_one_that_is_meant() -> None:
    region = memory.shared(LAYOUT)
    assert region is not None
    invitation = memory.invite(region)
    assert invitation is not None
    wrong = [
        {"nonce": "00" * 16},
        {"machine": "another"},
        {"descriptor": 0},
        {"pid": 2**22},
        {"descriptor": os.open(os.devnull, os.O_RDWR)},
    ]
    for change in wrong:
        assert memory.accept(memory.Invitation(**(vars(invitation) | change)), LAYOUT) is None
    assert memory.accept(invitation, Layout(torch.float64, 5000, SLOTS)) is None
    os.close(wrong[-1]["descriptor"])
    with pytest.raises(OSError):
        os.ftruncate(region.descriptor, 0)  # A peer that did so would kill this process.
    region.close()


def test_a_region_that_does_not_fit_is_an_error_that_says_how_much_it_needs() -> None:
    with pytest.raises(MemoryError, match="MiB"):
        memory.shared(Layout(torch.float64, 2**55, SLOTS)) or memory.private(Layout(torch.float64, 2**55, SLOTS))


def test_states_change_together(region: Region) -> None:
    region.change({0: READING, 1: FULL, 2: WRITING})
    assert [region.slots_in(state) for state in (READING, FULL, WRITING, EMPTY)] == [[0], [1], [2], []]
    region.change({1: EMPTY, 2: FULL})
    assert [region.slots_in(state) for state in (READING, FULL, WRITING, EMPTY)] == [[0], [2], [], [1]]


def test_a_mutex_goes_to_who_asked_first_and_is_given_back_by_the_dead() -> None:
    gate = Gate()
    assert gate.take(("own", 1))
    assert not gate.take(("peer", 1)) and not gate.take(("own", 2)) and not gate.take(("peer", 2))
    assert gate.leave(("peer", 1)) is None
    assert gate.leave(("own", 1)) == ("own", 2) and gate.holds(("own", 2))
    assert gate.leave(("own", 2)) == ("peer", 2)
    gate.take(("own", 3))
    assert gate.drop("peer") == ("own", 3)
    assert gate.leave(("own", 3)) is None and gate.leave(("own", 3)) is None
