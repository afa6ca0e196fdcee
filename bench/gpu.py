"""Everything that only a GPU can tell, in one call of at most eight and a half minutes: python bench/gpu.py

    pip install --no-deps --no-build-isolation -e .     # optional: without it, the source tree is imported as it lies
    python bench/gpu.py [--out FOLDER] [--only NAME ...] [--minutes M]
    python bench/gpu.py --dry-run                       # tiny sizes without a GPU: do the sections themselves work?

Sections run one after the other, the most important first, each in a process of its own: a crash, a hang or a poisoned
CUDA context costs one section and no more. What a section found before it failed is kept, with the end of its log. After
every section gpu.json and gpu.md are written to FOLDER (bench/results, or a temporary folder with --dry-run). The last
line says what passed.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Section:
    """One section: a function of the same name.

    Attributes:
        most: seconds it may take.
        shards: processes that share its work.
        dry: how much of a GPU a dry run has to stand in for; see `gpu_dry`.
    """

    name: str
    module: str
    most: float
    shards: int = 1
    dry: Literal["stub", "passes", "cpu"] = "stub"


SECTIONS = [
    # Compiles what others need: in parallel, since a kernel takes a core about a second.
    Section("passes", "gpu_sections", 100, shards=14, dry="cpu"),
    Section("device", "gpu_sections", 20),
    Section("optimizers", "gpu_sections", 45, dry="cpu"),
    Section("loopback", "gpu_loopback", 60, dry="passes"),
    Section("speed", "gpu_sections", 110),
    Section("graphs", "gpu_sections", 35, dry="cpu"),
    Section("memory", "gpu_sections", 20),
    Section("host", "gpu_sections", 25),
    Section("ranks", "gpu_ranks", 45, dry="cpu"),
    Section("counters", "gpu_sections", 25),
    Section("memcheck", "gpu_sections", 25, dry="cpu"),
]
CHILDREN = {section.name: section for section in SECTIONS} | {
    "counter_target": Section("counter_target", "gpu_sections", 25)
}
WORKERS = 3
"""Sections of a dry run at a time."""


def child(args: argparse.Namespace) -> None:
    """Run one section in this process; an error goes into its notes and to standard error."""
    from gpu_notes import Notes, Run

    shard, shards = map(int, args.shard.split("/"))
    notes = Notes(args.notes)
    deadline = args.deadline or time.time() + 600
    run = Run(args.dry_run, deadline, shard, shards, args.notes.parent)
    section = CHILDREN[args.child]
    try:
        with ExitStack() as stack:
            if args.dry_run:
                from gpu_dry import dry_run

                stack.enter_context(dry_run(section.dry))
            getattr(importlib.import_module(section.module), section.name)(notes, run)
    except Exception as error:
        notes["error"] = f"{type(error).__name__}: {error}"[:1000]
        traceback.print_exc()
        raise SystemExit(1) from error


def perform(section: Section, work: Path, deadline: float, dry: bool) -> dict[str, Any]:
    """Run a section's processes to their end or to its limit; its entry in the report."""
    begin, shards = time.time(), 2 if dry and section.shards > 1 else section.shards
    # Sections of a dry run share the cores, and nothing is paid by the minute.
    limit = min(begin + section.most * (WORKERS if dry else 1), deadline)
    notes = [work / f"{section.name}-{shard}.json" for shard in range(shards)]
    logs = [path.with_suffix(".log") for path in notes]
    processes: list[subprocess.Popen | Forked] = []
    for shard, (path, log) in enumerate(zip(notes, logs, strict=True)):
        # A section that watches the time ends by itself, before it is killed.
        arguments = ["--child", section.name, "--notes", str(path), "--shard", f"{shard}/{shards}"]
        arguments += ["--deadline", str(limit - 5)]
        if dry:
            processes.append(Forked([*arguments, "--dry-run"], log))
            continue
        with log.open("w") as out:
            command = [sys.executable, __file__, *arguments]
            processes.append(
                subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment(dry))
            )
    outcomes = []
    for process in processes:
        try:
            code = process.wait(timeout=max(0.1, limit - time.time()))
            outcomes.append("ok" if code == 0 else f"failed with exit status {code}")
        except subprocess.TimeoutExpired:
            outcomes.append(f"killed after {time.time() - begin:.0f} s")
        end_group(process)
    bad = [number for number, outcome in enumerate(outcomes) if outcome != "ok"]
    status = ["ok"] if not bad else [f"process {number} {outcomes[number]}" for number in bad]
    found = merged(notes)
    if found.get("failures"):
        status = ["FAILURES", *(status if bad else [])]
    return {
        "status": ", ".join(status),
        "seconds": time.time() - begin,
        "found": found,
        "log": "\n".join(logs[number].read_text(errors="replace")[-1500:] for number in bad[:3]),
    }


