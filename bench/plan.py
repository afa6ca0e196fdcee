"""How far `fusedfog plan` can be trusted, and what it says about many ranks: python bench/plan.py [--network FILE.json ...]

Three comparisons, each with what it was given: the measurements of `bench/network.py` (its files in results/, where there are
any), BlueFog's published throughputs on 32 to 128 GPUs, Decent-DP's published step times. Then scaling efficiency up to 4,096
ranks, without stragglers and with. Writes results/plan.json, plan.md and plan.png beside this file; about a minute.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from common import RESULTS, table

from fusedfog.cost.workload import OPTIMIZER_TENSORS, PROFILES
from fusedfog.plan import Layer, Link, Method, Network, Workload, predict, scaling
from fusedfog.plan.auto import explain_auto
from fusedfog.plan.report import Curve, draw_curves
from fusedfog.topology import inner_outer_exponential

RESNET50_BYTES = 4 * 25_557_032
TRANSFORMER_BASE_BYTES = 4 * 65_000_000

SIGMAS = (0.0, 0.1, 0.3)
SIZES = tuple(2**k for k in range(1, 13))


@dataclass(frozen=True)
class Row:
    """One predicted and one measured or published number, in the same unit."""

    case: str
    method: str
    published: float
    predicted: float
    used: bool = False
    """Whether the published number was an input, so that its error says nothing."""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1

    def cells(self, published: str) -> dict[str, str]:
        return {
            "case": self.case,
            "method": self.method,
            published: f"{self.published:.4g}",
            "predicted": f"{self.predicted:.4g}",
            "error": "(input)" if self.used else f"{self.error:+.1%}",
        }


@dataclass(frozen=True)
class Comparison:
    """A table of rows, the assumptions behind it and what it shows."""

    title: str
    given: str
    unit: str
    rows: list[Row]

    def errors(self) -> list[float]:
        return [abs(row.error) for row in self.rows if not row.used]

    def by_method(self) -> list[dict[str, str]]:
        """Median and largest error of each method."""
        found = []
        for method in dict.fromkeys(row.method for row in self.rows if not row.used):
            errors = [abs(row.error) for row in self.rows if row.method == method and not row.used]
            found.append(
                {"method": method, "median error": percent(statistics.median(errors)), "largest": percent(max(errors))}
            )
        return found

    def markdown(self) -> str:
        errors = self.errors()
        verdict = f"{len(errors)} predictions: median error {percent(statistics.median(errors))}, largest {percent(max(errors))}."
        body = table([row.cells(self.unit) for row in self.rows])
        return f"## {self.title}\n\n{self.given}\n\n{verdict}\n\n{table(self.by_method())}\n\n{body}"


def percent(value: float) -> str:
    return f"{value:.1%}"


# -- 1: measured on shaped links ---------------------------------------------------------------------------------------

MEASURED: dict[str, Method] = {
    "DDP": Method("ddp"),
    "allreduce, fused_backward": Method("allreduce", fused_backward=True),
    "AWC one-peer": Method("awc", "one_peer_exponential"),
    "AWC one-peer pairs": Method("awc", "one_peer_hypercube"),
    "AWC exponential": Method("awc", "exponential"),
    "AWC ring": Method("awc", "ring"),
    "ATC one-peer, fused_backward": Method("atc", "one_peer_exponential", fused_backward=True),
    "AWC hierarchical": Method("awc", "one_peer_exponential", mesh=True),
    "AWC exponential, int8": Method("awc", "exponential", wire="int8"),
    # Where links stay as they are, rounds stay in their order; and weights change numbers alone.
    "AWC adapt": Method("awc", "one_peer_exponential"),
    "AWC weights": Method("awc", "one_peer_exponential"),
}
"""Methods of bench/network.py by its names; the others there are not ours to predict."""

LOOPBACK = 1e9
"""B/s assumed of the unshaped links inside a machine; the shaped ones are 20 to 60 times slower."""

KINDS = {"device-like": None, "device-like, 9.4 MB": 25.0}
"""Kinds of compute that leave the CPU free -> MB of a bucket; None for those that the result names."""

GRADIENTS_SINCE = "2026-11-30"
"""The day from which on machines of `AWC hierarchical` average gradients; before, parameters."""


def against_measurements(paths: Sequence[Path]) -> Comparison | None:
    """Device-like compute on shaped links, where bench/network.py has been run; None without its files."""
    rows = [
        row
        for path in paths
        for file in [json.loads(path.read_text())]
        for result in file["results"]
        if result["kind"] in KINDS
        for row in _measured_rows(result, f"{path.stem}, run {result['run']}", file["machine"]["day"])
    ]
    if not rows:
        return None
    given = (
        "Nothing fitted. Given: the payload rate that the links are shaped to, the latency that a lone all-reduce of a bucket "
        "shows beyond its bytes, layer and bucket sizes, and the measured step of `local`, of which forward, backward and "
        "update have their measured shares. "
        f"Assumed: {LOOPBACK / 1e9:g} GB/s inside a machine. Measured: milliseconds per step, medians over rounds "
        "(`bench/network.py`, device-like compute)."
    )
    return Comparison("Against measurements on shaped links", given, "measured ms", rows)


def _medians(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: statistics.median(one["step_s"] for one in turns) for name, turns in result["turns"].items()}


def _measured_network(result: Mapping[str, Any]) -> Network:
    # A lone message of 4 bytes mostly waits for its process to wake up: 3 ms among eight processes on two cores. What an
    # all-reduce of one bucket takes beyond its bytes tells a hop's latency while gloo's threads are awake.
    ranks = result["machines"] * result["local"]
    moved = 2 * (ranks - 1) / ranks * result["bucket_bytes"] / result["rate_bytes_s"]
    alpha = max(0.0, result["allreduce_bucket_s"] - moved) / (2 * (ranks - 1))
    card = Link(alpha, result["rate_bytes_s"])
    local = result["local"]
    return Network(result["machines"] * local, card, local, Link(alpha, LOOPBACK) if local > 1 else None)


def _measured_rows(result: Mapping[str, Any], source: str, day: str) -> list[Row]:
    medians, network = _medians(result), _measured_network(result)
    workload = _measured_workload(result, medians["local"])
    bucket_mb = KINDS[result["kind"]] or result["bucket_bytes"] / 2**20
    inside = "gradients" if day >= GRADIENTS_SINCE else "parameters"
    return [
        Row(
            f"{result['network']}, transfer {result['transfer']:g} of a step ({source})",
            name,
            1e3 * medians[name],
            1e3 * predict(workload, network, replace(method, bucket_mb=bucket_mb, inside=inside)).step_s,
        )
        for name, method in (MEASURED | {"AWC auto": _automatic(network)}).items()
        if name in medians
    ]


def choices(paths: Sequence[Path]) -> list[dict[str, str]]:
    """What `topology="auto"` takes with `links=` on each measured network, beside the method with the shortest step there."""
    rows = []
    for path in paths:
        for result in json.loads(path.read_text())["results"]:
            if result["kind"] not in KINDS:
                continue
            medians, network = _medians(result), _measured_network(result)
            _, taken = explain_auto(_measured_workload(result, medians["local"]), network, optimizer="SGD")
            assert taken is not None
            own = [name for name, method in MEASURED.items() if name in medians and _alike(method, taken, network)]
            best = min((name for name in medians if name != "local"), key=medians.__getitem__)
            rows.append(
                {
                    "case": f"{result['network']}, transfer {result['transfer']:g} of a step ({path.stem}, run {result['run']})",
                    "taken": taken.name,
                    "measured ms": f"{1e3 * medians[own[0]]:.4g}" if own else "not measured",
                    "shortest step": best,
                    "ms": f"{1e3 * medians[best]:.4g}",
                    "over it": f"{medians[own[0]] / medians[best]:.3f}" if own else "",
                }
            )
    return rows


def _alike(one: Method, other: Method, network: Network) -> bool:
    graphs = [method.graph(network) for method in (one, other)]
    same = all(graph is not None and graph == graphs[0] for graph in graphs)
    return same and all(getattr(one, name) == getattr(other, name) for name in ("algorithm", "mesh", "wire", "fused_backward"))


def _automatic(network: Network) -> Method:
    """What `topology="auto"` takes there."""
    return MEASURED["AWC hierarchical" if network.local > 1 else "AWC one-peer"]


def _measured_workload(result: Mapping[str, Any], step_s: float) -> Workload:
    """A `local` step of `step_s`, its phases in the measured proportion; layers are all alike."""
    sizes, tensors = result["layer_bytes"], OPTIMIZER_TENSORS["momentum"]
    phases = [result[name] for name in ("forward_s", "backward_s", "update_s")]
    forward, backward, update = (step_s * phase / sum(phases) for phase in phases)
    layers = tuple(Layer(size, forward / len(sizes), backward / len(sizes)) for size in sizes)
    return Workload(layers, tensors, memory_bandwidth=tensors * sum(sizes) / update)


# -- 2: BlueFog --------------------------------------------------------------------------------------------------------

BLUEFOG: dict[int, dict[int, tuple[float, float, float]]] = {
    64: {32: (9500, 10000, 10500), 64: (17100, 20100, 21000), 128: (29900, 40400, 42800)},
    32: {32: (5250, 6760, 8590), 64: (10200, 13800, 16400), 128: (14600, 27800, 32700)},
}
"""batch -> GPUs -> images/s of Horovod, hierarchical, one-peer; bars of the repository's plots, +-1 %."""

