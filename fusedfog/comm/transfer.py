"""Transfers: the sends and receives of one bucket that are under way, and how to wait for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import _enable_record_function

PeerTensor = tuple[int, Tensor]
"""A peer's group rank, and the contiguous tensor to send to it or to fill from it."""


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, torch.profiler sees no operations; for starting works that may outlive its record.

    A gloo work reports its end to the profiler it was started under. If that has gone, it writes into freed memory and
    the process dies (torch 2.13, and with no more than isend in a profile and its wait after it).
    """
    _enable_record_function(False)
    try:
        yield
    finally:
        _enable_record_function(True)


class Owner(Protocol):
    """What a transfer asks of the communicator that started it."""

    @property
    def on_gpu(self) -> bool:
        """Whether works are queued on streams, as NCCL's."""

    @property
    def timeout(self) -> timedelta:
        """How long a wait may last."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""

    def register(self, transfer: Transfer) -> None:
        """Know of a transfer, for when the communicator is closed."""

    def keep(self, transfer: Transfer) -> None:
        """Keep an abandoned transfer's works alive until they have completed."""

    def failure(self, error: Exception, what: str) -> Exception:
        """The exception for an exchange that will never be complete."""

    def give_up(self, failure: Exception) -> None:
        """End if a rank has left."""


class Transfer:
    """One bucket's sends and receives in flight, or how they failed."""

    def __init__(self, communicator: Owner, label: str) -> None:
        self.communicator = communicator
        self.label = label
        self.pending: list[tuple[dist.Work, object]] = []
        self.keep_alive: list[Tensor] = []
        self.failure: Exception | None = None
        self.waiter: threading.Thread | None = None
        communicator.register(self)

    def add(self, operation: Callable[..., dist.Work | None], peers: object) -> None:
        """Start a collective operation, given the `group`; if it cannot be, only the wait for it complains."""
        group = self.communicator.group
        try:
            work = operation(group=group)
        except RuntimeError as error:
            self.fail(error, peers)
            return
        assert work is not None
        self.pending.append((work, peers))

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once; on gloo, asking for the first time starts a thread that finds out.

        A gloo work never says that it is complete (`is_completed` is false until it has been waited for), and a wait
        that times out closes the connection: so the only way to poll is to let somebody wait.
        """
        if self.failure is not None or not self.pending:
            return True
        if self.communicator.on_gpu:
            return all(work.is_completed() for work, _ in self.pending)
        if self.waiter is None:
            self.waiter = threading.Thread(target=self._await_works, daemon=True, name="fusedfog-waiter")
            self.waiter.start()
        return not self.waiter.is_alive()

    def wait(self) -> None:
        """Wait until all receives have arrived and all sends have left.

        On a GPU that is the current stream's wait. Another stream that uses the data, or overwrites what is sent, calls this
        again: the works are kept as long as the transfer.

        Raises:
            PeerTimeout: a peer's part did not come within the group's timeout.
            ExchangeError: the connection to a peer broke, now or when the transfer was started.
        """
        if self.waiter is not None:
            self.waiter.join()
        else:
            self._await_works()
        if self.failure is not None:
            self.communicator.keep(self)
            self.communicator.give_up(self.failure)
            raise self.failure
        if not self.communicator.on_gpu:
            self.keep_alive.clear()

    def _await_works(self) -> None:
        if self.communicator.on_gpu:
            self._order_stream()
            return
        deadline = time.monotonic() + self.communicator.timeout.total_seconds()
        while self.pending and self.failure is None:
            work, peers = self.pending[0]
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                self.fail(error, peers)
            del self.pending[:1]  # Nothing, if the communicator was closed while this thread waited.

    def _order_stream(self) -> None:
        for work, peers in self.pending:
            try:
                work.wait()
            except RuntimeError as error:
                self.fail(error, peers)
                return

    def fail(self, error: Exception, peers: object) -> None:
        """Note why this transfer will never be complete; the wait that needs it raises."""
        self.failure = self.communicator.failure(error, f"{self.label}: {peers}")
