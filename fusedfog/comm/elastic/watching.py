"""The thread of a member that looks, now and then, whether there are notes for the next epoch; and where no member waits for
another in steps, as asynchronous ones, whether the next member is still there.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from fusedfog.comm import whereabouts
from fusedfog.comm.elastic.asking import ask
from fusedfog.comm.elastic.board import Board
from fusedfog.comm.elastic.record import Record, Seat, read_record
from fusedfog.comm.elastic.silence import Silence
from fusedfog.errors import StoreLost
from fusedfog.log import log

EVERY = 0.25
"""Seconds between two looks; one is two questions to the store."""

_ASK_EVERY = 1.0
"""Seconds between two questions to the next member; one is a connection."""

_GRACE = 0.5
"""Seconds in which a member that has gone on to the next epoch is followed at the beginning of a step."""


class Watched(Protocol):
    """What the thread asks, and tells."""

    record: Record | None
    seat: Seat
    silence: Silence
    unwaited: bool

    def call(self, epoch: int) -> None:
        """Others are ready for the epoch after this one."""

    def wake(self, words: str) -> None:
        """The epoch is over: whoever waits in it need not."""


class Watcher:
    """Looks for a run; ends with the process."""

    def __init__(self, run: Watched, board: Board) -> None:
        self._run, self._board = run, board
        self._since: dict[int, float] = {}
        self._asked = 0.0
        self._said_lost = False
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="fusedfog-members").start()

    def stop(self) -> None:
        """End the thread, at its next look."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(EVERY):
            record = self._run.record
            if record is None:
                continue
            try:
                self._look(record)
                self._said_lost = False
            except StoreLost as error:
                if not self._said_lost:
                    self._said_lost = True
                    log.warning("%s. Training goes on; members can change again once a store answers", error)

    def _look(self, record: Record) -> None:
        following = record.epoch + 1
        if self._board.count(f"turn/{following}"):
            self._run.call(record.epoch)
            since = self._since.setdefault(following, time.monotonic())
            if time.monotonic() - since > _GRACE and self._run.record is record:
                self._run.wake("the members form a new epoch")
        elif self._board.count(f"join/{following}"):
            self._run.call(record.epoch)
        else:
            newest = read_record(self._board.get("record"))
            if newest is not None and newest.epoch > record.epoch and self._run.record is record:
                self._run.wake("the other members have gone on without this rank")
        self._since = {epoch: since for epoch, since in self._since.items() if epoch >= following}
        if self._run.unwaited and len(record.seats) > 1 and time.monotonic() - self._asked > _ASK_EVERY:
            self._asked = time.monotonic()
            self._look_after_next(record)

    def _look_after_next(self, record: Record) -> None:
        """Ask the member of the next rank whether it is there: of each one, one other knows."""
        seats = record.seats
        following = seats[(record.uids.index(self._run.seat.uid) + 1) % len(seats)]
        heard = ask([following], whereabouts.QUICKLY)[following.uid]
        answered = heard.said is not None and not heard.dead
        if heard.dead or self._run.silence.lasts(following.uid, answered, self._board):
            self._run.call(record.epoch)
