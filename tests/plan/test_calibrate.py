"""`fusedfog calibrate`: the line through what it measures, and a file that `fusedfog plan` reads."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from unittest import mock

import pytest
from support.pool import Pool

from fusedfog.cli import calibrate
from fusedfog.cli.main import main
from fusedfog.cost.links import read_links


def test_fit_finds_the_line_and_never_a_negative_latency() -> None:
    exact = [calibrate.Sample("", size, 2e-4 + size / 3e8) for size in calibrate.SIZES]
    link = calibrate.fit(exact)
    assert (link.latency_s, link.bandwidth) == (pytest.approx(2e-4), pytest.approx(3e8))
    link = calibrate.fit([calibrate.Sample("", size, size**1.1 / 1e8) for size in calibrate.SIZES])
    assert 0 <= link.latency_s < 2e-4 and 1e7 < link.bandwidth < 1e8


def test_fit_sees_through_bursts_that_a_shaper_lets_pass() -> None:
    shaped = [calibrate.Sample("", size, 1e-4 + max(0, size - 80_000) / 5e6) for size in calibrate.SIZES]
    link = calibrate.fit(shaped)
    assert (link.latency_s, link.bandwidth) == (pytest.approx(1e-4), pytest.approx(5e6, rel=0.01))


def calibrate_as(hosts: int, path: str) -> int:
    """Run the command on ranks that believe to be on `hosts` machines."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    small = {"SIZES": (4096, 65536, 1 << 20), "REPEATS": 2, "COPIED": 1 << 20}
    step = ["--step-ms=100"] if hosts == 2 else []
    # Undone again: the pool's processes serve other tests, whose ranks are on one machine.
    with (
        mock.patch.object(socket, "gethostname", lambda: f"host{rank * hosts // size}"),
        mock.patch.multiple(calibrate, **small),
    ):
        return main(["calibrate", "--backend=gloo", f"--out={path}", *step])


@pytest.mark.parametrize("hosts", [1, 2])
def test_calibrate_writes_what_plan_reads(hosts: int, ranks: Pool, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    assert ranks.run(4, calibrate_as, hosts, str(path), init=False) == [0] * 4
    links = read_links(path)
    assert links.local == 4 // hosts and links.inside is not None
    assert (links.across is None) == (hosts == 1)
    for link in (links.inside, links.across or links.inside):
        # Of these few repeats, any may take seconds on a busy machine.
        assert 0 <= link.latency_s < 60 and 10 < link.bandwidth < 1e12
    kinds = {sample["what"].split(",")[0] for sample in json.loads(path.read_text())["measured"]}
    assert kinds == {"exchange inside", "all-reduce"} | ({"exchange across"} if hosts == 2 else set())
    assert links.step_s == (None if hosts == 1 else 0.1)
    asked = ["plan", f"--links={path}", "--params=1e6", *(["--step-ms=100"] if hosts == 1 else []), "--ranks=4"]
    assert main(asked) == 0


def test_calibrate_alone_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 2
    assert "torchrun --nproc-per-node 2 -m fusedfog calibrate" in capsys.readouterr().err
    assert main(["calibrate", "--step-ms=0"]) == 2
    assert "a step takes a positive number of seconds, got 0.0" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text('{"local": 4}')
    with pytest.raises(ValueError, match="is not a file that `fusedfog calibrate` writes"):
        read_links(tmp_path / "links.json")
