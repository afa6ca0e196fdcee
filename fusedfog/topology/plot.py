"""Drawing: one circle of ranks per round."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import numpy as np

from fusedfog.topology.round import RoundSequence

MOST_ROUNDS = 8
MOST_LABELS = 64
COLUMNS = 4
HALF_WIDTH = 1.16

EDGE = "#2b5c8a"
NODE = "#f3efe6"
INK = "#222222"


def draw(topology: RoundSequence, path: str | PathLike[str]) -> None:
    """See `Topology.plot`: ranks clockwise from the top; lines for symmetric rounds, else arrows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from None
    rounds = MOST_ROUNDS if topology.period is None else min(MOST_ROUNDS, topology.period)
    columns = min(COLUMNS, rounds)
    rows = math.ceil(rounds / columns)
    side = 4.2 if rounds == 1 else 3.1
    figure = Figure(figsize=(columns * side, rows * (side + (0.25 if rounds > 1 else 0)) + 0.35), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(topology, rounds), fontsize=11, color=INK)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for step, panel in enumerate(panels):
        panel.set_axis_off()
        if step < rounds:
            _draw_round(topology, step, panel, side)
            if rounds > 1:
                panel.set_title(f"round {step}", fontsize=10, color=INK)
    figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.06)


def _title(topology: RoundSequence, rounds: int) -> str:
    text = repr(topology)
    if len(text) > 90:
        text = f"{topology.name}, {topology.size} ranks"
    if topology.period is None:
        return f"{text}: first {rounds} rounds"
    return f"{text}: first {rounds} of {topology.period} rounds" if rounds < topology.period else text


def _draw_round(topology: RoundSequence, step: int, panel: Any, side: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    n = topology.size
    angles = math.pi / 2 - 2 * math.pi * np.arange(n) / n
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labelled = n <= MOST_LABELS
    radius = min(0.105, 2.0 / n) if labelled else 0.5 / n
    points_per_unit = side * 72 / (2 * HALF_WIDTH)
    rounds = [topology.round(rank, step) for rank in range(n)]
    edges = [
        (sender, receiver, rounds[sender].recv.get(receiver) == weight)
        for receiver in range(n)
        for sender, weight in rounds[receiver].recv.items()
    ]
    width = float(np.clip(1.4 * (2 * n / max(1, len(edges))) ** 0.5, 0.25, 1.3))
    head = f"head_length={3 + 2 * width:.2f},head_width={1 + width:.2f}"
    exchange = "-" if all(mutual for _, _, mutual in edges) else f"<|-|>,{head}"
    for sender, receiver, mutual in edges:
        if mutual and sender > receiver:
            continue
        panel.add_patch(
            FancyArrowPatch(
                places[sender],
                places[receiver],
                arrowstyle=exchange if mutual else f"-|>,{head}",
                connectionstyle=f"arc3,rad={_bend(sender, receiver, n, radius):.3f}",
                shrinkA=radius * points_per_unit,
                shrinkB=radius * points_per_unit,
                linewidth=width,
                mutation_scale=1.0,
                color=EDGE,
                zorder=1,
            )
        )
    for rank, (x, y) in enumerate(places):
        _draw_rank(panel, rank, x, y, radius, points_per_unit, labelled)
    panel.set_xlim(-HALF_WIDTH, HALF_WIDTH)
    panel.set_ylim(-HALF_WIDTH, HALF_WIDTH)
    panel.set_aspect("equal")


def _bend(sender: int, receiver: int, n: int, radius: float) -> float:
    """Curvature towards the centre that keeps an edge clear of the ranks between its ends (matplotlib's ``rad``)."""
    clockwise = (receiver - sender) % n
    hop = min(clockwise, n - clockwise)
    half_chord = math.sin(math.pi * hop / n)
    middle = math.cos(math.pi * hop / n)
    wanted = middle if hop == 1 else min(0.92 * middle, 1 - 2.2 * radius)
    return math.copysign((middle - wanted) / half_chord, 1 if clockwise == hop else -1)


def _draw_rank(
    panel: Any, rank: int, x: float, y: float, radius: float, points_per_unit: float, labelled: bool
) -> None:
    from matplotlib.patches import Circle

    filling = NODE if labelled else INK
    panel.add_patch(
        Circle((x, y), radius, facecolor=filling, edgecolor=INK, linewidth=0.8 if labelled else 0, zorder=2)
    )
    if labelled:
        size = min(9.0, 1.0 * radius * points_per_unit)
        panel.text(x, y, str(rank), ha="center", va="center_baseline", fontsize=size, color=INK, zorder=3)
