"""Uneven data: a rank that has none left goes on mixing, without updates, until all ranks have made equally many steps.

`with opt.uneven():` costs a step one unacknowledged write to the store (2 us). Every rank that begins step number s of the block
writes key s, and whoever has finished waits for that key before it makes step s without gradients. The last one to finish
writes "end" behind the last step that anybody has begun. torch's own `Join` does the same with an all-reduce in every step.
"""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig

from fusedfog.comm.agreement import absent, next_agreement
from fusedfog.comm.calls import Call, leave_word
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import find_group
from fusedfog.comm.store import own_store
from fusedfog.engine.capture import recording
from fusedfog.engine.scheduler import Scheduler
from fusedfog.errors import ExchangeError, PeerTimeout
from fusedfog.optim.calls import ranks_of
from fusedfog.optim.options import Options

_END = "end"
_GLANCE = timedelta(seconds=1)
"""How often a rank that waits for a step looks whether another has failed."""
_KEPT = 512
"""Keys of the latest steps that stay in the store while there is one optimizer."""


class UnevenSteps(torch.optim.Optimizer, Joinable):
    """What `DecentralizedOptimizer` offers for uneven data; not built by itself."""

    _scheduler: Scheduler | None
    _options: Options
    _block: Block | None = None
    _announced = -1
    """The step that has been announced last."""
    _join_config = _JoinConfig.construct_disabled_join_config()

    @property
    @abstractmethod
    def _engine(self) -> Scheduler:
        """The scheduler; see `DecentralizedOptimizer`."""

    @abstractmethod
    def _update(self, engine: Scheduler, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        """Make a step from the gradients that are there."""

    def uneven(self, *others: UnevenSteps) -> Block:
        """Inside, ranks may make different numbers of steps; one that leaves goes on mixing until all have. Collective.

            with opt.uneven():
                for batch in loader:        # of whatever length on each rank, also none
                    ...
                    opt.step()
            # here all ranks have made as many steps as the one with the most data

        The steps that a rank makes on leaving are without gradients: its parameters are mixed and not updated, and under
        `algorithm="allreduce"` it contributes zero to the mean over all ranks, as under DistributedDataParallel's `join`.
        Neither closures and step hooks nor learning-rate schedules take part in them. Other calls that all ranks make
        together belong before or after the block.

        Args:
            others: further optimizers over the same ranks that are stepped inside, in the same order on all of them.

        Raises:
            ValueError: another optimizer's block is open, or the optimizers have different groups.
            PeerTimeout: on leaving, if no rank begins its next step, nor finishes, within the group's timeout; says who is where.
            ExchangeError: on leaving, if another rank has left its block by an error; names both.
        """
        return Block((self, *others))

    @abstractmethod
    def finish(self) -> None:
        """See `Controls`."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `torch.distributed.algorithms.Join`: steps without gradients, as `uneven` makes them."""
        if self._options.asynchronous:
            raise ValueError("Join makes ranks wait in every step: use `with opt.uneven():` with asynchronous=True")
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """Where `Join` has its own small tensors: the parameters' device."""
        return self._engine.place

    @property
    def join_process_group(self) -> Any:
        """The process group that the optimizer was given, for `Join`'s own all-reduce.

        Raises:
            RuntimeError: there is none.
        """
        group = find_group(self._options.group).group
        if group is None:
            raise RuntimeError("Join needs a process group, and there is none: call fusedfog.init() under torchrun")
        return group

    def _announce_step(self, engine: Scheduler) -> None:
        """Tell `Join`, and ranks that have left an `uneven` block, that this rank makes a step."""
        if (self._block is None and not self._join_config.enable) or recording() or self._options.asynchronous:
            return
        if self._announced == engine.clock.steps:
            return
        self._announced = engine.clock.steps
        work = Join.notify_join_context(self)
        if work is not None:
            work.wait()
        if self._block is not None:
            self._block.begin_step(self)

    def _announce_average(self, again: bool) -> None:
        """The same, for a backward that averages gradients: whoever has no data contributes zeros then, and once a step.

        Raises:
            RuntimeError: gradients are averaged a second time in one step.
        """
        engine = self._engine
        if again and (self._block is not None or self._join_config.enable):
            raise RuntimeError(
                f"rank {engine.rank}: a second backward averages gradients before step(), and ranks without data average once a "
                f"step: wrap all but the last backward of a step in `with opt.no_sync():`"
            )
        self._announce_step(engine)

    def _mix_only(self) -> None:
        """Make a step as a rank without data."""
        engine = self._engine
        with _no_gradients(self.param_groups), torch.no_grad(), Call("step()", ranks_of(engine), engine.clock.steps):
            self._update(engine, None, None)


class _Hook(JoinHook):
    def __init__(self, optimizer: UnevenSteps) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        self._optimizer._mix_only()

    def post_hook(self, is_last_joiner: bool) -> None:
        # torch leaves it enabled. And DistributedDataParallel's hook may have written all parameters by now.
        self._optimizer._join_config = _JoinConfig.construct_disabled_join_config()
        self._optimizer._engine.discard()


@contextlib.contextmanager
def _no_gradients(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Inside, no parameter has a gradient; what the last backward left is back afterwards."""
    params = [param for group in groups for param in group["params"]]
    gradients = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient


class Block:
    """One `with opt.uneven():`."""

    _open: ClassVar[list[Block]] = []

    def __init__(self, optimizers: tuple[UnevenSteps, ...]) -> None:
        self.optimizers = optimizers
        self._begun = 0
        self._outer = self._asynchronous = False

    def __enter__(self) -> None:
        """Take note of the optimizers' steps from now on."""
        communicators = [optimizer._engine.communicator for optimizer in self.optimizers]
        found = [communicator for communicator in communicators if communicator is not None]
        if not found or {optimizer._block for optimizer in self.optimizers} & set(self._open[-1:]):
            return  # A rank that is alone, or a block inside its own.
        if self._open:
            raise ValueError(
                f"rank {found[0].view.rank}: uneven() inside another optimizer's uneven(): a rank that has left one would not "
                f"make the other's steps. Give both to one block: `with first.uneven(second):`"
            )
        if len({communicator.view.ranks for communicator in found}) > 1 or len(found) < len(communicators):
            raise ValueError(f"rank {found[0].view.rank}: uneven() takes optimizers over the same ranks")
        kinds = {optimizer._options.asynchronous for optimizer in self.optimizers}
        if len(kinds) > 1:
            raise ValueError(
                f"rank {found[0].view.rank}: uneven() takes asynchronous optimizers, or others, and not both"
            )
        self._outer, self._asynchronous = True, kinds == {True}
        self._communicator: Communicator = found[0]
        self._view, self._timeout = found[0].view, found[0].timeout
        if not self._asynchronous:  # These only end together, and in elastic runs not all members begin together.
            self._store: Any = own_store()
            self._prefix = f"{next_agreement(self._view)}/uneven"
        self._open.append(self)
        for optimizer in self.optimizers:
            optimizer._block = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make the steps that are missing; on an error, tell the others of it."""
        if not self._outer:
            return
        self._open.remove(self)
        for optimizer in self.optimizers:
            optimizer._block = None
        if error is None and self._asynchronous:
            for optimizer in self.optimizers:
                optimizer.finish()
            return
        if error is None:
            self._catch_up()
            return
        if isinstance(error, (PeerTimeout, ExchangeError)):
            return  # All ranks have one.
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if not self._asynchronous:
            with contextlib.suppress(RuntimeError):  # The store may have gone, and the error is not about that.
                self._store.set(self._key("raised"), f"rank {self._view.rank} by {reason}")
        leave_word(self._view, f"uneven(), left by {reason}")

    def begin_step(self, optimizer: UnevenSteps) -> None:
        """An optimizer of this block begins a step on this rank."""
        self._store.set(self._key(self._begun), str(self.optimizers.index(optimizer)))
        self._count_step()

    def _key(self, name: object) -> str:
        return f"{self._prefix}/{name}"

    def _count_step(self) -> None:
        self._begun += 1
        if len(self.optimizers) > 1:
            return  # Whose step a key was for cannot be known without it.
        if self._begun % (_KEPT // 2) == 0:
            self._store.set(self._key(f"at/{self._view.rank}"), str(self._begun))
        old = self._begun - _KEPT
        if old >= 0 and old % self._view.size == self._view.rank:
            self._store.delete_key(self._key(old))

    def _catch_up(self) -> None:
        with Call("uneven()", self._view):
            self._store.set(self._key(f"made/{self._view.rank}"), str(self._begun))
            if self._store.add(self._key("done"), 1) == self._view.size:
                made = [int(self._store.get(self._key(f"made/{rank}"))) for rank in range(self._view.size)]
                self._store.set(self._key(max(made)), _END)
        floor = self._floor()
        while True:
            which = "0"
            if self._begun >= floor:
                with Call("uneven()", self._view):
                    which, floor = self._next(floor)
            if which == _END:
                break
            self.optimizers[int(which)]._mix_only()
            self._count_step()
        if self._store.add(self._key("left"), 1) == self._view.size:
            self._clean_up()

    def _next(self, floor: int) -> tuple[str, int]:
        """Whose step is the next one, and how many have been made at least."""
        deadline, key = time.monotonic() + self._timeout.total_seconds(), self._key(self._begun)
        while True:
            if not absent(self._store, [key], min(_GLANCE, self._timeout), self._view, "uneven()"):
                # It may be deleted between the two.
                with contextlib.suppress(RuntimeError):
                    return self._store.get(key).decode(), floor
            floor = self._floor()
            if self._begun < floor:
                return "0", floor
            if self._store.check([self._key("raised")]):
                who = self._store.get(self._key("raised")).decode()
                raise ExchangeError(
                    f"rank {self._view.rank}: uneven(): another rank left the block by an error, so its steps will not "
                    f"come: {who}"
                )
            if time.monotonic() > deadline:
                raise PeerTimeout(
                    f"rank {self._view.rank}: uneven(): no rank has begun step {self._begun} of the block, nor have all left it, "
                    f"within the process group's timeout of {self._timeout.total_seconds():g} s"
                )

    def _floor(self) -> int:
        """A number of steps that some rank has begun for certain, whose keys may be gone."""
        keys = [self._key(f"at/{rank}") for rank in range(self._view.size)]
        return max((int(self._store.get(key)) for key in keys if self._store.check([key])), default=0)

    def _clean_up(self) -> None:
        first = 0 if len(self.optimizers) > 1 else max(0, self._begun - 2 * _KEPT)
        each = [f"{kind}/{rank}" for kind in ("made", "at") for rank in range(self._view.size)]
        for name in (*each, "done", "left", *range(first, self._begun + 1)):
            self._store.delete_key(self._key(name))
