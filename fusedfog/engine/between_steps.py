"""What is asked of a scheduler between its steps: to wait for messages, to stand still, to take what users did to parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.engine.async_gossip import discard
from fusedfog.engine.exchanges import Exchanges
from fusedfog.engine.gradient_means import GradientMeans
from fusedfog.engine.hooks import BackwardHooks
from fusedfog.gossip.buckets import Buckets, BucketState
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import is_trained


class BetweenSteps:
    """A scheduler while no step is being made; `Scheduler` sets its attributes, and explains them."""

    segments: list[FlatSegment]
    frozen: list[Tensor]
    hooks: BackwardHooks
    exchanges: Exchanges
    buckets: Buckets
    communicator: Communicator | None
    blocked_by: str | None
    means: GradientMeans | None
    adopt_edits: WeakMethod[Callable[[], None]] | None = None
    announce: WeakMethod[Callable[[bool], None]] | None = None

    def has_unfrozen(self) -> bool:
        """Whether parameters that were frozen are to be trained now, as torch.optim does with whatever has a gradient.

        Asked once a step, at its first gradient or in `step`: hooks come at other moments on each rank.
        """
        if not self.frozen:
            return False
        if self.hooks.unfrozen is None:
            self.hooks.unfrozen = any(map(is_trained, self.frozen))
        return self.hooks.unfrozen

    def read_clock(self) -> dict[str, Any]:
        """The clock as plain data."""
        if self.means is not None:
            self.exchanges.clock.gradient_squares = self.means.squares
        return self.exchanges.read_clock()

    def discard(self) -> None:
        """Wait for what is in flight and forget it: the next step starts its own exchange. Asynchronous ranks do it together."""
        self.drain(keep_failures=True)
        discard(self)
        for bucket in self.buckets.all:
            bucket.transfer = None
        if self.exchanges.samples is not None:
            self.exchanges.samples.kept = False

    def drain(self, *, keep_failures: bool = False) -> None:
        """Wait for all sends and receives; what arrived is kept for the next step. Local; see `Mailbox.drain`."""
        if self.exchanges.mailbox is not None:
            self.exchanges.mailbox.drain(self.buckets.all, keep_failures=keep_failures)

    def meet(self, call: str) -> None:
        """Return once every rank has come to this call; see `Communicator.meet`. At once for a rank that is alone or has left."""
        if self.communicator is not None and self.communicator.ended is None:
            self.communicator.meet(call)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, gradients that arrive are left where they are."""
        with self.hooks.accumulate(), self.means.accumulate() if self.means is not None else nullcontext():
            yield

    @contextmanager
    def block_steps(self, where: str) -> Iterator[None]:
        """Inside, no step may be made and hooks do nothing; `where` names the with-block in the error."""
        previous, self.blocked_by = self.blocked_by, where
        try:
            yield
        finally:
            self.blocked_by = previous

    def may_step(self) -> bool:
        """Whether `begin_step` will let a step be made."""
        return self.blocked_by is None and (self.communicator is None or self.communicator.ended is None)

    def take_edits(self) -> None:
        """Have the flat states be what the user made of them."""
        adopt = self.adopt_edits() if self.adopt_edits is not None else None
        if adopt is not None:
            adopt()

    def announce_average(self, again: bool) -> None:
        """See `gradient_means.Trainer`."""
        announce = self.announce() if self.announce is not None else None
        if announce is not None:
            announce(again)

    def take_back_moved(self, only: BucketState | None = None) -> None:
        """Have all parameters, or those of one bucket, lie in the flat buffers again, with the values that they have now.

        They are moved by torch's own utilities: `vector_to_parameters`, `prune.remove`, `share_memory`, `flatten_parameters`.

        Raises:
            StorageReplacedError: one has another shape, dtype or device than before.
        """
        for segment in self.segments if only is None else [only.segment]:
            first, last = (0, len(segment.params)) if only is None else (only.layout.first, only.layout.last)
            moved = segment.moved(first, last)
            if moved:
                # What is in flight is read from the flat buffer.
                self.drain(keep_failures=True)
                changed = segment.take_back(moved)
                self.buckets.forget_edits_of(segment, set(moved).difference(changed))
