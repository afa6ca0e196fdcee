"""Whether a program goes by the clock of its elastic run, as far as one process can see: it reads `opt.steps` between steps.

A loop that counts its own steps is right until the clock is another one than its count: in a process that joins others, or that
was left behind in a call. It then ends at another time than the others', and until then draws other data and learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusedfog.log import warn_user

PATIENCE = 100
"""Steps without a look at the clock after which somebody is told. A loop may look seldom: once in some batches."""


class ClockReads:
    """What one process has seen of its program. All of it is local.

    Args:
        slot: of the process.
    """

    def __init__(self, slot: int) -> None:
        self._slot = slot
        self._steps = 0
        self._read, self._warned = False, False
        self._moved: tuple[int, int, int] | None = None

    def read(self) -> None:
        """The program looks at the clock.

        What it does before its first step is no loop: `if opt.steps == 0: prepare()` may stand above one that counts by itself.
        """
        self._read = self._read or self._steps > 0

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Inside, reads are no loop's either: a user's function is called that hears of new members, and may print the clock."""
        before = self._read
        try:
            yield
        finally:
            self._read = before

    def move(self, before: int, now: int) -> None:
        """The clock is another one than the count of the program's own steps would be."""
        if before != now and self._moved is None:
            self._moved = before, now, self._steps

    def begin_step(self) -> None:
        """The program makes a step.

        Warns:
            RuntimeWarning: once, if the clock has moved and the program has made `PATIENCE` steps since without ever reading it.
        """
        if self._moved is not None and not self._read and not self._warned:
            before, now, steps = self._moved
            if self._steps - steps >= PATIENCE:
                self._warned = True
                warn_user(
                    f"slot {self._slot}: opt.steps went from {before} to {now}, where the other members were, and in {PATIENCE} "
                    f"steps since the program has not read it. A loop that counts its own steps, as `for step in "
                    f"range(N)`, ends at another time than the others', with other data and learning rates: write `while "
                    f"opt.steps < N`, and have data and schedules be functions of opt.steps",
                    RuntimeWarning,
                )
        self._steps += 1
