"""Two ranks on one GPU: the section of bench/gpu.py that needs several processes.

NCCL takes two ranks on one GPU from version 2.30 on, if asked. Before, the engine is run with messages that travel through
host memory over gloo, and torch's symmetric memory is tried on its own: a pass that reads the neighbour's parameters where
they are. The same training on the CPU over gloo says what must come out.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import common  # noqa: F401 (makes fusedfog and the tests' table of rules importable)
import torch
import torch.distributed as dist
from gpu_notes import Notes, Run
from support.recorded import record
from torch import Tensor, nn

import fusedfog
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.transfer import Transfer
from fusedfog.kernels import BLOCK, Mixing, Pass, Region, run_pass

STEPS, WARM = 20, 3
METHODS = [
    ("SGD", "awc", {}),
    ("SGD", "atc", {}),
    ("SGD", "atc", {"fused_backward": True}),
    ("SGD", "momentum_tracking", {}),
    ("AdamW", "awc", {}),
    ("AdamW", "awc", {"capturable": True}),
    ("AdamW", "allreduce", {}),
]


def ranks(notes: Notes, run: Run) -> None:
    """Two processes on one GPU: which transports work, and whether training equals that on the CPU over gloo."""
    version = torch.cuda.nccl.version() if not run.dry else (0,)
    transports = ["cpu", "staged", "symmetric"]
    if version >= (2, 30):
        transports.insert(1, "nccl")
    else:
        notes["NCCL"] = f"{'.'.join(map(str, version))} refuses two ranks on one GPU (2.30 is the first that can)"
    trained: dict[str, Any] = {}
    for transport in transports:
        if run.left() < 10:
            notes[transport] = "not reached"
            continue
        if run.dry and transport == "symmetric":
            notes[transport] = "needs a GPU"
            continue
        folder = run.work / transport
        failure = launch(transport, folder, run)
        notes[transport] = failure or "worked"
        if failure is None and transport != "symmetric":
            trained[transport] = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
            compare(notes, transport, trained)
        for found in sorted(folder.glob("found-*.json")):
            notes[f"{transport}: rank 0 found"] = found.read_text()


def compare(notes: Notes, transport: str, trained: dict[str, Any]) -> None:
    """The parameters of both ranks after training, against those of the CPU run, method by method."""
    if transport == "cpu":
        return
    for method, expected in trained.get("cpu", [{}])[0].items():
        others = [one.get(method) for one in trained[transport]]
        if isinstance(expected, str) or any(other is None or isinstance(other, str) for other in others):
            problem = next((text for text in (expected, *others) if isinstance(text, str)), "not run")
            notes.add("training", {"transport": transport, "method": method, "equals the CPU": problem})
            continue
        references = [one[method] for one in trained["cpu"]]
        errors = [float((ours - theirs).abs().max()) for ours, theirs in zip(others, references, strict=True)]
        apart = float((references[0] - references[1]).abs().max())
        equal = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(others, references, strict=True))
        if not equal:
            notes.add("failures", f"{transport}: {method}: parameters differ from the CPU's by up to {max(errors):.3g}")
        entry = {"transport": transport, "method": method, "equals the CPU": "yes" if equal else "NO"}
        notes.add("training", entry | {"largest difference": max(errors), "the two ranks differ by": apart})


def launch(transport: str, folder: Path, run: Run) -> str | None:
    """Run both ranks; what went wrong, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        "NCCL_MAX_CTAS": "4",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "OMP_NUM_THREADS": "1",
    }
    processes, logs = [], [folder / f"{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        command = [sys.executable, __file__, transport, str(folder), "cpu" if run.dry else "cuda"]
        with log.open("w") as out:
            environment["RANK"] = str(rank)
            processes.append(subprocess.Popen(command, env=dict(environment), stdout=out, stderr=out))
    limit = min(60.0, run.left() - 3)
    failure = None
    for process in processes:
        try:
            if process.wait(timeout=max(1.0, limit)) != 0:
                failure = failure or f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            failure, limit = failure or f"no end after {limit:.0f} s", 1.0
            process.kill()
            process.wait()
    if failure is None:
        return None
    said = "\n".join(f"rank {rank}: ...{log.read_text()[-1500:]}" for rank, log in enumerate(logs))
    return f"FAILED: {failure}\n{said}"


def worker(transport: str, folder: Path, kind: str) -> None:
    """One rank's process."""
    rank = int(os.environ["RANK"])
    device = torch.device("cpu" if transport == "cpu" else kind)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if transport == "nccl" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=40),
        device_id=torch.device("cuda:0") if transport == "nccl" else None,
    )
    if transport == "symmetric":
        read_in_place(Notes(folder / f"found-{rank}.json"), rank)
    else:
        if transport == "staged":
            stage_through_host(device)
        train_all(rank, device, folder / f"{rank}.pt", METHODS[::3] if kind == "cpu" else METHODS)
        if transport == "nccl":
            prove_overlap(Notes(folder / f"found-{rank}.json"))
    dist.barrier()
    dist.destroy_process_group()


