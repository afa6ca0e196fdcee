"""Steps around another optimizer's update: the scheduler of `Decentralized`, whose passes only mix."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fusedfog.comm.profiling import span
from fusedfog.engine.gradient_scale import gradients_of, own_multipliers
from fusedfog.engine.passes import pass_of, stand_in_inputs, stand_ins, weights_of
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.buckets import Inbox, PassGroup
from fusedfog.kernels import Mixing, Pass, run_pass
from fusedfog.params.flat import FlatSegment


class AroundScheduler(Scheduler):
    """A scheduler that leaves the update to somebody else."""

    _healed = False
    _inner: weakref.ref[torch.optim.Optimizer] | None = None

    @cached_property
    def _rooms(self) -> dict[int, Tensor]:
        """By segment, where corrections are put if the inbox is not to be overwritten."""
        return {}

    def has_second_moments(self) -> bool:
        """Not known before the wrapped optimizer has made a step."""
        return True

    def second_moments(self, segment: FlatSegment, position: int) -> list[Tensor]:
        """See `Scheduler`; those that are called as torch's optimizers call them."""
        inner = self._inner() if self._inner is not None else None
        state = inner.state.get(segment.owners[position], {}) if inner is not None else {}
        return [state[name] for name in ("exp_avg_sq", "max_exp_avg_sq") if isinstance(state.get(name), Tensor)]

    def step_around(self, inner: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """A step whose update `x = inner(x)` is another optimizer's, in place, with passes around it that only mix.

        awc   wait for the inbox -> c = W x - x, into the inbox -> x = inner(x) -> x += c -> send x
        atc   x = inner(x) -> send x -> wait -> x = W x
        """
        self._inner = weakref.ref(inner)
        self.begin_step()
        flag = self.averaged_flag(found_inf)
        exchanges, step = self.exchanges, self.clock.steps
        ahead, exchanging, pass_groups = self.algorithm.before is None, exchanges.due(step), self.pass_groups(0)
        if ahead and exchanging:
            exchanges.start_missing(self.buckets.all)
            exchanges.find_edits()
        corrections = [self._correction(pass_group) if ahead and exchanging else None for pass_group in pass_groups]
        self._update_outside(inner, grad_scale, flag)
        target = exchanges.following() if ahead else (step, self.clock.exchanges) if exchanging else None
        for pass_group, correction in zip(pass_groups, corrections, strict=True):
            if correction is not None:
                pass_group.segment.param[pass_group.whole] += correction[pass_group.whole]
                pass_group.bump_versions()
            if target is not None:
                exchanges.start(pass_group.buckets, *target)
        if not ahead:
            self.after_exchange()
        self.end_step()

    def _correction(self, pass_group: PassGroup) -> Tensor | None:
        """W x - x of a pass group's buckets, in a tensor that came unless it is kept; None if there is nothing to mix."""
        inbox = self.exchanges.receive(pass_group)
        if not inbox.weights:
            return None
        into = self._room_for(pass_group.segment) if inbox.kept else inbox.tensors[0][0]
        if self._before_pass(pass_group, inbox):
            self._healed = True
        quarantine = self.exchanges.quarantine
        alarm = None
        if quarantine is not None:
            alarm = quarantine.alarm_for(pass_group.segment.param)
            quarantine.before_overwriting(pass_group, inbox)
        with span("pass", pass_group.numbers, "mix"):
            run_pass(self._differences(pass_group, inbox, into, alarm))
        return into

    def _differences(self, pass_group: PassGroup, inbox: Inbox, into: Tensor, alarm: Tensor | None) -> Pass:
        """The pass that makes W x - x."""
        mixing = Mixing((pass_group.segment.param,), inbox.tensors, weights_of(self, inbox), row_sum=0.0, alarm=alarm)
        return Pass("mix", into, (), (), pass_group.region, mixing=mixing)

    def passes_to_warm(self, pass_group: PassGroup, neighbours: set[int]) -> Iterator[Pass]:
        """See `Scheduler`: the update is another optimizer's, so all passes mix."""
        segment, quarantine = pass_group.segment, self.exchanges.quarantine
        alarm = quarantine.alarm_for(segment.param) if quarantine is not None else None
        with stand_in_inputs(self):
            for count in sorted(neighbours - {0}) if segment.layout.mix else ():
                inbox = stand_ins(self, segment, count)
                if self.algorithm.before is None:
                    yield self._differences(pass_group, inbox, inbox.tensors[0][0], alarm)
                else:
                    yield pass_of(self, pass_group, self.algorithm.after, None, inbox)

    def _room_for(self, segment: FlatSegment) -> Tensor:
        """Zeros like the segment at first: passes leave out the padding between parameters."""
        if id(segment) not in self._rooms:
            self._rooms[id(segment)] = torch.zeros_like(segment.param)
        return self._rooms[id(segment)]

    def _update_outside(
        self, inner: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if found_inf is not None and getattr(inner, "_step_supports_amp_scaling", False):
            self._unscale(grad_scale)
            inner.found_inf, inner.grad_scale = found_inf, None  # type: ignore[attr-defined]
            try:
                self._step_scaled(inner)
            finally:
                del inner.found_inf, inner.grad_scale  # type: ignore[attr-defined]
        elif found_inf is None or not found_inf.item():
            # The host waits for the flag here, as GradScaler does itself for an optimizer that cannot skip on the device.
            self._unscale(grad_scale)
            self._step_scaled(inner)
        self.take_back_moved()
        if self._healed:
            self._healed = False
            for state in inner.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                        value.nan_to_num_(0.0, 0.0, 0.0)
        self.buckets.begin_step()  # The update's own writes are no edits.

    def _step_scaled(self, inner: torch.optim.Optimizer) -> None:
        """The inner step at the phase's learning rates, times this rank's weight, which its groups show nobody else."""
        mixed = self.phase.lr_scale * self.weight
        rates = [group.get("lr") for group in self.groups] if (mixed, self.phase.lr_scale) != (1.0, 1.0) else []
        for group, rate in zip(self.groups, rates, strict=False):
            if rate is not None:
                group["lr"] = rate * (mixed if group["mix"] else self.phase.lr_scale)
        try:
            inner.step()
        finally:
            for group, rate in zip(self.groups, rates, strict=False):
                if rate is not None:
                    group["lr"] = rate

    def _unscale(self, grad_scale: Tensor | None) -> None:
        for mix, factor in zip((True, False), own_multipliers(self, grad_scale), strict=True):
            gradients = gradients_of([segment for segment in self.segments if segment.layout.mix == mix])
            if factor is not None and gradients:
                torch._foreach_mul_(gradients, factor)
