"""Make a rank fail at a step, to see what the others do: for tests of training loops, this package's own among them.

    with fail_at(rank=2, step=100, how="kill"):
        train()

It stands above the optimizers, and nothing of the package imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedfog.comm.group import rank as own_rank
from fusedfog.errors import UnsupportedEnvironment, did_you_mean
from fusedfog.optim.base import DecentralizedOptimizer

HOWS = ("kill", "stop", "raise", "nan", "slow", "partition")


class InjectedFailure(RuntimeError):
    """What `fail_at(..., how="raise")` raises out of `step()`."""


class fail_at:
    """A context: inside, rank `rank` fails when one of its optimizers begins its step number `step`, counted from 0, once.

    Every rank may enter it alike; it does something on one of them. Steps are those of an optimizer's own clock, which a
    checkpoint resumes.

    Args:
        rank: global rank, before there is a process group that of the launcher's variables; alone it is 0.
        step: the number of the step, from 0.
        how: "kill": SIGKILL to its own process, as the kernel's out-of-memory killer does. "stop": SIGSTOP, so that it neither
            answers nor ends until somebody sends SIGCONT. "raise": `InjectedFailure` out of `step()`. "nan": all gradients that
            the step would use become NaN; those that `fused_backward` has used already stay. "slow": it sleeps.
            "partition": nothing that anybody sends reaches it (see `cut_off`), and the step goes on.
        seconds: how long, for "slow" and "partition".

    Raises:
        ValueError: no such `how`; negative `rank` or `step`; `seconds` that are not positive.
        UnsupportedEnvironment (a ValueError): "partition" elsewhere than on Linux.
    """

    def __init__(self, rank: int, step: int, how: str = "kill", *, seconds: float = 5.0) -> None:
        if how not in HOWS:
            raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}{did_you_mean(how, HOWS)}")
        if rank < 0 or step < 0:
            raise ValueError(f"rank and step count from 0, got rank {rank} and step {step}")
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        if how == "partition":
            _check_can_cut_off()
        self.rank, self.step, self.how, self.seconds = rank, step, how, seconds
        self._hook: Any = None

    def __enter__(self) -> fail_at:
        """Have it happen from now on."""
        if own_rank() == self.rank:
            self._hook = register_optimizer_step_pre_hook(self._before_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """If it has not happened, it will not."""
        self._forget()

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer, DecentralizedOptimizer) or optimizer._engine.clock.steps != self.step:
            return
        self._forget()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "slow":
            time.sleep(self.seconds)
        elif self.how == "partition":
            cut_off(self.seconds)
        elif self.how == "raise":
            raise InjectedFailure(f"rank {self.rank}: injected at step {self.step} (fusedfog.testing.fail_at)")
        else:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.fill_(torch.nan)


# -- partitions --------------------------------------------------------------------------------------------------------

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
"""A program of the kernel's packet filter: keep 0 bytes of everything."""

_FILTER = struct.pack("@HP", 1, ctypes.addressof(_DROP_ALL))

_SWEEP_EVERY = 0.002
_cutting = threading.Lock()


def cut_off(seconds: float) -> None:
    """Have nothing that anybody sends over TCP reach this process for so many seconds, from now on; returns at once.

    Packets are dropped by a filter on each of its sockets, as a broken network drops them: nobody is told, connections are
    neither closed nor refused, and afterwards TCP sends again what was lost. New connections, either way, do not come about. What
    this process sends still arrives, until its TCP waits for an answer; and memory that ranks of one machine share is no network.
    It needs no privileges, and works on Linux only.

    Raises:
        ValueError: `seconds` are not positive; two of these at a time.
        UnsupportedEnvironment: this is not Linux.
    """
    _check_can_cut_off()
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if not _cutting.acquire(blocking=False):
        raise ValueError("this process is cut off already")
    known: dict[int, int] = {}
    _sweep(known)
    socket.socket.connect, socket.socket.connect_ex = _connect, _connect_ex  # type: ignore[method-assign, assignment]
    threading.Thread(target=_stay_cut_off, args=(seconds, known), daemon=True, name="fusedfog-cut-off").start()


def _stay_cut_off(seconds: float, known: dict[int, int]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _sweep(known)
        time.sleep(_SWEEP_EVERY)
    del socket.socket.connect, socket.socket.connect_ex
    for number, inode in _open_sockets():
        if known.get(number) == inode:
            _set(number, _SO_DETACH_FILTER, b"\0" * 4)
    _cutting.release()


def _sweep(known: dict[int, int]) -> None:
    """Put the filter on sockets that are new."""
    for number, inode in _open_sockets():
        if known.get(number) != inode:
            known[number] = inode
            _set(number, _SO_ATTACH_FILTER, _FILTER)


def _connect(self: socket.socket, address: Any) -> None:
    _set(self.fileno(), _SO_ATTACH_FILTER, _FILTER)
    super(socket.socket, self).connect(address)


def _connect_ex(self: socket.socket, address: Any) -> int:
    _set(self.fileno(), _SO_ATTACH_FILTER, _FILTER)
    return super(socket.socket, self).connect_ex(address)


def _set(number: int, option: int, value: bytes) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as end:
        if end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM:
            end.setsockopt(socket.SOL_SOCKET, option, value)


def _open_sockets() -> list[tuple[int, int]]:
    """(descriptor, inode) of this process' sockets."""
    found = []
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            about = os.fstat(int(name))
            if stat.S_ISSOCK(about.st_mode):
                found.append((int(name), about.st_ino))
    return found


def _check_can_cut_off() -> None:
    if sys.platform != "linux":
        raise UnsupportedEnvironment(
            "a process is cut off by a filter of Linux on its sockets: test this on Linux, or use another `how`"
        )
