"""Autograd hooks, which act on a bucket as soon as its last gradient has arrived.

    `BackwardHooks`                       with fused_backward, make the bucket's pass
    `gradient_means.GradientMeans`        start the average of its gradients over ranks

Buckets go in the one order that all ranks share, so a hook acts on all buckets that are complete, in order, and leaves the
rest to later hooks, or to the end of backward, or to `step`.

The user's own hooks on a parameter see its gradient first, also those that were registered after ours. So a hook acts at
once only where it is the parameter's last one; elsewhere it notes that the gradient has come, and the next hook acts, or the
end of backward, and the gradient is used and freed one parameter later.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedfog.gossip.buckets import BucketState
from fusedfog.params.flat import FlatSegment
from fusedfog.params.instances import instances
from fusedfog.params.layout import Bucket


class Hooked(Protocol):
    """Parameters `[layout.first, layout.last)` of a segment."""

    segment: FlatSegment
    layout: Bucket


class GradientHooks(ABC):
    """Hooks on the parameters of buckets.

    Attributes:
        accumulating: inside `no_sync()`.
    """

    def __init__(self) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.accumulating = False

    @abstractmethod
    def ready(self, bucket: Hooked, name: str, *, final: bool) -> None:
        """A parameter of `bucket` has its gradient; `final` if no hook of the user's will see, or change, it after this."""

    @abstractmethod
    def backward_ends(self, number: int) -> None:
        """The backward has come to its end in which `call_at_the_end(number)` was called."""

    def hook(self, buckets: Sequence[Hooked]) -> None:
        """Hook all parameters of these buckets, and let go of those hooked before."""
        for handle in self._handles:
            handle.remove()
        self._handles = [
            param.register_post_accumulate_grad_hook(_Hook(self, bucket))
            for bucket in buckets
            for param in bucket.segment.params[bucket.layout.first : bucket.layout.last]
            if param.requires_grad
        ]

    def detach(self) -> None:
        """Let go of all parameters."""
        self.hook(())

    def call_at_the_end(self, number: int = 0) -> None:
        """Inside backward: have `backward_ends(number)` called at its end, behind what others have asked for."""
        torch.autograd.Variable._execution_engine.queue_callback(_AtTheEnd(self, number))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, gradients that arrive are left where they are."""
        previous, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = previous


class PassMaker(Protocol):
    """What hooks need of a scheduler."""

    blocked_by: str | None

    def may_pass(self, bucket: BucketState) -> bool:
        """Whether a bucket's pass can be made now without the host waiting."""
        ...

    def pass_bucket(self, place: int) -> None:
        """Make the pass before the exchange, or the only one, of the bucket in place `place`, and start what follows it."""
        ...

    def has_unfrozen(self) -> bool:
        """Whether `step` has to take in parameters that were frozen before it makes any pass."""
        ...


class BackwardHooks(GradientHooks):
    """The hooks of `fused_backward`, and how far passes have come in this step.

    Args:
        maker: the scheduler; not kept alive.
        holds: passes need all gradients first.

    Attributes:
        passed: how many buckets have had their pass in this step.
        unfrozen: the answer of `Scheduler.has_unfrozen` in this step, once somebody has asked.
    """

    def __init__(self, maker: PassMaker, *, holds: bool) -> None:
        super().__init__()
        self._maker = weakref.ref(maker)
        self._holds: bool | None = True if holds else None
        self._buckets: Sequence[BucketState] = ()
        self.passed = 0
        self.unfrozen: bool | None = None

    def attach(self, buckets: Sequence[BucketState]) -> None:
        """Hook all parameters of these buckets, and let go of those hooked before."""
        self._buckets = buckets
        self.hook(buckets)

    def begin_step(self) -> None:
        """No bucket has had its pass."""
        self.passed, self.unfrozen = 0, None
        for bucket in self._buckets:
            bucket.ready = 0

    def ready(self, bucket: Hooked, name: str, *, final: bool) -> None:
        """See `GradientHooks`."""
        assert isinstance(bucket, BucketState)
        maker = self._maker()
        if maker is None or self.accumulating or self._wait_for_step(maker):
            return
        if bucket.place < self.passed:
            raise RuntimeError(
                f"a second gradient arrived for {name} after fused_backward had already applied its bucket. Wrap all but the "
                f"last backward of a step in `with opt.no_sync():`, and use non-reentrant checkpointing; or "
                f"fused_backward=False"
            )
        # The gradients that came before this one: their parameters' hooks have all been called.
        self.pass_complete()
        bucket.ready += 1
        if bucket.ready == bucket.layout.last - bucket.layout.first:
            if final:
                self.pass_complete()
            if self.passed <= bucket.place:
                self.call_at_the_end()  # For the bucket that no other gradient follows.

    def backward_ends(self, number: int) -> None:
        """See `GradientHooks`."""
        self.pass_complete()

    def pass_complete(self) -> None:
        """Make the pass of every bucket that has all its gradients, in order, without waiting."""
        maker = self._maker()
        while maker is not None and self.passed < len(self._buckets):
            bucket = self._buckets[self.passed]
            if bucket.ready < bucket.layout.last - bucket.layout.first or not maker.may_pass(bucket):
                return
            with torch.no_grad():
                maker.pass_bucket(self.passed)
            self.passed += 1

    def _wait_for_step(self, maker: PassMaker) -> bool:
        """Whether passes must wait for `step`: clipping needs all gradients, a GradScaler's factor comes with `step`."""
        if self._holds is None:
            self._holds = grad_scaler_exists()
        return self._holds or maker.blocked_by is not None or maker.has_unfrozen()


def grad_scaler_exists() -> bool:
    """Whether the process has an enabled GradScaler; one look through all objects."""
    # Autograd hooks cannot see whether the loss was scaled, and torch keeps no list of its scalers. Holding passes back
    # is always right, applying scaled gradients never: so one look through live objects, at the first backward.
    return any(scaler.is_enabled() for scaler in instances(torch.amp.GradScaler))


class _Hook:
    """Reports, if the hooks still live, that a parameter's gradient is complete."""

    def __init__(self, hooks: GradientHooks, bucket: Hooked) -> None:
        self._hooks = weakref.ref(hooks)
        self._bucket = weakref.ref(bucket)

    @_disable_dynamo
    def __call__(self, param: Tensor) -> None:
        hooks, bucket = self._hooks(), self._bucket()
        if hooks is not None and bucket is not None:
            hooks.ready(bucket, f"a parameter of shape {tuple(param.shape)}", final=self._is_final(param))

    def _is_final(self, param: Tensor) -> bool:
        """Whether only hooks of ours follow this one."""
        # torch keeps this dict for itself. Where it is not, users may have registered hooks anywhere.
        for other in reversed((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()):
            if not isinstance(other, _Hook):
                return False
            if other is self:
                return True
        return False


class _AtTheEnd:
    """Reports, if the hooks still live, that backward ends."""

    def __init__(self, hooks: GradientHooks, number: int) -> None:
        self._hooks, self._number = weakref.ref(hooks), number

    @_disable_dynamo
    def __call__(self) -> None:
        hooks = self._hooks()
        if hooks is not None:
            hooks.backward_ends(self._number)
