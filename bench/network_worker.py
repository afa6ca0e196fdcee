"""One host's process of the network bench: it builds trainers and runs what `network.py` asks for.

Requests come as JSON lines on stdin, `["turn", "device-like", "DDP", 1, 3]`, and each is answered by one JSON line on stdout.
All hosts get the same requests in the same order. The process ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network_models import KINDS, METHODS, Model, Trainer, time_phases
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_TIMEOUT = timedelta(seconds=120)


class Worker:
    """The requests that a host answers, one method each."""

    def __init__(self, rank: int, address: str, machines: int, local: int) -> None:
        self.rank, self.local, self.size = rank, local, machines * local
        torch.set_num_threads(1)
        url = f"tcp://{address}:29500"
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=self.size, timeout=_TIMEOUT)
        self.mesh: DeviceMesh | None = init_device_mesh("cpu", (machines, local)) if local > 1 else None
        self.trainers: dict[tuple[str, str], Trainer] = {}

    def build(self, kind: str, methods: list[str]) -> dict[str, Any]:
        """Build trainers; returns the kind's layers."""
        for method in methods:
            self.trainers[kind, method] = METHODS[method](KINDS[kind], self.mesh)
        return {"layer_bytes": Model(KINDS[kind]).layer_bytes(), "layer_waits_s": KINDS[kind].waits}

    def phases(self, kind: str, steps: int) -> dict[str, float]:
        """Seconds of a local step's phases."""
        dist.barrier()
        return time_phases(KINDS[kind], steps)

    def turn(self, kind: str, method: str, warm: int, steps: int) -> dict[str, float]:
        """Make `warm` + `steps` steps; returns the seconds per step of the latter, and how much of that was blocked.

        With the first steps unmeasured, what is measured is steady: as many messages leave as arrive.
        """
        trainer = self.trainers[kind, method]
        dist.barrier()
        for _ in range(warm):
            trainer.step()
        blocked, busy, begin = trainer.blocked(), time.process_time(), time.perf_counter()
        for _ in range(steps):
            trainer.step()
        end = time.perf_counter()
        result = {
            "step_s": (end - begin) / steps,
            "blocked_s": (trainer.blocked() - blocked) / steps,
            "cpu_s": (time.process_time() - busy) / steps,
        }
        trainer.settle()
        return result

    def every_step(self, kind: str, method: str, warm: int, steps: int) -> dict[str, Any]:
        """Seconds of each of `steps` steps, and how many TCP segments this host sent and sent again in them."""
        trainer = self.trainers[kind, method]
        dist.barrier()
        for _ in range(warm):
            trainer.step()
        before, times = _segments(), [time.perf_counter()]
        for _ in range(steps):
            trainer.step()
            times.append(time.perf_counter())
        sent = [after - then for after, then in zip(_segments(), before, strict=True)]
        trainer.settle()
        return {"step_s": [end - begin for begin, end in pairwise(times)], "segments": sent}

    def transfer(self, size: int, repeats: int) -> list[float]:
        """Seconds that `size` bytes take to the same place in the next machine, all hosts at once; each repeat."""
        sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        return self._repeat(lambda: self._shift(sent, received), repeats)

    def allreduce(self, size: int, repeats: int) -> list[float]:
        """Seconds that an all-reduce of `size` bytes takes; each repeat."""
        values = torch.zeros(size // 4)
        return self._repeat(lambda: dist.all_reduce(values), repeats)

    def _shift(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        works = [
            dist.irecv(received, (self.rank - self.local) % self.size),
            dist.isend(sent, (self.rank + self.local) % self.size),
        ]
        for work in works:
            assert work is not None
            work.wait()

    def _repeat(self, operation: Callable[[], object], repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            begin = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - begin)
        return seconds


def _segments() -> list[int]:
    """How many TCP segments this host has sent, and sent again."""
    names, numbers = (
        line.split()[1:] for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    counts = dict(zip(names, map(int, numbers), strict=True))
    return [counts["OutSegs"], counts["RetransSegs"]]


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    worker = Worker(**json.loads(sys.argv[1]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)
    # Nothing to clean up is worth a hang: trainers of several libraries share these process groups.
    answers.close()
    os._exit(0)


if __name__ == "__main__" and len(sys.argv) == 2:
    main()
