"""Operations under way: phases chained one after another, and the handle that a caller waits for."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Generator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fusedfog.comm.calls import Call, current_ranks
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.transfer import PeerTensor, Transfer
from fusedfog.kernels import device

Phases = Generator[Transfer, None, Tensor]
"""An operation: yields each message that it has started and now needs, returns the output tensor."""


class Work:
    """An operation in flight, as `async_op=True` returns it.

    Wait for every one, and for several in the same order on all ranks. Until then, leave the input (and `out`) alone.
    On the CPU, phases after the first begin in `wait` or `is_completed`. On a GPU all phases are queued at once, on a
    stream of their own, and `wait` lets the current stream wait, not the host.
    """

    def __init__(self, phases: Phases, source: Tensor) -> None:
        self._phases: Phases | None = phases
        self._transfer: Transfer | None = None
        self._output: Tensor | None = None
        self._done: torch.cuda.Event | None = None
        self._ranks = current_ranks()
        if device.on_gpu(source):
            self._queue(phases, source)
        else:
            self._advance()

    def wait(self) -> Tensor:
        """The output tensor, once it is there; the same tensor every time.

        Raises:
            PeerTimeout, ExchangeError: a neighbour's message did not come.
        """
        with Call("Work.wait()", self._ranks):
            while self._transfer is not None:
                self._transfer.wait()
                self._advance()
        assert self._output is not None
        if self._done is not None:
            stream = torch.cuda.current_stream(self._output.device)
            stream.wait_event(self._done)
            self._output.record_stream(stream)
        return self._output

    def is_completed(self) -> bool:
        """Whether `wait` would return, or raise, at once. Moves the operation on as far as it goes without waiting."""
        while self._transfer is not None and self._transfer.done():
            if self._transfer.failure is not None:
                return True
            self._transfer.wait()
            self._advance()
        return self._transfer is None and (self._done is None or self._done.query())

    def _advance(self) -> None:
        assert self._phases is not None
        with torch.no_grad():
            try:
                self._transfer = next(self._phases)
            except StopIteration as end:
                self._transfer, self._phases, self._output = None, None, end.value

    def _queue(self, phases: Phases, source: Tensor) -> None:
        side = _side_stream(source.device)
        side.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(side):
            self._output = finish(phases)
            self._done = side.record_event()
        for tensor in (source, self._output):
            # The caller may free either while the side stream still uses it.
            tensor.record_stream(side)

    def __del__(self) -> None:
        # A dropped gloo work would break its connection for everyone.
        transfer = getattr(self, "_transfer", None)
        if transfer is not None:
            with contextlib.suppress(Exception):
                transfer.communicator.keep(transfer)


def run(phases: Phases, source: Tensor, async_op: bool) -> Tensor | Work:
    """Carry an operation out, or start it."""
    return Work(phases, source) if async_op else finish(phases)


def finish(phases: Phases) -> Tensor:
    """Carry an operation out on the current stream."""
    with torch.no_grad():
        while True:
            try:
                transfer = next(phases)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            transfer.wait()


@functools.cache
def _side_stream(place: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(place)


class Port:
    """The operations' place on a communicator: a channel of their own, opened at its first use, and a number for each message."""

    # The channel and the number of the next message, by communicator; a Port itself would keep its communicator alive from here.
    _places: ClassVar[weakref.WeakKeyDictionary[Communicator, list[int]]] = weakref.WeakKeyDictionary()

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        if communicator not in self._places:
            self._places[communicator] = [communicator.open_channel(), 0]

    def tags(self, count: int) -> list[int]:
        """Tags for the messages of one operation, taken when it is called: all ranks call in the same order."""
        place = self._places[self.communicator]
        first = place[1]
        place[1] += count
        return [self.communicator.tag(place[0], first + i) for i in range(count)]

    def start(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], tag: int, label: str) -> Transfer:
        """As `Communicator.start`, for tensors of any dtype, which travel as bytes; empty ones do not travel."""
        outgoing, incoming = ([(p, t.view(torch.uint8)) for p, t in part if t.numel()] for part in (sends, recvs))
        return self.communicator.start(outgoing, incoming, tag=tag, label=label)
