"""Records of epochs, notes of those that are ready for the next one, and what follows from them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from fusedfog.comm.whereabouts import name_ranks

Position: TypeAlias = Literal["begin", "call", "construction", "join"]
"""Where a program stands that is ready: about to begin a step, in a call that all make together, before it has an optimizer. Or
it is none of the members, and wants to be."""


@dataclass(frozen=True)
class Seat:
    """A member, and where it listens. `token` tells its process from others that came to the same port."""

    uid: str
    host: str
    ip: str
    port: int
    token: str

    @property
    def slot(self) -> int:
        """Its place in the run."""
        return _numbers(self.uid)[0]

    @property
    def incarnation(self) -> tuple[int, ...]:
        """How often the process of this place was restarted, and how often it has come back by itself; later ones are larger."""
        return _numbers(self.uid)[1:]


@dataclass(frozen=True)
class Record:
    """An epoch.

    Attributes:
        epoch: its number.
        seats: of its members, by slot: their order is that of ranks.
        built: members that had an optimizer when it began.
        fresh: those of them that have a copy of another one's values.
        steps, exchanges: the clock that it begins with: that of the member that is ahead.
        clocks: of each member, by rank, its own steps and exchanges, which asynchronous ones keep.
        cause: why it began, for people.
        passed_over: somebody wants to join, and could not, as a member was in a call: the next step of all begins another epoch.
    """

    epoch: int
    seats: tuple[Seat, ...]
    built: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    steps: int = 0
    exchanges: int = 0
    cause: str = ""
    passed_over: bool = False
    clocks: tuple[tuple[int, int], ...] = ()

    @property
    def uids(self) -> tuple[str, ...]:
        """Its members, by rank."""
        return tuple(seat.uid for seat in self.seats)

    def clock_of(self, uid: str) -> tuple[int, int]:
        """A member's own steps and exchanges; of one that is none, those of the first member that has no copy of another's."""
        uids = self.uids
        settled = [one for one in uids if one not in self.fresh] or uids
        return self.clocks[uids.index(uid if uid in uids else settled[0])]

    def text(self) -> str:
        """As it is written into the store."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Note:
    """A process is ready for the next epoch.

    Attributes:
        seat: whose it is.
        at: where its program stands.
        steps, exchanges: its clock.
        built: it has an optimizer.
        lost: members that have not answered it for `dead_after` seconds.
        cause: why it has left the last epoch, for people.
    """

    seat: Seat
    at: Position
    steps: int = 0
    exchanges: int = 0
    built: bool = False
    lost: tuple[str, ...] = ()
    cause: str = ""

    def text(self) -> str:
        """As it is written into the store."""
        return json.dumps(asdict(self))


