"""Real processes for tests: n ranks over gloo on the loopback interface, started once per session and reused.

    def double(x):                                  # a module-level function of a test module
        y = torch.tensor([x * dist.get_rank()])
        dist.all_reduce(y)
        return y.item()

    def test_it(ranks):                             # `ranks` is the session's Pool (conftest.py)
        assert ranks.run(4, double, 2.0) == [12.0] * 4
        bad = ranks.outcomes(4, may_fail)           # never raises: bad[2].error_type, .message, .seconds

Every call is a brand-new world (store, process group, environment, seeds), so a poisoned group ends with its test. A
worker that dies, hangs or ends with an error is replaced before the call returns.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from support.pool_worker import recv_frame, send_frame

__all__ = ["FailAt", "InjectedFailure", "Outcome", "Pool", "RankError", "RankFailure", "fail_at"]

_START_LIMIT = 120.0  # seconds for the zygote to import torch on a busy machine
_GRACE = 2.0  # seconds a process whose pipe has closed gets to finish exiting by itself
_LIMIT = 180.0  # seconds for a call, on a machine that has other things to do


class RankError(Exception):
    """What one rank raised: the name of its type, its message, its traceback as text."""

    def __init__(self, rank: int, type_name: str, message: str, traceback: str) -> None:
        super().__init__(f"rank {rank}: {type_name}: {message}")
        self.rank, self.type_name, self.message, self.traceback = rank, type_name, message, traceback


class RankFailure(Exception):
    """One or more ranks of a `Pool.run` failed; `.errors` maps each failing rank to its RankError."""

    def __init__(self, errors: dict[int, RankError], world_size: int) -> None:
        self.errors = errors
        lines = [f"{len(errors)} of {world_size} ranks failed"]
        for error in errors.values():
            lines += [f"--- {error}", error.traceback.rstrip()]
        super().__init__("\n".join(line for line in lines if line))


@dataclass(frozen=True)
class Outcome:
    """How one rank's call ended: `value`, or `error_type` ("Died" and "Hung" included) with `message`, `traceback`."""

    value: Any = None
    error_type: str | None = None
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    """Time inside the function, without the world's set-up; for a dead or hung rank, time since the call began."""

    @property
    def ok(self) -> bool:
        return self.error_type is None


class InjectedFailure(RuntimeError):
    """What `fail_at(..., how="raise")` raises."""


@dataclass(frozen=True)
class FailAt:
    """See `fail_at`."""

    rank: int
    step: int
    how: str

    def check(self, step: int) -> None:
        """Call once per step in every rank; fails in the chosen rank at the chosen step."""
        if int(os.environ["RANK"]) != self.rank or step != self.step:
            return
        if self.how == "raise":
            raise InjectedFailure(f"injected at rank {self.rank}, step {self.step}")
        if self.how == "exit":
            os._exit(17)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)


def fail_at(rank: int, step: int, how: str = "raise") -> FailAt:
    """Return a picklable fault injector; `how` is "raise", "exit" (status 17), "kill" (SIGKILL) or "hang"."""
    if how not in ("raise", "exit", "kill", "hang"):
        raise ValueError(f"how must be raise, exit, kill or hang, got {how!r}")
    return FailAt(rank, step, how)


@dataclass(eq=False)
class _Worker:
    pid: int
    conn: Connection