IMAGES_PER_GPU = {64: 350.8, 32: 275.0}
"""Per second, alone: at 64 the plot's own ideal line (44.9k / 128), at 32 a quarter of the bar of 4 GPUs, read by eye."""

NVLINK = Link(10e-6, 130e9)
CARD = Link(30e-6, 25e9 / 8)
BLUEFOG_METHODS = ("Horovod", "hierarchical", "one-peer")


def bluefog_workload(batch: int) -> Workload:
    return Workload.profiled(PROFILES["resnet50"](), RESNET50_BYTES, batch / IMAGES_PER_GPU[batch])


@cache
def images(batch: int, gpus: int, method: str, card: Link) -> float:
    """Images per second of 8-GPU machines."""
    network = Network(gpus, card, 8, NVLINK)
    chosen = {
        "Horovod": Method("ddp"),
        "hierarchical": Method("awc", "one_peer_exponential", mesh=True, inside="parameters"),
        "one-peer": Method("awc", inner_outer_exponential(network.machines, 8)),
    }[method]
    return batch * gpus / predict(bluefog_workload(batch), network, chosen).step_s


def fit_card() -> Link:
    """Effective alpha and beta under Horovod, from its batch-64 bars at 32 and 64 GPUs alone."""

    def mismatch(card: Link) -> float:
        return sum((images(64, gpus, "Horovod", card) / BLUEFOG[64][gpus][0] - 1) ** 2 for gpus in (32, 64))

    grid = itertools.product([k * 20e-6 for k in range(1, 61)], [k * 0.1e9 for k in range(8, 32)])
    return min((Link(latency, rate) for latency, rate in grid), key=mismatch)


