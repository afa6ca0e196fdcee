"""`fusedfog watch RUN.jsonl`: a page about a run, while it goes on or afterwards."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from fusedfog.watch.server import RunFile, Server

_HOST = "127.0.0.1"


def add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `fusedfog watch`."""
    parser = commands.add_parser("watch", help="show a run that fusedfog.monitor records, in a browser")
    parser.add_argument("file", metavar="RUN.jsonl", type=Path, help="what fusedfog.monitor writes")
    parser.add_argument("--port", type=_port, default=8265, help="default 8265; 0 takes one that is free")
    parser.add_argument(
        "--host", default=_HOST, help=f"address to serve on; {_HOST}, the default, only this machine sees"
    )
    parser.set_defaults(run=_run)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    run = RunFile(options.file)
    run.after(0)  # A file that cannot be read is an error here, not a page without records.
    server = Server(run.after, options.port, options.host)
    with contextlib.suppress(KeyboardInterrupt):
        if options.host != _HOST:
            print(f"fusedfog: whoever reaches {options.host} can read this run: there is no password", file=sys.stderr)
        print(f"{options.file}: http://{options.host}:{server.port}/ (Ctrl-C ends this)", flush=True)
        server.wait()
    server.close()
    return 0