class Pool:
    """Workers that run a function as n ranks; use through the `ranks` fixture."""

    def __init__(self) -> None:
        self._zygote: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._workers: list[_Worker] = []
        self._dir = ""
        self._calls = 0
        self.zygote_threads = 0

    def run(
        self,
        n: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = _LIMIT,
        pg_timeout: float = 30.0,
        init: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Call fn(*args, **kwargs) on n ranks; return their results by rank, or raise RankFailure.

        `timeout` limits the whole call, `pg_timeout` is the process group's own, `init=False` leaves the group to fn
        (RANK, WORLD_SIZE, MASTER_ADDR... are set either way, and `init_process_group("gloo")` works with them).
        """
        outcomes = self.outcomes(n, fn, *args, timeout=timeout, pg_timeout=pg_timeout, init=init, **kwargs)
        errors = {
            rank: RankError(rank, o.error_type, o.message, o.traceback)
            for rank, o in enumerate(outcomes)
            if o.error_type is not None
        }
        if errors:
            raise RankFailure(errors, n)
        return [o.value for o in outcomes]

    def outcomes(
        self,
        n: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = _LIMIT,
        pg_timeout: float = 30.0,
        init: bool = True,
        **kwargs: Any,
    ) -> list[Outcome]:
        """As `run`, but report how each rank ended instead of raising: for tests of errors, deaths and hangs."""
        from torch.distributed import TCPStore

        call = pickle.dumps((fn, args, kwargs))
        self._grow(n)
        # A file, since a TCPStore looks up the names of its clients, which can take a resolver's whole timeout.
        self._calls += 1
        store = os.path.join(self._dir, f"store-{self._calls}")
        # For functions that open env:// themselves. It lives here, as torchrun's store lives in its agent, so that
        # any rank may die without taking it along.
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        busy: dict[int, _Worker] = {}
        start = time.monotonic()
        try:
            for rank, worker in enumerate(self._workers[:n]):
                task = {
                    "call": call,
                    "rank": rank,
                    "world_size": n,
                    "init": init,
                    "pg_timeout": pg_timeout,
                    "sys_path": [p for p in sys.path if p],
                    "store": store,
                    "env": _environment(rank, n, server.port),
                }
                busy[rank] = worker
                with contextlib.suppress(OSError):  # a worker killed from outside: `_collect` reports the death
                    worker.conn.send_bytes(pickle.dumps(task))
            return self._collect(busy, start, timeout)
        finally:
            # Only an interrupt of this process leaves anyone busy: what they would still say belongs to no call.
            for rank in list(busy):
                self._replace(busy.pop(rank), grace=0.0)
            Path(store).unlink(missing_ok=True)
            del server

    def close(self) -> None:
        """Take all processes down. Never hangs: the zygote's end kills whatever its workers are stuck in."""
        for worker in self._workers:
            worker.conn.close()
        self._workers = []
        if self._control is not None:
            self._control.close()
        if self._zygote is not None:
            try:
                self._zygote.wait(5)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait(5)
        self._control = self._zygote = None
        shutil.rmtree(self._dir, ignore_errors=True)

    def pids(self) -> list[int]:
        """Process ids of the workers started so far, by the rank they play."""
        return [worker.pid for worker in self._workers]

    def _collect(self, busy: dict[int, _Worker], start: float, timeout: float) -> list[Outcome]:
        n = len(busy)
        done: dict[int, Outcome] = {}
        while busy:
            left = start + timeout - time.monotonic()
            ready = wait([w.conn for w in busy.values()], max(left, 0.0))
            for rank in [r for r, w in busy.items() if w.conn in ready]:
                worker = busy.pop(rank)
                try:
                    reply = pickle.loads(worker.conn.recv_bytes())
                    done[rank] = _outcome(reply)
                    if reply["spent"]:
                        self._replace(worker, grace=0.0)
                except (EOFError, OSError):
                    status = self._replace(worker, _GRACE)
                    done[rank] = Outcome(None, "Died", _epitaph(status), "", time.monotonic() - start)
            if not ready and left <= 0:
                hung = {r: self._stack(w) for r, w in busy.items()}  # all stacks first: killing one would free others
                for rank, stack in hung.items():
                    self._replace(busy.pop(rank), grace=0.0)
                    message = f"no answer within {timeout:g} s (worker killed)"
                    done[rank] = Outcome(None, "Hung", message, stack, time.monotonic() - start)
        return [done[rank] for rank in range(n)]

    def _grow(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"need at least one rank, got {n}")
        if self._zygote is None:
            self._start()
        while len(self._workers) < n:
            self._workers.append(self._fork())

    def _start(self) -> None:
        self._dir = tempfile.mkdtemp(prefix="fusedfog-pool-")
        self._control, theirs = socket.socketpair()
        # One thread each: more would oversubscribe the machine, and a zygote with a BLAS thread is unsafe to fork.
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        env |= {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        env["RES_OPTIONS"] = "timeout:1 attempts:1"  # for the name look-ups of env:// worlds
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("pool_worker.py")), str(theirs.fileno()), self._dir],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
            )
        self._control.settimeout(_START_LIMIT)
        self.zygote_threads = recv_frame(self._control)[0]["threads"]

    def _ask(self, request: dict[str, Any], *fds: int) -> Any:
        assert self._control is not None
        send_frame(self._control, request, fds)
        return recv_frame(self._control)[0]

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._ask({"do": "fork"}, theirs.fileno())
        return _Worker(pid, Connection(ours.detach()))

    def _replace(self, worker: _Worker, grace: float) -> int | None:
        """Put a fresh worker in the place of one that died or hung; return the old one's exit status."""
        status = self._ask({"do": "reap", "pid": worker.pid, "grace": grace})
        worker.conn.close()
        self._workers[self._workers.index(worker)] = self._fork()
        return status

    def _stack(self, worker: _Worker) -> str:
        """Where a hung worker is, by its faulthandler."""
        path = Path(self._dir, f"{worker.pid}.stack")
        with contextlib.suppress(OSError):
            os.kill(worker.pid, signal.SIGUSR1)
            deadline = time.monotonic() + (1.0 if _is_stopped(worker.pid) else 20.0)
            # The dump is many writes, and the process may have to wait for a core between any two of them.
            while "in <module>" not in path.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            return path.read_text() or _NO_STACK
        return _NO_STACK


_NO_STACK = "(no stack: the process did not answer)"


def _is_stopped(pid: int) -> bool:
    """Whether the process was suspended (SIGSTOP), and so will not answer a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # It has ended, or this system has no /proc.
        return False


def _environment(rank: int, n: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// then makes every rank a client of the pool's store
    }


def _outcome(reply: dict[str, Any]) -> Outcome:
    if "error" in reply:
        return Outcome(None, *reply["error"], reply["seconds"])
    return Outcome(pickle.loads(reply["value"]), seconds=reply["seconds"])


def _epitaph(status: int | None) -> str:
    if status is None:
        return "the process is gone, its exit status unknown"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
