"""torch.cuda on CPU memory, as far as fusedfog uses it: streams that run at once, and know who is ordered after whom.

    ordered_backend.open_world()
    with fake_cuda.pretend() as gpu:                   # tensors on the CPU count as a GPU's
        opt = fusedfog.SGD(...)
        with gpu.watching():                           # every torch operation from here on, and every message
            opt.step()
        assert gpu.races == []

Each stream and each communicator has a vector clock. An event, a wait and an issued operation hand clocks on as CUDA and
NCCL order work; two uses of the same memory, one of them a write, that no clock orders are a race, whatever came out of
it. Memory is looked at from the moment it is first sent or received.

The GPU's pass is stood in for by the CPU's, which takes its gradients from the address table alone and finds its blocks in
the block table, as the kernel does; inside `torch.cuda.graph` it is recorded, and made by `replay`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedfog import environment
from fusedfog.kernels import Gradients, Pass, Region, cpu_pass, device
from support import ordered_backend
from support.passes import with_fields

Clock = dict[object, int]
"""By stream or communicator, how far it is known to have come."""

_numbers = itertools.count(1)
_HOST: Clock = {}
"""What the host has seen to be over: work that is queued from now on comes after it."""


def _merge(clock: Clock, other: Clock) -> None:
    for key, tick in other.items():
        clock[key] = max(tick, clock.get(key, 0))


class Stream:
    """`torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.priority = torch.device("cuda", 0), priority
        self.cuda_stream = next(_numbers)
        self.clock: Clock = {self: 1}

    def now(self) -> Clock:
        """What work that is queued now is ordered after."""
        _merge(self.clock, _HOST)
        return self.clock

    def release(self) -> Clock:
        """A copy of the clock for others to wait for; what the stream does later is not in it."""
        clock = dict(self.now())
        self.clock[self] += 1
        return clock

    def wait_stream(self, other: Stream) -> None:
        """As torch's."""
        _merge(self.clock, other.release())

    def wait_event(self, event: Event) -> None:
        """As torch's."""
        _merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        """As torch's."""
        event = event if event is not None else Event()
        event.clock = self.release()
        return event

    def synchronize(self) -> None:
        """The host waits."""
        _merge(_HOST, self.release())

    def query(self) -> bool:
        """True, and so the host knows."""
        self.synchronize()
        return True


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        """As torch's."""
        (stream or _current()).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        """As torch's."""
        (stream or _current()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        _merge(_HOST, self.clock)

    def query(self) -> bool:
        """True, and so the host knows."""
        self.synchronize()
        return True

    def elapsed_time(self, other: Event) -> float:
        """Nothing takes time here."""
        return 0.0


class _Streams(threading.local):
    current: Stream | None = None


_DEFAULT = Stream()
_streams = _Streams()


def _current(device: Any = None) -> Stream:
    return _streams.current or _DEFAULT


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    before, _streams.current = _streams.current, stream or _streams.current
    try:
        yield
    finally:
        _streams.current = before


class Graph:
    """`torch.cuda.CUDAGraph`, of passes alone."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.passes: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Make the passes, on the current stream."""
        for make in self.passes:
            make()


class Runtime:
    """`torch.cuda.cudart()`, as far as it registers memory.

    Attributes:
        registered: bytes by address.
        refuses: registering fails, as some drivers have it.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refuses = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """As CUDA's."""
        assert address % 4096 == 0 and size > 0 and address not in self.registered
        if self.refuses:
            return 801
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        """As CUDA's."""
        del self.registered[address]
        return 0


class Gpu:
    """What happened on the pretended GPU.

    Attributes:
        runtime: what torch.cuda.cudart() returns.
        races: uses of one piece of memory that nothing orders.
        passes: rules of the passes made, in order.
    """

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.races: list[str] = []
        self.passes: list[str] = []
        self.capturing: Graph | None = None
        self.inside_pass = False
        self._works: dict[tuple[int, int], Clock] = {}
        self._clocks: dict[object, Clock] = {}
        # Memory that travels, and the last uses of pieces of it by each stream or communicator: (what, tick).
        self._travels: set[tuple[int, int]] = set()
        self._uses: dict[tuple[int, int], dict[tuple[object, bool], tuple[str, int]]] = {}

    # -- what ordered_backend tells ----------------------------------------------------------------------------------

    def issued(self, communicator: int, number: int, parts: list[tuple[str, bool, int, int]]) -> None:
        """A communicator's stream waits for the current one, and uses the memory."""
        actor = ("communicator", communicator)
        clock = self._clocks.setdefault(actor, {})
        _merge(clock, _current().release())
        clock[actor] = clock.get(actor, 0) + 1
        self._works[communicator, number] = dict(clock)
        for what, writes, start, size in parts:
            if size:
                self._travels.add((start, start + size))
                self._use(actor, clock, start, start + size, writes, f"{what} (operation {number} of {communicator})")

    def waited(self, communicator: int, number: int) -> None:
        """The current stream, and it alone, is ordered after the operation."""
        _merge(_current().clock, self._works.get((communicator, number), {}))

    # -- what is looked at -------------------------------------------------------------------------------------------

    def use(self, tensor: Tensor, writes: bool, what: str) -> None:
        """The current stream reads or writes a tensor."""
        if tensor.numel() and tensor.device.type == "cpu":
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, stream = tensor.data_ptr(), _current()
            self._use(stream, stream.now(), start, start + (reach + 1) * tensor.element_size(), writes, what)

    def _use(self, actor: object, clock: Clock, start: int, stop: int, writes: bool, what: str) -> None:
        if not any(first < stop and start < last for first, last in self._travels):
            return
        for (first, last), uses in self._uses.items():
            if first < stop and start < last:
                for (other, wrote), (earlier, at) in uses.items():
                    if (writes or wrote) and other != actor and clock.get(other, 0) < at:
                        self.races.append(f"{what} is not ordered after {earlier}")
        self._uses.setdefault((start, stop), {})[actor, writes] = (what, clock[actor])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what this thread does with memory that travels is looked at."""
        ordered_backend.observe(self)
        try:
            with _Watch(self):
                yield
        finally:
            ordered_backend.observe(None)

    @contextmanager
    def without_syncs(self) -> Iterator[None]:
        """Inside, whatever would have the host wait for the device raises; passes themselves may."""

        def refused(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def method(*args: Any, **keywords: Any) -> Any:
                assert self.inside_pass, f"Tensor.{name} has the host wait for the device"
                return real(*args, **keywords)

            return method

        names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(Tensor, name, refused(name, getattr(Tensor, name))))
            yield

    # -- passes and graphs -------------------------------------------------------------------------------------------

    def run(self, rule: str, make: Callable[[], None]) -> None:
        """Make a pass, or record it."""

        def play() -> None:
            self.passes.append(rule)
            self.inside_pass = True
            try:
                make()
            finally:
                self.inside_pass = False

        if self.capturing is not None:
            self.capturing.passes.append(play)
        else:
            play()

    @contextmanager
    def graph(self, graph: Graph, *args: Any, **keywords: Any) -> Iterator[None]:
        """`torch.cuda.graph`: passes are recorded and not made."""
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class _Watch(TorchDispatchMode):
    """Reports every operation's tensors."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        schema = func._schema
        views = any(given.alias_info is not None and not given.alias_info.is_write for given in schema.returns)
        writes = False
        for place, spec in enumerate(() if views else schema.arguments):
            value = args[place] if place < len(args) else keywords.get(spec.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    written = spec.alias_info is not None and spec.alias_info.is_write
                    writes |= written
                    self.gpu.use(tensor, written, str(func))
        if writes and self.gpu.capturing is not None:
            self.gpu.races.append(f"{func} inside a capture is made and not recorded")
        return func(*args, **keywords)


def _at(address: int, numel: int, dtype: torch.dtype) -> Tensor:
    assert address % 16 == 0, "gradients are read 16 bytes at a time"
    memory = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def _through_table(grads: Gradients, first: int, spans: tuple[tuple[int, int], ...]) -> Gradients:
    """The gradients that the address table knows of, and no others."""
    assert grads.addresses is not None, "a pass on a GPU reads gradients from its table of addresses"
    homes = grads.addresses.tolist()
    found: list[Tensor | None] = [None] * len(homes)
    for p, (_, numel) in enumerate(spans, first):
        if homes[p]:
            found[p] = _at(homes[p], numel, grads.dtype)
    return Gradients(found, None, grads.dtype)


_known: weakref.WeakKeyDictionary[Region, tuple[Region, dict[int, int]]] = weakref.WeakKeyDictionary()


def _of_blocks(region: Region) -> tuple[Region, dict[int, int]]:
    """The same region for the CPU, and each parameter's first row in the block table.

    The table is about the region's parameters, every element of them, once.
    """
    if region not in _known:
        assert region.blocks is not None, "a pass on a GPU needs a table of blocks"
        covered: dict[int, int] = {}
        rows: dict[int, int] = {}
        spans = dict(enumerate(region.spans, region.first))
        for row, (p, offset, length, start) in enumerate(region.blocks.tolist()):
            assert covered.get(p, 0) == offset and start == spans[p][0] + offset, (p, offset, start)
            covered[p] = offset + length
            rows.setdefault(p, row)
        assert covered == {p: numel for p, (_, numel) in spans.items() if numel}
        _known[region] = replace(region, blocks=None), rows
    return _known[region]


def _counts(steps: Tensor, region: Region) -> Tensor:
    """Step counts by parameter; a GPU pass has one for each block, the same for all of a parameter."""
    assert region.blocks is not None and len(steps) == len(region.blocks)
    counts = torch.zeros(region.first + len(region.spans))
    counts[region.blocks[:, 0]] = steps
    assert torch.equal(counts[region.blocks[:, 0]], steps), "blocks of one parameter count differently"
    return counts


def kernel_by_the_cpu(real: Callable[[Pass], None]) -> Callable[[Pass], None]:
    """Passes with tables of addresses and blocks, as the kernel takes them, made by the CPU's passes."""

    def run(work: Pass) -> None:
        region, rows = _of_blocks(work.region)
        grads = None if work.gradient.grads is None else _through_table(work.gradient.grads, region.first, region.spans)
        sums = None if work.norm_sums is None else torch.zeros(len(region.spans), 2, dtype=torch.float64)
        steps = None if work.gradient.steps is None else _counts(work.gradient.steps, work.region)
        real(with_fields(work, grads=grads, region=region, norm_sums=sums, steps=steps))
        if work.gradient.steps is not None and steps is not None and work.region.blocks is not None:
            work.gradient.steps.copy_(steps[work.region.blocks[:, 0]])
        if work.norm_sums is not None and sums is not None:
            # The kernel has a row for each block; what a parameter's come to stands in its first.
            work.norm_sums.zero_()
            for p, row in rows.items():
                work.norm_sums[row] = sums[p - region.first]

    return run


@contextmanager
def pretend() -> Iterator[Gpu]:
    """Inside, CPU tensors count as a GPU's, and torch.cuda has streams, events and graphs for them."""
    gpu = Gpu()
    _HOST.clear()
    run_pass = kernel_by_the_cpu(cpu_pass.run_pass)
    stand_ins = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": gpu.graph,
        "stream": _stream,
        "current_stream": _current,
        "default_stream": lambda device=None: _DEFAULT,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: _current().synchronize(),
        "cudart": lambda: gpu.runtime,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: gpu.capturing is not None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    with ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for where, name, value in (
            (Tensor, "record_stream", lambda tensor, stream: None),
            (device, "on_gpu", lambda where: True),
            (cpu_pass, "run_pass", lambda work: gpu.run(work.rule, lambda: run_pass(work))),
            # The kernel is stood in for, so no Triton is needed.
            (environment, "triton_version", lambda: "3.9.0"),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield gpu
