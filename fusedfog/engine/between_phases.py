"""How a scheduler goes over from one phase of a run into another: what it holds anew, and what goes on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedfog.algorithm import Algorithm
from fusedfog.comm.communicator import Communicator
from fusedfog.engine.adapt import Adaptation
from fusedfog.engine.between_steps import BetweenSteps
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.exchanges import Exchanges
from fusedfog.engine.gradient_means import GradientMeans
from fusedfog.engine.hand_over import hand_over
from fusedfog.engine.hooks import BackwardHooks
from fusedfog.engine.phases import Phase, Phases
from fusedfog.engine.rank_weights import part_of_node, parts
from fusedfog.engine.same_numbers import SameNumbers
from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.by_machine import Hierarchy
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.gossip.delivery import ExchangeStats
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.topology import Topology


class Members(Protocol):
    """Who the ranks are in an elastic run, as far as steps are concerned."""

    def before_step(self) -> None:
        """If the members have changed, go over to those that there are now; see `change_members`."""

    def is_waited_for(self) -> bool:
        """Whether somebody waits for this rank's next step: the members, to go over, or a newcomer for its state."""

    def serve(self, clock: tuple[int, int] | None) -> None:
        """From now on steps only mix: newcomers are given this as steps and exchanges. For None, they are training again."""

    def clock_is_read(self) -> None:
        """The program reads how many steps were made."""

    def leave(self) -> None:
        """This rank makes no further step."""

    def lost(self, error: Exception) -> None:
        """An exchange has failed, and its step mixes nothing."""


