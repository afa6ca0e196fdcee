"""Commands: ``fusedfog run``, ``topology``, ``topologies``, ``plan``, ``calibrate``, ``trace``, ``watch``, ``--version``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fusedfog import __version__
from fusedfog.cli.calibrate import add_calibrate
from fusedfog.cli.plan import add_plan
from fusedfog.cli.run import add_run
from fusedfog.cli.topology import add_topologies, add_topology
from fusedfog.cli.trace import add_trace
from fusedfog.cli.watch import add_watch

COMMANDS: list[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None]] = [
    add_run,
    add_topology,
    add_topologies,
    add_plan,
    add_calibrate,
    add_trace,
    add_watch,
]
"""Each adds one subcommand and names, as ``run``, the function that takes the options and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for input that no command can use)."""
    parser = argparse.ArgumentParser(prog="fusedfog", description="Decentralized training for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedfog {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"fusedfog: {error}", file=sys.stderr)
        return 2
    return status
