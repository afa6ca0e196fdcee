"""Processes of an elastic run for benches: each is forked, may be killed, and may be started again as the next of its slot."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from faults_common import Run, end, open_store

from fusedfog.log import configure

Work = Callable[[int, int], Run]
"""What a process does, given its slot and incarnation; what it reports."""


class Processes:
    """See the module; the store lives in a process of its own.

    Args:
        slots: how many places the run has.
        work: what each process does; it calls `fusedfog.init(elastic=True)`.

    Attributes:
        folder: where logs are, and whatever else.
        reports: what processes have reported, by uid; `{"error": ...}` of those that have raised.
    """

    def __init__(self, slots: int, work: Work) -> None:
        self.slots, self._work = slots, work
        self.folder = tempfile.mkdtemp(prefix="fusedfog-faults-")
        self.reports: dict[str, Run] = {}
        self._pipes: dict[str, int] = {}
        self._pids: dict[str, int] = {}
        self.incarnations = [-1] * slots
        self._host, self._port = open_store()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        end([*self._pids.values(), self._host])
        for pipe in self._pipes.values():
            os.close(pipe)
        shutil.rmtree(self.folder, ignore_errors=True)

    def uid(self, slot: int) -> str:
        """Of the newest process of a slot."""
        return f"{slot}.{self.incarnations[slot]}"

    @property
    def living(self) -> list[int]:
        """Slots whose newest process has neither been seen dead nor has raised anything."""
        raised = {uid for uid, report in self.reports.items() if "error" in report}
        return [slot for slot in range(self.slots) if self.uid(slot) in self._pids and self.uid(slot) not in raised]

    def start(self, slot: int) -> float:
        """Start the next process of a slot; when."""
        self.incarnations[slot] += 1
        uid = self.uid(slot)
        reads, writes = os.pipe()
        begin, pid = time.monotonic(), os.fork()
        if pid == 0:
            self._be(slot, writes)
        os.close(writes)
        os.set_blocking(reads, False)
        self._pids[uid], self._pipes[uid] = pid, reads
        return begin

    def kill(self, slot: int) -> None:
        """Kill the process of a slot, and see it dead."""
        os.kill(self._pids[self.uid(slot)], signal.SIGKILL)
        os.waitpid(self._pids.pop(self.uid(slot)), 0)

    def ended(self) -> list[int]:
        """Slots whose process has killed itself since the last time."""
        found = []
        for slot in self.living:
            pid, status = os.waitpid(self._pids[self.uid(slot)], os.WNOHANG)
            if pid and os.WIFSIGNALED(status):
                found.append(slot)
                del self._pids[self.uid(slot)]
        return found

    def wait(self, done: Callable[[], bool], limit: float) -> bool:
        """Until it is done, or so many seconds are over; whether it is done."""
        deadline = time.monotonic() + limit
        while not done() and time.monotonic() < deadline:
            self._hear()
            time.sleep(2e-3)
        return done()

    def _hear(self) -> None:
        for uid in self._pids:
            with contextlib.suppress(BlockingIOError):
                text = os.read(self._pipes[uid], 65536) if uid not in self.reports else b""
                if text:
                    self.reports[uid] = json.loads(text)

    def all_reported(self) -> bool:
        """Whether all that live have."""
        return all(self.uid(slot) in self.reports for slot in self.living)

    def logs(self) -> dict[str, str]:
        """What processes have logged, and where their threads are."""
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        return {path.stem: path.read_text()[-6000:] for path in sorted(Path(self.folder).glob("*.log"))}

    def _be(self, slot: int, pipe: int) -> None:
        """A process: never returns."""
        os.environ |= {
            "FUSEDFOG_SLOT": str(slot),
            "FUSEDFOG_SLOTS": str(self.slots),
            "FUSEDFOG_INCARNATION": str(self.incarnations[slot]),
            "FUSEDFOG_STORES": f"127.0.0.1:{self._port}",
            "FUSEDFOG_LOG": "info",
        }
        try:
            with Path(self.folder, f"{self.uid(slot)}.log").open("w") as log:
                os.dup2(log.fileno(), 2)
            faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
            configure()
            os.write(pipe, json.dumps(self._work(slot, self.incarnations[slot])).encode())
        except BaseException:
            os.write(pipe, json.dumps({"error": traceback.format_exc()[-3000:]}).encode())
            os._exit(1)
        while True:  # Others may not have completed the last call yet; and a signal that asks for stacks ends a pause.
            signal.pause()