def against_bluefog() -> tuple[Comparison, Link]:
    """Throughputs of BlueFog's paper (arXiv 2111.04287), and the link fitted to two of Horovod's."""
    fitted = fit_card()
    cards = {"Horovod": fitted, "hierarchical": CARD, "one-peer": CARD}
    rows = [
        Row(
            f"batch {batch}, {gpus} GPUs",
            method,
            BLUEFOG[batch][gpus][column],
            images(batch, gpus, method, cards[method]),
            used=method == "Horovod" and batch == 64 and gpus < 128,
        )
        for batch in BLUEFOG
        for gpus in BLUEFOG[batch]
        for column, method in enumerate(BLUEFOG_METHODS)
    ]
    nominal = images(64, 128, "Horovod", CARD) / (128 * IMAGES_PER_GPU[64])
    ours = images(64, 128, "Horovod", fitted) / (128 * IMAGES_PER_GPU[64])
    gossip = images(64, 128, "one-peer", CARD) / (128 * IMAGES_PER_GPU[64])
    given = (
        "ResNet-50 on p3.16xlarge: 8 V100 per machine, 25 Gb/s, layers by their multiply-adds, steps of 182 ms (batch 64: the "
        "plot's ideal line) and 116 ms (batch 32: a quarter of the 4-GPU bar, read by eye). Assumed: 30 us between machines, "
        "NVLink 130 GB/s and 10 us. For gossip nothing is fitted; it is our schedule that is predicted (one-peer: inner-outer "
        "exponential, BlueFog's default there), not BlueFog's, whose hosts, negotiation and mixing passes cost time of their "
        "own, most of all when hierarchical. Horovod is taken for DDP with a ring. With nominal links it would reach "
        f"{nominal:.0%} at batch 64 on 128 GPUs (published 67 %): presumably a ring over TCP falls short of line rate and "
        "Horovod's coordinator adds delays that grow with ranks. Two effective numbers are fitted, to its bars of 32 and 64 GPUs "
        f"at batch 64: {fitted.bandwidth * 8 / 1e9:.0f} Gb/s and {fitted.latency_s * 1e6:.0f} us; its other four are predicted. "
        f"Headline, 128 GPUs at batch 64: predicted {gossip:.0%} against {ours:.0%}, published 95 % against 67 %."
    )
    return Comparison("Against BlueFog's published throughput", given, "published img/s", rows), fitted


