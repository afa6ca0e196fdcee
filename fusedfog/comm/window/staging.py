"""How values get from a window's tensor into slots and back: at once on a CPU, by queued copies for a tensor on a GPU.

Slots lie in the CPU's memory in either case, so that peers, other hosts and dead processes are the same to both. For a GPU:

- A send clones the values on the program's stream, which costs the GPU's memory bandwidth and not the bus', and the program
  may write on at once. A side stream carries the clone into a slot, which is *published once that copy's event has passed*:
  by the next send, or by the window's thread, which looks every few milliseconds.
- One message an edge is on its way to its slot. The next send waits for it, that is for work of this process' own GPU from
  before the last send, so the host is ahead of the GPU by one message at most, and something is always published. (Were the
  slot written again instead, a host that is always ahead would publish nothing, ever.)
- What arrived is copied to the GPU on the program's stream. The next look into the inbox waits for that copy, or the sender
  would be given a slot that the GPU still reads.

Slots are registered with cudaHostRegister, in each process that has mapped them. Where the driver refuses, copies go through
the driver's own pinned buffers, and those to slots hold up the host until they are over: slower, and right.

No GPU has run this yet: tests delay copies at will, and run all of it on a pretended GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fusedfog.comm.watchdog import leave_captures_alone
from fusedfog.comm.window.region import Region
from fusedfog.kernels import device
from fusedfog.log import log


class Copies(Protocol):
    """The copies of one end of an edge."""

    def start(self, copy: Callable[[], object]) -> None:
        """Make a copy, at once or later, after those that were started before."""

    def over(self) -> bool:
        """Whether all that were started have been made; waits for nothing."""

    def wait(self) -> None:
        """Wait until they have."""


class Staging(Protocol):
    """What a window's endpoint needs of its tensor's device."""

    def outgoing(self) -> Copies:
        """For a sender: into slots."""

    def incoming(self) -> Copies:
        """For an inbox: out of slots."""

    def hold(self, values: Tensor) -> Tensor:
        """The values as they are on the current stream, for copies that are made later."""

    def follow(self) -> None:
        """The window's user works on the current stream."""

    def as_program(self) -> AbstractContextManager[object]:
        """Inside, the window's thread works on the stream on which its user last worked."""

    def pin(self, region: Region) -> None:
        """Have the device reach a region's slots, until the region is closed."""

    def settle_in(self) -> None:
        """Make the calling thread one that may ask whether copies are over, and disturbs nobody."""


class AtOnce:
    """`Copies` that are over when `start` returns."""

    def start(self, copy: Callable[[], object]) -> None:
        """See `Copies`."""
        copy()

    def over(self) -> bool:
        """See `Copies`."""
        return True

    def wait(self) -> None:
        """See `Copies`."""


class OnHost:
    """`Staging` of a tensor on the CPU."""

    def outgoing(self) -> Copies:
        """See `Staging`."""
        return AtOnce()

    def incoming(self) -> Copies:
        """See `Staging`."""
        return AtOnce()

    def hold(self, values: Tensor) -> Tensor:
        """See `Staging`; the values are copied before anybody can write to them."""
        return values

    def follow(self) -> None:
        """See `Staging`."""

    def as_program(self) -> AbstractContextManager[object]:
        """See `Staging`."""
        return contextlib.nullcontext()

    def pin(self, region: Region) -> None:
        """See `Staging`."""

    def settle_in(self) -> None:
        """See `Staging`."""


class OnStream:
    """`Copies` on a stream, that of the program where it is None."""

    def __init__(self, place: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._place, self._stream = place, stream
        self._event = torch.cuda.Event()

    def start(self, copy: Callable[[], object]) -> None:
        """See `Copies`."""
        stream = self._stream if self._stream is not None else torch.cuda.current_stream(self._place)
        with torch.cuda.stream(stream):
            copy()
            self._event.record(stream)

    def over(self) -> bool:
        """See `Copies`."""
        return bool(self._event.query())

    def wait(self) -> None:
        """See `Copies`."""
        self._event.synchronize()


class OnDevice:
    """`Staging` of a tensor on a GPU."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._side = torch.cuda.Stream(place)
        self._program = torch.cuda.current_stream(place)

    def outgoing(self) -> Copies:
        """See `Staging`."""
        return OnStream(self._place, self._side)

    def incoming(self) -> Copies:
        """See `Staging`."""
        return OnStream(self._place, None)

    def hold(self, values: Tensor) -> Tensor:
        """See `Staging`."""
        held = values.clone()
        self._side.wait_stream(torch.cuda.current_stream(self._place))
        held.record_stream(self._side)
        return held

    def follow(self) -> None:
        """See `Staging`."""
        self._program = torch.cuda.current_stream(self._place)

    def as_program(self) -> AbstractContextManager[object]:
        """See `Staging`."""
        return torch.cuda.stream(self._program)

    def pin(self, region: Region) -> None:
        """See `Staging`."""
        address, size = region.extent
        if not size:
            return
        with contextlib.suppress(RuntimeError):
            if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:  # type: ignore[no-untyped-call]
                region.before_close = partial(_unregister, address)
                return
        log.info(
            "the GPU's driver does not register %d bytes of a window's memory: copies to and from it are slower", size
        )

    def settle_in(self) -> None:
        """See `Staging`; as the watchdog's thread does."""
        torch.cuda.set_device(self._place)
        leave_captures_alone()


def _unregister(address: int) -> None:
    with contextlib.suppress(RuntimeError):  # The process may be ending, and CUDA before it.
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def staging_of(values: Tensor) -> Staging:
    """What the device of these values needs."""
    return OnDevice(values.device) if device.on_gpu(values) else OnHost()