def read_record(text: str | None) -> Record | None:
    """A record that was written; None for what is none."""
    try:
        said: Any = json.loads(text or "")
        seats = tuple(Seat(**one) for one in said.pop("seats"))
        lists = {name: tuple(said[name]) for name in ("built", "fresh")}
        clocks = tuple((int(steps), int(exchanges)) for steps, exchanges in said["clocks"])
        return Record(**{**said, **lists, "seats": seats, "clocks": clocks})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def read_note(text: str | None) -> Note | None:
    """A note that was written; None for what is none."""
    try:
        said: Any = json.loads(text or "")
        return replace(Note(**{**said, "seat": Seat(**said["seat"])}), lost=tuple(said["lost"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@dataclass(frozen=True)
class Situation:
    """What one process knows when it looks.

    Attributes:
        own: its uid.
        base: the newest record; None if there is none.
        slots: how many places the run has.
        notes: of those that are ready for the next epoch, by uid.
        reached: who has answered just now, itself among them.
        dead: members of `base` that are proven to have ended.
        lost: those that have not answered for `dead_after` seconds.
        late: it has waited as long as a run waits for its first members.
        min_ranks: with how many members training goes on.
    """

    own: str
    base: Record | None
    slots: int
    notes: Mapping[str, Note]
    reached: Collection[str]
    dead: Collection[str]
    lost: Collection[str]
    late: bool
    min_ranks: int


@dataclass(frozen=True)
class Verdict:
    """What follows: a record to propose, or whom it waits for, or that it is on the smaller side of a broken network."""

    propose: Record | None = None
    waits_for: tuple[str, ...] = ()
    minority: str = ""


def judge(now: Situation) -> Verdict:
    """What a process does about what it knows."""
    ready = {uid: note for uid, note in now.notes.items() if uid in now.reached}
    base = now.base
    alive = [uid for uid in base.uids if uid not in now.dead] if base is not None else []
    if not alive:
        return _found(now, ready)
    assert base is not None
    said = {uid for note in ready.values() for uid in note.lost}
    gone = {uid for uid in alive if uid not in now.reached and (uid in now.lost or uid in said)}
    members = {uid: ready[uid] for uid in alive if uid in ready}
    waits = [uid for uid in alive if uid not in members and uid not in gone]
    if waits or now.own not in members:
        return Verdict(waits_for=tuple(waits) or base.uids)
    if not has_quorum(list(members), alive):
        here, there = _words(list(members)), _words([uid for uid in alive if uid not in members])
        return Verdict(
            minority=f"{here} cannot reach {there}, and more than half of the members that are not known to be dead go on"
        )
    record = _next(base, members, ready, now)
    if len(record.seats) < now.min_ranks:
        return Verdict(waits_for=("more members",))
    first = _lowest([uid for uid in record.uids if uid in members])
    return Verdict(propose=record) if first == now.own else Verdict(waits_for=(first,))


def has_quorum(here: Sequence[str], alive: Sequence[str]) -> bool:
    """Whether these are more than half of the members that are alive, or half of them and the lowest among them."""
    return 2 * len(here) > len(alive) or (2 * len(here) == len(alive) and _lowest(alive) in here)


def _found(now: Situation, ready: Mapping[str, Note]) -> Verdict:
    """Begin a run, or begin it again after all members have died."""
    newest: dict[int, Note] = {}
    for note in ready.values():
        if note.seat.slot not in newest or newest[note.seat.slot].seat.incarnation < note.seat.incarnation:
            newest[note.seat.slot] = note
    missing = [slot for slot in range(now.slots) if slot not in newest]
    if missing and not (now.late and len(newest) >= now.min_ranks):
        return Verdict(waits_for=tuple(f"slot {slot}" for slot in missing))
    seats = tuple(newest[slot].seat for slot in sorted(newest))
    if seats[0].uid != now.own:
        return Verdict(waits_for=(seats[0].uid,))
    epoch = now.base.epoch + 1 if now.base is not None else 0
    built = {note.seat.uid: note for note in newest.values() if note.built}
    clocks = tuple((newest[slot].steps, newest[slot].exchanges) for slot in sorted(newest))
    clock = max(((note.steps, note.exchanges) for note in built.values()), default=(0, 0))
    return Verdict(propose=Record(epoch, seats, tuple(built), (), *clock, cause="the run begins", clocks=clocks))


def _next(base: Record, members: Mapping[str, Note], ready: Mapping[str, Note], now: Situation) -> Record:
    """The record of those that go on, and of whoever joins them.

    Members without an optimizer, where others have one, are none any more: they join as a newcomer does. Newcomers wait while a
    member is in a call, which they would not make. One whose first epoch has ended before it could begin a step in it is a
    newcomer still, as long as others are none.
    """
    built = {uid: note for uid, note in members.items() if note.built}
    stay = built or dict(members)
    joiners = {uid: note for uid, note in ready.items() if uid not in base.uids and note.built and built}
    passed_over = bool(joiners) and any(note.at != "begin" for note in built.values())
    if passed_over:
        joiners = {}
    waiting = [uid for uid, note in built.items() if note.at == "join"]
    fresh = (*(waiting if len(waiting) < len(built) else ()), *joiners)
    ahead = max(stay.values(), key=lambda note: (note.steps, note.exchanges))
    notes = sorted((*stay.values(), *joiners.values()), key=lambda note: note.seat.slot)
    seats, clocks = tuple(note.seat for note in notes), tuple((note.steps, note.exchanges) for note in notes)
    causes = [note.cause for note in stay.values() if note.cause]
    if left := [uid for uid in base.uids if uid not in stay]:
        cause = "; ".join(dict.fromkeys(_why_left(uid, causes, now) for uid in left))
    else:
        cause = f"{_words(list(joiners))} came" if joiners else next(iter(causes), "")
    clock = ahead.steps, ahead.exchanges
    return Record(base.epoch + 1, seats, (*built, *joiners), fresh, *clock, cause, passed_over, clocks)


def _why_left(uid: str, causes: Sequence[str], now: Situation) -> str:
    """Why one is no member any more, as whoever noticed it says; most members have only heard that there is another epoch."""
    who = _words([uid])
    for cause in causes:
        if re.search(rf"\b{who}\b", cause):
            return cause
    if uid in now.dead:
        return f"{who} has ended"
    return f"{who} had no optimizer" if uid in now.notes else f"{who} has not answered"


def launched(uid: str) -> str:
    """What its launcher calls a member, which does not know of a process that it has come back by itself."""
    return ".".join(uid.split(".")[:2])


def _numbers(uid: str) -> tuple[int, ...]:
    return tuple(map(int, uid.split(".")))


def _lowest(uids: Collection[str]) -> str:
    return min(uids, key=_numbers)


def _words(uids: Sequence[str]) -> str:
    """Members in words, by slot."""
    return name_ranks([_numbers(uid)[0] for uid in uids]).replace("rank", "slot")
