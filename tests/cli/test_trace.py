"""Profiler ranges name bucket and peers, and the report of a trace adds up."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.cli.main import main
from fusedfog.cli.trace import report
from fusedfog.comm.profiling import span

STEPS = 3


def record(path: str | None, keywords: dict[str, Any]) -> list[str]:
    """The fusedfog ranges of three steps, in order; with `path`, their Chrome trace is written too."""
    if "mesh" in keywords:
        keywords = keywords | {"mesh": init_device_mesh("cpu", keywords["mesh"])}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    opt = fusedfog.SGD(net.parameters(), lr=0.1, **{"bucket_mb": 0.001, **keywords})
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS):
            opt.zero_grad()
            net(torch.ones(2, 20)).sum().backward()
            opt.step()
    if path is not None:
        profile.export_chrome_trace(f"{path}/{dist.get_rank()}.json")
    names = [event.name for event in profile.events()]
    # Messages started under the profiler come when it is gone, and must not write into what it has left.
    del profile
    opt.drain()
    gc.collect()
    assert not any(name.startswith(("gloo:", "c10d::")) for name in names)
    return [name for name in names if name.startswith("fusedfog::")]


def test_ranges_name_bucket_and_peers(ranks: Pool) -> None:
    for rank, names in enumerate(ranks.run(4, record, None, {"topology": fusedfog.topology.ring(4, "right")})):
        after, before = (rank + 1) % 4, (rank - 1) % 4
        assert names == STEPS * [
            *(f"fusedfog::wait bucket {bucket} from {before}" for bucket in (0, 1)),
            "fusedfog::pass buckets 0,1 sgd",
            *(f"fusedfog::exchange bucket {bucket} to {after} from {before}" for bucket in (0, 1)),
        ]


def test_ranges_of_two_passes_around_an_exchange(ranks: Pool) -> None:
    names = ranks.run(2, record, None, {"algorithm": "atc", "bucket_mb": 25})[0]
    assert names == STEPS * [
        "fusedfog::pass bucket 0 sgd",
        "fusedfog::exchange bucket 0 to 1 from 1",
        "fusedfog::wait bucket 0 from 1",
        "fusedfog::pass bucket 0 mix",
    ]


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"algorithm": "allreduce"}, "to all from all"),
        ({"global_average_every": 1}, "to all from all"),
        ({"mesh": (2, 2), "topology": "ring"}, "to machine 1 from machine 1"),
    ],
    ids=str,
)
def test_ranges_of_exchanges_with_everyone_or_with_machines(
    ranks: Pool, keywords: dict[str, Any], expected: str
) -> None:
    names = ranks.run(4, record, None, keywords)[0]
    assert f"fusedfog::exchange bucket 1 {expected}" in names
    assert f"fusedfog::wait bucket 1 from {expected.split('from ')[1]}" in names


def test_a_range_costs_nothing_without_a_profiler() -> None:
    assert span("wait", (0,)) is span("pass", (1,), "sgd")


def test_the_command_reports_every_rank(ranks: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.run(2, record, str(tmp_path), {})
    files = sorted(tmp_path.glob("*.json"))
    packed = tmp_path / "1.json.gz"
    packed.write_bytes(gzip.compress(files[1].read_bytes()))
    assert main(["trace", str(files[0]), str(packed)]) == 0
    text = capsys.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: {STEPS} steps of" in text
    assert "communication by host waits" in text
    assert "2 ranks: exposed communication" in text


def test_a_trace_without_ranges_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.json"
    file.write_text('{"traceEvents": []}')
    assert main(["trace", str(file)]) == 2
    assert "no fusedfog:: ranges" in capsys.readouterr().err
    file.write_text("not json")
    assert main(["trace", str(file)]) == 2
    assert main(["trace", str(tmp_path / "absent.json")]) == 2


# -- arithmetic on traces made by hand, in microseconds --------------------------------------------------------------------


def event(name: str, start: float, stop: float, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, "pid": 1, "tid": 1}


TWO_STEPS = [
    event("forward", 0, 1000, "cpu_op"),
    event("Optimizer.step#SGD.step", 1000, 2000),
    event("fusedfog::wait bucket 0 from 1", 1000, 1200),  # posted before the record began
    event("fusedfog::pass bucket 0 sgd", 1200, 1400),
    event("fusedfog::exchange bucket 0 to 1 from 1", 1400, 1500),
    event("fusedfog::wait bucket 1 from 1,2", 1500, 1500),
    event("fusedfog::exchange bucket 1 to 1 from 1,2", 1900, 2000),
    event("Optimizer.step#SGD.step", 5000, 6000),
    event("Optimizer.step#Inner.step", 5400, 5500),
    event("fusedfog::wait bucket 0 from 3", 5000, 5400),
    event("fusedfog::pass buckets 0,1 sgd", 5500, 5900),
    event("fusedfog::wait bucket 1 from 1,2", 5900, 6000),
    event("Later", 6000, 10000, "cpu_op"),
]


def test_exposed_time_on_the_cpu_is_the_time_in_waits() -> None:
    norm_sums = report({"traceEvents": TWO_STEPS, "distributedInfo": {"rank": 3}}, "0")
    assert (norm_sums.rank, norm_sums.steps, norm_sums.total) == ("3", 2, 10.0)
    assert norm_sums.exposed == pytest.approx(0.2 + 0.4 + 0.1)
    # In flight: bucket 0 from 0 to 1200 and 1400 to 5400, bucket 1 from 0 to 1500 and 1900 to 6000; one or both all along.
    assert norm_sums.communication == pytest.approx(6.0)
    assert norm_sums.overlap == pytest.approx(1 - 0.7 / 6.0)
    assert norm_sums.passes == pytest.approx(0.2 + 0.4)
    zero, one = norm_sums.buckets[0], norm_sums.buckets[1]
    assert (zero.exchanges, zero.sources) == (2, {"1", "3"})
    assert (zero.in_flight, zero.waited) == pytest.approx((1.2 + 4.0, 0.6))
    assert (one.exchanges, one.sources) == (2, {"1", "2"})
    assert (one.in_flight, one.waited) == pytest.approx((1.5 + 4.1, 0.1))


def test_exposed_time_on_the_gpu_is_nccl_alone() -> None:
    kernels = [
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 2000, 3000, "kernel"),
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 7000, 8000, "kernel"),
        event("gemm", 1500, 2500, "kernel"),
        event("gemm", 2400, 2600, "kernel"),
        event("fused_pass", 7900, 8100, "kernel"),
        event("fusedfog::wait bucket 0 from 1", 0, 9000, "gpu_user_annotation"),  # a copy, on the GPU's timeline
    ]
    norm_sums = report({"traceEvents": TWO_STEPS + kernels}, "0")
    assert norm_sums.measured_by == "NCCL kernels"
    assert norm_sums.communication == pytest.approx(2.0)
    assert norm_sums.exposed == pytest.approx(0.4 + 0.9)
    assert norm_sums.overlap == pytest.approx(0.35)


def test_a_second_wait_for_a_drained_message_is_no_exchange() -> None:
    trace = json.loads(json.dumps({"traceEvents": [*TWO_STEPS, event("fusedfog::wait bucket 0 from 3", 6500, 6501)]}))
    assert report(trace, "0").buckets[0].in_flight == pytest.approx(5.2 + 0.001)
