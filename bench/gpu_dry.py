"""Stand-ins for a GPU, so that the sections of bench/gpu.py can be executed without one before they are with one.

    with dry_run("stub"):     kernels are compiled and launched by Triton down to the stub driver, and do not run
    with dry_run("passes"):   everything takes its GPU way but the passes themselves, which run on the CPU
    with dry_run("cpu"):      CPU tensors take the CPU's way

In all three torch.cuda's streams, events, graphs and counters are stand-ins that do nothing and say something.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from support.fake_cuda import kernel_by_the_cpu
from support.stub_driver import stub_gpu

from fusedfog.kernels import cpu_pass, device

Way = Literal["stub", "passes", "cpu"]


class Stream:
    """A stream on which everything is over at once."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class Event:
    """An event that knows when it was recorded."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._at = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return max(1e-3, 1e3 * (end._at - self._at))


def _ignored() -> Callable[..., None]:
    """In the place of a call that only a GPU needs; every one another, since torch.compile keeps a table of functions."""
    return lambda *arguments, **named: None


def _stand_ins() -> dict[str, Any]:
    stream = Stream()
    runtime = SimpleNamespace(cudaHostRegister=lambda *arguments: 0, cudaHostUnregister=lambda *arguments: 0)
    properties = SimpleNamespace(name="stub", multi_processor_count=132, total_memory=1 << 37)
    answers: dict[str, Callable[..., Any]] = {
        "current_stream": lambda *arguments: stream,
        "default_stream": lambda *arguments: stream,
        "stream": lambda other: other or nullcontext(),
        "device": lambda *arguments: nullcontext(),
        "current_device": lambda: 0,
        "memory_allocated": lambda *arguments: 1 << 20,
        "max_memory_allocated": lambda *arguments: 1 << 21,
        "get_device_properties": lambda *arguments: properties,
        "get_device_name": lambda *arguments: "stub",
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: runtime,
    }
    ignored = ("synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats", "set_device", "set_sync_debug_mode")
    return {"Stream": Stream, "Event": Event, **answers, **{name: _ignored() for name in ignored}}


@contextmanager
def dry_run(way: Way) -> Iterator[None]:
    """Inside, there is as much of a GPU as `way` says; see the module."""
    with ExitStack() as stack:
        for name, value in _stand_ins().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _ignored()))
        stack.enter_context(mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 27, 0)))
        if way == "stub":
            stack.enter_context(stub_gpu(take_gpu_way=True))
        elif way == "passes":
            stack.enter_context(mock.patch.object(device, "on_gpu", lambda where: True))
            stack.enter_context(mock.patch.object(cpu_pass, "run_pass", kernel_by_the_cpu(cpu_pass.run_pass)))
        yield
