"""Windows of a GPU's tensors, without a GPU: copies that come late, and real ranks on pretended GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pool import Pool
from support.windows import TRANSPORTS, Late, settle, slow_gpu, transport

import fusedfog
from fusedfog.comm.window import memory
from fusedfog.comm.window.edge import SLOTS, Inbox, Kind, Message, Sender
from fusedfog.comm.window.region import Layout
from fusedfog.topology import ring

LAYOUT = Layout(torch.float64, 5, SLOTS)

ACTIONS = st.one_of(
    st.tuples(st.sampled_from([Kind.PUT, Kind.ADD]), st.integers(-8, 8)),
    st.sampled_from(["copied", "flush", "take", "read", "clear"]),
)


def message(kind: Kind, value: float) -> Message:
    return Message(kind, torch.full((5,), value, dtype=torch.float64), 1.0, 1.0)


@settings(max_examples=300, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_whatever_comes_late_is_complete_when_it_is_seen_and_stays_while_it_is_read(actions: list[Any]) -> None:
    """Sums of what was added between puts, for the inbox; and all of it in the end."""
    region = memory.private(LAYOUT)
    into_slots, out_of_slots = Late(), Late()
    sender, inbox = Sender(region, into_slots), Inbox(region, None, 0.0, out_of_slots)
    sent = 0.0  # What an inbox that is never cleared would come to.
    seen = [0.0]
    cleared = 0.0
    reads: list[tuple[torch.Tensor, torch.Tensor]] = []
    for action in [*actions, "copied", "flush", "take"]:
        if action == "copied":
            into_slots.wait()
        elif action == "flush":
            assert sender.flush() == (not sender.waits)
        elif action == "take":
            inbox.take()
            assert inbox.blank or inbox.front.unique().numel() == 1, "half a message"
        elif action == "read":
            target = torch.empty(5, dtype=torch.float64)
            reads.append((target, inbox.front.clone()))
            inbox.read(target)
        elif action == "clear":
            inbox.take()
            if not any(isinstance(one, tuple) and one[0] is Kind.PUT for one in actions):
                cleared += 0.0 if inbox.blank else inbox.front[0].item()
                inbox.clear()
        else:
            kind, value = action
            sender.send(message(kind, value))
            sent = value if kind is Kind.PUT else sent + value
            assert not sender.waits or sender._waiting is not None
        seen.append(sent)
    out_of_slots.wait()
    assert all(torch.equal(target, expected) for target, expected in reads)
    assert cleared + (0.0 if inbox.blank else inbox.front[0].item()) == sent
    region.close()


def test_nothing_is_published_before_it_was_copied_and_the_next_send_publishes_it() -> None:
    region = memory.private(LAYOUT)
    copies = Late()
    sender, inbox = Sender(region, copies), Inbox(region, None, 0.0)
    assert not sender.send(message(Kind.PUT, 1.0)) and sender.waits
    assert not sender.flush() and not inbox.take()
    # A host that is always ahead of its GPU is ahead by one message.
    for value in (2.0, 3.0, 4.0):
        assert not sender.send(message(Kind.PUT, value))
        assert inbox.take() and inbox.front.tolist() == [value - 1] * 5
    copies.wait()
    assert sender.flush() and inbox.take() and inbox.front.tolist() == [4.0] * 5
    region.close()


def test_a_slot_is_not_given_back_while_the_gpu_reads_it() -> None:
    region = memory.private(LAYOUT)
    copies = Late()
    sender, inbox = Sender(region), Inbox(region, None, 0.0, copies)
    sender.send(message(Kind.PUT, 1.0))
    inbox.take()
    target = torch.zeros(5, dtype=torch.float64)
    inbox.read(target)
    for value in (2.0, 3.0, 4.0):
        sender.send(message(Kind.PUT, value))
    assert copies._queued
    inbox.take()
    assert target.tolist() == [1.0] * 5 and inbox.front.tolist() == [4.0] * 5
    region.close()


def on_pretended_gpus(how: str, refuses: bool) -> dict[str, Any]:
    """Everything that a window does, one rank after another; what was registered in the middle, and at the end."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * rank
    with slow_gpu() as gpu:
        gpu.runtime.refuses = refuses
        with transport(how), fusedfog.Window(x, "ring") as window:
            registered = len(gpu.runtime.registered)
            dist.barrier()
            window.put()
            window.put(weights={(rank + 1) % size: 2.0}, async_op=True).wait(20)
            window.put()
            settle(window)
            mixed = window.update().clone()
            dist.barrier()
            window.get({(rank + 1) % size: 0.5})
            dist.barrier()
            got = window.update(0.0, {(rank + 1) % size: 1.0}, out=torch.empty_like(x)).clone()
            window.accumulate(weights={(rank + 1) % size: 3.0}, self_weight=0.25)
            window.accumulate(torch.ones_like(x), weights={(rank + 1) % size: -1.0})
            settle(window)
            window.update(1.0, {(rank + 1) % size: 0.0}, reset=True)
            collected = window.collect().clone()
            dist.barrier()
        return {
            "registered": registered,
            "left": len(gpu.runtime.registered),
            "mixed": mixed.tolist(),
            "got": got.tolist(),
            "collected": collected.tolist(),
            "own": x.data_ptr() == window._own.tensor.data_ptr(),
        }


@pytest.mark.parametrize(("how", "refuses"), [("memory", False), ("tcp", False), ("memory", True)])
def test_a_gpu_s_window_does_what_a_cpu_s_does(ranks: Pool, how: str, refuses: bool) -> None:
    size = 3
    given = np.stack([np.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(size)])
    mixed = np.einsum("ij,jab->iab", ring(size).matrix(), given)
    for rank, found in enumerate(ranks.run(size, on_pretended_gpus, how, refuses)):
        before, after = (rank - 1) % size, (rank + 1) % size
        np.testing.assert_allclose(found["mixed"], mixed[rank], rtol=1e-12)
        np.testing.assert_allclose(found["got"], 0.5 * mixed[after], rtol=1e-12)
        # What lay in the inbox of the one before, and what it added, as that was before it was multiplied by 0.25.
        expected = 0.25 * mixed[rank] + given[before] + 3 * mixed[before] - 1
        np.testing.assert_allclose(found["collected"], expected, rtol=1e-12)
        # Two edges in and two out, each with memory that this process has mapped.
        assert found["registered"] == (0 if refuses else 4) and found["left"] == 0 and found["own"]


def exact_and_many(how: str) -> tuple[int, int]:
    rank = dist.get_rank()
    with slow_gpu(), transport(how):
        x = torch.zeros(100, dtype=torch.int64)
        with fusedfog.Window(x, "fully_connected", zero_init=True) as window:
            dist.barrier()
            for number in range(200):
                window.accumulate(torch.full((100,), number * (rank + 1)))
                if number % 7 == 0:
                    window.collect()
            settle(window)
            window.collect()
            dist.barrier()
            return int(x.min()), int(x.max())


@pytest.mark.parametrize("how", TRANSPORTS)
def test_what_a_gpu_adds_is_there_exactly_once(ranks: Pool, how: str) -> None:
    total = sum(range(200))
    found = ranks.run(3, exact_and_many, how)
    assert found == [(total * (6 - (rank + 1)),) * 2 for rank in range(3)]
