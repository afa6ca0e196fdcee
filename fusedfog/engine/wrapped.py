"""Steps around another optimizer's update: the scheduler of `Decentralized`, whose passes only mix."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedfog.comm.profiling import span
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.buckets import Sweep
from fusedfog.kernels import Pass, run_pass


class AroundScheduler(Scheduler):
    """A scheduler that leaves the update to somebody else."""

    def step_around(self, inner: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """A step whose update `x = inner(x)` is another optimizer's, in place, with passes around it that only mix.

        awc   wait for the inbox -> c = W x - x, into the inbox -> x = inner(x) -> x += c -> send x
        atc   x = inner(x) -> send x -> wait -> x = W x
        """
        self._begin()
        step, exchanging = self.clock.steps, self._exchanging(self.clock.steps)
        ahead, sweeps = self.algorithm.before is None, self._sweeps(0)
        if ahead and exchanging:
            self._send_missing()
        corrections = [self._correction(sweep) if ahead and exchanging else None for sweep in sweeps]
        self._update_outside(inner, grad_scale, found_inf)
        for sweep, correction in zip(sweeps, corrections, strict=True):
            if correction is not None:
                sweep.segment.param[sweep.whole] += correction[sweep.whole]
                sweep.bump_versions()
            if ahead and self._exchanging(step + 1):
                self._send_all(sweep, step + 1, self.clock.exchanges + (exchanging and self.rhythm.turns(step)))
            elif exchanging and not ahead:
                self._send_all(sweep, step, self.clock.exchanges)
        if not ahead:
            self._follow_all()
        self._tick()

    def _correction(self, sweep: Sweep) -> Tensor | None:
        """W x - x of a sweep's buckets, in one of the tensors that came; None if there is nothing to mix."""
        inbox = self._receive(sweep)
        if not inbox.weights:
            return None
        (received,), param = inbox.tensors, sweep.segment.param
        with span("pass", sweep.numbers, "mix"):
            run_pass(
                Pass(
                    "mix",
                    received[0],
                    (),
                    (),
                    sweep.region,
                    sent=(param,),
                    inbox=(received,),
                    weights=inbox.weights,
                    row_sum=0.0,
                )
            )
        return received[0]

    def _update_outside(
        self, inner: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if found_inf is not None and getattr(inner, "_step_supports_amp_scaling", False):
            self._unscale(grad_scale)
            inner.found_inf, inner.grad_scale = found_inf, None  # type: ignore[attr-defined]
            try:
                inner.step()
            finally:
                del inner.found_inf, inner.grad_scale  # type: ignore[attr-defined]
        elif found_inf is None or not found_inf.item():
            # The host waits for the flag here, as GradScaler does itself for an optimizer that cannot skip on the device.
            self._unscale(grad_scale)
            inner.step()
        for lane in self._lanes:
            lane.counted = False  # The update's own writes are no edits.

    def _unscale(self, grad_scale: Tensor | None) -> None:
        factor = self._multiplier(grad_scale)
        if factor is not None:
            torch._foreach_mul_(self._gradients(), factor)