def train_all(rank: int, device: torch.device, path: Path, methods: Sequence[tuple[str, str, dict]]) -> None:
    """Methods on a small model; saves each one's flat parameters, or its error."""
    results: dict[str, Any] = {}
    for kind, algorithm, options in methods:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 70), nn.Tanh(), nn.Linear(70, 3))
        random = torch.Generator().manual_seed(rank)
        x, y = torch.randn(64, 40, generator=random).to(device), torch.randn(64, 3, generator=random).to(device)
        model = model.to(device)
        own: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
        label = " ".join([kind, algorithm, *options])
        try:
            optimizer = getattr(fusedfog, kind)(
                model.parameters(), lr=0.01, algorithm=algorithm, bucket_mb=0.02, **own, **options
            )

            def train(model: nn.Module = model, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> None:
                (model(x) - y).square().mean().backward()
                optimizer.step()

            captured = "capturable" in options and device.type == "cuda"
            if captured:
                torch.cuda.synchronize(device)
            # torch wants the steps before a capture on a stream that is not the default one.
            with torch.cuda.stream(torch.cuda.Stream(device)) if captured else nullcontext():
                for _ in range(WARM if captured else STEPS):
                    optimizer.zero_grad()
                    train()
            if captured:
                torch.cuda.synchronize(device)
                optimizer.zero_grad()
                replay = record(device, train)
                for _ in range(WARM, STEPS):
                    with optimizer.replaying():
                        replay()
            optimizer.drain()
            results[label] = torch.cat([param.detach().flatten() for param in model.parameters()]).cpu()
        except (RuntimeError, ValueError) as error:
            results[label] = f"rank {rank}: {type(error).__name__}: {error}"[:400]
        torch.save(results, path)


class Staged:
    """A gloo work on host memory, whose result goes to the GPU when it is waited for."""

    def __init__(self, work: dist.Work, host: Tensor, target: Tensor | None) -> None:
        self._work, self._host, self._target, self._over = work, host, target, False

    def wait(self, timeout: timedelta | None = None) -> None:
        self._work.wait()
        if self._target is not None:
            self._target.copy_(self._host)
        self._over = True

    def is_completed(self) -> bool:
        return self._over


def stage_through_host(device: torch.device) -> None:
    """Let links send through host memory over gloo, which cannot send from a GPU."""
    sent: dict[int, int] = {}

    def start(
        self: Communicator, message: Transfer, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[Any], tag: int = 0
    ) -> None:
        # The engine starts the same messages in the same order on both ranks, so that a count can be the tag.
        tag = sent[id(self)] = sent.get(id(self), 0) + 1
        works = []
        for number, (peer, tensor) in enumerate(recvs):
            host = torch.empty_like(tensor, device="cpu")
            work = dist.irecv(host, group=self.group, group_src=peer, tag=8 * tag + number)
            works.append((Staged(work, host, tensor), f"receiving from rank {peer}"))
        for number, (peer, tensor) in enumerate(sends):
            host = tensor.cpu().clone()
            work = dist.isend(host, group=self.group, group_dst=peer, tag=8 * tag + number)
            works.append((Staged(work, host, None), f"sending to rank {peer}"))
        message.pending = works

    setattr(Communicator, "_start_grouped" if device.type == "cuda" else "_start_tagged", start)


def read_in_place(notes: Notes, rank: int) -> None:
    """A pass whose inbox is the other process' memory: exact averaging of small integers, then its speed."""
    from torch.distributed import _symmetric_memory as symmetric

    numel = 1 << 24
    mine = symmetric.empty(numel, dtype=torch.float32, device=torch.device("cuda:0"))
    handle = symmetric.rendezvous(mine, dist.group.WORLD)
    theirs = handle.get_buffer(1 - rank, (numel,), torch.float32)
    mine.copy_(torch.arange(numel, device="cuda") % 1000 * 2 + 2000 * rank)
    param = mine.clone()
    starts = torch.arange(0, numel, BLOCK)
    blocks = torch.stack([0 * starts, starts, torch.full_like(starts, BLOCK), starts], dim=1).cuda()
    region = Region(0, ((0, numel),), blocks)
    torch.cuda.synchronize()
    dist.barrier()
    run_pass(Pass("mix", param, (), (), region, mixing=Mixing((), ((theirs,),), (0.5,))))
    expected = torch.arange(numel, device="cuda") % 1000 * 2 + 1000
    notes["averages exactly"] = bool(torch.equal(param, expected.float()))
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        begin.record()
        run_pass(Pass("mix", param, (), (), region, mixing=Mixing((), ((theirs,),), (0.5,))))
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    notes["fastest pass, GB/s (both processes share the GPU)"] = 3 * mine.nbytes / min(times) / 1e9
    dist.barrier()


def prove_overlap(notes: Notes) -> None:
    """The share of NCCL's time under forward and backward."""
    from gpu_sections import overlapped

    for algorithm, fused in (("awc", False), ("atc", True), ("allreduce", True)):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4096, 4096, device="cuda") for _ in range(8)))
        optimizer = fusedfog.SGD(model.parameters(), lr=1e-4, momentum=0.9, algorithm=algorithm, fused_backward=fused)
        x = torch.randn(4096, 4096, device="cuda")

        def step(model: nn.Module = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        notes.add("overlap", {"algorithm": algorithm, "fused_backward": fused} | overlapped(step, "nccl"))
        optimizer.drain()


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
