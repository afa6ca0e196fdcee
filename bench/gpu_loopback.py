"""The section of bench/gpu.py on NCCL with one GPU: a group of one rank whose neighbours are all itself.

NCCL allows a rank to send to itself, if send and receive are in one batch. So torch's coalescing, waits on streams, the
watchdog and the overlap with computation are NCCL's own; what is received is what was sent, and equal values are averaged
to themselves exactly: training among such neighbours must equal training alone.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import common  # noqa: F401 (makes fusedfog and the tests' files importable)
import torch
import torch.distributed as dist
from gpu_notes import Notes, Run
from gpu_sections import overlapped
from support.gpu_checks import among, assert_same, convnet, give_gradients
from support.recorded import record
from torch import Tensor, nn

import fusedfog
from fusedfog import topology
from fusedfog.algorithms import algorithm_for
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import GroupView, find_group
from fusedfog.comm.transfer import Transfer
from fusedfog.engine.clock import StepSchedule
from fusedfog.engine.phases import Phase

TRANSFERS = r"nccl|Memcpy DtoD"
"""What a message to oneself is on the GPU's timeline."""


class LoopLink(Communicator):
    """The link of one rank that stands for `size`: what goes to a neighbour goes to itself."""

    def __init__(self, place: torch.device, size: int) -> None:
        super().__init__(find_group(), place)
        self.view = GroupView(0, size, self.view.group)

    def start(self, sends: Sequence[Any], recvs: Sequence[Any], *, tag: int, label: str) -> Transfer:
        ours = [[(0, tensor) for _, tensor in parcels] for parcels in (sends, recvs)]
        return super().start(*ours, tag=tag, label=label)


def among_loops(optimizer: Any, algorithm: str, communicator: LoopLink, *, fused_backward: bool = False) -> Any:
    """`optimizer`, built with algorithm="local", as one of the link's ranks on a ring."""
    phase = Phase(
        algorithm_for(algorithm, optimizer._family),
        topology.ring(communicator.view.size),
        StepSchedule(fused_backward=fused_backward),
    )
    return among(optimizer, communicator, phase, communicator.open_channel())


def open_group(run: Run) -> None:
    """A world of one rank on NCCL, or on its stand-in."""
    if run.dry:
        from support import ordered_backend

        ordered_backend.load()
        dist.init_process_group("ordered", rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=20))
        return
    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        rank=0,
        world_size=1,
        store=dist.HashStore(),
        timeout=timedelta(seconds=40),
        device_id=torch.device("cuda:0"),
    )


def slow_down(run: Run, seconds: float) -> None:
    """In a dry run, let messages take so long."""
    if run.dry:
        from support import ordered_backend

        ordered_backend.delay(seconds)


def loopback(notes: Notes, run: Run) -> None:
    """NCCL to oneself: coalescing, waits, training, graph capture, the watchdog, overlap, the host's time in a step."""
    open_group(run)
    place = torch.device("cpu") if run.dry else torch.device("cuda:0")
    links = {size: LoopLink(place, size) for size in (2, 4)}
    for part in (coalescing, waits, training, captured, watched, covered_transfers, host_time):
        if run.left() < 5:
            notes.add("parts", {"part": part.__name__, "result": "not reached"})
            continue
        begin, result = time.perf_counter(), "ok"
        try:
            part(notes, run, links)
        except Exception as error:
            result = f"FAILED: {type(error).__name__}"
            notes.add("failures", f"{part.__name__}: {type(error).__name__}: {error}"[:1500])
            if "CUDA error" in str(error) or "NCCL error" in str(error):
                raise
        notes.add("parts", {"part": part.__name__, "result": result, "s": time.perf_counter() - begin})
    dist.destroy_process_group()


Links = dict[int, LoopLink]


