"""``fusedfog run``: the ranks of a script on this machine, of which each may die and be started again by itself."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import Std, to_map
from torch.distributed.run import determine_local_world_size

from fusedfog.cli.run_launcher import Launcher
from fusedfog.cli.run_rank import Plan
from fusedfog.cli.run_stores import Address, Stores, host_store, parse_stores, show_stores
from fusedfog.errors import LaunchError

EPILOG = """\
examples:
  fusedfog run --nproc-per-node 4 train.py --lr 0.1
  fusedfog run --nnodes 2 --node-rank 0 --stores hostA:29400,hostB:29400 --nproc-per-node 8 train.py   # on hostA
  fusedfog run --nnodes 2 --node-rank 1 --stores hostA:29400,hostB:29400 --nproc-per-node 8 train.py   # on hostB

A script that calls fusedfog.init(elastic=True) survives the death of a rank: the others train on, and this command starts it
again. Any other script is run as by torchrun, whose variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) are set: if a rank
fails, all end. Exit status: 0 if the last process of every rank of this machine ended with 0; 128 + n after signal n, which
is passed on to the ranks; 2 if nothing was started; else 1."""


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run",
        help="start the ranks of a script, and those that die again",
        description="Start the ranks of a script on this machine, and each again that dies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, both = parser.add_argument, _both_spellings
    add(
        *both("--nproc-per-node"),
        default="1",
        metavar="N",
        help="ranks on each machine: a number, gpu, cpu or auto (1)",
    )
    add("--nnodes", type=int, default=1, metavar="N", help="machines (1)")
    add(
        *both("--node-rank"),
        type=int,
        metavar="N",
        help="which of them this one is, from 0; in a Slurm step its SLURM_NODEID",
    )
    add(
        "--stores",
        metavar="HOST:PORT,...",
        help="a store for each machine, or for the first few, in the order of --node-rank",
    )
    add(*both("--max-restarts"), type=int, default=3, metavar="N", help="how often each rank is started again (3)")
    add(*both("--run-id"), metavar="NAME", help="the run's name, the same on all machines; in a Slurm job its number")
    add(*both("--log-dir"), type=Path, metavar="DIR", help="where output goes that is kept in files")
    add(
        "-r",
        "--redirects",
        default="0",
        metavar="STD",
        help="into files: 1 stdout, 2 stderr, 3 both; or by local rank, 0:3,1:1",
    )
    add(
        "-t",
        "--tee",
        default="0",
        metavar="STD",
        help="into files, and to the console with a prefix; written as for -r",
    )
    add("-m", "--module", action="store_true", help="the script is the name of a module, as for python -m")
    add(*both("--no-python"), action="store_true", help="the script is a program by itself")
    add("script", help="the training program")
    add("arguments", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(run=run)


def _both_spellings(name: str) -> tuple[str, ...]:
    """torchrun's users know either."""
    return name, "--" + name[2:].replace("-", "_")


def run(options: argparse.Namespace) -> int:
    """Run the ranks. Returns the exit status.

    Raises:
        LaunchError: something is wrong with the arguments, or with what other launchers say; nothing has been started.
    """
    nodes, local = options.nnodes, _local_size(options.nproc_per_node)
    if nodes < 1 or local < 1 or options.max_restarts < 0:
        raise LaunchError("--nnodes and --nproc-per-node must be at least 1, and --max-restarts at least 0")
    node = _node(options)
    stores = _stores(options.stores, nodes)
    command = _command(options)
    hosted = host_store(stores[node]) if node < len(stores) else None
    if hosted is not None:
        stores[node] = stores[node][0], int(hosted.port)
    name = options.run_id or os.environ.get("SLURM_JOB_ID") or (secrets.token_hex(4) if nodes == 1 else "run")
    if not re.fullmatch(r"[\w.-]+", name):
        raise LaunchError(f"--run-id {name!r}: letters, digits, '.', '-' and '_' make a run's name")
    redirects, tees = _streams(options.redirects, local), _streams(options.tee, local)
    kept = options.log_dir is not None or any(redirects.values()) or any(tees.values())
    plan = Plan(
        command,
        name,
        nodes,
        node,
        local,
        stores,
        options.max_restarts,
        _logs(options, name) if kept else None,
        redirects,
        tees,
    )
    if kept:
        print(f"fusedfog run: output is kept in {plan.logs}", file=sys.stderr)
    try:
        return Launcher(plan, Stores(stores, f"fusedfog/{name}/")).run()
    finally:
        del hosted


def _local_size(text: str) -> int:
    try:
        return int(determine_local_world_size(text))
    except ValueError as error:
        raise LaunchError(f"--nproc-per-node {text}: {error}") from None


def _node(options: argparse.Namespace) -> int:
    node = options.node_rank
    if node is None:
        in_step = os.environ.get("SLURM_NODEID", "") if "SLURM_STEP_NODELIST" in os.environ else ""
        node = int(in_step) if in_step.isdecimal() and options.nnodes > 1 else None if options.nnodes > 1 else 0
    if node is None:
        raise LaunchError(f"--nnodes {options.nnodes} needs --node-rank: which of the machines, from 0, is this one?")
    if not 0 <= node < options.nnodes:
        raise LaunchError(
            f"--node-rank {node}: machines count from 0 to {options.nnodes - 1}, so that this one has no place in the run: raise "
            f"--nnodes on all machines, or start fewer"
        )
    return int(node)


def _stores(text: str | None, nodes: int) -> list[Address]:
    if text is None:
        if nodes > 1:
            raise LaunchError(
                f"--nnodes {nodes} needs --stores, where the machines meet: --stores hostA:29400,hostB:29400, an entry for each "
                f"machine, in the order of --node-rank; training survives as long as one of them does"
            )
        return [("127.0.0.1", 0)]
    stores = parse_stores(text)
    if len(stores) > nodes:
        raise LaunchError(
            f"--stores {show_stores(stores)}: {len(stores)} stores for --nnodes {nodes}: entry k is hosted by machine k"
        )
    return stores


def _command(options: argparse.Namespace) -> list[str]:
    script = options.script
    if options.no_python:
        if options.module:
            raise LaunchError("--module and --no-python: a module is run by Python")
        if shutil.which(script) is None:
            raise LaunchError(f"{script!r} is no program that can be run")
        return [script, *options.arguments]
    if options.module:
        return [sys.executable, "-u", "-m", script, *options.arguments]
    if not Path(script).is_file():
        raise LaunchError(f"there is no file {script!r} to run")
    return [sys.executable, "-u", script, *options.arguments]


def _streams(text: str, local: int) -> dict[int, Std]:
    try:
        found: dict[int, Std] = to_map(Std.from_str(text), local)
    except ValueError as error:
        raise LaunchError(f"-r and -t: {error}") from None
    return found


def _logs(options: argparse.Namespace, name: str) -> Path:
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}_", dir=options.log_dir))
