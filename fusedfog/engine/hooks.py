"""`fused_backward`: autograd hooks that make a bucket's pass as soon as its last gradient has arrived.

Buckets go in the one order that all ranks share, so a hook makes the passes of all buckets that are complete, in order, and
leaves the rest to later hooks or to `step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fusedfog.engine.gradient_scale import grad_scaler_exists
from fusedfog.gossip.buckets import Lane


class Leader(Protocol):
    """What hooks need of a scheduler."""

    held: str | None

    def may_lead(self, lane: Lane) -> bool:
        """Whether a bucket's pass can be made now without the host waiting."""
        ...

    def lead(self, number: int) -> None:
        """Make bucket number `number`'s pass before the exchange, or the only one, and start what follows it."""
        ...


class BackwardHooks:
    """The hooks of one scheduler, and how far they have come in this step.

    Args:
        leader: the scheduler; not kept alive.
        clips: passes need all gradients first.

    Attributes:
        led: how many buckets have had their pass in this step.
        accumulating: inside `no_sync()`.
    """

    def __init__(self, leader: Leader, *, clips: bool) -> None:
        self._leader = weakref.ref(leader)
        self._holds: bool | None = True if clips else None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._lanes: Sequence[Lane] = ()
        self.led = 0
        self.accumulating = False

    def attach(self, lanes: Sequence[Lane]) -> None:
        """Hook all parameters of these buckets, and let go of those hooked before."""
        for handle in self._handles:
            handle.remove()
        self._lanes = lanes
        self._handles = [
            param.register_post_accumulate_grad_hook(_Hook(self, lane))
            for lane in lanes
            for param in lane.segment.params[lane.bucket.first : lane.bucket.last]
            if param.requires_grad
        ]

    def begin_step(self) -> None:
        """No bucket has had its pass."""
        self.led = 0
        for lane in self._lanes:
            lane.ready = 0

    def ready(self, lane: Lane, name: str) -> None:
        """A parameter of `lane` has its gradient: lead every bucket that can go, in order, without waiting."""
        leader = self._leader()
        if leader is None or self.accumulating or self._wait_for_step(leader):
            return
        if lane.number < self.led:
            raise RuntimeError(
                f"a second gradient arrived for {name} after fused_backward had already applied its bucket. Wrap all but the "
                f"last backward of a step in `with opt.no_sync():`, and use non-reentrant checkpointing; or "
                f"fused_backward=False"
            )
        lane.ready += 1
        while self.led < len(self._lanes):
            lane = self._lanes[self.led]
            if lane.ready < lane.bucket.last - lane.bucket.first or not leader.may_lead(lane):
                return
            with torch.no_grad():
                leader.lead(self.led)
            self.led += 1

    def _wait_for_step(self, leader: Leader) -> bool:
        """Whether passes must wait for `step`: clipping needs all gradients, a GradScaler's factor comes with `step`."""
        if self._holds is None:
            self._holds = grad_scaler_exists()
        return self._holds or leader.held is not None


class _Hook:
    """Reports, if the hooks still live, that a parameter's gradient is complete."""

    def __init__(self, hooks: BackwardHooks, lane: Lane) -> None:
        self._hooks = weakref.ref(hooks)
        self._lane = weakref.ref(lane)

    def __call__(self, param: Tensor) -> None:
        hooks, lane = self._hooks(), self._lane()
        if hooks is not None and lane is not None:
            hooks.ready(lane, f"a parameter of shape {tuple(param.shape)}")