# -- 3: Decent-DP ------------------------------------------------------------------------------------------------------

DECENT: dict[str, tuple[int, Link, Link, dict[int, tuple[float, float, float]]]] = {
    "8 x T4 per node, 100 Gb/s": (
        8,
        Link(3e-6, 100e9 / 8),
        Link(5e-6, 8e9),
        {16: (372.5, 314.8, 312.3), 32: (225.5, 178.8, 178.8), 64: (167.3, 123.1, 122.2)},
    ),
    "4 x A100 per node, 100 Gb/s": (
        4,
        Link(3e-6, 100e9 / 8),
        Link(5e-6, 200e9),
        {8: (73.0, 63.4, 61.7), 16: (54.8, 46.8, 45.8), 32: (51.5, 44.7, 43.7)},
    ),
    "4 x A40 per node, 25 Gb/s": (
        4,
        Link(30e-6, 25e9 / 8),
        Link(5e-6, 20e9),
        {8: (166.1, 122.8, 122.0), 16: (195.5, 97.4, 78.9), 32: (188.5, 110.8, 67.9)},
    ),
}
"""cluster -> ranks per node, links across and inside, GPUs -> ms per iteration of all-reduce, Decent(Exp), Decent(AER)."""


def against_decent() -> Comparison:
    """Iteration times of Decent-DP's figure 6."""
    rows = []
    for cluster, (local, across, inside, published) in DECENT.items():
        for gpus, (reduced, exponential, alternating) in published.items():
            network = Network(gpus, across, local, inside)
            workload = Workload.profiled(PROFILES["transformer"](), TRANSFORMER_BASE_BYTES, alternating / 1e3)
            pairs = Method("awc", "one_peer_hypercube", fused_backward=True)
            for name, milliseconds, method in (("all-reduce", reduced, Method("ddp")), ("Exp", exponential, pairs)):
                predicted = 1e3 * predict(workload, network, method).step_s
                rows.append(Row(f"{cluster}, {gpus} GPUs", name, milliseconds, predicted))
    given = (
        "Transformer-base of 65M fp32 parameters. Given: nominal links (3 us InfiniBand, 30 us Ethernet; inside 8 GB/s on T4, "
        "200 on A100, 20 on A40, all assumed), and as the step without communication the published time of Decent(AER), the "
        "best of the row. The A40 rows cannot be right as given: with Decent(Exp) four GPUs of a node send the model through "
        "one 25 Gb/s card every other step, 330 ms for 65M fp32 parameters, and the published mean of a step is 97 ms. Either "
        "the nodes had more than one such port or fewer bytes travelled; the text does not say, and nothing was adjusted."
    )
    return Comparison("Against Decent-DP's published step times", given, "published ms", rows)


