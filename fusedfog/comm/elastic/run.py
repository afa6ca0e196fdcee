"""This process' part in an elastic run: what optimizers, and `fusedfog.init`, use of the rooms beside."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from torch._C._distributed_c10d import HashStore, Store, TCPStore

from fusedfog.comm import calls, whereabouts
from fusedfog.comm.elastic import asking, nccl
from fusedfog.comm.elastic.board import Board
from fusedfog.comm.elastic.completing import completed
from fusedfog.comm.elastic.epoch import close_epoch, open_epoch
from fusedfog.comm.elastic.forming import Dropped, form
from fusedfog.comm.elastic.handing import Hand
from fusedfog.comm.elastic.identity import Identity
from fusedfog.comm.elastic.record import Note, Position, Record, Seat, read_record
from fusedfog.comm.elastic.silence import Silence
from fusedfog.comm.elastic.watching import Watcher
from fusedfog.comm.failures import Origin
from fusedfog.comm.listener import Listener
from fusedfog.comm.registry import close_all, hear_all
from fusedfog.comm.whereabouts import State
from fusedfog.errors import LaunchError, Minority, StoreLost
from fusedfog.log import log

_TOLD_EVERY = 0.3
_HAND_OVER = 90.0
"""Seconds without a byte after which a newcomer asks another member."""


@dataclass(frozen=True)
class Change:
    """The members have changed.

    Attributes:
        epoch: the number of the period that begins.
        members: all of them, by rank; each is "slot.incarnation", or "slot.incarnation.returns" of a process that was let go, as
            it had not answered for too long, and has come back.
        left, joined: who is no member any more, and who has become one.
        cause: why, for people.
    """

    epoch: int
    members: tuple[str, ...]
    left: tuple[str, ...]
    joined: tuple[str, ...]
    cause: str


class Run:
    """See the package.

    Args:
        timeout: seconds that a wait for a living member may last.
        min_ranks: with how many members training goes on.
        dead_after: seconds without an answer after which a member counts as lost.
        on_change: called with each `Change`, in the program's thread.

    Attributes:
        record: of the epoch that this process is a member of; None before its first one.
        left: this process has ended its part, and answers as one that is none of the members.
        over: why the current epoch is over, once it is; "" until then.
        met: all members have completed a call in the current epoch.
        built: this process has an optimizer, whose state newcomers may have.
        again: what makes a call again whose epoch ends before all have completed it; the optimizer's.
        hand, write: where newcomers' wishes for it arrive, and what writes it into a file; the optimizer's.
        source: the member whose state this process has begun with; "" if it has begun with its own.
        silence: of the other members.
        unwaited: in steps no member waits for another, so that none would miss it; a thread looks after the next one then.
        epochs_store: the connection that process groups use, and where to; made anew when a thread may be blocked in it.
        reforms, reform_s: how many epochs it has gone over to, and for how many seconds it waited for them.
    """

    _current: ClassVar[Run | None] = None

    def __init__(
        self,
        identity: Identity,
        *,
        timeout: float,
        min_ranks: int,
        dead_after: float,
        on_change: Callable[[Change], object] | None,
    ) -> None:
        self.identity, self.timeout, self.min_ranks, self.dead_after = identity, timeout, min_ranks, dead_after
        self._on_change = on_change
        self._change: Change | None = None
        self._known: tuple[str, ...] = ()
        self._hosted = _host(identity) if identity.hosts else None
        prefix = f"fusedfog/{identity.run}/"
        self.board = Board(identity.stores, prefix)
        self._own_seat()
        self.record: Record | None = None
        self.over, self.met, self.built, self.left = "", False, False, False
        self.source = ""
        self.again: Callable[..., Any] | None = None
        self.hand = Hand()
        self.write: Callable[[Path], int] | None = None
        self.reforms, self.reform_s = 0, 0.0
        self.epochs_store: tuple[tuple[str, int], TCPStore] | None = None
        self.silence = Silence(dead_after)
        self.unwaited = False
        self._commits, self._called = 0, -1
        self._watcher = Watcher(self, Board(identity.stores, prefix))
        atexit.register(self._end)

    @classmethod
    def current(cls) -> Run | None:
        """This process', if it is in an elastic run."""
        return cls._current

    def _own_seat(self) -> None:
        """Listen, and take this process' place in the run.

        Raises:
            LaunchError: another process has it.
        """
        identity = self.identity
        listener = socket.create_server(("", 0), backlog=256)
        ip = whereabouts.own_ip(self._first_store())
        self._listener = Listener(listener, ip, self._answer, lambda: None, lambda: 1.0)
        self.seat = Seat(identity.uid, socket.gethostname(), ip, self._listener.port, secrets.token_hex(8))
        key, own = f"slot/{identity.slot}", json.dumps(vars(self.seat))
        while True:
            before = self.board.get(key)
            known = Seat(**json.loads(before)) if before else None
            if known is not None and known.incarnation >= (identity.incarnation,):
                living = not asking.ask([known], whereabouts.PATIENCE)[known.uid].dead
                if living or known.incarnation > (identity.incarnation,):
                    self._listener.stop()
                    raise LaunchError(
                        f"slot {identity.slot} of run {identity.run!r} is taken by {known.uid} on {known.host}"
                        f"{'' if living else ', which has ended'}: two launchers have started the same slot, or this process, "
                        f"{identity.uid}, is an old one. Give each its own FUSEDFOG_SLOT, or each run its own FUSEDFOG_RUN_ID"
                    )
            if self.board.swap(key, before, own) == own:
                return

    def _first_store(self) -> Store:
        """A store that answers."""
        with contextlib.suppress(StoreLost):
            self.board.get("record")
        if self.board.store is None:
            where = ", ".join(f"{host}:{port}" for host, port in self.identity.stores)
            raise LaunchError(
                f"slot {self.identity.slot}: no store answers at {where}: start the launcher, or see FUSEDFOG_STORES"
            )
        return self.board.store

    # -- epochs ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Be a member of the first epoch; or, if others train already, a rank that is alone until `join`."""
        base = read_record(self.board.get("record"))
        if base is not None and self._lives(base):
            self.stand_alone()
            log.info("slot %d joins run %r, which is in epoch %d", self.identity.slot, self.identity.run, base.epoch)
        else:
            try:
                self._enter(Note(self.seat, "construction"), base)
                self.tell()
            except Dropped:
                self.stand_alone()
        Run._current = self

    def stand_alone(self) -> None:
        """Be no member, in a world of one."""
        self.record = None
        self._leave()
        alone = Record(-1, (self.seat,))
        open_epoch(alone, 0, HashStore(), timedelta(seconds=self.timeout), self.dead_after, lambda: "")

    def come_back(self) -> None:
        """Be another member of the same place, which is none of the run's until it joins: the others have let this one go.

        Raises:
            Minority: another process has the place meanwhile.
        """
        key, self.record = f"slot/{self.identity.slot}", None
        identity = replace(self.identity, returns=self.identity.returns + 1)
        seat = replace(self.seat, uid=identity.uid, token=secrets.token_hex(8))
        own, before = json.dumps(vars(seat)), self.board.get(key)
        while True:
            known = Seat(**json.loads(before)) if before else self.seat
            if known.incarnation > self.seat.incarnation:
                raise Minority(
                    f"slot {identity.slot}: the others have let this process, {self.seat.uid}, go, and {known.uid} on "
                    f"{known.host} was started in its place: this one is none of the run's any more. End it"
                )
            found = self.board.swap(key, before, own)
            if found == own:
                break
            before = found
        self.identity, self.seat = identity, seat
        self.stand_alone()

    def newest(self) -> Record | None:
        """The newest record; None if there is none, or none of its members lives."""
        base = read_record(self.board.get("record"))
        return base if base is not None and self._lives(base) else None

    def _lives(self, record: Record) -> bool:
        others = [seat for seat in record.seats if seat.uid != self.seat.uid and seat.slot != self.seat.slot]
        return any(not heard.dead for heard in asking.ask(others, whereabouts.PATIENCE).values())

    def reform(self, at: Position, steps: int, exchanges: int, cause: str) -> Record:
        """Go over to the next epoch, from wherever the program stands.

        Raises:
            Minority, Evicted, PeerTimeout: as `form`.
        """
        note = Note(self.seat, at, steps, exchanges, self.built, self.silence.lost(self.board), cause)
        base = self.record if self.record is not None else read_record(self.board.get("record"))
        return self._enter(note, base)

    def _enter(self, note: Note, base: Record | None) -> Record:
        """Leave the current epoch, and be in the next one."""
        begin, before = time.monotonic(), self.record
        self.record = None  # The watcher has nothing to look for.
        record = form(self, note, base, self._leave)
        # Else members would see at different steps that somebody waits, and one of them would be in a call each time.
        if record.passed_over:
            self.call(record.epoch)
        self.over, self.met, self._commits = "", False, 0
        self.silence.forget()
        if len(record.seats) > 1:
            calls.change_world(self.timeout, self._oversee)
        self.record = record
        taken = time.monotonic() - begin
        if before is not None or note.at == "join":
            self.reforms, self.reform_s = self.reforms + 1, self.reform_s + taken
        self._log(before or base, record, taken)
        return record

    def _leave(self) -> None:
        """Let go of the epoch that is over. Not before all are ready: somebody may still take what was sent to it."""
        close_all(0.0)
        close_epoch()

    def _log(self, before: Record | None, record: Record, taken: float) -> None:
        old = before.uids if before is not None else ()
        left = tuple(uid for uid in old if uid not in record.uids)
        joined = tuple(uid for uid in record.uids if uid not in old)
        self._note(old, record)
        parts = [f"without {', '.join(left)}" if left else "", f"with {', '.join(joined)}" if joined and old else ""]
        log.info(
            "slot %d: epoch %d has %d members%s, from step %d on (%s), after %.2f s",
            self.identity.slot,
            record.epoch,
            len(record.seats),
            "".join(f", {part}" for part in parts if part),
            record.steps,
            record.cause or "no member has changed",
            taken,
        )

    def _note(self, old: tuple[str, ...], record: Record) -> None:
        """What is to be told: all that has changed since the last time, as an epoch may end before its members are ready."""
        untold = self._change if self._on_change is not None else None
        self._known = old if untold is None else self._known
        causes = dict.fromkeys(["" if untold is None else untold.cause, record.cause])
        left = tuple(uid for uid in self._known if uid not in record.uids)
        joined = tuple(uid for uid in record.uids if uid not in self._known)
        self._change = Change(record.epoch, record.uids, left, joined, "; ".join(filter(None, causes)))

    def tell(self) -> None:
        """Call the user's function, once this process is ready to train in the new epoch."""
        if self._on_change is not None and self._change is not None:
            change, self._change = self._change, None
            self._on_change(change)

    # -- while an epoch lasts ----------------------------------------------------------------------------------------

    @property
    def called(self) -> bool:
        """Whether others are ready for the epoch after the current one."""
        return self.record is not None and self._called == self.record.epoch

    def call(self, epoch: int) -> None:
        """Others are ready for the epoch after this one, which may be over meanwhile. For any thread."""
        self._called = max(self._called, epoch)

    def wake(self, words: str) -> None:
        """The epoch is over: whoever waits in it need not. For any thread."""
        self.over = self.over or words
        hear_all(Origin(-1, words))

    def _oversee(self, states: Mapping[int, State]) -> tuple[int, str] | None:
        """See `World.overseer`."""
        record = self.record
        if self.over or record is None:
            return -1, self.over or "the epoch is over"
        for rank, state in states.items():
            uid = record.uids[rank]
            if uid != self.seat.uid and self.is_lost(uid, state.fate != whereabouts.SILENT):
                return rank, f"has ended, or has not answered for {self.dead_after:g} s"
        return None

    def is_lost(self, uid: str, answered: bool) -> bool:
        """See `forming.Forms`, and `Silence.lasts`; for the program's thread."""
        return self.silence.lasts(uid, answered, self.board)

    def commit(self) -> bool:
        """Whether every member has completed the call that this one has; if not, all of them repeat it."""
        record = self.record
        if record is None or len(record.seats) == 1:
            return record is not None
        self._commits += 1
        others = [seat for seat in record.seats if seat.uid != self.seat.uid]
        looked = time.monotonic()

        def why_not() -> str:
            nonlocal looked
            if not self.over and time.monotonic() - looked > _TOLD_EVERY:
                heard, looked = asking.ask(others, whereabouts.QUICKLY), time.monotonic()
                lost = [uid for uid, one in heard.items() if one.dead or self.is_lost(uid, one.said is not None)]
                self.over = f"{lost[0]} has ended" if lost else ""
            return self.over

        key = f"done/{record.epoch}/{self._commits}"
        done = completed(self.board, key, self.seat.uid, record.uids, why_not, self.dead_after)
        self.met = self.met or done
        if done and self._commits > 1:
            # Who has come to this call knows the verdict on the one before.
            before = f"done/{record.epoch}/{self._commits - 1}"
            self.board.delete(f"{before}/{self.seat.uid}")
            if self.seat.uid == record.uids[0]:
                self.board.delete(f"{before}/verdict")
        return done

    def serve(self) -> None:
        """Write what a newcomer has asked for, where the program stands at the beginning of a step or waits for other members."""
        if self.hand.wanted and self.write is not None:
            if self.record is None:
                # Nothing of the epoch that is over will be used, and what may never come is not to be waited for.
                hear_all(Origin(-1, "the members form a new epoch"))
            self.hand.give(self.write)

    def fetch(self, into: Path) -> tuple[int, int] | None:
        """Have a member hand over its state into a file; its size and checksum, or None if no member has one yet.

        Raises:
            OSError: it has ended on the way.
        """
        base = self.newest()
        for seat in base.seats if base is not None else ():
            found = asking.fetch(seat, into, _HAND_OVER) if seat.uid != self.seat.uid else None
            if found is not None:
                self.source = seat.uid
                return found
        return None

    # -- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, connection: socket.socket) -> None:
        """Answer one question; a thread hands over a state."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection.settimeout(0.2)
            question: Any = json.loads(connection.recv(4096))
            if question["token"] == self.seat.token and question["ask"] == "state":
                threading.Thread(target=self._hand_over, args=(connection,), daemon=True, name="fusedfog-hand").start()
                return
            uid = self.seat.uid if question["token"] == self.seat.token and not self.left else ""
            connection.sendall(json.dumps({"uid": uid, "pid": os.getpid()}).encode())
        connection.close()

    def _hand_over(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.hand.send(connection, self.built)

    def _end(self) -> None:
        """The process ends."""
        self._watcher.stop()
        if nccl.backend() is not None:
            close_all()  # What others wait for is not to be aborted.
        close_epoch()
        self._listener.stop()


def _host(identity: Identity) -> TCPStore | None:
    """A store in this process, where no launcher has one; None if one is there already."""
    host, port = identity.stores[0]
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    except RuntimeError:
        return None
