"""Several methods side by side: which are worth comparing, their table, how they scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from fusedfog.cost.network import Network
from fusedfog.cost.timeline import Prediction
from fusedfog.cost.workload import Workload
from fusedfog.plan.methods import Method, predict
from fusedfog.plan.units import show_bytes
from fusedfog.topology import inner_outer_exponential

CLOSE = 0.002
"""Steps that differ by less than this are equally fast."""


def standard_methods(network: Network) -> list[Method]:
    """What is worth comparing on a network, from the most to the least thorough averaging per step."""
    several = network.local > 1 and network.machines > 1
    methods = [Method("ddp"), Method("ddp", collective="tree")]
    if several:
        methods += [Method("ddp", collective="hierarchical"), Method("awc", mesh=True)]
    methods += [
        Method("awc", "exponential"),
        Method("atc", fused_backward=True),
        Method("awc"),
    ]
    if several:
        methods.append(Method("awc", inner_outer_exponential(network.machines, network.local)))
    return [_named(method, network) for method in (*methods, Method("awc", communicate_every=4))]


def _named(method: Method, network: Network) -> Method:
    # Default topologies depend on the size: the label says which one it is.
    graph = method.graph(network)
    return method if method.topology is not None or graph is None else replace(method, topology=graph)


def predict_all(
    workload: Workload, network: Network, methods: Sequence[Method], *, sigma: float = 0.0, seed: int = 0
) -> list[Prediction]:
    """`predict` for each method, all with the same compute times."""
    return [predict(workload, network, method, sigma=sigma, seed=seed) for method in methods]


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The fastest; among equally fast ones (to 0.2 %) the first."""
    limit = min(one.step_s for one in predictions) * (1 + CLOSE)
    return next(one for one in predictions if one.step_s <= limit)


def table(predictions: Sequence[Prediction], *, machines: bool = False) -> str:
    """One line per method, the best marked with an asterisk; with `machines`, also bytes that leave a machine per step."""
    winner = best(predictions)
    width = max(len(one.method) for one in predictions) + 2
    head = f"  {'method':<{width}}{'step':>11}{'exposed':>11}{'efficiency':>12}{'sent':>10}"
    lines = [head + f"{'by machine':>12}" * machines]
    for one in predictions:
        mark = "*" if one is winner else " "
        line = (
            f"{mark} {one.method:<{width}}{one.step_s * 1e3:>8.1f} ms{one.exposed_s * 1e3:>8.1f} ms"
            f"{one.efficiency:>12.1%}{show_bytes(one.sent):>10}"
        )
        lines.append(line + f"{show_bytes(one.sent_by_machine):>12}" * machines)
    lines.append("* fastest; methods listed first average more thoroughly per step")
    return "\n".join(lines)


@dataclass(frozen=True)
class Curve:
    """A method's efficiency against the number of ranks."""

    method: str
    ranks: tuple[int, ...]
    efficiency: tuple[float, ...]


def scaling(
    workload: Workload,
    network: Network,
    sizes: Sequence[int],
    methods: Callable[[Network], Mapping[str, Method]],
    *,
    sigma: float = 0.0,
) -> list[Curve]:
    """Weak scaling: the same work per rank on networks of `sizes` ranks with the same links and machines.

    Args:
        methods: the methods to follow on a network, by the name of their curve.
    """
    found: dict[str, dict[int, float]] = {}
    for size in sizes:
        grown = replace(network, ranks=size)
        for name, method in methods(grown).items():
            found.setdefault(name, {})[size] = predict(workload, grown, method, sigma=sigma).efficiency
    return [Curve(name, tuple(points), tuple(points.values())) for name, points in found.items()]


def sizes_up_to(network: Network, largest: int = 4096) -> list[int]:
    """Two machines, four, eight, ... of a network's kind, up to `largest` ranks or its own size if that is more."""
    sizes = {network.ranks}
    machines = 2
    while machines * network.local <= max(largest, network.ranks):
        sizes.add(machines * network.local)
        machines *= 2
    return sorted(sizes)


COLORS = ("#9b2226", "#ca6702", "#e9b44c", "#2b5c8a", "#0a9396", "#6a4c93", "#588157", "#555555", "#b56576")


def draw_curves(panel: Any, curves: Sequence[Curve]) -> None:
    """Efficiency against ranks on a matplotlib panel; the same method has the same colour and mark in every panel."""
    for number, curve in enumerate(curves):
        panel.plot(
            curve.ranks,
            curve.efficiency,
            marker="osD^vP*Xh"[number % 9],
            markersize=4,
            linewidth=1.5,
            color=COLORS[number % len(COLORS)],
            label=curve.method,
        )
    sizes = sorted({size for curve in curves for size in curve.ranks})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 6 else 0)
    panel.minorticks_off()
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("ranks")
    panel.set_ylabel("scaling efficiency")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def draw(path: str | PathLike[str], curves: Sequence[Curve], title: str) -> None:
    """One panel of curves, into a file whose suffix names the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_title(title, fontsize=10)
    draw_curves(panel, curves)
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path, dpi=200)
