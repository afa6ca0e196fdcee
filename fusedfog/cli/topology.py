"""`fusedfog topology NAME -n N` and `fusedfog topologies`: figures, matrices and drawings of graphs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from fusedfog.topology import Topology, named
from fusedfog.topology.guide import SUMMARIES, accepted_by, guide_table
from fusedfog.topology.names import BY_MACHINES, BY_SIZE

LARGEST_PRINTED = 64
BYTES_PER_PARAMETER = 4


def add_topology(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `fusedfog topology`."""
    parser = commands.add_parser("topology", help="figures, matrices and a drawing of one topology")
    parser.add_argument("name", metavar="NAME", help="for instance exponential; `fusedfog topologies` lists them")
    parser.add_argument("-n", type=int, metavar="N", help="number of ranks")
    parser.add_argument("--machines", type=int, metavar="M", help="number of machines, for hierarchical topologies")
    parser.add_argument("--local", type=int, metavar="L", help="ranks per machine, for hierarchical topologies")
    parser.add_argument("--plot", metavar="FILE.png", help="draw each round (at most 8) into this file")
    parser.add_argument("--matrix", action="store_true", help=f"print W of each round (up to {LARGEST_PRINTED} ranks)")
    parser.add_argument(
        "--params",
        type=_count,
        action="append",
        metavar="COUNT",
        help="model size for the bytes per step, for instance 25e6 (the default); may be repeated",
    )
    parser.set_defaults(run=_run_topology)


def add_topologies(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `fusedfog topologies`."""
    parser = commands.add_parser("topologies", help="list all topologies")
    parser.add_argument("--table", action="store_true", help="as a markdown table that tells which one to pick")
    parser.set_defaults(run=_run_topologies)


def _count(text: str) -> int:
    try:
        count = float(text)
    except ValueError:
        count = -1.0
    if not (1 <= count < 1e18 and count == int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters")
    return int(count)


def _run_topology(options: argparse.Namespace) -> int:
    topology = _chosen(options)
    for label, value in _figures(topology, options.params or [25_000_000]):
        print(f"{label:<26}{value}")
    if options.matrix:
        _print_matrices(topology)
    if options.plot:
        topology.plot(options.plot)
        print(f"{'drawing':<26}{options.plot}")
    return 0


def _chosen(options: argparse.Namespace) -> Topology:
    if options.name not in BY_MACHINES:
        if options.machines is not None or options.local is not None:
            raise ValueError(f"--machines and --local are for {', '.join(BY_MACHINES)}; give -n for {options.name}")
        if options.n is None:
            raise ValueError("how many ranks? give -n N")
        if options.name not in BY_SIZE:
            raise ValueError(f"unknown topology {options.name!r}; `fusedfog topologies` lists all")
        return named(options.name, options.n)
    if options.machines is None or options.local is None:
        raise ValueError(f"{options.name} needs --machines M and --local L (ranks per machine)")
    if options.n is not None and options.n != options.machines * options.local:
        raise ValueError(f"{options.machines} machines of {options.local} ranks are not -n {options.n}; leave -n out")
    return BY_MACHINES[options.name](options.machines, options.local)


def _figures(topology: Topology, model_sizes: Sequence[int]) -> list[tuple[str, str]]:
    period = topology.period
    doubly = topology.is_doubly_stochastic()
    exact = topology.rounds_to_exact()
    degree = topology.max_degree
    figures = [
        ("topology", repr(topology)),
        ("ranks", str(topology.size)),
        ("degree", f"{degree} (most messages a rank sends or receives in a round)"),
        ("period", "endless" if period is None else _plural(period, "round")),
        ("doubly stochastic", "yes" if doubly else "no"),
        ("symmetric", "yes" if topology.is_symmetric() else "no"),
        ("spectral gap", f"{topology.spectral_gap():.6g}" + ("" if topology.is_static else " (mean rate per round)")),
    ]
    if period is not None:
        factor = 0.0 if exact is not None and exact <= period else topology.consensus_factor(period)
        figures.append(("contraction per period", f"{factor:.6g}"))
    figures.append(("rounds to exact average", "never" if exact is None else str(exact)))
    for count in model_sizes:
        sent = degree * count * BYTES_PER_PARAMETER
        figures.append(("bytes per step", f"{sent:,} for {count:,} parameters in fp32, from the busiest rank"))
    figures.append(("algorithms", accepted_by(topology)))
    return figures


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _print_matrices(topology: Topology) -> None:
    if topology.size > LARGEST_PRINTED:
        raise ValueError(f"--matrix prints up to {LARGEST_PRINTED} ranks, not {topology.size}")
    with np.printoptions(precision=4, suppress=True, linewidth=10_000, threshold=LARGEST_PRINTED**2 + 1):
        for step in range(8 if topology.period is None else topology.period):
            print(f"W({step}) =\n{topology.matrix(step)}")


def _run_topologies(options: argparse.Namespace) -> int:
    if options.table:
        print(guide_table())
        return 0
    width = max(map(len, SUMMARIES)) + 2
    for name in (*BY_SIZE, *BY_MACHINES):
        print(f"{name:<{width}}{SUMMARIES[name]}{' (--machines, --local)' if name in BY_MACHINES else ''}")
    return 0
