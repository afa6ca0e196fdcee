"""Ranges for `torch.profiler` that show where a step's communication went, and a report of what it cost.

    fusedfog::exchange bucket 3 to 1,2 from 5     sends and receives are posted; the messages travel on behind it
    fusedfog::wait bucket 3 from 5                the host (gloo) or the stream (NCCL) waits for them
    fusedfog::pass buckets 0,1,2,3 adam           the pass that mixes and updates

Any profiler shows them. `fusedfog trace RUN.json ...` reads the Chrome traces that `export_chrome_trace` writes, one per
rank. Communication is *exposed* while nothing else goes on: on the GPU while NCCL kernels run and no others, on the CPU
while the host is inside a wait. The rest of it is overlapped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Interval: TypeAlias = tuple[float, float]


# -- the report ----------------------------------------------------------------------------------------------------------

_RANGE = re.compile(r"fusedfog::(?P<what>\w+) buckets? (?P<buckets>[\d,]+).*?(?: from (?P<sources>.+))?$")
_STEP = "Optimizer.step#"


@dataclass
class BucketFigures:
    """One bucket's messages, times in milliseconds: `in_flight` from posting to the end of the wait, `waited` in the wait."""

    exchanges: int = 0
    in_flight: float = 0.0
    waited: float = 0.0
    sources: set[str] = field(default_factory=set)


@dataclass
class Report:
    """What one rank's trace says; times in milliseconds over the whole record.

    Attributes:
        measured_by: "NCCL kernels" or "host waits": what communication was seen by.
        steps: optimizer steps in the record.
        total: from the first event to the end of the last.
        communication: during which messages were in flight (CPU) or NCCL kernels ran (GPU).
        exposed: the part of it under which nothing else went on.
        passes: during which the host was launching (GPU) or making (CPU) passes.
        buckets: by bucket number.
    """

    rank: str
    measured_by: str
    steps: int
    total: float
    communication: float
    exposed: float
    passes: float
    buckets: dict[int, BucketFigures]

    @property
    def overlap(self) -> float:
        """The fraction of communication that was hidden."""
        return 1.0 - self.exposed / self.communication if self.communication else 1.0

    def __str__(self) -> str:
        each = max(self.steps, 1)
        lines = [
            f"rank {self.rank}: {self.steps} steps of {self.total / each:.3f} ms, communication by {self.measured_by}",
            f"  exposed communication  {self.exposed / each:10.3f} ms a step, {self.exposed / self.total:.1%} of the time",
            f"  all communication      {self.communication / each:10.3f} ms a step, {self.overlap:.1%} of it overlapped",
            f"  passes                 {self.passes / each:10.3f} ms a step",
            f"  {'bucket':>6} {'exchanges':>10} {'in flight ms':>13} {'waited ms':>10} {'hidden':>7}  from",
        ]
        for number, bucket in sorted(self.buckets.items()):
            count = max(bucket.exchanges, 1)
            hidden = 1.0 - bucket.waited / bucket.in_flight if bucket.in_flight else 1.0
            lines.append(
                f"  {number:6d} {bucket.exchanges:10d} {bucket.in_flight / count:13.3f} {bucket.waited / count:10.3f} "
                f"{hidden:7.1%}  {','.join(sorted(bucket.sources))}"
            )
        return "\n".join(lines)


