"""``fusedfog plan``: the command."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from fusedfog.cost.links import INSIDE, Links, read_links
from fusedfog.cost.network import Link, Network
from fusedfog.cost.prices import Price, best, fastest
from fusedfog.cost.units import parse_count, parse_rate, parse_time, show_bytes, show_rate, show_time
from fusedfog.cost.workload import DEFAULT_BUCKET_MB, OPTIMIZER_TENSORS, PROFILES, Workload, read_layers
from fusedfog.plan.auto import explain_auto
from fusedfog.plan.methods import Method
from fusedfog.plan.report import (
    draw,
    predict_all,
    prices,
    scaling,
    sizes_up_to,
    standard_methods,
    table,
    wire_advice,
)
from fusedfog.topology import Topology
from fusedfog.topology.names import BY_MACHINES, BY_SIZE

EXAMPLE = """\
example:
  fusedfog plan --params 25.6e6 --step-ms 200 --ranks 128 --local 8 --bandwidth 25Gb/s --latency 30us

A step without communication is what one rank alone takes, optimizer included. `torchrun ... -m fusedfog calibrate` measures
links into a file for --links. Losses are those of small models: bench/results/loss.md."""

Value = TypeVar("Value")


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="predict step times of DDP and of decentralized methods on a network",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=_typed(parse_count), required=True, metavar="N", help="number of ranks")
    work = parser.add_argument_group("what a step computes")
    work.add_argument(
        "--params", type=_typed(parse_count), metavar="COUNT", help="parameters, for instance 25.6e6 or 7B"
    )
    work.add_argument(
        "--step-ms", type=float, metavar="MS", help="milliseconds of a step without communication (default: of --links)"
    )
    work.add_argument("--profile", choices=PROFILES, default="even", help="how both are shared among layers")
    work.add_argument("--layers", metavar="FILE.json", help="layers instead: [{params, forward_ms, backward_ms}, ...]")
    work.add_argument("--param-bytes", type=int, choices=(2, 4, 8), default=4, help="bytes of a parameter (default 4)")
    work.add_argument(
        "--optimizer", choices=OPTIMIZER_TENSORS, default="adam", help="whose pass is counted (default adam)"
    )
    work.add_argument("--memory-bandwidth", type=_typed(parse_rate), metavar="RATE", help="for passes; default: free")
    work.add_argument("--sigma", type=float, default=0.0, help="stragglers: log-normal compute times (default 0)")
    net = parser.add_argument_group("the network")
    net.add_argument("--links", metavar="FILE.json", help="links measured by `fusedfog calibrate`")
    net.add_argument("--bandwidth", type=_typed(parse_rate), metavar="RATE", help="of a machine's network card: 25Gb/s")
    net.add_argument("--latency", type=_typed(parse_time), metavar="TIME", help="of a message between machines: 30us")
    net.add_argument("--local", type=_typed(parse_count), metavar="L", help="ranks per machine (default 1)")
    net.add_argument("--inner-bandwidth", type=_typed(parse_rate), metavar="RATE", help="per rank (default 100GB/s)")
    net.add_argument("--inner-latency", type=_typed(parse_time), metavar="TIME", help="inside a machine (default 5us)")
    own = parser.add_argument_group("a method of your own, beside DDP (default: compare the usual ones)")
    own.add_argument("--algorithm", metavar="NAME", help="awc, atc, allreduce, ... as in the optimizers")
    own.add_argument("--topology", metavar="NAME", help="`fusedfog topologies` lists them")
    own.add_argument("--fused-backward", action="store_true")
    own.add_argument("--mesh", action="store_true", help="mix across machines only; the topology is of machines")
    own.add_argument("--communicate-every", type=int, default=1, metavar="H")
    own.add_argument("--wire", choices=("bf16", "fp8", "int8"), help="format of messages; default: fp32")
    own.add_argument(
        "--start", type=float, default=0.0, metavar="PART", help="of all steps that are data-parallel before"
    )
    own.add_argument("--bucket-mb", type=float, default=DEFAULT_BUCKET_MB, metavar="MB")
    parser.add_argument("--plot", metavar="FILE.png", help="draw efficiency against ranks, up to 4,096")
    parser.add_argument("--json", metavar="FILE.json", help="write the predictions")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Predict, print, and draw or write what was asked for; returns the exit status.

    Raises:
        ValueError: options that are missing or do not fit together; says which.
    """
    links = read_links(options.links) if options.links else None
    network, workload = _network(options, links), _workload(options, links)
    methods, optimizer = _methods(options, network), "AdamW" if options.optimizer == "adam" else "SGD"
    explained, auto = explain_auto(workload, network, options.algorithm, optimizer)
    names = [method.name for method in methods]
    if auto is not None and auto.name not in names:
        methods.append(auto)
        names.append(auto.name)
    predictions = predict_all(workload, network, methods, sigma=options.sigma)
    found = prices(methods, predictions, network, optimizer)
    taken = found[names.index(auto.name)] if auto is not None else None
    print(_heading(workload, network, options.sigma))
    print(table(found, taken, machines=network.local > 1))
    for line in filter(None, (wire_advice(found, methods), explained)):
        print(line)
    if options.json:
        _write(Path(options.json), found, taken, options)
    if options.plot:
        _plot(workload, network, options)
        print(f"drawing: {options.plot}")
    return 0


