"""The demo does what it says."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.pool import Pool

import fusedfog
from fusedfog.examples import digits, windows


def test_shards_cover_the_images_once_and_differ_by_label() -> None:
    labels = torch.arange(10).repeat(40)[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    pieces = [digits.shard(labels, rank, 4, shared=0.0, seed=0) for rank in range(4)]
    assert sorted(torch.cat(pieces).tolist()) == list(range(400))
    seen = [set(labels[piece].tolist()) for piece in pieces]
    assert seen == [{0, 1, 2}, {2, 3, 4}, {5, 6, 7}, {7, 8, 9}]
    pieces = [digits.shard(labels, rank, 4, shared=0.1, seed=0) for rank in range(4)]
    assert sorted(torch.cat(pieces).tolist()) == list(range(400))
    counts = [torch.bincount(labels[piece], minlength=10) for piece in pieces]
    assert all(count.topk(3).values.sum() > 0.85 * count.sum() for count in counts)
    assert torch.equal(digits.shard(labels, 0, 1, shared=0.0, seed=0).sort().values, torch.arange(400))


def short_demo(folder: str, argument: str) -> list[str]:
    torch.set_num_threads(1)
    # Rank 0 waits as long for the others' last words as a busy machine may keep them from saying them.
    with mock.patch.object(importlib.import_module("fusedfog.watch.monitor"), "_LAST_WORDS", 60.0):
        digits.main(
            ["--steps", argument, "--batch", "8", "--out", f"{folder}/shown.png", "--watch", f"{folder}/run.jsonl"]
        )
    return os.listdir(folder)


def test_the_demo_on_four_ranks(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(4, short_demo, str(tmp_path), "30", init=False)
    check_figures(tmp_path, ranks=4)
    watched = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert {record["rank"] for record in watched if record["kind"] == "sample" and record["step"] == 30} == {0, 1, 2, 3}


def test_the_demo_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_demo(str(tmp_path), "2")
    runs = check_figures(tmp_path, ranks=1)
    printed = capsys.readouterr().out
    assert all(run["label"] in printed for run in runs)


def check_figures(folder: Path, ranks: int) -> list[dict[str, Any]]:
    assert (folder / "shown.png").read_bytes().startswith(b"\x89PNG")
    runs: list[dict[str, Any]] = json.loads((folder / "shown.json").read_text())
    awc, atc, ddp = runs
    parameters = 4 * sum(p.numel() for p in digits.network(0).parameters())
    padding = 4 * 64 * len(list(digits.network(0).parameters()))
    neighbours = {1: 0, 2: 1, 4: 2}[ranks]  # of the ring; the one-peer graph has one
    for run, copies in ((awc, min(neighbours, 1)), (atc, neighbours), (ddp, 2 * (ranks - 1) / ranks)):
        assert copies * parameters <= run["bytes_per_step"] <= copies * (parameters + padding)
        assert run["steps"][0] == 0 and all(len(values) == ranks for values in run["rank_accuracy"])
        assert (run["blocked_s"] > 0) == (ranks > 1)
    assert len({run["averaged_accuracy"][0] for run in runs}) == 1  # the same start
    for run in (awc, atc):
        assert (max(run["consensus_distance"]) > 1e-4) == (ranks > 1)  # ranks saw different images
    assert max(ddp["consensus_distance"]) == 0.0
    return runs


def test_the_demo_refuses_what_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--steps=0", "--batch=-1", "--shared=2"):
        with pytest.raises(SystemExit):
            digits.main([argument])
        assert "must be at least 1" in capsys.readouterr().err


def consensus_and_mean() -> tuple[float, float, float]:
    rank = float(os.environ["RANK"])
    fusedfog.init()
    x = torch.full((3,), rank, dtype=torch.float64)
    windows.consensus_by_put(x, 30, 0.005 * (rank == 0))
    y = torch.full((3,), rank, dtype=torch.float64)
    estimate, p = windows.mean_by_push_sum(y, 30, 0.005 * (rank == 0))
    windows.main(["--steps", "2"])
    return x[0].item(), estimate[0].item(), p


def test_the_windows_example_agrees_by_put_and_finds_the_exact_mean_by_push_sum(ranks: Pool) -> None:
    found = ranks.run(4, consensus_and_mean, init=False)
    assert all(0 <= value <= 3 for value, _, _ in found)
    assert sum(p for _, _, p in found) == pytest.approx(4.0, abs=1e-12)
    for _, estimate, _ in found:
        assert estimate == pytest.approx(1.5, abs=1e-4)


def test_the_windows_example_alone(capsys: pytest.CaptureFixture[str]) -> None:
    windows.main(["--steps", "3"])
    assert "push-sum: 0.000000000" in capsys.readouterr().out
