"""Phases of a run, as plain data: what an optimizer does in a part of it.

A run has one phase as a rule. With `data_parallel_steps=N` it has two, and `switch` begins another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedfog.algorithm import Algorithm
from fusedfog.comm.communicator import Communicator
from fusedfog.engine.clock import StepSchedule
from fusedfog.engine.rank_weights import RankWeights
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.topology import Topology


@dataclass(frozen=True)
class Phase:
    """What an optimizer does in a part of a run.

    Attributes:
        algorithm, topology, schedule: by what it makes steps; `topology` is between machines with a hierarchy.
        codes: dtype of compressed messages; None sends the flat tensors themselves.
        hierarchy: this rank's place on a mesh.
        lr_scale: what learning rates are multiplied by.
        gradients: of the ranks that average their gradients although they are not all: those of a machine.
        reason: why this topology, for people.
        weights: of the ranks; None where all are equal.
    """

    algorithm: Algorithm
    topology: Topology | None
    schedule: StepSchedule
    codes: torch.dtype | None = None
    hierarchy: Hierarchy | None = None
    lr_scale: float = 1.0
    gradients: Communicator | None = None
    reason: str = ""
    weights: RankWeights | None = None

    @property
    def data_parallel(self) -> bool:
        """Whether all ranks have the same parameters, and the mean of their gradients."""
        return self.algorithm.exchanges == "gradients"


@dataclass(frozen=True)
class Phases:
    """The phases of a run, each from a step on; the first one from step 0."""

    begins: tuple[tuple[int, Phase], ...]

    @staticmethod
    def of(phase: Phase, before: Phase | None = None, steps: int = 0) -> Phases:
        """One phase, behind so many steps of another one."""
        return Phases(((0, before), (steps, phase)) if before is not None and steps else ((0, phase),))

    def at(self, step: int) -> Phase:
        """The phase of a step."""
        return [phase for first, phase in self.begins if first <= step][-1]

    def with_last(self, phase: Phase) -> Phases:
        """The same with another last phase."""
        first, _ = self.begins[-1]
        return Phases((*self.begins[:-1], (first, phase)))

    @property
    def last(self) -> Phase:
        """The one that has no end."""
        return self.begins[-1][1]
