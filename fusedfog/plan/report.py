"""Several methods side by side: which are worth comparing, their table, how they scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from fusedfog.cost.loss import NEAR
from fusedfog.cost.network import Network
from fusedfog.cost.prices import CLOSE, Price, best, fastest, of_data_parallel, price
from fusedfog.cost.timeline import Prediction
from fusedfog.cost.units import show_bytes
from fusedfog.cost.workload import Workload
from fusedfog.plan.methods import Method, predict
from fusedfog.topology import inner_outer_exponential


def standard_methods(network: Network) -> list[Method]:
    """What is worth comparing on a network, from the most to the least thorough averaging per step."""
    several = network.local > 1 and network.machines > 1
    methods = [Method("ddp"), Method("ddp", collective="tree")]
    if several:
        methods += [
            Method("ddp", collective="hierarchical"),
            Method("atc", mesh=True),
            Method("awc", mesh=True),
        ]
    methods += [
        Method("awc", "exponential"),
        Method("awc", "exponential", wire="int8"),
        Method("atc", fused_backward=True),
        Method("awc", start=0.1),
        Method("awc"),
        Method("awc", Method("awc").graph(network), wire="int8"),
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


def prices(
    methods: Sequence[Method], predictions: Sequence[Prediction], network: Network, optimizer: str = "AdamW"
) -> list[Price]:
    """The price of each method, whose predictions these are; `optimizer` is "AdamW" or "SGD", for the loss."""
    parallel = [one.step_s for way, one in zip(methods, predictions, strict=True) if way.reduces]
    base = min(parallel, default=None)
    return [
        of_data_parallel(one, base)
        if method.reduces and base is not None
        else price(one, method.loss_way(network, optimizer), base)
        for method, one in zip(methods, predictions, strict=True)
    ]


def table(found: Sequence[Price], auto: Price | None = None, *, machines: bool = False) -> str:
    """One line per method with its three prices; with `machines`, also bytes that leave a machine per step.

    `auto` is the one of them that `topology="auto"` takes.
    """
    winner, quickest = best(found), fastest(found)
    width = max(len(one.prediction.method) for one in found) + 2
    head = f"    {'method':<{width}}{'step':>11}{'exposed':>11}{'efficiency':>12}{'sent':>10}{'by machine':>12}"
    lines = [(head if machines else head.removesuffix("  by machine")) + f"{'loss':>17}{'time':>9}"]
    for one_price in found:
        one = one_price.prediction
        marks = ">" * (one_price is auto) + "*" * (one_price is winner) + "+" * (one_price is quickest)
        line = (
            f"{marks:<3} {one.method:<{width}}{one.step_s * 1e3:>8.1f} ms{one.exposed_s * 1e3:>8.1f} ms"
            f"{one.efficiency:>12.1%}{show_bytes(one.sent):>10}"
        )
        line += f"{show_bytes(one.sent_by_machine):>12}" * machines
        lines.append(line + f"{one_price.shown_loss():>17}{one_price.shown_time():>9}")
    return "\n".join([*lines, *_notes(auto is not None)])


def _notes(auto: bool) -> list[str]:
    return [
        f"* least time to DDP's loss (within {NEAR} %), where that is known; + shortest step"
        + "; > what topology='auto' takes" * auto,
        "loss: above DDP's, each at its own best rate, measured on n ranks (byte models, bench/results/loss.md); ~ of a like "
        "method; - not measured",
        f"time: until within {NEAR} % of DDP's final loss, over DDP's own time; never: not in as many steps as its run",
    ]


def wire_advice(found: Sequence[Price], methods: Sequence[Method]) -> str:
    """That smaller messages would make steps shorter, if they would; nothing else. Communicating less often costs loss too."""
    gossip = [
        (price, way)
        for price, way in zip(found, methods, strict=True)
        if not way.reduces and way.communicate_every == 1
    ]
    plain = [price for price, way in gossip if way.wire is None and not way.start]
    small = [price for price, way in gossip if way.wire is not None]
    if not plain or not small:
        return ""
    one, other = fastest(small), fastest(plain)
    if one.seconds >= other.seconds * (1 - CLOSE):
        return ""
    return (
        f"the network is tight: {one.prediction.method} takes {one.seconds / other.seconds:.2f} of the step of "
        f"{other.prediction.method}. Try a smaller wire_dtype before communicate_every, which costs loss"
    )


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
