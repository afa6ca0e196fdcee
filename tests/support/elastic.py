"""Processes of an elastic run for tests: each is started by itself, may be killed, and may be started again.

    with Members(4) as members:
        members.start(train, 100)                 # slots 0 to 3
        members.kill(2)                           # SIGKILL
        members.start_again(2, train, 100)        # as its next incarnation
        results = members.results()               # by uid: "0.0", "1.0", ..., "2.1"

The store lives in this process, as the launcher's does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "fusedfog", "fusedfog.testing", "numpy"])


class Members:
    """See the module."""

    def __init__(self, slots: int, **env: str) -> None:
        from torch.distributed import TCPStore

        self.slots, self._env = slots, env
        self.store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = self.store.port
        self.processes: dict[str, Any] = {}
        self._pipes: dict[str, Connection] = {}
        self._said: dict[str, list[Any]] = {}

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Start the first process of every slot."""
        for slot in range(self.slots):
            self.start_one(slot, 0, function, *args)

    def start_one(self, slot: int, incarnation: int, function: Callable[..., Any], *args: Any) -> None:
        """Start one process."""
        env = {
            "FUSEDFOG_RUN_ID": "test",
            "FUSEDFOG_SLOT": str(slot),
            "FUSEDFOG_SLOTS": str(self.slots),
            "FUSEDFOG_INCARNATION": str(incarnation),
            "FUSEDFOG_STORES": f"127.0.0.1:{self.port}",
            **self._env,
        }
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_run, args=(theirs, env, function, args), daemon=True)
        process.start()
        theirs.close()
        uid = f"{slot}.{incarnation}"
        self.processes[uid], self._pipes[uid], self._said[uid] = process, ours, []

    def start_again(self, slot: int, function: Callable[..., Any], *args: Any) -> None:
        """Start the next process of a slot."""
        before = max(int(uid.partition(".")[2]) for uid in self.processes if uid.startswith(f"{slot}."))
        self.start_one(slot, before + 1, function, *args)

    def signal(self, uid: str, number: int) -> None:
        """Send a signal to a process."""
        os.kill(self.processes[uid].pid, number)

    def kill(self, slot: int, incarnation: int = 0) -> None:
        """Kill a process, and see it dead; raises what it raised if it has ended before."""
        uid = f"{slot}.{incarnation}"
        if not self.processes[uid].is_alive():
            while True:
                self._hear(uid, time.monotonic() + 1.0)
                result = self._said[uid][-1]
                assert not isinstance(result, Result), (
                    f"{uid} has ended before it was killed: {result.error or result.value}"
                )
        self.signal(uid, signal.SIGKILL)
        self.processes[uid].join()

    def wait_for(self, uid: str, said: object, timeout: float = 240.0) -> None:
        """Return once a process has `say`ed this."""
        deadline = time.monotonic() + timeout
        while said not in self._said[uid]:
            self._hear(uid, deadline)

    def results(self, timeout: float = 240.0) -> dict[str, Any]:
        """What each process returned that was not killed; raises what one raised."""
        deadline, found = time.monotonic() + timeout, {}
        for uid in self.processes:
            while not self._said[uid] or not isinstance(self._said[uid][-1], Result):
                try:
                    self._hear(uid, deadline)
                except EOFError:
                    break
            else:
                result = self._said[uid][-1]
                if result.error:
                    raise AssertionError(f"{uid}: {result.error}")
                found[uid] = result.value
        return found

    def _hear(self, uid: str, deadline: float) -> None:
        pipe = self._pipes[uid]
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"{uid} did not say anything in time; said {self._said[uid][-3:]}")
        self._said[uid].append(pipe.recv())


class Result:
    """How a process' function ended."""

    def __init__(self, value: Any, error: str = "") -> None:
        self.value, self.error = value, error


class _Own:
    pipe: Connection


def results_when_one_comes_back(slots: int, slot: int, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """What all processes return of a run in which this slot's first process ends, and is started again."""
    with Members(slots) as members:
        members.start(function, *args)
        members.processes[f"{slot}.0"].join()
        members.start_again(slot, function, *args)
        return members.results()


def current_run() -> Any:
    """In a process: its part in the run, to look into and to disturb."""
    from fusedfog.comm.elastic.run import Run

    run = Run.current()
    assert run is not None
    return run


def let_go_after(seconds: float) -> None:
    """In a process: from now on a member that has not answered for so long counts as lost.

    If `init` were given so few, the run would begin without a process that a busy machine starts so much later.
    """
    run = current_run()
    run.dead_after = run.silence._dead_after = seconds


def linger(opt: Any, uid: str, until: int) -> None:
    """In a process, after each of its steps: take time for the last third of them unless a newcomer is a member by then.

    However late that one is started, the others are still there.
    """
    if 3 * opt.steps > 2 * until and uid not in opt.stats()["members"]:
        time.sleep(0.2)


def say(what: object) -> None:
    """In a process: tell the test something."""
    _Own.pipe.send(what)


def _run(pipe: Connection, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    from fusedfog.log import configure

    os.environ.update(env)
    configure()
    torch.set_num_threads(1)
    _Own.pipe = pipe
    try:
        pipe.send(Result(function(*args)))
    except BaseException:
        pipe.send(Result(None, traceback.format_exc()))