class BetweenPhases(BetweenSteps):
    """A scheduler while it changes its phase; `Scheduler` sets its attributes, and explains them."""

    groups: list[dict[str, Any]]
    phase: Phase
    phases: Phases
    algorithm: Algorithm
    schedule: StepSchedule
    clock: Clock
    stats: ExchangeStats
    channels: CompressedChannels | None
    place: torch.device
    adaptation: Adaptation | None = None
    weight: float = 1.0
    weight_of_gradients: Tensor | None = None
    members: Members | None = None
    _same_numbers: SameNumbers | None
    _channel: int
    _mean_bytes: int
    _by_segment: bool

    @property
    @abstractmethod
    def rank(self) -> int:
        """See `Scheduler`."""

    @abstractmethod
    def pass_bucket(self, place: int) -> None:
        """See `hooks.PassMaker`."""

    @abstractmethod
    def may_pass(self, bucket: BucketState) -> bool:
        """See `hooks.PassMaker`."""

    @abstractmethod
    def rebuild_buckets(self, *, local: bool = False) -> None:
        """See `Scheduler`."""

    @abstractmethod
    def use_topology(self, topology: Topology | None) -> None:
        """See `Scheduler`."""

    @abstractmethod
    def warm_up(self) -> None:
        """See `Scheduler`."""

    @property
    def node(self) -> int:
        """This rank; 0 where all ranks have the same parameters, and with gradients averaged inside machines the machine."""
        if self.phase.data_parallel:
            return 0
        return self.phase.hierarchy.machine if self.phase.gradients is not None and self.phase.hierarchy else self.rank

    def enter(self, phase: Phase) -> None:
        """Make steps as this phase says, beginning with nothing in flight."""
        schedule, gradients = phase.schedule, phase.gradients
        self.phase, self.algorithm, self.schedule = phase, phase.algorithm, schedule
        # Not with fused_backward: how many buckets the hooks have passed differs by rank, and with it the order of pass
        # groups, in which messages are started and NCCL matches them.
        self._by_segment = not schedule.fused_backward
        self._drop_states()
        self._weigh(phase)
        averages = gradients is not None or phase.data_parallel
        self.hooks = BackwardHooks(self, holds=averages or schedule.max_grad_norm is not None or schedule.skips)
        before: Exchanges | None = getattr(self, "exchanges", None)
        self.exchanges = Exchanges(self.segments, phase, self.communicator, self._channel, self.clock, self.stats)
        if before is not None:
            self.exchanges.go_on_from(before)
        if self.members is not None:
            self.exchanges.survive(self.members.lost)
        self.channels, self.means = self.exchanges.channels, None
        over = self.communicator if phase.data_parallel else gradients
        if over is not None:
            members = self._members_of(over)
            self.means = GradientMeans(
                self,
                over,
                members,
                parts(phase.weights, members) if phase.weights is not None else None,
                self.exchanges.quarantine,
                self._mean_bytes,
                frees=schedule.fused_backward,
                # With "allreduce" alone ranks may start apart, as under DistributedDataParallel without its broadcast.
                compares=gradients is not None or phase is not self.phases.last,
                measures=phase.data_parallel and self.has_second_moments(),
            )
        self.rebuild_buckets()
        self.use_topology(phase.topology)
        self.warm_up()

    def _weigh(self, phase: Phase) -> None:
        """Note n p of this rank, or of its machine; where all ranks average gradients, the mean is weighted already."""
        weight = 1.0
        if phase.weights is not None and not phase.data_parallel:
            members, nodes, hierarchy = [self.rank], len(phase.weights), phase.hierarchy
            if hierarchy is not None and hierarchy.equal:
                members = self._members_of(phase.gradients) if phase.gradients is not None else members
                nodes = hierarchy.machines
            weight = part_of_node(phase.weights, members, nodes)
        if weight != self.weight:  # Or else the tensor stays where it is, for CUDA graphs that read it.
            # A GPU's kernel reads fp32, a pass on a CPU whatever number it is.
            dtype = torch.float32 if device.on_gpu(self.place) else torch.float64
            self.weight = weight
            self.weight_of_gradients = None if weight == 1 else torch.tensor(weight, dtype=dtype, device=self.place)

    def _members_of(self, part: Communicator) -> list[int]:
        """The ranks of a communicator, as this one's calls them."""
        assert self.communicator is not None
        return [self.communicator.view.ranks.index(rank) for rank in part.view.ranks]

    def replace_topology(
        self, topology: Topology | None, reason: str, hierarchy: Hierarchy | None, codes: torch.dtype | None
    ) -> None:
        """Exchange along another topology from the next step on, or once the phase begins that has exchanges.

        Args:
            topology: between the machines of `hierarchy`, if there is one.
            reason: why, for people.
            hierarchy: the one that there is; None where ranks are nodes from now on.
            codes: dtype of compressed messages from now on; None for exact ones.
        """
        last = self.phases.last
        ahead, nodes_change = self.phase is not last, hierarchy is not last.hierarchy
        phase = replace(last, topology=topology, reason=reason, codes=codes)
        if nodes_change:
            phase = replace(
                phase, hierarchy=hierarchy, gradients=hierarchy.gradients if hierarchy is not None else None
            )
        self.phases = self.phases.with_last(phase)
        if ahead:
            return
        self.clock.intervals = None
        if nodes_change or codes != last.codes:
            self.take_edits()
            self.change_phase(phase)
        else:
            self.discard()
            self.phase = phase
            self.use_topology(topology)
            self.exchanges.open_connections()
            self.warm_up()

    def set_clock(self, saved: dict[str, Any]) -> None:
        """Resume from `read_clock`'s data, in the phase that this is in; missing entries count from zero."""
        self.clock.restore(saved)
        phase = self.phases.at(self.clock.steps)
        if phase is not self.phase:
            self.discard()
            self.hooks.detach()
            if self.means is not None:
                self.means.detach()
            self.enter(phase)
        elif self.adaptation is not None:
            self.use_topology(phase.topology)
        self.exchanges.set_clock(saved)
        if self.means is not None:
            self.means.squares = self.clock.gradient_squares or []

    def change_phase(self, phase: Phase) -> None:
        """Go over into another phase. Collective, if one of the two is data-parallel."""
        self.discard()
        self.hooks.detach()
        if self.means is not None:
            self.means.detach()
        hand_over(self, self.phase, phase)
        self.clock.intervals = None  # Of other rounds.
        self.enter(phase)
        self.exchanges.open_connections()
        if self.channels is not None:
            self.channels.start_replicas()  # A checkpoint of this moment has them.
        self.buckets.bump_versions()

    def change_members(self, communicator: Communicator | None, phase: Phase, fresh: Collection[int], exchange: int) -> None:
        """Exchange with other ranks from now on, as this phase says, which is the same but for its topology.

        Parameters and states stay this rank's own. Those that carry sums over the ranks that there were begin with zero, and
        push-sum's scalars with one.

        Args:
            communicator: of the ranks that there are; None for one that is alone.
            fresh: ranks whose values are another one's; see `Exchanges.admit`.
            exchange: the number of the next one.
        """
        if self.exchanges.windows is not None:
            # What is in flight is dropped, and whoever has gone would be waited for. All members have left them.
            self.exchanges.windows.close(0.0)
        self.discard()
        self.hooks.detach()
        self.communicator, self._channel = communicator, 0 if communicator is None else communicator.open_channel()
        self.phases = self.phases.with_last(phase)
        # Scalars of the ranks that there were: a checkpoint of one that is alone would keep them.
        self.clock.push_sum, self.clock.masses = None, None
        self.enter(phase)
        self.exchanges.restart()
        self.compare_numbers()
        if communicator is not None:
            self.exchanges.admit(fresh, exchange)
            self.exchanges.open_connections()

    def compare_numbers(self) -> None:
        """Compare hyper-parameters with the ranks that there are now, from time to time."""
        communicator = self.communicator
        # Asynchronous ranks are at different steps of their schedules at any moment.
        compares = communicator is not None and not self.phases.last.schedule.asynchronous
        self._same_numbers = SameNumbers(communicator, self._channel) if communicator is not None and compares else None

    def _drop_states(self) -> None:
        """Free the states of phases that are over."""
        for segment in self.segments:
            names = self.algorithm.state_names(self.groups[segment.layout.group])
            kept = {*names, segment.remainder_name}
            segment.states = {name: state for name, state in segment.states.items() if name in kept}

    def has_second_moments(self) -> bool:
        """Whether updates divide by a mean of squared gradients."""
        return any("exp_avg_sq" in self.algorithm.state_names(group) for group in self.groups)

    def second_moments(self, segment: FlatSegment, position: int) -> list[Tensor]:
        """Those of a segment's parameter number `position`, as far as they have begun."""
        names = [name for name in ("exp_avg_sq", "max_exp_avg_sq") if name in segment.states]
        return [segment.state_view(name, position) for name in names]
