"""A torch.distributed backend that keeps NCCL's rules on CPU memory, and breaks loudly where NCCL would hang.

    def on_each_rank():                                # through the pool, with init=False
        ordered_backend.open_world(timeout=5.0)        # init_process_group("ordered"); the backend's name() is "nccl"
        works = dist.batch_isend_irecv([...])          # one work, by torch's own coalescing

    ordered_backend.build()                            # beforehand, in the parent: compiling takes ten seconds, once

What it shares with NCCL: messages between two ranks match by order, whatever their tags, and only with the same size; what
is issued on one communicator is carried out in that order, a batch as one; a batch has one work, which may be waited for
again; the first operation of a communicator takes all of its ranks; a batch may hold messages to oneself; a send is over
only when it was received; the default group may be bound to a device (`bound=True`), and then every new group is split from
it, a collective of all of its ranks. After an abort, what had not come counts as complete: the wait for it raises nothing, and
its memory has garbage (NaN).

What NCCL answers with a hang is here an error, at once or after the group's timeout: other orders or sizes on two ranks,
more than 256 operations in a batch, operations from two threads, a first operation or a split that not all ranks enter. So is
the death of a rank; after `silence(True)` whoever waits for one waits until it aborts, as a kernel does for a rank of its host.

It is stricter in one way: a work's `wait` blocks the host, since fake streams (`fake_cuda`) run at once. So a program may
hang here that NCCL lets pass, if the host would have run ahead of a wait to start what a peer waits for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from fusedfog.comm.communicator import Communicator

SOURCE = Path(__file__).with_name("ordered_backend.cpp")
_BUILDS = Path(__file__).parents[2] / "build" / "ordered_backend"
_GPU = torch.device("cuda", 0)
_SETTING_UP = timedelta(seconds=30)
"""To connect in, however short a timeout is tested: machines are busy at times."""


class Observer(Protocol):
    """Is told, by the thread that does it, what is issued and what is waited for."""

    def issued(self, communicator: int, number: int, parts: list[tuple[str, bool, int, int]]) -> None:
        """Operation `number` of a communicator; parts are (what, whether it writes, address, bytes)."""

    def waited(self, communicator: int, number: int) -> None:
        """The wait for this operation returns; it may be called again."""


def _command(target: Path) -> list[str]:
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    names = ("COMPILER_TYPE", "STDLIB", "BUILD_ABI")
    abi = {name: getattr(torch._C, f"_PYBIND11_{name}", None) for name in names}
    return [
        *os.environ.get("CXX", "c++").split(),
        *("-O0", "-std=c++20", "-shared", "-fPIC", "-w"),
        f"-DTORCH_EXTENSION_NAME={SOURCE.stem}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f'-DPYBIND11_{name}="{value}"' for name, value in abi.items() if value is not None),
        *(f"-I{path}" for path in include),
        str(SOURCE),
        *("-o", str(target), f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"),
        *("-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"),
        *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()),
    ]


def build() -> Path:
    """The compiled backend; compiles it where this source, torch and Python have not met before."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update("\0".join([*_command(Path()), torch.__version__, sys.version]).encode())
    folder = _BUILDS / key.hexdigest()[:16]
    target = folder / f"{SOURCE.stem}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole: another process may be at it, too.
        part = folder / f"{os.getpid()}.part"
        done = subprocess.run(_command(part), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr}")
        part.replace(target)
    return target


@functools.cache
def load() -> ModuleType:
    """Build if necessary, load into this process and register as torch.distributed's backend "ordered"."""
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader(SOURCE.stem, path)
    spec = importlib.util.spec_from_file_location(SOURCE.stem, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    # For "cuda" as well, although no tensor is there: torch asks for the backend of the device that a group is bound to.
    dist.Backend.register_backend("ordered", _create, devices=["cpu", "cuda"], extended_api=True)
    return module


def _create(options: Any, _: Any) -> dist.Backend:
    place = options.group_rank, options.group_size
    store, limit = dist.PrefixStore("inner", options.store), max(options.timeout, _SETTING_UP)
    backend = load().OrderedBackend(
        lambda: dist.ProcessGroupGloo(store, *place, timeout=limit), options.store, *place, options.timeout
    )
    default = c10d._world.default_pg
    if default is not None and default.bound_device_id is not None:
        backend.splits_from(default._get_backend(default.bound_device_id))
    return backend


def open_world(timeout: float = 20.0, *, bound: bool = False) -> None:
    """Join the world that RANK, WORLD_SIZE and MASTER_PORT describe, over this backend.

    Args:
        timeout: of the group, in seconds.
        bound: as with `init_process_group(device_id=...)`, which torch refuses where there is no GPU.
    """
    module = load()
    module.forget_thread()
    observe(None)
    delay(0.0)
    dist.init_process_group("ordered", timeout=_SETTING_UP)
    default = c10d._get_default_group()
    if bound:
        default.bound_device_id = _GPU
        default._get_backend(_GPU).eager_connect_single_device(_GPU)
    # Nobody may leave, or fail, before everybody is in.
    store = c10d._get_default_store()
    if store.add("ordered/opened", 1) == dist.get_world_size():
        store.set("ordered/all", "in")
    store.wait(["ordered/all"], _SETTING_UP)
    limit(timeout)


def limit(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """Have operations of this process in a group, by default the default group, wait for so long from now on."""
    group = group if group is not None else c10d._get_default_group()
    group._get_backend(_GPU).options._timeout = timedelta(seconds=seconds)


def shorten(communicator: Communicator, seconds: float) -> None:
    """From now on, whoever waits in this process' part of a communicator gives up after so long.

    A short timeout of the world would strike while it is opened, too, where a busy machine has another rank come late.
    """
    communicator.timeout = timedelta(seconds=seconds)
    communicator.membership = dataclasses.replace(communicator.membership, timeout=communicator.timeout)
    limit(seconds, communicator.group)


def observe(observer: Observer | None) -> None:
    """Tell `observer`, from now on, what this process issues and waits for."""
    load().observe(observer)


def delay(seconds: float) -> None:
    """Have every operation that this process issues begin so much later, so that what is not ordered after it shows."""
    load().delay(seconds)


def silence(silent: bool) -> None:
    """Have this process learn nothing, from now on, of ranks that die."""
    load().silence(silent)
