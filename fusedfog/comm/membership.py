"""Who of a group's ranks is still there: those that leave put a note into the store, and others read it when they miss them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from fusedfog.comm.group import GroupView
from fusedfog.comm.store import own_store
from fusedfog.comm.waiter import Task
from fusedfog.errors import DivergedError, ExchangeError, NonFiniteError, PeerTimeout, RankLeft

CannotGoOn: TypeAlias = NonFiniteError | DivergedError
"""What ends one rank and, since it exchanges nothing more, all others in their turn."""

_KINDS: dict[str, type[CannotGoOn]] = {kind.__name__: kind for kind in (NonFiniteError, DivergedError)}

_STORE_ANSWERS = 5.0
"""Seconds in which a store answers; it does in a millisecond, or not at all."""


def is_timeout(error: Exception) -> bool:
    """Whether torch says that a peer did not come in time: gloo "Timed out", stores "wait timeout", NCCL either."""
    return re.search("timed out|timeout", str(error), re.IGNORECASE) is not None


def torchs_words(error: Exception) -> str:
    """An error's text without the frames of C++ that torch adds to it, and without gloo's guesses at who is to blame."""
    return str(error).split("\nException raised from")[0].split(". This is typically caused by")[0].strip()


@dataclass(frozen=True)
class Membership:
    """The members of one communicator's group.

    Attributes:
        view: this rank's place among them.
        prefix: of the communicator's keys in the store, the same on all of its ranks.
        timeout: how long a wait may last.
    """

    view: GroupView
    prefix: str
    timeout: timedelta

    def note_leaving(self, steps: int, why: CannotGoOn | None = None) -> None:
        """Tell the others that this rank exchanges nothing more, after so many steps; `why`, if it had to."""
        store = own_store()
        reason = f" {type(why).__name__} {why}" if why is not None else ""
        store.set(f"{self.prefix}/left/{self.view.rank}", f"{steps}{reason}")

    def left(self) -> dict[int, str]:
        """Ranks that have left, their numbers of steps, and why if they had to. Asks the store: for what has failed already."""
        task = Task(self._read_notes)
        # The store may have gone with the rank that hosted it; one that is cut off would be waited for, for ever.
        if task.over.wait(_STORE_ANSWERS):
            with contextlib.suppress(RuntimeError):
                return task.result()
        return {}

    def _read_notes(self) -> dict[int, str]:
        store = own_store()
        keys = {rank: f"{self.prefix}/left/{rank}" for rank in range(self.view.size)}
        return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}

    def failure(self, error: Exception, what: str) -> Exception:
        """The exception for an exchange that will never be complete; `what` names it and its peers."""
        where = f"rank {self.view.rank}: {what}"
        notes = self.left()
        found: Exception
        reasons = [why for _, _, why in (note.partition(" ") for note in notes.values()) if why]
        if reasons:
            kind, _, why = reasons[0].partition(" ")
            found = _KINDS[kind](f"{where}: no rank can go on. {why}")
        elif notes:
            gone = ", ".join(f"rank {rank} after {steps} steps" for rank, steps in notes.items())
            rest = [rank for rank in range(self.view.size) if rank not in notes]
            found = RankLeft(
                f"{where}: left with opt.leave(): {gone}. A group cannot go on without a member: end here too, or build a new "
                f"optimizer with group=fusedfog.new_group({[self.view.ranks[rank] for rank in rest]}) and sync_init=False",
                tuple(notes),
            )
        elif is_timeout(error):
            limit = f"{self.timeout.total_seconds():g} s"
            found = PeerTimeout(
                f"{where}: nothing within the process group's timeout of {limit}. That rank is stuck, far behind or gone; "
                f"raise init_process_group(timeout=...) if it is only slow"
            )
        else:
            found = ExchangeError(
                f"{where}: connection lost: that rank has exited, or has given up and closed it ({torchs_words(error)})"
            )
        # Its traceback would keep gloo's works alive, and with them the connections that `close` closes.
        found.__cause__ = error.with_traceback(None)
        return found
