"""What a GPU has to get right of windows, in one process: an edge whose ends are both here."""

from __future__ import annotations

import time

import torch

from fusedfog.comm.window import memory
from fusedfog.comm.window.edge import SLOTS, Inbox, Kind, Message, Sender
from fusedfog.comm.window.region import Layout
from fusedfog.comm.window.staging import staging_of


def check_windows(device: torch.device) -> None:
    """Puts and sums of a tensor that is overwritten at once, through registered memory, and read where it lies."""
    layout = Layout(torch.float32, 1 << 20, SLOTS)
    region = memory.private(layout)
    values, target = torch.zeros(layout.count, device=device), torch.zeros(layout.count, device=device)
    staging = staging_of(values)
    staging.pin(region)
    sender, inbox = Sender(region, staging.outgoing()), Inbox(region, None, 0.0, staging.incoming())
    try:
        for number in range(1, 20):
            values.fill_(float(number))
            held = staging.hold(values)
            sender.send(Message(Kind.PUT, held, 0.5, 1.0))
            sender.send(Message(Kind.ADD, held, 2.0, 1.0))
            values.fill_(-1.0)
            while not sender.flush():
                time.sleep(0.001)
            inbox.take()
            inbox.read(target)
            low, high = target.aminmax()
            assert (low.item(), high.item(), inbox.mass) == (2.5 * number, 2.5 * number, 2.0)
    finally:
        sender.copies.wait()
        inbox.copies.wait()
        region.close()