def environment(dry: bool) -> dict[str, str]:
    """The processes' environment; the CPU's threads are shared out among those that run together."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if dry else {}
    return {**os.environ, **hidden, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


PRELOADED = ["torch._dynamo", "gpu_dry", "gpu_sections", "gpu_loopback", "gpu_ranks"]


class Forked:
    """A dry run's process, which finds its imports made: they are most of what so small a section costs."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=_forked, args=(arguments, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen.wait`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a section", timeout or 0.0)
        return self._process.exitcode


def _forked(arguments: list[str], log: str) -> None:
    os.setsid()
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = [__file__, *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not


def end_group(process: subprocess.Popen | Forked) -> None:
    """Kill what a section's process left running, and itself if it still does."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def merged(notes: list[Path]) -> dict[str, Any]:
    """What all shards found so far."""
    from gpu_notes import merge

    return merge([json.loads(path.read_text()) for path in notes if path.exists()])


def about(section: Section) -> str:
    """The section's own words on what it finds out."""
    return str(getattr(importlib.import_module(section.module), section.name).__doc__).strip()


def write(report: dict[str, Any], folder: Path) -> None:
    """gpu.json and gpu.md."""
    from gpu_notes import markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(report))


def entries(
    sections: list[Section], work: Path, deadline: float, dry: bool
) -> Iterator[tuple[Section, dict[str, Any]]]:
    """Every section with its entry in the report: one after the other, but in a dry run a few at a time."""

    def entry(section: Section) -> dict[str, Any]:
        if deadline - time.time() < 15:
            return {"status": "no time left", "seconds": 0.0, "found": {}, "log": ""}
        return perform(section, work, deadline, dry)

    if not dry:
        yield from ((section, entry(section)) for section in sections)
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        # The last ones first: they start most processes.
        futures = {section.name: pool.submit(entry, section) for section in reversed(sections)}
        yield from ((section, futures[section.name].result()) for section in sections)


def everything(sections: list[Section], minutes: float, out: Path, dry: bool) -> dict[str, Any]:
    """Run the sections, write the report after every one of them, and return it."""
    from gpu_notes import verdict

    begin = time.time()
    report: dict[str, Any] = {"machine": {"day": date.today().isoformat()}, "sections": {}}
    if dry:
        report["machine"]["dry run"] = "no GPU: no number here means anything"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for section, entry in entries(sections, Path(folder), begin + 60 * minutes, dry):
            report["sections"][section.name] = {"about": about(section)} | entry
            if section.name == "device":
                report["machine"] |= {key: value for key, value in entry["found"].items() if key != "copy"}
            report["seconds"] = time.time() - begin
            report["verdict"] = verdict(report["sections"])
            write(report, out)
            print(f"{section.name}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)
    return report


def main() -> None:
    """Run the sections, or one of them as a child of such a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, help="these sections alone")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes without a GPU")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.dry_run:
        os.environ.update(environment(dry=True), PYTHONPATH=os.pathsep.join(sys.path))
    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if args.dry_run else RESULTS)
    wanted = [section for section in SECTIONS if not args.only or section.name in args.only]
    report = everything(wanted, args.minutes, out, args.dry_run)
    print((out / "gpu.md").read_text(), flush=True)
    print(f"written to {out}/gpu.json and {out}/gpu.md")
    print(report["verdict"], flush=True)
    sys.exit(any(section["status"] != "ok" for section in report["sections"].values()))


if __name__ == "__main__":
    main()
