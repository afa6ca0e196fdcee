"""Transfers: the sends and receives of one bucket that are under way, and how to wait for them."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import _enable_record_function

from fusedfog.comm.failures import FIRST_LOOK

_FOR_EVER = timedelta(days=3650)
"""Whoever needs a transfer has a limit, and this thread has none: a wait that times out would close all connections."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3
"""Seconds between a host's looks at a GPU, doubling."""

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


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom a work is with, in words that are only put together for an error.

    Attributes:
        recvs, sends: group ranks.
    """

    recvs: tuple[int, ...]
    sends: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [("receiving from", self.recvs), ("sending to", self.sends)]
        if len(self.recvs) + len(self.sends) == 1:
            return "".join(f"{verb} rank {ranks[0]}" for verb, ranks in parts if ranks)
        return ", ".join(f"{verb} ranks {list(ranks)}" for verb, ranks in parts)


class Owner(Protocol):
    """What a transfer asks of the communicator that started it."""

    @property
    def on_gpu(self) -> bool:
        """Whether works are queued on streams, as NCCL's."""

    @property
    def ended(self) -> Exception | None:
        """Why nothing can be exchanged any more, once that is so."""

    @property
    def follows(self) -> bool:
        """Whether the host waits for what comes to the GPU, and for nobody who has died; in elastic runs."""

    @property
    def broken(self) -> Exception | None:
        """Why nothing that seems to have come may be used, once that is so; with `follows`."""

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

    def begin_waiting(self, transfer: Transfer) -> None:
        """Have a thread wait for a transfer."""

    def look_after(self, transfer: Transfer) -> None:
        """Return when a transfer is over; that of dead peers, or after the timeout, is made to fail."""

    def failure(self, error: Exception, what: str) -> Exception:
        """The exception for an exchange that will never be complete."""

    def conclude(self, failure: Exception, first: Iterable[int]) -> Exception:
        """End the communicator for this failure of a transfer with these peers; what to raise."""


class Transfer:
    """One bucket's sends and receives in flight, or how they failed.

    Attributes:
        label: what it is, for errors: "step 12, bucket 3".
        pending: works that are not known to be complete, and whom each is with.
        over: on gloo, set when all are complete, or it has failed.
        last: on gloo, whom the work that was waited for last is with.
        begun: a thread waits for them, or has; returned: it does no more.
    """

    def __init__(self, communicator: Owner, label: str) -> None:
        self.communicator = communicator
        self.label = label
        self.pending: list[tuple[dist.Work, object]] = []
        self.keep_alive: list[Tensor] = []
        self.failure: Exception | None = None
        self.over = threading.Event()
        self.last: object = None
        self.begun = self.queued = self.returned = False
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
        """Whether `wait` would return (or raise) at once."""
        if self.failure is not None or not self.pending:
            return True
        if self.communicator.on_gpu:
            return all(work.is_completed() for work, _ in self.pending)
        self.communicator.begin_waiting(self)
        return self.over.is_set()

    def wait(self) -> None:
        """Wait until all receives have arrived and all sends have left.

        On a GPU that is the current stream's wait. Another stream that uses the data, or overwrites what is sent, calls this
        again: the works are kept as long as the transfer.

        Raises:
            PeerTimeout: a peer's part did not come within the group's timeout.
            ExchangeError: the connection to a peer broke, now or when the transfer was started, or a peer has died.
        """
        first = self.peers_in_flight()
        self.finish()
        if self.failure is not None:
            self.communicator.keep(self)
            self.failure = self.communicator.conclude(self.failure, first)
            raise self.failure

    def finish(self) -> None:
        """As `wait`, but a failure is only noted, and ends nothing: what was to come may be wanted by nobody."""
        if self.communicator.on_gpu:
            if not self.communicator.follows or self._comes():
                self._order_stream()
        elif self.pending and self.failure is None:
            self.communicator.begin_waiting(self)
            if not self.over.wait(FIRST_LOOK):
                self.communicator.look_after(self)
        if self.failure is None and not self.communicator.on_gpu:
            self.keep_alive.clear()

    def _comes(self) -> bool:
        """Wait on the host until what a GPU is to receive and to send is over; whether it has not failed."""
        if not self.over_within(FIRST_LOOK):
            self.communicator.look_after(self)
        return self.failure is None

    def over_within(self, seconds: float) -> bool:
        """Wait for so long; whether it is over by then."""
        if not self.communicator.follows:
            return self.over.wait(seconds)
        deadline, pause = time.monotonic() + seconds, _SHORTEST_PAUSE
        while not self.is_over():
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def is_over(self) -> bool:
        """Whether it is complete, as far as anybody has noticed, or has failed."""
        if not self.communicator.follows:
            return self.over.is_set()
        # The works first: those that an abort ends count as complete, and the communicator was broken before.
        complete = all(work.is_completed() for work, _ in self.pending)
        if self.failure is None and self.communicator.broken is not None:
            self.failure = self.communicator.broken
        return complete or self.failure is not None

    def peers_in_flight(self) -> list[int]:
        """Group ranks that its works are with, the one that is waited for first; empty where that are all."""
        peers = [peers for _, peers in self.pending]
        return [rank for one in peers if isinstance(one, Peers) for rank in (*one.recvs, *one.sends)]

    def await_works(self) -> None:
        """Wait for all works, however long it takes; for the thread that does nothing else."""
        while self.pending and self.failure is None:
            work, peers = self.pending[0]
            self.last = peers
            try:
                work.wait(_FOR_EVER)
            except RuntimeError as error:
                if not self.over.is_set():
                    self.fail(error, peers)
            del work, self.pending[:1]  # Nothing, if the communicator was closed while this thread waited.
        self.returned = True
        self.over.set()

    def _order_stream(self) -> None:
        for work, peers in self.pending:
            try:
                work.wait()
            except RuntimeError as error:
                self.fail(error, peers)
                return

    def fail(self, error: Exception, peers: object) -> None:
        """Note why this transfer will never be complete; the wait that needs it raises."""
        if self.failure is None:
            what = f"{self.label}: {peers}" if self.label else str(peers)
            self.failure = self.communicator.failure(error, what)
        self.over.set()

    def end(self, failure: Exception) -> None:
        """It will never be complete, for this reason, unless there is an earlier one."""
        if self.failure is None:
            self.failure = failure
        self.over.set()


def copy_of(transfers: weakref.WeakSet[Transfer]) -> list[Transfer]:
    """All of them, while another thread may add some."""
    while True:
        try:
            return list(transfers)
        except RuntimeError:
            continue
