"""One rank of `fusedfog run`: its environment, its process, where its output goes, and how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from torch.distributed.elastic.multiprocessing import Std
from torch.distributed.elastic.multiprocessing.tail_log import TailLog

from fusedfog.cli.run_stores import Address, show_stores


@dataclass(frozen=True)
class Plan:
    """What a launcher starts.

    Attributes:
        command: of a rank, as for `subprocess.Popen`.
        run: the run's name.
        nodes, node: how many machines there are, and which one this is.
        local: ranks on each of them.
        stores: of the run; the first is where ranks that are not elastic meet.
        max_restarts: of each rank.
        logs: the folder for output; None where none is kept.
        redirects, tees: which streams of a local rank go to a file only, and which to a file and to the console.
    """

    command: Sequence[str]
    run: str
    nodes: int
    node: int
    local: int
    stores: Sequence[Address]
    max_restarts: int
    logs: Path | None
    redirects: Mapping[int, Std]
    tees: Mapping[int, Std]

    @property
    def slots(self) -> int:
        """Places of the run."""
        return self.nodes * self.local


def variables(plan: Plan, local_rank: int, incarnation: int, stores: Sequence[Address]) -> dict[str, str]:
    """What torchrun sets, for scripts that are not elastic, and what `fusedfog.init(elastic=True)` reads.

    Args:
        plan, local_rank, incarnation: what the process is.
        stores: the plan's, in the order in which this process is to use them.
    """
    slot = plan.node * plan.local + local_rank
    host, port = plan.stores[0]
    found = {
        "RANK": slot,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": plan.slots,
        "LOCAL_WORLD_SIZE": plan.local,
        "GROUP_RANK": plan.node,
        "GROUP_WORLD_SIZE": plan.nodes,
        "ROLE_NAME": "default",
        "ROLE_RANK": slot,
        "ROLE_WORLD_SIZE": plan.slots,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": incarnation,
        "TORCHELASTIC_MAX_RESTARTS": plan.max_restarts,
        "TORCHELASTIC_RUN_ID": plan.run,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # The launcher's store is the one where ranks meet; none of them hosts it.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "FUSEDFOG_RUN_ID": plan.run,
        "FUSEDFOG_SLOT": slot,
        "FUSEDFOG_SLOTS": plan.slots,
        "FUSEDFOG_INCARNATION": incarnation,
        "FUSEDFOG_STORES": show_stores(stores),
    }
    if plan.local > 1:
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return {name: str(value) for name, value in found.items()}


def words(code: int) -> str:
    """A return code of `subprocess` for people: "exit code 1", "signal SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


class RankProcess:
    """A process of a rank, in a session of its own, so that a signal reaches its data loaders too.

    Args:
        plan: what is started.
        local_rank: its place on this machine.
        incarnation: how often the process of this place was started before.
        stores: as for `variables`.
        ended: called by a thread, with this object, when the process has ended; `code` says how.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        plan: Plan,
        local_rank: int,
        incarnation: int,
        stores: Sequence[Address],
        ended: Callable[[RankProcess], None],
    ) -> None:
        self.local_rank, self.incarnation = local_rank, incarnation
        self.slot = plan.node * plan.local + local_rank
        self.code: int | None = None
        self._tails: list[TailLog] = []
        with ExitStack() as files:
            self._process = subprocess.Popen(
                plan.command,
                env={**os.environ, **variables(plan, local_rank, incarnation, stores)},
                stdout=files.enter_context(file) if (file := self._file(plan, Std.OUT, "stdout", sys.stdout)) else None,
                stderr=files.enter_context(file) if (file := self._file(plan, Std.ERR, "stderr", sys.stderr)) else None,
                start_new_session=True,
            )
        threading.Thread(target=self._await, args=(ended,), daemon=True, name="fusedfog-rank").start()

    @property
    def uid(self) -> str:
        """The member that this process is."""
        return f"{self.slot}.{self.incarnation}"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _file(self, plan: Plan, stream: Std, name: str, console: TextIO) -> TextIO | None:
        """Where this stream goes; None for this launcher's own."""
        redirects, tees = (which[self.local_rank] & stream for which in (plan.redirects, plan.tees))
        if plan.logs is None or not (redirects or tees):
            return None
        path = plan.logs / f"attempt_{self.incarnation}" / str(self.local_rank) / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        if tees:
            prefix = {self.local_rank: f"[default{self.local_rank}]:"}
            tail = TailLog("fusedfog", {self.local_rank: str(path)}, console, log_line_prefixes=prefix)
            self._tails.append(tail.start())
        return file

    def _await(self, ended: Callable[[RankProcess], None]) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.send(signal.SIGKILL)  # Its data loaders, while its number is still its own: they may hold a port or a GPU.
        self.code = self._process.wait()
        for tail in self._tails:
            tail.stop()
        ended(self)

    def lives(self) -> bool:
        """Whether it has not ended, and is not stopped (SIGSTOP, a debugger): what its heartbeat says."""
        if self._process.returncode is not None:
            return False
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZX"
        return True

    def send(self, number: int) -> None:
        """A signal to it and to all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            if self.code is None:
                os.killpg(self.pid, number)