def report(trace: dict[str, Any], rank: str) -> Report:
    """Work out where the communication of one rank's Chrome trace went.

    Args:
        trace: what `torch.profiler.profile.export_chrome_trace` wrote, parsed.
        rank: what to call this rank if the trace does not say.

    Raises:
        ValueError: the trace holds no fusedfog ranges.
    """
    events = [event for event in trace.get("traceEvents", ()) if event.get("ph") == "X"]
    # torch repeats ranges on the GPU's timeline as "gpu_user_annotation".
    ranges = [
        (match, _interval(event))
        for event in events
        if event.get("cat") == "user_annotation" and (match := _RANGE.match(event["name"]))
    ]
    if not ranges:
        raise ValueError("no fusedfog:: ranges in this trace; record optimizer steps inside torch.profiler.profile()")
    waits, passes = (_union(at for match, at in ranges if match["what"] == what) for what in ("wait", "pass"))
    # A wrapper's step holds its inner optimizer's: together they are one.
    steps = [
        _interval(event)
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_STEP)
    ]
    kernels = [(event["name"], _interval(event)) for event in events if event.get("cat") == "kernel"]
    nccl = _union(at for name, at in kernels if "nccl" in name.lower())
    whole = _union([(min(map(_start, events)), max(_interval(event)[1] for event in events))])
    flights, buckets = _follow_buckets(ranges, whole[0][0])
    if nccl:
        communication, exposed = nccl, _without(nccl, _union(at for name, at in kernels if "nccl" not in name.lower()))
    else:
        communication, exposed = _union(flights), waits
    return Report(
        rank=str(trace.get("distributedInfo", {}).get("rank", rank)),
        measured_by="NCCL kernels" if nccl else "host waits",
        steps=len(_union(steps)),
        total=_length(whole),
        communication=_length(communication),
        exposed=_length(exposed),
        passes=_length(passes),
        buckets=buckets,
    )


def _follow_buckets(
    ranges: Iterable[tuple[re.Match[str], Interval]], begin: float
) -> tuple[list[Interval], dict[int, BucketFigures]]:
    """When each bucket was in flight: from the start of an exchange to the end of the wait for it."""
    posted: dict[int, float] = {}
    flights: list[Interval] = []
    buckets: dict[int, BucketFigures] = {}
    for match, (start, stop) in sorted(ranges, key=lambda entry: entry[1]):
        for number in map(int, match["buckets"].split(",") if match["what"] != "pass" else ()):
            if match["what"] == "exchange":
                posted[number] = start
                continue
            # What is waited for first may have been posted before the record began; later, drain() has been here before.
            since = posted.pop(number, start if number in buckets else begin)
            figures = buckets.setdefault(number, BucketFigures())
            flights.append((since, stop))
            figures.exchanges += 1
            figures.in_flight += (stop - since) / 1e3
            figures.waited += (stop - start) / 1e3
            figures.sources |= set((match["sources"] or "").split(","))
    return flights, buckets


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _interval(event: dict[str, Any]) -> Interval:
    return _start(event), _start(event) + float(event.get("dur", 0.0))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The parts of `intervals` outside `others`; both disjoint and in order."""
    left: list[Interval] = []
    ends = [high for _, high in others]
    for start, stop in intervals:
        for low, high in others[bisect_right(ends, start) :]:
            if low >= stop:
                break
            if low > start:
                left.append((start, low))
            start = high
        if start < stop:
            left.append((start, stop))
    return left


def _length(intervals: Iterable[Interval]) -> float:
    """Milliseconds; traces count in microseconds."""
    return sum(stop - start for start, stop in intervals) / 1e3


def read(path: Path) -> dict[str, Any]:
    """Parse a Chrome trace, gzipped or not.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    data = path.read_bytes()
    trace: dict[str, Any] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return trace


def add_trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `fusedfog trace` to the command line."""
    parser = commands.add_parser("trace", help="exposed and overlapped communication of a torch.profiler trace")
    parser.add_argument(
        "files", metavar="RUN.json", nargs="+", type=Path, help="Chrome traces, one per rank; or .json.gz"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    reports = []
    for number, path in enumerate(options.files):
        try:
            reports.append(report(read(path), str(number)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(reports[-1])
    if len(reports) > 1:
        exposed = sorted(one.exposed / max(one.steps, 1) for one in reports)
        print(f"{len(reports)} ranks: exposed communication {exposed[0]:.3f} to {exposed[-1]:.3f} ms a step")
    return 0
