"""Whether all members have completed a call: each says so on the board, and one verdict counts for all of them.

What is said can be said again. A store that does not answer in time may have taken a word all the same, and a member that
then made the call once more would wait for others who have gone on. So nobody leaves before it knows the verdict, unless the
store stays away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fusedfog.errors import StoreLost

_PAUSE = 0.005


class Keeps(Protocol):
    """What is needed of the board; see `Board`."""

    def get(self, key: str) -> str | None:
        """What was set last."""

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all were set."""

    def swap(self, key: str, old: str | None, new: str) -> str:
        """Set it if it is what it was; what it is then."""


def completed(
    board: Keeps, key: str, own: str, members: Sequence[str], why_not: Callable[[], str], patience: float
) -> bool:
    """Whether every member has completed a call, which this one has; if not, all of them make it again.

    Args:
        key: of this call, the same on all members, and used once.
        own, members: who they are.
        why_not: why the others never will, once that is known; "" until then.
        patience: seconds that the store may stay away.

    Raises:
        StoreLost: it has stayed away for longer: the verdict cannot be known.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            verdict = _verdict(board, key, own, members, why_not)
        except StoreLost:
            if time.monotonic() > deadline:
                raise
            continue
        if verdict is not None:
            return verdict == "done"
        deadline = time.monotonic() + patience
        time.sleep(_PAUSE)


def _verdict(board: Keeps, key: str, own: str, members: Sequence[str], why_not: Callable[[], str]) -> str | None:
    """The verdict, as far as there is one. Whoever is the last to come, or finds that somebody never will, gives it."""
    verdict = board.get(f"{key}/verdict")
    if verdict is not None:
        return verdict
    # Each time, as the store may be another one now, or have been started anew.
    board.swap(f"{key}/{own}", None, "done")
    if board.has([f"{key}/{uid}" for uid in members]):
        return board.swap(f"{key}/verdict", None, "done")
    return board.swap(f"{key}/verdict", None, "again") if why_not() else None
