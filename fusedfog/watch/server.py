"""The live page: one HTML file and the records behind it, served by the standard library, to this machine only by default.

GET /                   the page
GET /records?after=N    {"next": M, "records": [...]}: what came after the first N bytes (a file) or records (live)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fusedfog.watch.records import Record

_MOST = 1 << 22
"""Bytes of a file that one answer carries; the page asks again at once for more."""
_KEPT = 100_000
"""Records that a live run keeps for pages that are opened later."""

Source = Callable[[int], tuple[int, list[Record]]]
"""From a place in a run to the next place, and the records between them."""


class RunFile:
    """The records of a file of JSON lines, which may grow meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after(self, place: int) -> tuple[int, list[Record]]:
        """See `Source`. Lines that are not whole yet come with a later answer; those that are no records are skipped."""
        with self._path.open("rb") as file:
            file.seek(place)
            data = file.read(_MOST)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == _MOST:
            whole = _MOST  # No line of a record is so long.
        return place + whole, [record for record in map(_parsed, data[:whole].splitlines()) if record is not None]


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


class LiveRun:
    """The records of a run of this process; the oldest are given up when there are very many."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._forgotten = 0
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """One more."""
        with self._lock:
            self._records.append(record)
            if len(self._records) > _KEPT:
                # What says who is who comes first, and stays.
                first = [one for one in self._records[: _KEPT // 2] if one["kind"] != "sample"]
                self._forgotten += _KEPT // 2 - len(first)
                self._records[: _KEPT // 2] = first

    def after(self, place: int) -> tuple[int, list[Record]]:
        """See `Source`."""
        with self._lock:
            return self._forgotten + len(self._records), self._records[max(0, place - self._forgotten) :]


class Server:
    """A page about a source of records, in a thread.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """

    def __init__(self, source: Source, port: int, host: str = "127.0.0.1") -> None:
        handler = type("Handler", (_Handler,), {"source": staticmethod(source), "local": host in ("127.0.0.1", "::1")})
        self._http = ThreadingHTTPServer((host, port), handler)
        self._http.daemon_threads = True
        self.port: int = self._http.server_address[1]
        self._live: LiveRun | None = None
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True, name="fusedfog-page")
        self._thread.start()

    @staticmethod
    def live(port: int) -> Server:
        """One for a run of this process, whose records come by `add`."""
        run = LiveRun()
        server = Server(run.after, port)
        server._live = run
        return server

    def add(self, record: Record) -> None:
        """One more record of a live run."""
        assert self._live is not None
        self._live.add(record)

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        self._thread.join()

    def close(self) -> None:
        """Serve no longer."""
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    source: Source
    local: bool

    def do_GET(self) -> None:
        """Answer; nothing but these two paths exists, and no request changes anything."""
        url = urlsplit(self.path)
        # A name that a hostile page has had resolve to this machine would let that page read the run.
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.local and name.strip("[]") not in ("localhost", "127.0.0.1", "::1"):
            self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif url.path == "/":
            page = resources.files("fusedfog.watch").joinpath("page.html").read_bytes()
            self._answer(page, "text/html; charset=utf-8")
        elif url.path == "/records":
            self._records(parse_qs(url.query).get("after", ["0"])[0])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _records(self, after: str) -> None:
        if not (after.isascii() and after.isdigit() and len(after) < 16):
            self.send_error(HTTPStatus.BAD_REQUEST, "after= is a number")
            return
        try:
            following, records = self.source(int(after))
        except OSError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, type(error).__name__)
            return
        self._answer(json.dumps({"next": following, "records": records}).encode(), "application/json")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        # Only what is in the page itself runs, and it talks to nobody but this server.
        inline = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        self.send_header("Content-Security-Policy", f"{inline}; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a training run's terminal is no place for requests."""