# -- curves ------------------------------------------------------------------------------------------------------------


def curve_methods(network: Network) -> dict[str, Method]:
    """What the curves follow, on a flat network of a power of two."""
    return {
        "DDP, ring": Method("ddp"),
        "DDP, tree": Method("ddp", collective="tree"),
        "AWC, exponential": Method("awc", "exponential"),
        "ATC, one-peer, fused_backward": Method("atc", "one_peer_exponential", fused_backward=True),
        "AWC, one-peer": Method("awc", "one_peer_exponential"),
        "AWC, one-peer, every 4 steps": Method("awc", "one_peer_exponential", communicate_every=4),
    }


def curves() -> dict[float, list[Curve]]:
    """Efficiency against ranks for each sigma: ResNet-50 at batch 64, one GPU per machine, 25 Gb/s, 30 us."""
    workload = bluefog_workload(64)
    return {sigma: scaling(workload, Network(2, CARD), SIZES, curve_methods, sigma=sigma) for sigma in SIGMAS}


def curve_table(found: Mapping[float, Sequence[Curve]], sizes: Sequence[int] = (8, 128, 1024, 4096)) -> str:
    rows = []
    for sigma, several in found.items():
        for curve in several:
            values = dict(zip(curve.ranks, curve.efficiency, strict=True))
            rows.append({"sigma": f"{sigma:g}", "method": curve.method} | {f"n={n}": percent(values[n]) for n in sizes})
    return table(rows)


# -- report ------------------------------------------------------------------------------------------------------------


