"""Waits in a communicator that take long: whether the ranks are still there that they are for."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Protocol

from fusedfog.comm import calls
from fusedfog.comm.failures import FIRST_LOOK, LOOK_EVERY, Origin, set_origin
from fusedfog.comm.group import GroupView
from fusedfog.comm.membership import Membership
from fusedfog.comm.transfer import Peers, Transfer
from fusedfog.comm.waiter import wait_here


class Waits(Protocol):
    """What is asked of the communicator."""

    @property
    def view(self) -> GroupView:
        """This rank's place among its ranks."""

    @property
    def name(self) -> str:
        """The same on all of its ranks."""

    @property
    def timeout(self) -> timedelta:
        """How long a wait may last."""

    @property
    def follows(self) -> bool:
        """See `Owner`."""

    @property
    def membership(self) -> Membership:
        """Who is still there."""

    @property
    def told(self) -> Origin | None:
        """Where the failure began for which another rank has given the communicator up."""


def look_after(communicator: Waits, transfer: Transfer) -> None:
    """Return when a transfer is over: after the timeout, or when peers of it have died, it fails.

    Called by whoever waits, from the first look on.
    """
    deadline = time.monotonic() + communicator.timeout.total_seconds() - FIRST_LOOK
    ranks = communicator.view.ranks
    vigil = calls.vigil(communicator.name, ranks)
    if not transfer.begun and not communicator.follows:
        # The waiter is held by another transfer, of which this one need not know.
        threading.Thread(target=wait_here, args=(transfer,), daemon=True, name="fusedfog-waiter").start()
    while not transfer.over_within(max(0.0, min(LOOK_EVERY, deadline - time.monotonic()))):
        works = transfer.pending[:1]
        peers = [ranks[peer] for peer in transfer.peers_in_flight()]
        whole = not works or not isinstance(works[0][1], Peers)
        origin = communicator.told
        if origin is None and vigil is not None:
            origin = vigil.look(ranks if whole else dict.fromkeys(peers), None if whole or not peers else peers[0])
        # Nothing else ends the wait for one that has left: its NCCL tells nobody.
        left = origin is None and communicator.follows and bool(communicator.membership.left())
        if origin is None and not left and time.monotonic() < deadline:
            continue
        if transfer.is_over():
            return
        what = works[0][1] if works else "waiting"
        if origin is None:
            transfer.fail(RuntimeError("has left" if left else "timed out"), what)
        elif origin.rank not in ranks:
            # A rank has given up, and nobody knows of one with which it began.
            transfer.end(calls.given_up(communicator.view, origin))
        else:
            transfer.fail(RuntimeError(f"rank {ranks.index(origin.rank)} {origin.words}"), what)
            set_origin(transfer.failure, communicator.view, origin)