def _network(options: argparse.Namespace, links: Links | None) -> Network:
    local = options.local or (min(links.local, options.ranks) if links else 1)
    measured = links.across if links else None
    if links is not None and measured is None:
        if local == options.ranks:
            measured = links.inside  # One machine: nothing crosses its network card.
        elif options.bandwidth is None or options.latency is None:
            raise ValueError(
                f"{options.links} was measured on one machine of {links.local} ranks, which {options.ranks} ranks exceed: "
                f"give --bandwidth and --latency of the network, or --local {options.ranks} if all are on one machine"
            )
    across = _link("", options.bandwidth, options.latency, measured)
    inside = _link(
        "inner-", options.inner_bandwidth, options.inner_latency, (links.inside if links else None) or INSIDE
    )
    return Network(options.ranks, across, local, inside if local > 1 else None)


def _link(kind: str, bandwidth: float | None, latency: float | None, measured: Link | None) -> Link:
    if bandwidth is None and measured is None:
        raise ValueError(f"how fast is the network? give --{kind}bandwidth, for instance 25Gb/s, or --links FILE.json")
    if latency is None and measured is None:
        raise ValueError(f"how long does a small message take? give --{kind}latency, for instance 30us, or --links")
    return Link(
        latency if latency is not None else measured.latency_s if measured else 0.0,
        bandwidth if bandwidth is not None else measured.bandwidth if measured else math.inf,
    )


def _workload(options: argparse.Namespace, links: Links | None) -> Workload:
    memory = options.memory_bandwidth or (links.memory_bandwidth if links else math.inf)
    tensors = OPTIMIZER_TENSORS[options.optimizer]
    if options.layers:
        if options.params or options.step_ms is not None:
            raise ValueError("--layers holds parameters and times: leave --params and --step-ms out")
        return Workload(read_layers(options.layers, options.param_bytes), tensors, memory)
    measured = links.step_s if links else None
    step_s = options.step_ms / 1e3 if options.step_ms is not None else measured
    if options.params is None or step_s is None:
        raise ValueError("what does a step compute? give --params and --step-ms, or --layers FILE.json")
    if not 0 < step_s < math.inf:
        raise ValueError(f"--step-ms must be positive, got {options.step_ms}")
    size = options.params * options.param_bytes
    shares = PROFILES[options.profile]()
    return Workload.profiled(shares, size, step_s, optimizer_tensors=tensors, memory_bandwidth=memory)


def _methods(options: argparse.Namespace, network: Network) -> list[Method]:
    switches = options.fused_backward or options.mesh or options.communicate_every != 1 or options.wire or options.start
    if not (options.algorithm or options.topology or switches or options.bucket_mb != DEFAULT_BUCKET_MB):
        return standard_methods(network)
    own = Method(
        options.algorithm or "awc",
        _topology(options, network),
        fused_backward=options.fused_backward,
        communicate_every=options.communicate_every,
        mesh=options.mesh,
        bucket_mb=options.bucket_mb,
        wire=options.wire,
        start=options.start,
    )
    return [*standard_methods(network)[:2], own]


def _topology(options: argparse.Namespace, network: Network) -> Topology | None:
    name, size = options.topology, network.machines if options.mesh else network.ranks
    if name is None:
        return None
    if name in BY_MACHINES:
        if options.mesh:
            raise ValueError(f"{name} is between ranks; with --mesh the topology is between machines: take another")
        return BY_MACHINES[name](network.machines, network.local)
    if name not in BY_SIZE:
        raise ValueError(f"unknown topology {name!r}; `fusedfog topologies` lists all")
    return BY_SIZE[name](size)


def _heading(workload: Workload, network: Network, sigma: float) -> str:
    step = workload.forward_s + workload.backward_s + workload.pass_seconds(workload.size, workload.optimizer_tensors)
    place = f"{network.ranks} ranks"
    if network.local > 1 and network.inside is not None:
        place += f" on {network.machines} machines of {network.local}, inside "
        place += f"{show_rate(network.inside.bandwidth)} and {show_time(network.inside.latency_s)}"
    lines = [
        f"{place}; network {show_rate(network.across.bandwidth)}, {show_time(network.across.latency_s)}",
        f"model {show_bytes(workload.size)}, step without communication {show_time(step)}"
        + (f", log-normal with sigma {sigma:g}" if sigma else ""),
    ]
    return "\n".join(lines)


def _write(path: Path, found: Sequence[Price], auto: Price | None, options: argparse.Namespace) -> None:
    asked = {key: value for key, value in vars(options).items() if key not in ("run", "json", "plot")}
    rows = [
        {
            **asdict(price.prediction),
            "exposed_s": price.prediction.exposed_s,
            "efficiency": price.prediction.efficiency,
            "loss_above_percent": price.loss.above if price.loss is not None else None,
            "loss_measured_on": price.loss.ranks if price.loss is not None else None,
            "loss_is_its_own": price.own,
            "time_to_ddp_loss": price.time,
            "best": price is best(found),
            "fastest": price is fastest(found),
            "auto": price is auto,
        }
        for price in found
    ]
    path.write_text(json.dumps({"asked": asked, "rows": rows}, indent=1) + "\n")


def _plot(workload: Workload, network: Network, options: argparse.Namespace) -> None:
    def methods(grown: Network) -> Mapping[str, Method]:
        # Exponential and one-peer graphs have other labels at other sizes: curves go by place in the list.
        names = [method.name for method in _methods(options, network)]
        return dict(zip(names, _methods(options, grown), strict=True))

    if network.machines == 1:
        raise ValueError("--plot grows the number of machines: the network must have at least two")
    curves = scaling(workload, network, sizes_up_to(network), methods, sigma=options.sigma)
    straggling = f", sigma {options.sigma:g}" if options.sigma else ""
    title = f"{show_bytes(workload.size)} model, {show_rate(network.across.bandwidth)} per machine of {network.local}{straggling}"
    draw(options.plot, curves, title)


def _typed(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """An argparse type whose errors say what `parse` says."""

    def read(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
