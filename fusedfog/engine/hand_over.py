"""What of an optimizer's states goes over from one phase of a run into the next.

Parameters, torch's states and the clock go on; what only the old phase's algorithm kept ends with it, and what only the new one
keeps begins.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fusedfog.algorithm import Algorithm
from fusedfog.comm.averaging import average_in_place
from fusedfog.comm.communicator import Communicator
from fusedfog.engine.clock import Clock
from fusedfog.engine.gradient_means import GradientMeans
from fusedfog.engine.phases import Phase
from fusedfog.params.flat import FlatSegment
from fusedfog.params.precision import COMPENSATION, MASTER


class Run(Protocol):
    """What a hand-over needs of a scheduler."""

    groups: list[dict[str, Any]]
    segments: list[FlatSegment]
    communicator: Communicator | None
    clock: Clock
    means: GradientMeans | None

    def has_second_moments(self) -> bool:
        """See `Scheduler`."""

    def second_moments(self, segment: FlatSegment, position: int) -> list[Tensor]:
        """See `Scheduler`."""


def hand_over(run: Run, old: Phase, new: Phase) -> None:
    """Have parameters and states be what the new phase begins with. Collective if one of the two is data-parallel.

    From data-parallel steps on, momentum is what `Algorithm.begins_with` says, and a second moment, which so far was that of the
    mean gradient, is multiplied by how much larger one rank's squared gradient is (`GradientMeans.ratios`). Into them,
    parameters and states become the mean over ranks.
    """
    if old.data_parallel and not new.data_parallel:
        if run.means is not None:
            _scale_second_moments(run, run.means, new)
        _begin_states(run, new.algorithm)
    if new.data_parallel and not old.data_parallel:
        for segment in run.segments:
            if segment.layout.mix:
                _make_common(segment, run.communicator)


def _make_common(segment: FlatSegment, communicator: Communicator | None) -> None:
    """Have parameters and states be their means over ranks, to the last bit the same on all. Collective."""
    compensation, master = segment.states.get(COMPENSATION), segment.states.get(MASTER)
    if compensation is not None:
        compensation.zero_()
    average_in_place([segment.param, *(segment.states[name] for name in sorted(segment.states))], communicator)
    if master is not None:
        segment.param.copy_(master)


def _scale_second_moments(run: Run, means: GradientMeans, phase: Phase) -> None:
    if not run.has_second_moments():
        return
    for segment, position, ratio in means.ratios(phase.gradients.view.size if phase.gradients is not None else 1):
        for moment in run.second_moments(segment, position):
            moment.mul_(ratio.to(moment.dtype))


def _begin_states(run: Run, algorithm: Algorithm) -> None:
    for segment in run.segments:
        number = segment.layout.group
        for name, (source, by_rate) in algorithm.begins_with.items():
            if source in segment.states and name in algorithm.state_names(run.groups[number]):
                rate = run.clock.previous_lr.get(number, 0.0) if by_rate else 1.0
                segment.state(name).copy_(segment.states[source]).mul_(rate)
