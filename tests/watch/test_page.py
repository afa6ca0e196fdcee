"""The live page in headless Chromium: it shows what records say, and runs nothing that they contain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedfog.watch.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=4000",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the live page's script was NOT run")


def sample(rank: int, step: int, blocked: float, waited_for: dict[str, float], **stats: Any) -> dict[str, Any]:
    figures = {"blocked_s": blocked, "bytes_sent": 1000 * step, "torn_messages": 0, "refused": 0, "healed": 0, **stats}
    values = {"loss": 2.0 / step}
    return {"kind": "sample", "rank": rank, "time": float(step), "step": step, "exchange": step, "step_s": 0.1,
            "values": values, "stats": figures, "waited_for": waited_for}  # fmt: skip


HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
RECORDS = [
    {"kind": "run", "rank": 0, "time": 0.0, "ranks": 2, "version": "1"},
    {"kind": "rank", "rank": 1, "node": 1, "time": 0.0, "host": "here", "pid": 2, "device": "cpu"},
    {"kind": "rank", "rank": 0, "node": 0, "time": 0.0, "host": HOSTILE, "pid": 1, "device": "cpu"},
    {"kind": "graph", "rank": 0, "time": 0.0, "method": "awc on ring", "nodes": 2, "rounds": [[[0, 1], [1, 0]]],
     "endless": False, "bytes": 4096.0},
    *(sample(rank, step, blocked=rank * step * 0.06, waited_for={str(1 - rank): rank * step * 0.06}, disagreement=0.5)
      for step in (1, 2, 3) for rank in (0, 1)),
    {"kind": "end", "rank": 1, "time": 4.0, "how": "ValueError: no more data"},
]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    server = Server.live(0)
    for record in RECORDS:
        server.add(json.loads(json.dumps(record)))
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}", "--dump-dom", f"http://127.0.0.1:{server.port}/"]
    yield subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    server.close()


def test_the_page_shows_every_rank_and_who_is_waited_for(page: str) -> None:
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    first, second = (row for row in cells if row)
    assert first[:3] == ["0", "training", "3"]
    assert second[:3] == ["1", "ValueError: no more data", "3"]
    assert second[4:6] == ["60.0 %", "rank 0 (60.0 %)"]
    assert first[-1].startswith("&lt;img")  # What a record says is text.
    assert "<title>fusedfog</title>" in page
    assert "awc on ring" in page
    # Each chart has a line a rank: loss, disagreement, waiting. The graph has its two edges.
    assert page.count("<polyline") == 6
    assert len(re.findall('<line [^>]*marker-end="url', page)) == 2
