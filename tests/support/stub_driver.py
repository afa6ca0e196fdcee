"""Launches through Triton's real launcher where there is no GPU: a driver library that keeps what it was given.

    with stub_gpu() as stub:
        fused_pass.launch(work)           # work's tensors are on the CPU
        (launch,) = stub.launches()       # its grid, and its arguments as the launcher packed them
        launch.arguments["row_sum"]

Compiling goes as far as PTX, which the library reads the parameters from; `ptxas` is replaced by a copy. Kernels do not
run. Needs a C compiler and a process that has no CUDA driver loaded; Triton's interpreter has no launcher.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from fusedfog.gossip import samples as gossip_samples
from fusedfog.kernels import cpu_pass, device, fused_pass, samples

SOURCE = Path(__file__).with_name("stub_driver.c")
_FORMATS = {"fp32": "<f", "fp64": "<d", "i1": "<?", "u1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q"}
_FORMATS |= {f"u{width}": _FORMATS[f"i{width}"].upper() for width in (8, 16, 32, 64)}
_PTXAS = """#!/bin/sh
# What Triton asks of ptxas, answered by a copy: the stub driver loads PTX.
case "$*" in *--version*) echo "stub ptxas, Cuda compilation tools, release 12.8, V12.8.93"; exit 0;; esac
for last; do case "$last" in *.ptx) source=$last;; esac; done
exec cp "$source" "$last"
"""
_CC = """#!/bin/sh
# Triton's launchers, built without optimization: tests read what they pack and do not time them.
exec {compiler} "$@" -O0
"""


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("begin", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        handle: the driver's, of the kernel's variant.
        packed: the bytes of every parameter that the kernel's PTX declares, in order.
        arguments: the same by the names of the kernel's arguments, tuples nested as they were given: pointers and
            integers as int, floats as float; what was compiled into the kernel as it was then, None for an absent tensor.
    """

    kernel: str
    handle: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    device: int
    packed: tuple[bytes, ...]
    arguments: dict[str, Any] = field(repr=False)

    def flat(self, name: str) -> list[Any]:
        """The values of one argument in order, without the absent ones."""
        return [value for value in _leaves(self.arguments[name]) if value is not None]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


class StubGpu:
    """What the stub driver has seen since it was entered."""

    def __init__(self, library: ctypes.CDLL, sources: dict[int, Any]) -> None:
        self._library, self._sources = library, sources
        self._modules = library.stub_modules()
        library.stub_clear()

    @property
    def variants(self) -> int:
        """How many kernels were loaded: grows by one with each call that had to compile, or fetch, another variant."""
        return self._library.stub_modules() - self._modules

    def __len__(self) -> int:
        return self._library.stub_count()

    @property
    def made(self) -> int:
        """How many launches there were in all, kept or not."""
        return self._library.stub_launches_made()

    def clear(self) -> None:
        """Forget the launches so far."""
        self._library.stub_clear()

    def launches(self, kernel: str | None = None) -> list[Launch]:
        """The launches since the last `clear`, of one kernel or of all."""
        found = [self._decoded(self._library.stub_launch(index).contents) for index in range(len(self))]
        return [launch for launch in found if kernel in (None, launch.kernel)]

    def _decoded(self, record: _Record) -> Launch:
        library, function = self._library, record.function
        data = ctypes.string_at(library.stub_bytes(record.begin), record.size)
        packed, begin = [], 0
        for size in library.stub_sizes(function)[: library.stub_parameters(function)]:
            packed.append(data[begin : begin + size])
            begin += size
        source = self._sources[function]
        return Launch(
            library.stub_name(function).decode(),
            function,
            tuple(record.grid),
            tuple(record.block),
            record.shared,
            record.stream,
            record.device,
            tuple(packed),
            _arguments(source, packed),
        )


