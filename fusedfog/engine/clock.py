"""When things happen, as plain data: the schedule an optimizer was given, and the clock that says where in it a rank is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusedfog.engine.mix_strength import FULL, MixStrength
from fusedfog.engine.rhythm import Rhythm, is_due


@dataclass
class Clock:
    """Where a rank is in time; what a checkpoint restores, beside states, to keep ranks in phase.

    Attributes:
        steps, exchanges: how many were made.
        previous_lr: each group's last learning rate that was not zero (DecentLaM scales its momentum by lr changes).
        largest_lr: the largest learning rate of the first group that is mixed.
        push_sum: all ranks' push-sum scalars.
        masses: this rank's, by segment, of asynchronous push-sum.
        encoded: the compressed messages of the next exchange are made already.
        gradient_squares: of data-parallel steps; see `GradientMeans.squares`.
        intervals: the last two plans of `adapt=`: from which exchange on, and for each round, in every how many periods it comes.
    """

    steps: int = 0
    exchanges: int = 0
    previous_lr: dict[int, float] = field(default_factory=dict)
    largest_lr: float = 0.0
    push_sum: list[float] | None = None
    masses: list[float] | None = None
    encoded: bool = False
    gradient_squares: list[list[float]] | None = None
    intervals: list[Any] | None = None

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from saved fields; missing ones count from zero."""
        vars(self).update(vars(Clock(**saved)))

    def tick(self, schedule: StepSchedule, exchanging: bool, rates: Sequence[float], mixed: int = 0) -> None:
        """Count a step that has been made, with or without exchange, at these learning rates of the groups.

        `mixed` is the place of the first group that is mixed.
        """
        self.exchanges += exchanging and schedule.is_gossip_step(self.steps)
        self.steps += 1
        self.largest_lr = max(self.largest_lr, rates[mixed])
        for number, rate in enumerate(rates):
            if rate:
                self.previous_lr[number] = rate


@dataclass(frozen=True)
class StepSchedule:
    """Which steps exchange, how strongly they mix, when passes run, whether they measure, what becomes of NaNs and infinities.

    `asynchronous` steps wait for nobody, or with `max_lag` for whoever is that many steps behind. `adapt` exchanges after each
    other, ranks agree on how often rounds are used.
    """

    communicate_every: Rhythm = 1
    global_average_every: int | None = None
    fused_backward: bool = False
    max_grad_norm: float | None = None
    measure: bool = False
    nonfinite: str = "contain"
    mix_strength: MixStrength = FULL
    asynchronous: bool = False
    max_lag: int | None = None
    adapt: int | None = None

    @property
    def skips(self) -> bool:
        """Whether a step whose gradients are not finite makes no update."""
        return self.nonfinite in ("skip", "heal")

    def is_global_average_step(self, step: int) -> bool:
        """Whether this step averages over all ranks."""
        return self.global_average_every is not None and (step + 1) % self.global_average_every == 0

    def is_gossip_step(self, step: int) -> bool:
        """Whether this step counts as an exchange with neighbours."""
        return is_due(self.communicate_every, step)

    def exchanges(self, step: int) -> bool:
        """Whether anything is exchanged for this step, with neighbours or with all ranks."""
        return self.is_gossip_step(step) or self.is_global_average_step(step)
