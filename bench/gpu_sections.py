"""The sections of bench/gpu.py that need one process: what is right, how fast, how much memory.

Each is `section(notes, run)`, in a process of its own, and writes what it finds as it finds it.
"""

from __future__ import annotations

import cProfile
import csv
import gc
import io
import json
import os
import pstats
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import common  # noqa: F401 (makes fusedfog and the tests' files importable)
import torch
from gpu_notes import Notes, Run
from kernel_cases import TORCH, USES, Pass, rows
from support.gpu_cases import Case, all_cases, check_beyond_int32
from support.gpu_checks import CHECKS, among_echoes
from support.kernel_rules import ROWS
from support.recorded import record
from torch import nn

import fusedfog

SHARE_OF_COPY, OVER_DECENT_DP, HOST_US = 0.92, 1.6, 150.0
"""Targets: least share of copy bandwidth; Decent-DP's time over ours with one neighbour; the host's time in a step."""


def device(notes: Notes, run: Run) -> None:
    """The GPU, the versions and how fast it copies."""
    import triton

    notes["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}"

    properties = torch.cuda.get_device_properties(0)
    notes["gpu"] = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory >> 30} GiB"
    notes["triton"], notes["nccl"] = triton.__version__, ".".join(map(str, torch.cuda.nccl.version()))
    query = "driver_version,clocks.max.sm,clocks.max.mem,clocks_event_reasons.active,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    if shutil.which(command[0]):
        notes["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    for numel in (1 << 10,) if run.dry else (1 << 24, 1 << 26, 1 << 28, 1 << 30):
        source = torch.rand(numel, device=run.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(12):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        speeds = [2 * source.nbytes / seconds / 1e9 for seconds in times[2:]]
        entry = {"MB read and written": 2 * source.nbytes / 1e6, "copy GB/s": statistics.median(speeds)}
        notes.add("copy", entry | {"lowest": min(speeds), "highest": max(speeds)})


def passes(notes: Notes, run: Run) -> None:
    """Every rule, dtype, number of neighbours and option of a pass against the CPU reference; errors in tolerances."""
    groups: dict[Any, list[Case]] = {}
    for case in all_cases():
        row = ROWS[case.name]
        groups.setdefault((row.rule, row.states, case.dtype, case.neighbours), []).append(case)
    mine = [case for number, group in enumerate(groups.values()) if number % run.shards == run.shard for case in group]
    notes["cases"], notes["failed"], notes["not reached"], worst = 0, 0, len(mine), 0.0
    for case in mine[::8] if run.dry else mine:
        if run.left() < 5:
            return
        try:
            worst = max(worst, case.check(run.device))
        except Exception as error:
            notes["failed"] = notes.found["failed"] + 1
            if notes.found["failed"] <= 20:
                notes.add("failures", f"{case}: {type(error).__name__}: {error}"[:600])
            if "CUDA error" in str(error) or "AcceleratorError" in type(error).__name__:
                raise
        notes.found |= {"cases": notes.found["cases"] + 1, "not reached": notes.found["not reached"] - 1}
        notes["largest error"] = worst


def speed(notes: Notes, run: Run) -> None:
    """Every rule on 128M elements: share of copy bandwidth, against torch and Decent-DP, interleaved; registers."""
    numel, rounds = (4096, 2) if run.dry else (1 << 27, 15)
    counts, names = ((0, 1) if run.dry else (0, 1, 2, 4)), USES
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for line in rows(names, counts, (dtype,), numel, run.device, rounds):
            lines.append(line)
            notes.add("rows", line)
            notes["targets"] = _verdicts(lines)
            if run.left() < 10:
                notes["stopped early"] = f"after {len(lines)} rows"
                return


def _verdicts(lines: list[dict[str, Any]]) -> dict[str, str]:
    shares = {f"{line['rule']} K={line['K']} {line['dtype']}": line["of copy"][0] for line in lines}
    ours = {name: share for name, share in shares.items() if name.split()[0] in TORCH}
    verdicts = {}
    for what, found in (("all rules", shares), ("torch's own rules", ours)):
        reached, worst = sum(share >= SHARE_OF_COPY for share in found.values()), min(found, key=found.__getitem__)
        target = f"at least {SHARE_OF_COPY:.0%} of copy, {what}"
        verdicts[target] = f"{reached} of {len(found)} rows; worst {found[worst]:.1%}: {worst}"
    against = [line["decent-dp / fused"][0] for line in lines if line["decent-dp / fused"] is not None]
    if against:
        reached = sum(ratio >= OVER_DECENT_DP for ratio in against)
        verdicts[f"at least {OVER_DECENT_DP} times Decent-DP's sequence"] = (
            f"{reached} of {len(against)} rows; least {min(against):.2f}"
        )
    spilling = sum(bool(line.get("spills")) for line in lines)
    return verdicts | {"rows whose kernel spills registers": str(spilling)}


def optimizers(notes: Notes, run: Run) -> None:
    """Whole optimizers against torch.optim, GradScaler, clipping, half precision, checkpoints, streams, host syncs."""
    checks = CHECKS if run.dry else CHECKS | {"beyond_int32": check_beyond_int32}
    for name, check in checks.items():
        if run.left() < 10:
            notes.add("checks", {"check": name, "result": "not reached"})
            continue
        begin = time.perf_counter()
        try:
            check(run.device)
            result = "ok"
        except Exception as error:
            result = f"FAILED: {type(error).__name__}"
            notes.add("failures", f"{name}: {traceback.format_exc()[-1500:]}")
            if "CUDA error" in str(error):
                raise
        notes.add("checks", {"check": name, "result": result, "s": time.perf_counter() - begin})


def _optimizer(
    kind: str, algorithm: str, size: int, params: list[nn.Parameter], *, silent: bool = True, capturable: bool = False
) -> Any:
    """A fusedfog optimizer alone, among silent or echoing neighbours on a ring, or torch's fused one."""
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    if algorithm == "torch.optim fused":
        return getattr(torch.optim, kind)(params, lr=1e-3, fused=True, **options)
    optimizer = getattr(fusedfog, kind)(params, lr=1e-3, algorithm="local", capturable=capturable, **options)
    return optimizer if size == 1 else among_echoes(optimizer, algorithm, size, silent=silent)


SETTINGS = [("local", 1), ("awc", 2), ("awc", 4), ("atc", 2), ("torch.optim fused", 1)]
"""Algorithm and number of ranks on a ring: 2 have one neighbour each, 4 have two."""


def host(notes: Notes, run: Run) -> None:
    """The host's time in step() for 300 parameters with a link that sends nothing, and kernels launched per step."""
    count, numel, rounds = (300, 64, 5) if run.dry else (300, 40_000, 50)
    for kind in ("SGD", "AdamW"):
        for algorithm, size in SETTINGS:
            if run.left() < 5:
                return
            params = [nn.Parameter(torch.rand(numel, device=run.device)) for _ in range(count)]
            optimizer = _optimizer(kind, algorithm, size, params)
            for param in params:
                param.grad = torch.rand_like(param)
            steps, reads = [], []
            for turn in range(rounds + 5):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                optimizer.step()
                middle = time.perf_counter()
                for param in params:
                    param.grad.data_ptr()
                end = time.perf_counter()
                if turn >= 5:
                    steps.append(1e6 * (middle - begin))
                    reads.append(1e6 * (end - middle))
            entry = {"optimizer": kind, "algorithm": algorithm, "neighbours": min(size - 1, 2)}
            entry |= {"step us": statistics.median(steps), "least us": min(steps)}
            entry |= {"reading addresses us": statistics.median(reads)}
            entry["beyond that us"] = entry["step us"] - entry["reading addresses us"]
            entry[f"under {HOST_US:g}"] = "yes" if entry["beyond that us"] < HOST_US else "no"
            notes.add("host time", entry | {"launches": _launches(optimizer, run)})
            if kind == "AdamW" and algorithm == "awc" and size == 2:
                notes["where AdamW's time goes, one neighbour, 100 steps"] = _profile(optimizer, run)


def graphs(notes: Notes, run: Run) -> None:
    """Steps replayed from a CUDA graph against eager ones: the host's time and the time from step to step, in us."""
    count, numel, rounds = (300, 64, 5) if run.dry else (300, 40_000, 50)
    for kind in ("SGD", "AdamW"):
        for algorithm, size in (("local", 1), ("awc", 2), ("awc", 4)):
            entry: dict[str, Any] = {"optimizer": kind, "algorithm": algorithm, "neighbours": min(size - 1, 2)}
            for capturable in (False, True):
                if run.left() < 5:
                    return
                params = [nn.Parameter(torch.rand(numel, device=run.device)) for _ in range(count)]
                optimizer = _optimizer(kind, algorithm, size, params, capturable=capturable)
                for param in params:
                    param.grad = torch.rand_like(param)
                name = "capturable" if capturable else "eager"
                entry[f"{name}: host"], entry[f"{name}: step to step"] = _paces(optimizer.step, run, rounds)
            step = _replayed(optimizer, optimizer.step, run)
            entry["replayed: host"], entry["replayed: step to step"] = _paces(step, run, rounds)
            notes.add("step alone", entry)
    for width in (8,) if run.dry else (64, 1024):
        entry = {"layers": 24, "width": width}
        for captured in (False, True):
            model = nn.Sequential(*(nn.Linear(width, width, device=run.device) for _ in range(24)))
            optimizer = _optimizer("AdamW", "awc", 2, list(model.parameters()), silent=False, capturable=captured)
            x = torch.randn(256, width, device=run.device)

            def train(model: nn.Module = model, optimizer: Any = optimizer, x: torch.Tensor = x) -> None:
                model(x).square().mean().backward()
                optimizer.step()

            def eager(optimizer: Any = optimizer, train: Any = train) -> None:
                optimizer.zero_grad()
                train()

            step = eager
            if captured:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        eager()
                torch.cuda.current_stream().wait_stream(side)
                optimizer.zero_grad()
                step = _replayed(optimizer, train, run)
            name = "graph" if captured else "eager"
            entry[f"{name}: host"], entry[f"{name}: step to step"] = _paces(step, run, rounds)
        notes.add("forward, backward and step", entry)


def _replayed(optimizer: Any, step: Any, run: Run) -> Any:
    replay = record(run.device, step)

    def again() -> None:
        with optimizer.replaying():
            replay()

    return again


def _paces(step: Any, run: Run, rounds: int) -> tuple[float, float]:
    """The host's time in a step that finds the device idle (median), and the time a step takes in a row of them, in us."""
    hosts = []
    for turn in range(rounds + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        hosts += [1e6 * (time.perf_counter() - begin)] * (turn >= 5)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        step()
    torch.cuda.synchronize()
    return statistics.median(hosts), 1e6 * (time.perf_counter() - begin) / rounds


def _launches(optimizer: Any, run: Run) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    counts = Counter(event.name[:40] for event in _on_gpu(profiler))
    return ", ".join(f"{number} {name}" for name, number in counts.most_common(5))


def _on_gpu(profiler: torch.profiler.profile) -> list[Any]:
    """What ran on the GPU; the host's ranges are shown on its timeline too, and left out."""
    return [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("fusedfog::", "Optimizer."))
    ]


def _profile(optimizer: Any, run: Run) -> str:
    profiler = cProfile.Profile()
    for _ in range(100):
        torch.cuda.synchronize()
        profiler.enable()
        optimizer.step()
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(14)
    return "\n".join(text.getvalue().splitlines()[2:])


def memory(notes: Notes, run: Run) -> None:
    """Peak memory of a step: parameters, gradients, states and inbox, and nothing else."""
    numel, count = (64, 4) if run.dry else (1 << 20, 256)
    for kind, states in (("SGD", 1), ("AdamW", 2)):
        for algorithm, size in SETTINGS:
            gc.collect()  # an optimizer of the round before may still hold its parameters, in a cycle
            torch.cuda.empty_cache()
            empty = torch.cuda.memory_allocated()
            params = [nn.Parameter(torch.rand(numel, device=run.device)) for _ in range(count)]
            whole = sum(param.nbytes for param in params)
            optimizer = _optimizer(kind, algorithm, size, params, silent=False)
            for param in params:
                param.grad = torch.rand_like(param)
            for _ in range(2):
                optimizer.step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            inbox = min(size - 1, 2)
            entry: dict[str, Any] = {"optimizer": kind, "algorithm": algorithm, "neighbours": inbox}
            entry["resident / parameters"] = (before - empty) / whole
            entry["parameters, gradients, states, inbox"] = 2 + states + inbox
            entry["more during a step, MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            notes.add("memory", entry)
            del optimizer, params


def overlapped(step: Any, exchange: str, steps: int = 5) -> dict[str, float]:
    """Profile `steps` calls; how much of the time of the GPU events that match `exchange` the others cover."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    sent, computed = [], []
    for event in _on_gpu(profiler):
        span = (event.time_range.start, event.time_range.end)
        (sent if re.search(exchange, event.name) else computed).append(span)
    total = sum(end - begin for begin, end in sent)
    under = covered(sent, computed)
    return {
        "exchanges": float(len(sent)),
        "exchange us per step": total / steps,
        "under compute": under / total if total else 0.0,
        "exposed us per step": (total - under) / steps,
    }


def covered(spans: list[tuple[float, float]], by: list[tuple[float, float]]) -> float:
    """How much of the length of `spans` lies inside the union of `by`."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(by):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return sum(max(0.0, min(end, high) - max(begin, low)) for begin, end in spans for low, high in merged)


COUNTED = [("mix", 1), ("sgd", 0), ("sgd-momentum", 1), ("adamw", 0), ("adamw", 1), ("adamw", 2), ("tracking", 1)]
"""The passes whose DRAM traffic is counted, with their numbers of neighbours."""


def counter_target(notes: Notes, run: Run) -> None:
    """The program that ncu looks at: each pass once."""
    numel = 4096 if run.dry else 1 << 25
    for dtype in (torch.float32, torch.bfloat16):
        for name, neighbours in COUNTED:
            one = Pass(name, neighbours, dtype, numel, run.device)
            one()
            torch.cuda.synchronize()
            notes.add("passes", {"rule": name, "K": neighbours, "dtype": str(dtype)[6:], "due": one.traffic() / numel})


def counters(notes: Notes, run: Run) -> None:
    """DRAM bytes per element by the hardware's counters, where ncu is there and permitted."""
    ncu = _tool("ncu", run, NCU_SAYS)
    if ncu is None:
        notes["skipped"] = "no ncu here"
        return
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    target = run.work / "counter_target.json"
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--metrics", metrics, "--clock-control", "none"]
    command += ["--kernel-name", "regex:fused_pass", sys.executable, str(Path(__file__).parent / "gpu.py")]
    command += ["--child", "counter_target", "--notes", str(target), *(["--dry-run"] if run.dry else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, run.left() - 5))
    found = counted(done.stdout)
    if not found:
        notes["ncu said"] = (done.stdout + done.stderr)[-2000:]
        return
    for line, counts in zip(json.loads(target.read_text())["passes"], found, strict=False):
        read, written, nanoseconds = counts
        entry = line | {"read": read / (1 << 25), "written": written / (1 << 25)}
        entry["moved / due"] = (read + written) / (1 << 25) / line["due"]
        notes.add("DRAM bytes per element", entry | {"GB/s": (read + written) / nanoseconds})


NCU_SAYS = """"ID","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","byte","byte","ns"
"0","1,000","2,000","3,000\""""
"""What the stand-in for ncu prints."""


def _tool(name: str, run: Run, says: str) -> str | None:
    """A tool's path; in a dry run that of a script which runs the program that it is given, and then says `says`."""
    if not run.dry:
        places = (str(path) for path in Path("/usr/local").glob(f"cuda*/bin/{name}"))
        return shutil.which(name) or next(places, None)
    path = run.work / name
    path.with_suffix(".txt").write_text(says + "\n")
    path.write_text(
        f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@" && cat "{path.with_suffix(".txt")}"\n'
    )
    path.chmod(0o755)
    return str(path)


def counted(text: str) -> list[tuple[float, float, float]]:
    """DRAM bytes read and written, and nanoseconds, of every kernel in ncu's CSV."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
    found = []
    for line in csv.DictReader(lines[start:]):
        if line["ID"].strip():  # the line below the header holds units
            found.append(tuple(float(line[name].replace(",", "")) for name in names))
    return found


def memcheck(notes: Notes, run: Run) -> None:
    """A share of the passes under compute-sanitizer: reads and writes outside tensors."""
    tool = _tool("compute-sanitizer", run, "========= ERROR SUMMARY: 0 errors")
    if tool is None:
        notes["skipped"] = "no compute-sanitizer here"
        return
    target = run.work / "memcheck_target.json"
    command = [tool, "--tool", "memcheck", sys.executable, str(Path(__file__).parent / "gpu.py"), "--child", "passes"]
    command += ["--notes", str(target), "--shard", "3/24", "--deadline", str(run.deadline - 8)]
    command += ["--dry-run"] if run.dry else []
    # Without it the allocator hides small overruns inside its own large blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(20.0, run.left() - 2))
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    notes["compute-sanitizer said"] = "\n".join(said[-12:])
    if target.exists():
        notes["passes"] = target.read_text()[:600]