def coalescing(notes: Notes, run: Run, links: Links) -> None:
    """Many tensors of many types and odd sizes are one work, and arrive."""
    sizes, dtypes = (1, 63, 1000, 100_003), (torch.float32, torch.bfloat16, torch.uint8, torch.int8)
    sent = [torch.randint(0, 100, (size,), device=run.device).to(dtype) for size in sizes for dtype in dtypes]
    got = [torch.zeros_like(tensor) for tensor in sent]
    message = links[4].start([(1, one) for one in sent], [(3, one) for one in got], tag=0, label="coalescing")
    notes["works of a batch of 32"] = len(message.pending)
    message.wait()
    for ours, theirs in zip(sent, got, strict=True):
        assert torch.equal(ours, theirs), f"{theirs.dtype} of {len(theirs)} did not arrive"
    assert len(message.pending) == 1, f"a batch is {len(message.pending)} works"


def waits(notes: Notes, run: Run, links: Links) -> None:
    """A wait does not hold the host, orders every stream that asks for it, and may be asked for again."""
    size = 1000 if run.dry else 1 << 24
    source, target = torch.zeros(size, device=run.device), torch.zeros(size, device=run.device)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.cuda._sleep(200_000_000)
    source.fill_(7.0)
    message = links[2].start([(1, source)], [(1, target)], tag=0, label="waits")
    seen = []
    for stream in (side, torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            message.wait()
            seen.append(target.clone())
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    notes["waits: host s, until over s"] = f"{host:.4f}, {whole:.4f}"
    for values in seen:
        assert (values == 7.0).all(), "a stream read before the message had come"
    assert run.dry or host < 0.5 * whole, "wait held the host"


def training(notes: Notes, run: Run, links: Links) -> None:
    """Training among loops equals training alone, to the last bit."""
    for kind, algorithm, options in (
        ("SGD", "awc", {"momentum": 0.9}),
        ("AdamW", "awc", {}),
        ("SGD", "atc", {"momentum": 0.9}),
    ):
        for size, fused in ((2, False), (4, False), (4, True)):
            alone, among = convnet(run.device), convnet(run.device)
            make = getattr(fusedfog, kind)
            a = make(alone.parameters(), lr=1e-2, algorithm="local", **options)
            b = make(among.parameters(), lr=1e-2, algorithm="local", bucket_mb=1e-3, **options)
            among_loops(b, algorithm, links[size], fused_backward=fused)
            x = torch.randn(8, 3, 12, 12, device=run.device)
            for step in range(6):
                for model, optimizer in ((alone, a), (among, b)):
                    if fused:
                        model.eval()(x).square().sum().backward()
                    else:
                        give_gradients(model, step)
                    optimizer.step()
                    optimizer.zero_grad()
            b.drain()
            moved = float((next(among.parameters()) - next(convnet(run.device).parameters())).abs().max())
            assert moved > 0, f"{kind} {algorithm}: nothing was trained"
            # Convolutions' own backward is not deterministic on a GPU.
            assert_same(among, alone, **({"rtol": 1e-3, "atol": 1e-4} if fused else {"rtol": 0.0, "atol": 0.0}))
            entry = {"optimizer": kind, "algorithm": algorithm, "neighbours": size // 2, "fused_backward": fused}
            notes.add("training equals training alone", entry)


def captured(notes: Notes, run: Run, links: Links) -> None:
    """Steps with NCCL's messages, recorded in a CUDA graph and replayed, equal eager ones."""
    models = [convnet(run.device), convnet(run.device)]
    for model, capturable in zip(models, (False, True), strict=True):
        optimizer = fusedfog.AdamW(model.parameters(), lr=1e-2, algorithm="local", capturable=capturable)
        among_loops(optimizer, "awc", links[2])
        give_gradients(model, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        replay = record(run.device, optimizer.step) if capturable else None
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            if replay is None:
                optimizer.step()
                continue
            with optimizer.replaying():
                replay()
        optimizer.drain()
    assert_same(models[1], models[0])
    notes["recorded steps equal eager ones"] = True


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def watched(notes: Notes, run: Run, links: Links) -> None:
    """The watchdog names a message that is late, and does not end a capture that is going on beside it."""
    communicator = LoopLink(run.device if run.dry else torch.device("cuda:0"), 2)
    assert communicator._watchdog is not None
    communicator._watchdog._patience = 0.2
    said = _Said()
    logging.getLogger("fusedfog").addHandler(said)
    source, target = torch.ones(1000, device=run.device), torch.zeros(1000, device=run.device)
    static = torch.zeros(100, device=run.device)
    time.sleep(1.1)  # its thread may still be in the pause that was as long as its old patience allowed
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)
    slow_down(run, 0.7)
    message = communicator.start([(1, source)], [(1, target)], tag=0, label="step 12, bucket 3")
    if run.dry:
        time.sleep(0.6)
    else:
        # By hand: torch.cuda.graph waits for the GPU first. In "global" mode, which queries of other threads may break.
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(side):
            graph.capture_begin()
            for _ in range(20):
                static += 1.0
                time.sleep(0.03)
            graph.capture_end()
        graph.replay()
    message.wait()
    torch.cuda.synchronize()
    slow_down(run, 0.0)
    logging.getLogger("fusedfog").removeHandler(said)
    notes["the watchdog said"] = said.lines[:3]
    assert torch.equal(source, target)
    late = [line for line in said.lines if "step 12, bucket 3" in line and "still waiting" in line]
    assert late, "the watchdog said nothing of a message that was late"
    assert run.dry or float(static[0]) == 20.0, "the capture beside the watchdog was broken"


def covered_transfers(notes: Notes, run: Run, links: Links) -> None:
    """What share of the messages' time runs under forward and backward."""
    width, rows = (32, 8) if run.dry else (4096, 8192)
    for algorithm, fused in (("awc", False), ("awc", True), ("atc", False), ("atc", True)):
        if run.left() < 8:
            return
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, device=run.device) for _ in range(8)))
        optimizer = fusedfog.SGD(model.parameters(), lr=1e-4, momentum=0.9, algorithm="local")
        among_loops(optimizer, algorithm, links[2], fused_backward=fused)
        x = torch.randn(rows, width, device=run.device)

        def step(model: nn.Module = model, optimizer: Any = optimizer, x: Tensor = x) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        entry = {"algorithm": algorithm, "fused_backward": fused}
        notes.add("overlap", entry | overlapped(step, TRANSFERS))
        optimizer.drain()


