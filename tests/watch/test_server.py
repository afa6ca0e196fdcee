"""The live page's server: what it answers, and to whom."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedfog.watch import server as serving
from fusedfog.watch.server import LiveRun, RunFile, Server

SAMPLE = {"kind": "sample", "rank": 0, "step": 1}


@pytest.fixture
def live() -> Iterator[Server]:
    server = Server.live(0)
    yield server
    server.close()


def ask(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def records(port: int, after: int = 0) -> dict[str, Any]:
    return dict(json.loads(ask(port, f"/records?after={after}")[1]))


def test_the_page_and_the_records_of_a_live_run(live: Server) -> None:
    assert b"<title>fusedfog</title>" in ask(live.port, "/")[1]
    live.add(SAMPLE)
    first = records(live.port)
    assert first == {"next": 1, "records": [SAMPLE]}
    live.add({**SAMPLE, "step": 2})
    assert records(live.port, first["next"]) == {"next": 2, "records": [{**SAMPLE, "step": 2}]}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/other", 404),
        ("/../etc/passwd", 404),
        ("/records?after=-1", 400),
        ("/records?after=x", 400),
        ("/records?after=" + "9" * 30, 400),
    ],
)
def test_nothing_else_is_served(live: Server, path: str, status: int) -> None:
    assert ask(live.port, path)[0] == status


def test_only_this_machine_is_answered(live: Server) -> None:
    for host in ("localhost", f"127.0.0.1:{live.port}", f"localhost:{live.port}", "[::1]:80"):
        assert ask(live.port, "/records", host)[0] == 200
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        assert ask(live.port, "/records", host)[0] == 403


def test_requests_change_nothing(live: Server) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert ask(live.port, "/records", method=method)[0] == 501


def test_a_file_is_read_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    line = json.dumps(SAMPLE) + "\n"
    path.write_text(line + line[:10])
    run = RunFile(path)
    place, found = run.after(0)
    assert (place, found) == (len(line), [SAMPLE])
    path.write_text(line + line)
    assert run.after(place) == (2 * len(line), [SAMPLE])
    assert run.after(2 * len(line)) == (2 * len(line), [])


@given(
    st.lists(
        st.one_of(st.binary(max_size=40).filter(lambda line: b"\n" not in line), st.just(json.dumps(SAMPLE).encode()))
    )
)
def test_lines_that_are_no_records_are_skipped(lines: list[bytes]) -> None:
    wanted = sum(line == json.dumps(SAMPLE).encode() for line in lines)
    found = [serving._parsed(line) for line in lines]
    assert sum(record == SAMPLE for record in found) == wanted
    assert all(record is None or "kind" in record for record in found)


def test_a_long_live_run_forgets_old_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_KEPT", 10)
    run = LiveRun()
    run.add({"kind": "run"})
    for step in range(25):
        run.add({**SAMPLE, "step": step})
    place, found = run.after(0)
    assert found[0] == {"kind": "run"}
    assert found[-1]["step"] == 24
    assert len(found) <= 10
    run.add({**SAMPLE, "step": 25})
    assert run.after(place) == (place + 1, [{**SAMPLE, "step": 25}])


def test_the_command_serves_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(SAMPLE) + "\n")
    # Shells have what they start in the background ignore Ctrl-C, these tests perhaps among it.
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedfog", "watch", str(path), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        assert records(port)["records"] == [SAMPLE]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedfog", "watch", str(tmp_path / "none.jsonl")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr
