"""`fusedfog.monitor`: all ranks' figures in one place, without a rank waiting for another."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import await_said, say
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.watch import debug, relay
from fusedfog.watch.records import plain
from fusedfog.watch.sinks import scalars

P = ParamSpec("P")
R = TypeVar("R")


def train(opt: Any, net: nn.Module, steps: int, run: fusedfog.Monitor | None = None) -> None:
    data = torch.arange(8.0).view(2, 4) + (dist.get_rank() if dist.is_initialized() else 0)
    for step in range(steps):
        opt.zero_grad()
        loss = net(data).square().sum()
        loss.backward()
        if run is not None:
            run.log(loss=loss, half=step / 2)
        opt.step()


def build(**keywords: Any) -> tuple[nn.Module, Any]:
    net = nn.Linear(4, 4)
    return net, fusedfog.AdamW(net.parameters(), lr=0.01, **keywords)


def patiently(function: Callable[P, R]) -> Callable[P, R]:
    """Rank 0 waits as long for the others' last words as a busy machine may keep them from saying them."""
    return mock.patch.object(importlib.import_module("fusedfog.watch.monitor"), "_LAST_WORDS", 60.0)(function)


@patiently
def watched(path: str, keywords: dict[str, Any]) -> dict[str, Any]:
    if "mesh" in keywords:
        keywords = keywords | {"mesh": init_device_mesh("cpu", keywords["mesh"])}
    net, opt = build(**keywords)
    with fusedfog.monitor(opt, path, every=2) as run:
        train(opt, net, 7, run)
    return dict(opt.stats())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rank_0_writes_what_all_ranks_did(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    stats = ranks.run(3, watched, str(path), {"topology": "ring", "measure": True})
    records = read(path)
    assert records[0]["kind"] == "run"
    assert records[0]["ranks"] == 3
    for rank in range(3):
        mine = [record for record in records if record["rank"] == rank]
        assert [record["kind"] for record in mine if record["kind"] not in ("run", "graph")] == [
            "rank",
            *["sample"] * 3,
            "end",
        ]
        samples = [record for record in mine if record["kind"] == "sample"]
        assert [sample["step"] for sample in samples] == [2, 4, 6]
        assert [sample["values"]["half"] for sample in samples] == [0.5, 1.5, 2.5]
        assert all(sample["values"]["loss"] > 0 and sample["step_s"] > 0 for sample in samples)
        assert set(samples[-1]["stats"]) == set(stats[rank])
        assert samples[-1]["stats"]["disagreement"] > 0
        assert mine[-1]["how"] == "finished"


def test_the_graph_is_that_of_the_topology(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ranks.run(4, watched, str(path), {"topology": "one_peer_exponential"})
    (graph,) = [record for record in read(path) if record["kind"] == "graph"]
    assert graph["nodes"] == 4
    assert graph["rounds"] == [[[i, (i + hop) % 4] for i in range(4)] for hop in (1, 2)]
    assert graph["bytes"] == 2 * 64 * 4  # Each parameter takes a multiple of 64 elements.


def test_machines_of_a_mesh_are_nodes(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ranks.run(4, watched, str(path), {"mesh": (2, 2)})
    (graph,) = [record for record in read(path) if record["kind"] == "graph"]
    assert graph["nodes"] == 2
    assert {record["rank"]: record["node"] for record in read(path) if record["kind"] == "rank"} == {
        0: 0,
        1: 0,
        2: 1,
        3: 1,
    }
    assert graph["rounds"][0] == [[0, 1], [1, 0]]


def changed(path: str) -> None:
    net, opt = build(topology="ring")
    with fusedfog.monitor(opt, path, every=1) as run:
        train(opt, net, 2, run)
        opt.set_topology("fully_connected")
        train(opt, net, 2, run)


def test_another_topology_is_another_graph(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ranks.run(4, changed, str(path))
    graphs = [record["method"] for record in read(path) if record["kind"] == "graph"]
    assert graphs == ["awc on ring", "awc on fully_connected"]


@patiently
def failing(path: str) -> None:
    net, opt = build()
    with fusedfog.monitor(opt, path, every=1) as run:
        train(opt, net, 2, run)
        if dist.get_rank() == 1:
            raise ValueError("no more data")


def test_the_file_says_what_ended_a_rank(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    outcomes = ranks.outcomes(2, failing, str(path))
    assert outcomes[1].error_type == "ValueError"
    ends = {record["rank"]: record["how"] for record in read(path) if record["kind"] == "end"}
    assert ends == {0: "finished", 1: "ValueError: no more data"}


@patiently
def with_a_slow_one(path: str) -> None:
    """Rank 1 begins each step 0.1 s after rank 0 has begun it, however slow rank 0 is."""
    net, opt = build(topology="ring")
    with fusedfog.monitor(opt, path, every=2) as run:
        for step in range(8):
            say(f"{step}/{dist.get_rank()}")
            if dist.get_rank() == 1:
                await_said(f"{step}/0")
                time.sleep(0.1)
            train(opt, net, 1, run)


def test_who_waits_for_whom(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ranks.run(2, with_a_slow_one, str(path))
    last = {record["rank"]: record["waited_for"] for record in read(path) if record["kind"] == "sample"}
    assert last[0]["1"] > 0.3
    assert last[1].get("0", 0.0) < last[0]["1"]


def alone_watched(path: str) -> float:
    net, opt = build()
    if dist.get_rank() == 1:
        train(opt, net, 4)
        return 0.0
    begin = time.monotonic()
    with fusedfog.monitor(opt, path, every=1) as run:
        train(opt, net, 4, run)
    return time.monotonic() - begin


def test_a_monitor_on_one_rank_alone_holds_nobody_up(ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert ranks.run(2, alone_watched, str(path))[0] < 60
    assert {record["rank"] for record in read(path)} == {0}


def overwritten() -> list[Any]:
    view = fusedfog.comm.group.find_group()
    end = relay.Relay(view)
    if view.rank == 1:
        for number in range(relay.RING + 3):
            end.send({"number": number})
    dist.barrier()
    found = [record["number"] for record in end.receive()] if view.rank == 0 else []
    dist.barrier()
    return [found, end.missed]


def test_a_slow_reader_loses_the_oldest_records_and_says_how_many(ranks: Pool) -> None:
    found, missed = ranks.run(2, overwritten)[0]
    # The first three were written over by the last three.
    assert found == [*range(3, relay.RING + 3)]
    assert missed == 3


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int, walltime: float) -> None:
        self.scalars.append((name, value, step))


class Run:
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)


class Broken:
    def add_scalar(self, *_: Any, **__: Any) -> None:
        raise OSError("disk full")


def test_dashboards_and_functions_take_the_same_figures(caplog: pytest.LogCaptureFixture) -> None:
    writer, run, seen = Writer(), Run(), []
    net, opt = build(algorithm="local")
    with fusedfog.monitor(opt, writer, Broken(), run, seen.append, every=3) as monitor:
        train(opt, net, 6, monitor)
    samples = [record for record in seen if record["kind"] == "sample"]
    assert [(step, value) for name, value, step in writer.scalars if name == "half/rank 0"] == [(3, 1.0), (6, 2.5)]
    assert [figures["half/rank 0"] for figures in run.logged] == [1.0, 2.5]
    assert [figures["step/rank 0"] for figures in run.logged] == [3, 6]
    assert {name for name, _ in scalars(samples[0])} >= {"loss", "step_s", "bytes_sent", "blocked_s"}
    assert [record.message for record in caplog.records if "Broken" in record.message or "disk full" in record.message]


def test_any_of_the_optimizers_can_be_watched() -> None:
    net = nn.Linear(4, 4)
    for make in (
        lambda: fusedfog.SGD(net.parameters(), lr=0.1, algorithm="local"),
        lambda: fusedfog.Decentralized(torch.optim.RMSprop(net.parameters()), algorithm="local"),
    ):
        opt, seen = make(), []
        with fusedfog.monitor(opt, seen.append, every=1) as run:
            train(opt, net, 2, run)
        assert [record["step"] for record in seen if record["kind"] == "sample"] == [1, 2]
        opt.release()


def test_nothing_is_recorded_after_the_end() -> None:
    net, opt = build(algorithm="local")
    seen: list[dict[str, Any]] = []
    run = fusedfog.monitor(opt, seen.append, every=1)
    train(opt, net, 1, run)
    run.close()
    run.close()
    train(opt, net, 1)
    assert [record["kind"] for record in seen] == ["run", "rank", "graph", "sample", "end"]


def test_short_steps_are_not_sampled_more_often_than_four_times_a_second_and_the_last_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    net, opt = build(algorithm="local")
    seen: list[dict[str, Any]] = []
    with fusedfog.monitor(opt, seen.append) as run:
        for _ in range(75):
            now += 1 / 128  # A quarter of a second is 32 of them.
            train(opt, net, 1, run)
        for _ in range(21):
            now += 1 / 8
            train(opt, net, 1, run)
    samples = [record for record in seen if record["kind"] == "sample"]
    assert [sample["step"] for sample in samples] == [10, 42, 74, 84, 94, 96]
    assert samples[1]["step_s"] == 1 / 128


def test_a_monitor_that_failed_takes_no_last_sample() -> None:
    net, opt = build(algorithm="local")
    seen: list[dict[str, Any]] = []
    with pytest.raises(LookupError), fusedfog.monitor(opt, seen.append) as run:
        train(opt, net, 3, run)
        raise LookupError
    assert [record["kind"] for record in seen] == ["run", "rank", "graph", "end"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_every_is_a_positive_number_of_steps(every: Any) -> None:
    _, opt = build(algorithm="local")
    with pytest.raises(ValueError, match="every= is a positive number"):
        fusedfog.monitor(opt, print, every=every)


@pytest.mark.parametrize("target", [3, None, object(), ["run.jsonl"]])
def test_a_target_is_something_to_write_to(target: Any) -> None:
    _, opt = build(algorithm="local")
    with pytest.raises(TypeError, match="records go to"):
        fusedfog.monitor(opt, target)


def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    _, opt = build(algorithm="local")
    with pytest.raises(FileNotFoundError):
        fusedfog.monitor(opt, tmp_path / "missing" / "run.jsonl")


def test_only_numbers_are_logged() -> None:
    _, opt = build(algorithm="local")
    with fusedfog.monitor(opt, print, every=5) as run:
        for wrong in ("0.5", torch.ones(2), None):
            with pytest.raises(TypeError, match="loss is"):
                run.log(loss=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, None])
def test_a_process_that_was_watched_exits_quietly(every: int | None) -> None:
    program = (
        "import torch, fusedfog; net = torch.nn.Linear(4, 4); opt = fusedfog.SGD(net.parameters(), lr=0.1, algorithm='local')\n"
        f"run = fusedfog.monitor(opt, lambda record: None, every={every}, port=0)\n"
        "net(torch.ones(2, 4)).sum().backward(); opt.step()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_figures_that_are_not_finite_are_words() -> None:
    wild = {"a": float("nan"), "b": [torch.tensor(float("-inf"))], 3: {"c": 1}}
    assert plain(wild) == {"a": "nan", "b": ["-inf"], "3": {"c": 1}}
    json.dumps(plain(wild), allow_nan=False)


def test_torchs_debug_server_can_ask_for_the_figures() -> None:
    net, opt = build(algorithm="local")

    class Response:
        def set_content(self, text: str, kind: str) -> None:
            self.text, self.kind = text, kind

        def set_status(self, status: int) -> None:
            self.status = status

    with fusedfog.monitor(opt, print, every=5):
        train(opt, net, 3)
        response = Response()
        debug._answer(None, response)
    assert json.loads(response.text)["0"]["steps"] == 3
    assert (response.kind, response.status) == ("application/json", 200)
    assert debug.figures() == {}