def host_time(notes: Notes, run: Run, links: Links) -> None:
    """The host's least and median us in step() with NCCL's messages, 300 parameters, beside torch's fused AdamW, in turns."""
    count, numel, rounds = (20, 64, 4) if run.dry else (300, 1000, 100)
    runs = {}
    for name, algorithm, size in (
        ("alone", None, 1),
        ("awc, K=1", "awc", 2),
        ("awc, K=2", "awc", 4),
        ("torch", None, 0),
    ):
        params = [nn.Parameter(torch.rand(numel, device=run.device)) for _ in range(count)]
        for param in params:
            param.grad = torch.rand_like(param)
        if name == "torch":
            runs[name] = torch.optim.AdamW(params, lr=1e-3, fused=True)
            continue
        runs[name] = fusedfog.AdamW(params, lr=1e-3, algorithm="local")
        if algorithm is not None:
            among_loops(runs[name], algorithm, links[size])
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    with ExitStack() as stack:
        gc.disable()
        stack.callback(gc.enable)
        for turn in range(rounds + 5):
            for name, optimizer in runs.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                optimizer.step()
                if turn >= 5 or run.dry:
                    times[name].append(1e6 * (time.perf_counter() - begin))
    for name, found in times.items():
        entry = {"step": name, "least us": min(found), "median us": statistics.median(found)}
        notes.add("host time", entry | {"least / torch's": min(found) / min(times["torch"])})
    for name in ("awc, K=1", "awc, K=2"):
        runs[name].drain()
