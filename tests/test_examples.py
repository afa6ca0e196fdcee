"""What the README shows runs as written, and the demo does what it says."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool

from fusedfog.examples import digits

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run_block(code: str, folder: str) -> list[str]:
    """Run a README block as a script of its own, in `folder`; returns the files that are there afterwards."""
    torch.set_num_threads(1)
    os.chdir(folder)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_blocks_run_alone(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # also undoes run_block's own chdir
    run_block(code, str(tmp_path))


def test_readme_scripts_run_on_two_ranks(ranks: Pool, tmp_path: Path) -> None:
    scripts = [code for code in BLOCKS if "fusedfog.init()" in code]
    assert len(scripts) == 3
    for number, code in enumerate(scripts):
        folder = tmp_path / str(number)
        folder.mkdir()
        ranks.run(2, run_block, code, str(folder), init=False)
    assert (tmp_path / "0" / "model.pt").exists()
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"checkpoint-0.pt", "checkpoint-1.pt"}
    assert (tmp_path / "2" / "checkpoint" / ".metadata").exists()


def test_snippets_for_frameworks_are_lines_of_scripts_that_are_tested() -> None:
    scripts = (Path(__file__).parent / "framework_scripts").glob("*.py")
    tested = {line.strip() for script in scripts for line in script.read_text().splitlines()}
    tested |= {line.removesuffix(",") for line in tested}
    snippets = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    for line in "\n".join(snippets).splitlines():
        assert line.strip() in tested or line.startswith("..."), line


def test_the_readme_shows_a_picture_that_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert 0 < (Path(__file__).parents[1] / picture).stat().st_size < 150_000


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
    digits.main(["--steps", argument, "--batch", "8", "--out", f"{folder}/shown.png"])
    return os.listdir(folder)


def test_the_demo_on_four_ranks(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(4, short_demo, str(tmp_path), "30", init=False)
    check_figures(tmp_path, ranks=4)


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
