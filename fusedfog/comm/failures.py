"""Where a failure began: found by those who wait, and told to everybody else.

Above it are calls and communicators, which fail; below it are the questions and answers of `whereabouts`.

A message whose peer dies in the middle of it is never completed and never fails (gloo tells of a broken connection only those
operations of which nothing has travelled yet), so nobody may rely on an error. Instead, who has waited for `FIRST_LOOK` seconds
looks at the ranks that it waits for, and again and again: a port that refuses is a process that has ended. Nothing is sent or
asked while waits are shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fusedfog.comm import whereabouts
from fusedfog.comm.group import Ranks
from fusedfog.comm.whereabouts import State, World
from fusedfog.errors import ExchangeError, PeerTimeout

FIRST_LOOK = 0.3
"""Seconds of waiting after which the ranks that are waited for are looked at."""

LOOK_EVERY = 0.4
"""Seconds between looks. One costs a connection to each of these ranks."""

_GRACE = 0.7
"""Seconds that what a rank sent before it ended in good order has to arrive in."""

_AT_ONCE = 64
"""Ranks that are looked at without being waited for; of more, others in turn."""

_LONGEST_WORDS = 300


@dataclass(frozen=True)
class Origin:
    """Where a failure began.

    Attributes:
        rank: global; -1 where it is not known, as of a network that broke between two living ranks.
        words: what became of that rank, as a sentence goes on after "rank 3".
        late: whoever noticed it had waited for the whole timeout.
    """

    rank: int
    words: str
    late: bool = False

    def plain(self, name: str) -> tuple[str, int, str, bool]:
        """The entry of `State.ended` for the communicator `name`."""
        return name, self.rank, self.words[:_LONGEST_WORDS], self.late


def origin_in(state: State, name: str) -> Origin | None:
    """Why a rank has given the communicator `name` up; None if it has not."""
    for ended, rank, words, late in state.ended:
        if ended == name:
            return Origin(rank, words, late)
    return None


def origin_of(error: PeerTimeout | ExchangeError | None) -> Origin | None:
    """Where a failure began that knows it already."""
    if error is None or error.origin_rank is None:
        return None
    return Origin(error.origin_rank, error.origin_words, isinstance(error, PeerTimeout))


def set_origin(error: Exception | None, view: Ranks, origin: Origin | None) -> None:
    """Have an error say, for programs, where it began."""
    if isinstance(error, (PeerTimeout, ExchangeError)) and origin is not None and origin.rank >= 0:
        error.origin = view.ranks.index(origin.rank) if origin.rank in view.ranks else None
        error.origin_rank, error.origin_words = origin.rank, origin.words


def find(world: World, states: Mapping[int, State], name: str, first: Iterable[int] = ()) -> Origin | None:
    """Where the failure began that ranks tell of, or that has ended some of them; None if nothing is known yet.

    Args:
        states: of ranks that were asked just now, by global rank.
        name: of the communicator that failed, or the call.
        first: ranks that were waited for: if one of them has ended, it began there.
    """
    told = [found for state in states.values() if (found := origin_in(state, name)) is not None]
    if told:
        return max(told, key=lambda origin: origin.rank >= 0)
    gone = [rank for rank in states if world.is_gone(rank)]
    ended = [rank for rank in first if rank in gone] or [rank for rank in gone if not world.is_done(rank, states[rank])]
    return Origin(ended[0], whereabouts.ENDED) if ended else None


class Vigil:
    """Looks, now and then while a thread waits for ranks, whether they are still there.

    Args:
        world: of this process.
        name: of the communicator that is waited in, or the call.
        own: what this rank says of itself.
        lasting: it is a communicator's, which no rank takes up again that has given it up; a call may be made again.
        needed: global ranks without which a call can't be completed, whether this rank waits for them or for others who do.
    """

    def __init__(
        self, world: World, name: str, own: State, *, lasting: bool = False, needed: Iterable[int] = ()
    ) -> None:
        self._world, self._name, self._own, self._lasting = world, name, own, lasting
        self._needed = tuple(needed)
        self._ended_at: dict[int, float] = {}

    def look(self, ranks: Iterable[int], next_one: int | None) -> Origin | None:
        """Whether the wait for these global ranks is in vain; takes a quarter of a second at most.

        Args:
            next_one: the one without whose message the wait goes no further; None if all are needed.
        """
        if len(self._needed) > _AT_ONCE:
            self._needed = (*self._needed[_AT_ONCE:], *self._needed[:_AT_ONCE])
        waited = {rank for rank in ranks if rank != self._world.rank}
        others = waited.union(self._needed[:_AT_ONCE]) - {self._world.rank}
        states = whereabouts.ask(self._world, others, self._own, whereabouts.QUICKLY)
        if self._world.overseer is not None and (seen := self._world.overseer(states)) is not None:
            return Origin(*seen)
        for state in states.values() if self._lasting else ():
            found = origin_in(state, self._name)
            if found is not None:
                return found
        now = time.monotonic()
        for rank, state in states.items():
            if self._world.is_done(rank, state):
                if rank not in waited:
                    continue
                # What it sent before it ended in good order may still be on its way.
                since = self._ended_at.setdefault(rank, now)
                if next_one in (None, rank) and now - since > _GRACE:
                    return Origin(rank, whereabouts.ENDED)
            elif self._world.is_gone(rank):
                return find(self._world, states, self._name, [rank])
        return None