def draw(path: Path, comparisons: Sequence[Comparison], fitted: Link, found: Mapping[float, Sequence[Curve]]) -> None:
    """Above: predicted against measured, and BlueFog's bars; below: the curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    scatter, *bars = above.subplots(1, 3)
    draw_scatter(scatter, comparisons)
    for panel, batch in zip(bars, BLUEFOG, strict=True):
        draw_bluefog(panel, batch, fitted)
    panels = below.subplots(1, len(found), sharey=True)
    for panel, (sigma, several) in zip(panels, found.items(), strict=True):
        draw_curves(panel, several)
        panel.set_title(
            "all ranks equally fast" if sigma == 0 else f"log-normal compute times, $\\sigma$ = {sigma:g}", fontsize=10
        )
        if sigma != 0:
            panel.set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    below.suptitle("Predicted scaling: ResNet-50, 182 ms per step, one GPU per machine, 25 Gb/s, 30 µs", fontsize=11)
    figure.savefig(path, dpi=110)


def draw_scatter(panel: Any, comparisons: Sequence[Comparison]) -> None:
    """Predicted over published, with a band of 10 %, all comparisons on relative axes."""
    colors = {"Against measurements on shaped links": "#2b5c8a", "Against BlueFog's published throughput": "#9b2226"}
    labels = {"#2b5c8a": "measured here", "#9b2226": "BlueFog, published", "#e9a03b": "Decent-DP, published"}
    for comparison in comparisons:
        color = colors.get(comparison.title, "#e9a03b")
        errors = sorted(row.error for row in comparison.rows if not row.used)
        share = [(k + 0.5) / len(errors) for k in range(len(errors))]
        panel.plot(errors, share, drawstyle="steps-mid", marker="o", markersize=3, color=color, label=labels[color])
    panel.axvspan(-0.1, 0.1, color="#888888", alpha=0.15, linewidth=0)
    panel.axvline(0, color="#444444", linewidth=0.8)
    panel.set_xlim(-0.5, 1.05)
    panel.set_xticks([-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0])
    panel.tick_params(axis="x", labelsize=8)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}" if value else "0")
    panel.set(xlabel="predicted / measured or published - 1", ylabel="share of predictions")
    panel.set_title("Error of the predictions (grey: 10 %)", fontsize=10)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def draw_bluefog(panel: Any, batch: int, fitted: Link) -> None:
    """Published points and predicted lines."""
    gpus = sorted(BLUEFOG[batch])
    looks = {"Horovod": ("#9b2226", fitted), "hierarchical": ("#e9a03b", CARD), "one-peer": ("#2b5c8a", CARD)}
    for column, (method, (color, card)) in enumerate(looks.items()):
        lines = [images(batch, n, method, card) / (n * IMAGES_PER_GPU[batch]) for n in gpus]
        dots = [BLUEFOG[batch][n][column] / (n * IMAGES_PER_GPU[batch]) for n in gpus]
        style = (0, (4, 4)) if method == "hierarchical" else "-"
        order = 3 if method == "hierarchical" else 2  # dashes on the line they coincide with
        panel.plot(gpus, lines, linestyle=style, zorder=order, color=color, linewidth=1.5, label=f"{method}, predicted")
        panel.plot(gpus, dots, "o", color=color, markersize=5, label=f"{method}, published")
        if method == "Horovod" and batch == 64:
            panel.plot(gpus[:2], dots[:2], "o", color=color, markerfacecolor="white", markersize=5, zorder=4)
    panel.set_xscale("log", base=2)
    panel.set_xticks(gpus, [str(n) for n in gpus])
    panel.minorticks_off()
    panel.set_ylim(0, 1.08)
    panel.set(xlabel="GPUs (8 per machine)", ylabel="scaling efficiency")
    panel.set_title(f"BlueFog, ResNet-50, batch {batch}{' (hollow: fitted to)' if batch == 64 else ''}", fontsize=10)
    panel.legend(fontsize=7.5, frameon=False, loc="lower left", ncols=2)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Compare, predict, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = sorted(RESULTS.glob("network*.json"))
    parser.add_argument("--network", type=Path, nargs="*", default=written, help="what bench/network.py wrote")
    options = parser.parse_args()
    measured = against_measurements(options.network)
    bluefog, fitted = against_bluefog()
    comparisons = [one for one in (measured, bluefog, against_decent()) if one is not None]
    found = curves()
    parts = ["# How far `fusedfog plan` can be trusted (`bench/plan.py`)"]
    if measured is None:
        parts.append("Not compared with measurements on shaped links: run `bench/network.py` first.")
    parts += [one.markdown() for one in comparisons]
    taken = (
        "With `links=`, SGD with momentum: the least time to DistributedDataParallel's loss by prediction, beside the method "
        f"with the shortest measured step. Machines averaged parameters when they were measured before {GRADIENTS_SINCE}."
    )
    parts.append(f"## What auto takes on the measured networks\n\n{taken}\n\n{table(choices(options.network))}")
    parts.append(f"## Scaling efficiency, ResNet-50 at 182 ms per step, 25 Gb/s, 30 us\n\n{curve_table(found)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    (RESULTS / "plan.md").write_text(text)
    data = {
        "comparisons": [asdict(one) for one in comparisons],
        "curves": {f"{sigma:g}": [asdict(curve) for curve in several] for sigma, several in found.items()},
    }
    (RESULTS / "plan.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(RESULTS / "plan.png", comparisons, fitted, found)


if __name__ == "__main__":
    main()