def _arguments(source: Any, packed: list[bytes]) -> dict[str, Any]:
    """The packed parameters by name and in the tuples they were given in."""
    names = source.fn.arg_names
    constants = {(names.index(key),) if isinstance(key, str) else key: value for key, value in source.constants.items()}
    left = iter(packed)

    def value(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(value(part, (*path, number)) for number, part in enumerate(kind))
        if kind == "constexpr":
            return constants.get(path)
        data, form = next(left), "<Q" if kind.startswith("*") else _FORMATS[kind]
        assert len(data) == struct.calcsize(form), f"argument {path} is a {kind}, but {len(data)} bytes were packed"
        return struct.unpack(form, data)[0]

    found = {name: value(kind, (names.index(name),)) for name, kind in source.signature.items()}
    # Behind the arguments are two pointers to scratch memory, which these kernels have no use for.
    assert all(data == bytes(8) for data in left), "parameters behind the last argument"
    return found


@functools.cache
def _folder() -> Path:
    """A folder of this process for the library, the tools and Triton's cache; gone at exit."""
    folder = Path(tempfile.mkdtemp(prefix="stub-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the library and load it under the name that Triton's modules look for."""
    folder = _folder()
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    target = folder / "libcuda.so.1"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "cc"
    # Whoever opens libcuda.so.1 from now on gets what is loaded under that name: this.
    options = ["-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-pthread"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(target)], check=True)
    (folder / "libcuda.so").symlink_to(target.name)  # what Triton before 3.7 communicators with
    for name, text in (("ptxas", _PTXAS), ("cc", _CC.format(compiler=compiler))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    pointer = ctypes.c_void_p
    for name, result, *arguments in (
        ("stub_modules", ctypes.c_uint64),
        ("stub_launches_made", ctypes.c_uint64),
        ("stub_count", ctypes.c_uint64),
        ("stub_launch", ctypes.POINTER(_Record), ctypes.c_uint64),
        ("stub_bytes", pointer, ctypes.c_uint64),
        ("stub_name", ctypes.c_char_p, pointer),
        ("stub_parameters", ctypes.c_uint, pointer),
        ("stub_sizes", ctypes.POINTER(ctypes.c_uint), pointer),
    ):
        call = getattr(library, name)
        call.restype, call.argtypes = result, arguments
    return library


@functools.cache
def _driver() -> tuple[Any, dict[int, Any]]:
    """Triton's own driver on the stub library, and the source that each of its kernels' handles was compiled from."""
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    launcher, load = driver.launcher_cls, driver.utils.load_binary
    sources: dict[int, Any] = {}
    newest: list[Any] = []

    def made(source: Any, metadata: Any) -> Any:
        newest[:] = [source]
        return launcher(source, metadata)

    def loaded(*arguments: Any) -> Any:
        found = load(*arguments)
        sources[found[1]] = newest[0]  # Triton makes a kernel's launcher, then loads the kernel
        return found

    driver.launcher_cls, driver.utils.load_binary = made, loaded
    # In the place of torch.cuda's functions, which a build without CUDA has not.
    driver.get_current_device, driver.set_current_device = lambda: 0, lambda index: None
    driver.get_current_stream = lambda index: 0
    return driver, sources


def unavailable() -> str | None:
    """Why the stub cannot be used in this process, or None."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter has no launcher"
    if torch.cuda.is_available():
        return "a CUDA driver is loaded"
    if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
        return "no C compiler"
    return None


class _Event:
    """`torch.cuda.Event` where nothing is ever late, and a millisecond passes between two of them."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 1.0


@contextmanager
def stub_gpu(
    capability: int = 90,
    *,
    also: Sequence[Any] = (),
    take_gpu_way: bool = False,
    record: bool = True,
    optimized: bool = False,
) -> Iterator[StubGpu]:
    """Inside, the kernels of `fused_pass` are launched on CPU tensors, by Triton's launcher, on the stub driver.

    Args:
        capability: of the device that Triton compiles for.
        also: other kernels that will be launched.
        take_gpu_way: also let the engine take its GPU way: `fusedfog.kernels.device.on_gpu` says yes to all tensors, and
            passes that would run on the CPU, and looks at samples, are launched.
        record: keep the launches.
        optimized: build Triton's launchers as Triton does, to time them.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"no stub driver here: {reason}")
    library, active = _library(), triton.runtime.driver._active
    folder = _folder()
    settings = {
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_PTXAS_PATH": str(folder / "ptxas"),
        "TRITON_PTXAS_BLACKWELL_PATH": str(folder / "ptxas"),
        # Of its own: what stands for machine code here must not be found by a run on a GPU.
        "TRITON_CACHE_DIR": str(folder / ("cache-optimized" if optimized else "cache")),
    } | ({} if optimized else {"CC": str(folder / "cc")})
    ours = [*vars(fused_pass).values(), *vars(samples).values()]
    kernels = [*also, *(one for one in ours if isinstance(one, triton.runtime.JITFunction))]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, settings))
        driver, sources = _driver()
        driver.get_device_capability = lambda index: divmod(capability, 10)
        library.stub_set(*divmod(capability, 10), int(record))
        for kernel in kernels:
            stack.enter_context(mock.patch.dict(kernel.device_caches, clear=True))
        for launcher in (fused_pass.LAUNCHER, samples.LAUNCHER):
            launcher.forget()
            stack.callback(launcher.forget)
        if take_gpu_way:
            stack.enter_context(mock.patch.object(device, "on_gpu", lambda where: True))
            stack.enter_context(mock.patch.object(cpu_pass, "run_pass", fused_pass.launch))
            stack.enter_context(mock.patch.object(gossip_samples, "by_kernel", lambda tensor: True))
            stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
            stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda where=None: None))
        triton.runtime.driver.set_active(driver)
        try:
            yield StubGpu(library, sources)
        finally:
            for kernel in kernels:
                for cache in kernel.device_caches.values():
                    for compiled in cache[0].values():
                        compiled.module = None  # nobody is to unload it from another driver
            triton.runtime.driver._active = active
