"""How the next epoch comes to be: notes are written and read, one of those that are ready proposes, all who are in it connect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

from torch._C._distributed_c10d import TCPStore

from fusedfog.comm.elastic.asking import Heard, ask
from fusedfog.comm.elastic.board import Board, open_store
from fusedfog.comm.elastic.epoch import NotFormed, open_epoch
from fusedfog.comm.elastic.identity import Identity
from fusedfog.comm.elastic.record import Note, Record, Seat, Situation, judge, launched, read_note, read_record
from fusedfog.errors import Minority, PeerTimeout, StoreLost
from fusedfog.log import log

_PAUSE = 0.02
_PATIENCE = 0.25
"""Seconds in which members answer who they are."""


class Forms(Protocol):
    """What is needed of the run."""

    identity: Identity
    board: Board
    timeout: float
    dead_after: float
    min_ranks: int
    epochs_store: tuple[tuple[str, int], TCPStore] | None

    def serve(self) -> None:
        """Give a newcomer what it has asked for."""

    def is_lost(self, uid: str, answered: bool) -> bool:
        """Take note of an answer, or of none; whether a member has not answered for too long."""


class Dropped(RuntimeError):
    """The others have an optimizer and go on without this process, which has none: it is to join them as a newcomer."""


class Evicted(Minority):
    """The others have let this process go, and it reaches them: it may come back as a newcomer."""


def form(run: Forms, note: Note, base: Record | None, leave: Callable[[], None]) -> Record:
    """The next epoch that this process is in, with its default group open.

    Args:
        base: the epoch that ends; None to begin a run.
        leave: called when all are ready, before the new epoch is opened.

    Raises:
        Minority: the others go on without this process; `Evicted` if it reaches them.
        Dropped: the same, before it has an optimizer.
        PeerTimeout: a member lives and does not come, within the run's timeout; names it.
    """
    while True:
        record = _Forming(run, note, base).agree()
        leave()
        try:
            _open(run, record)
        except NotFormed as why:
            log.info("slot %d: epoch %d did not form: %s", run.identity.slot, record.epoch, why)
            base, note = record, replace(note, cause=note.cause or str(why), steps=max(note.steps, record.steps))
            continue
        return record


def _open(run: Forms, record: Record) -> None:
    """Connect with the other members of a record; raises NotFormed."""
    known, run.epochs_store = run.epochs_store, None
    if known is None or known[0] != run.board.address:
        try:
            known = run.board.address, open_store(*run.board.address, timedelta(seconds=run.timeout))
        except RuntimeError as error:
            raise NotFormed(f"the store does not answer: {error}") from None
    others = [seat for seat in record.seats if seat.uid != run.identity.uid]

    def give_up() -> str:
        try:
            if run.board.count(f"turn/{record.epoch + 1}"):
                return "a member has given it up"
        except StoreLost as error:
            return str(error)
        heard = ask(others, _PATIENCE)
        return next((f"slot {seat.slot} has ended" for seat in others if heard[seat.uid].dead), "")

    rank = record.uids.index(run.identity.uid)
    open_epoch(record, rank, known[1], timedelta(seconds=run.timeout), run.dead_after, give_up)
    run.epochs_store = known


class _Forming:
    """One member on its way to the epoch after `base`."""

    def __init__(self, run: Forms, note: Note, base: Record | None) -> None:
        self._run, self._note, self._base = run, note, base
        self._board, self._uid = run.board, run.identity.uid
        self._began = time.monotonic()
        self._text: str | None = None
        self._waits: Sequence[str] = ()
        self._written = False

    def agree(self) -> Record:
        """The record of the next epoch that this process is in."""
        while True:
            try:
                found = self._look()
            except StoreLost as error:
                self._written = False
                found = None
                self._check_alone(error)
            if found is not None:
                return found
            self._run.serve()
            if time.monotonic() - self._began > self._run.timeout:
                raise PeerTimeout(
                    f"slot {self._run.identity.slot}: epoch {self._next}: waited {self._run.timeout:g} s for "
                    f"{', '.join(self._waits)}"
                )
            time.sleep(_PAUSE)

    @property
    def _next(self) -> int:
        return self._base.epoch + 1 if self._base is not None else 0

    def _look(self) -> Record | None:
        found = self._newest()
        if found is not None:
            return found
        if not self._written:
            self._write()
        notes = self._notes()
        situation = self._situation(notes)
        verdict = judge(situation)
        self._waits = verdict.waits_for
        if verdict.minority:
            raise Minority(f"slot {self._run.identity.slot}: {verdict.minority}. Start it again to have it join them")
        if verdict.propose is not None:
            self._board.swap("record", self._text, verdict.propose.text())
        elif situation.lost and set(situation.lost) - set(self._note.lost):
            self._note = replace(self._note, lost=tuple(situation.lost))
            self._written = False
        return None

    def _newest(self) -> Record | None:
        """The newest record, if this process is in it and it is newer than `base`, which becomes it otherwise."""
        self._text = self._board.get("record")
        newest, base = read_record(self._text), self._base
        if newest is None or (base is not None and newest.epoch < base.epoch):
            if base is not None:  # A store that has been started anew, or another one.
                self._text = self._board.swap("record", self._text, base.text())
                self._written = False
            return None
        if base is not None and newest.epoch == base.epoch:
            return None
        if self._uid in newest.uids:
            return newest
        if self._note.at != "join":
            raise self._left_out(newest)(
                f"slot {self._run.identity.slot}: {newest.cause or 'the members changed'}, and the others go on without this "
                f"process (epoch {newest.epoch}). Start it again to have it join them"
            )
        self._base, self._written = newest, False
        return None

    def _left_out(self, newest: Record) -> type[RuntimeError]:
        """What it is that the others go on without this process."""
        if self._note.at == "construction":
            return Dropped
        deadline = time.monotonic() + self._run.dead_after
        while time.monotonic() < deadline:
            if any(heard.said is not None and not heard.dead for heard in ask(newest.seats, _PATIENCE).values()):
                return Evicted
            time.sleep(_PAUSE)
        return Minority

    def _write(self) -> None:
        """Say that this process is ready."""
        self._board.set(f"ready/{self._next}/{self._run.identity.slot}", self._note.text())
        self._board.count(f"{'join' if self._note.at == 'join' else 'turn'}/{self._next}", 1)
        self._written = True

    def _notes(self) -> dict[str, Note]:
        texts = [self._board.get(f"ready/{self._next}/{slot}") for slot in range(self._run.identity.slots)]
        return {note.seat.uid: note for text in texts if (note := read_note(text)) is not None}

    def _situation(self, notes: dict[str, Note]) -> Situation:
        run, base = self._run, self._base
        seats = {
            seat.uid: seat
            for seat in (*(base.seats if base is not None else ()), *(note.seat for note in notes.values()))
        }
        others = [seat for uid, seat in seats.items() if uid != self._uid]
        heard = ask(others, _PATIENCE)
        newer = {note.seat.slot: note.seat.incarnation for note in notes.values()}
        dead = [seat.uid for seat in others if self._is_dead(seat, heard[seat.uid], newer)]
        answered = [uid for uid, one in heard.items() if one.said is not None and uid not in dead]
        lost = [uid for uid in heard if run.is_lost(uid, uid in answered or uid in dead)]
        late = time.monotonic() - self._began > run.dead_after
        reached = {self._uid, *answered}
        return Situation(self._uid, base, run.identity.slots, notes, reached, dead, lost, late, run.min_ranks)

    def _is_dead(self, seat: Seat, heard: Heard, newer: dict[int, tuple[int, ...]]) -> bool:
        """Whether a process has ended for certain."""
        if heard.dead or newer.get(seat.slot, ()) > seat.incarnation:
            return True
        return heard.said is None and self._board.get(f"dead/{launched(seat.uid)}") is not None

    def _check_alone(self, error: StoreLost) -> None:
        """Without a store nobody can say who goes on: the smaller side of a broken network has none."""
        base = self._base
        if base is None:
            return
        others = [seat for seat in base.seats if seat.uid != self._uid]
        heard = ask(others, _PATIENCE)
        lost = [uid for uid, one in heard.items() if self._run.is_lost(uid, one.said is not None or one.dead)]
        self._waits = ("a store that answers",)
        if lost and 2 * (len(base.seats) - len(lost)) <= len(base.seats):
            raise Minority(
                f"slot {self._run.identity.slot}: {len(lost)} of {len(base.seats)} members do not answer, and {error}. Start it "
                f"again to have it join them"
            )
