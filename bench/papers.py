"""Claims of papers on decentralized optimization that can be checked on a laptop, checked: python bench/papers.py

Every run is `fusedfog.simulate`: the rules that real ranks run, on virtual ranks in one process. Prints a table and writes
results/papers.json and results/papers.png beside this file. Unless a row says otherwise: n = 8 ranks, d = 10,
least squares with 20 samples a rank and different targets (heterogeneous data), uniform ring weights 1/3, float64. "Error"
is the root mean square over ranks of ||x_i - x*||. Expected numbers are theory (a formula, or the fixed point by a linear
solve), or the paper's statement in words where it gives no number.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import torch
from common import RESULTS, machine
from torch import Tensor

from fusedfog import Outer, topology
from fusedfog.simulate import Quadratics, Trajectory, simulate

P = Quadratics.random(8, 10, 20)
RING = topology.ring(8)
STARTS = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 10)))
SMALL = 1e-9
"""What counts as zero: float64 rounding after thousands of steps, and what has not yet converged."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    paper: str
    claim: str
    expected: str
    measured: str
    verdict: str


CURVES: dict[str, Any] = {}
"""What the plots show, filled by the checks below."""


def row(paper: str, claim: str, expected: str, measured: str, holds: bool) -> Row:
    return Row(paper, claim, expected, measured, "holds" if holds else "FAILS")


def numbers(values: Any, digits: int = 3) -> str:
    return " / ".join(f"{value:.{digits}g}" for value in values)


def run(algorithm: str, graph: Any = RING, steps: int = 4000, lr: Any = 0.005, **options: Any) -> Trajectory:
    """A run on the standard problem from the standard starts, recorded at the end only."""
    options = {"problem": P, "x0": STARTS, "record_every": max(steps, 1)} | options
    problem = options.pop("problem")
    return simulate(problem, graph.size, graph, algorithm, steps=steps, lr=lr, **options)


def close(values: Any, wanted: Any, relative: float) -> bool:
    return bool(np.allclose(list(values), list(wanted), rtol=relative, atol=0))


def falls_linearly(values: list[float], rates: list[float]) -> bool:
    """Whether values shrink in proportion to the rates, within a quarter in the exponent."""
    exponent = math.log(values[0] / values[-1]) / math.log(rates[0] / rates[-1])
    return 0.75 < exponent < 1.25


def limit_atc(lr: float) -> float:
    """Error of diffusion's fixed point on the ring: (I - Wt (I - lr H)) x = lr Wt c, Wt = W kron I, H block diagonal."""
    n, d = P.linear.shape
    w = torch.kron(torch.from_numpy(RING.matrix()), torch.eye(d, dtype=torch.float64))
    h, eye = torch.block_diag(*P.hessians), torch.eye(n * d, dtype=torch.float64)
    x = torch.linalg.solve(eye - w @ (eye - lr * h), lr * w @ P.linear.reshape(-1)).view(n, d)
    return float((x - P.minimiser).norm()) / math.sqrt(n)


# -- topologies ------------------------------------------------------------------------------------------------------


def consensus_after(graph: topology.Topology, steps: int) -> list[float]:
    """Consensus distance along pure averaging (lr = 0), relative to the start."""
    x0 = torch.from_numpy(np.random.default_rng(2).standard_normal((graph.size, 4)))
    path = simulate(Quadratics.random(graph.size, 4), graph.size, graph, "atc", steps=steps, lr=0.0, x0=x0)
    return [value / path.consensus[0] for value in path.consensus]


def one_peer() -> list[Row]:
    paper = "Ying et al. 2021, exponential graphs (arXiv 2110.13363)"
    powers = {n: consensus_after(topology.one_peer_exponential(n), n.bit_length() - 1)[-1] for n in (8, 32, 256)}
    others = {n: consensus_after(topology.one_peer_exponential(n), (n - 1).bit_length())[-1] for n in (6, 12, 24)}
    base = {n: consensus_after(g, g.period or 1)[-1] for n in (6, 12, 24) for g in [topology.base_graph(n)]}
    sizes = np.arange(2, 66, 2)
    gaps = np.array([topology.exponential(int(n)).spectral_gap() for n in sizes])
    theory = 2 / (1 + np.ceil(np.log2(sizes)))
    odd = [topology.exponential(n).spectral_gap() - 2 / (1 + math.ceil(math.log2(n))) for n in range(3, 65, 2)]
    CURVES["consensus"] = {
        name: consensus_after(topology.named(name, 32), 20)
        for name in ("ring", "exponential", "one_peer_exponential", "base_graph")
    }
    # fmt: off
    return [
        row(paper, "one-peer exponential averages exactly in log2 n steps, n = 8, 32, 256", "0",
            numbers(powers.values(), 1), max(powers.values()) < 1e-14),
        row(paper, "and does not where n is no power of two (n = 6, 12, 24)", "> 0", numbers(others.values()),
            min(others.values()) > 1e-3),
        row("Takezawa et al. 2023, Base-(k+1) graph",
            "averages exactly at any n with one peer a step (n = 6, 12, 24)", "0", numbers(base.values(), 1),
            max(base.values()) < 1e-14),
        row(paper, "static exponential: gap 2/(1+ceil log2 n) for even n (2..64), larger for odd n",
            "difference 0; > 0", f"{abs(gaps - theory).max():.1g}; least {min(odd):.3g}",
            abs(gaps - theory).max() < 1e-10 and min(odd) > 0),
    ]
    # fmt: on


# -- momentum and bias -----------------------------------------------------------------------------------------------


def momentum() -> list[Row]:
    lr, betas = 0.005, (0.0, 0.5, 0.8, 0.9)
    limits = {
        name: [run(name, momentum=b, steps=6000).distances[-1] for b in betas]
        for name in ("atc", "decentlam", "quasi_global")
    }
    theory = [limit_atc(lr / (1 - b)) for b in betas]
    CURVES["momentum"] = {"betas": betas, **limits}
    rates = [0.02, 0.01, 0.005]
    diffusion = [run("atc", lr=a, steps=round(40 / a)).distances[-1] for a in rates]
    # fmt: off
    return [
        row("Lian et al. 2017, D-PSGD", f"bias of diffusion (ATC) is O(lr), lr = {numbers(rates)}",
            numbers(map(limit_atc, rates), 4), numbers(diffusion, 4),
            close(diffusion, map(limit_atc, rates), 1e-6) and falls_linearly(diffusion, rates)),
        row("Yuan et al. 2021, DecentLaM", f"DmSGD's bias is that of lr/(1-b): b = {numbers(betas)}",
            numbers(theory, 4), numbers(limits["atc"], 4), close(limits["atc"], theory, 1e-4)),
        row("Yuan et al. 2021, DecentLaM", "DecentLaM's limit does not depend on b", numbers([theory[0]] * 4, 4),
            numbers(limits["decentlam"], 4), close(limits["decentlam"], [theory[0]] * 4, 1e-4)),
        row("Lin et al. 2021, quasi-global momentum", "QG-DSGDm's limit does not depend on b",
            numbers([theory[0]] * 4, 4), numbers(limits["quasi_global"], 4),
            close(limits["quasi_global"], [theory[0]] * 4, 1e-4)),
    ]
    # fmt: on


def exact_methods() -> list[Row]:
    lr, steps = 0.02, 3000
    paths = {
        name: run(name, steps=steps, lr=lr, record_every=20)
        for name in ("atc", "awc", "exact_diffusion", "extra", "gradient_tracking")
    }
    CURVES["exact"] = {name: (path.steps, path.distances) for name, path in paths.items()}
    ends = {name: path.distances[-1] for name, path in paths.items()}
    dropping = run("exact_diffusion", lr=lambda t: lr if t < 1500 else lr / 5, steps=8000).distances[-1]
    one_peer_graph = topology.one_peer_exponential(8)
    moving = run("gradient_tracking", one_peer_graph, lr=lr, steps=steps).distances[-1]
    heavy = run("momentum_tracking", one_peer_graph, lr=lr / 10, momentum=0.9, steps=steps).distances[-1]
    adam = run("gradient_tracking", lr=lambda t: 0.01 * 0.9985**t, steps=12000, optimizer="Adam", amsgrad=True)
    # fmt: off
    return [
        row("Yuan et al. 2018, exact diffusion", f"reaches x* where diffusion stalls (ring, lr = {lr})",
            f"0, diffusion {limit_atc(lr):.4g}", f"{ends['exact_diffusion']:.1g}, diffusion {ends['atc']:.4g}",
            ends["exact_diffusion"] < SMALL and close([ends["atc"]], [limit_atc(lr)], 1e-6)),
        row("Tang et al. 2018, D2", "still x* after lr drops in mid-run (as a_k (g_k - g_(k-1)) it would not be)",
            "0", f"{dropping:.1g}", dropping < SMALL),
        row("Shi et al. 2015, EXTRA", "reaches x* (ring)", "0", f"{ends['extra']:.1g}", ends["extra"] < SMALL),
        row("Nedic et al. 2017, DIGing", "gradient tracking reaches x*: ring; one-peer exponential (time-varying)",
            "0; 0", f"{ends['gradient_tracking']:.1g}; {moving:.1g}",
            max(ends["gradient_tracking"], moving) < SMALL),
        row("Takezawa et al. 2023, momentum tracking", "reaches x* with b = 0.9 on one-peer exponential", "0",
            f"{heavy:.1g}", heavy < SMALL),
        row("Carnevale et al. 2020, GT-Adam", "reaches x* where D-Adam is O(1) off (ring, decaying lr)", "0",
            f"{adam.distances[-1]:.1g}", adam.distances[-1] < 1e-6),
        Row("Nedic et al. 2017, push-DIGing", "exact on directed graphs with column-stochastic weights", "0", "-",
            "not implemented: push_sum is biased, O(lr)"),
    ]
    # fmt: on


# -- noise -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """`copies` independent noisy runs of one problem side by side: rows are [copies * d]."""

    problem: Quadratics
    copies: int
    noise: float

    @property
    def minimiser(self) -> Tensor:
        return self.problem.minimiser.repeat(self.copies)

    def grad(self, step: int, X: Tensor) -> Tensor:
        n, d = self.problem.linear.shape
        x = X.view(n, self.copies, d)
        exact = x @ self.problem.hessians - self.problem.linear[:, None]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=X.dtype)
        return (exact + self.noise * noise).view(X.shape)


def spread_to(problem: Quadratics, heterogeneity: float) -> Quadratics:
    """The same Hessians and x* with (1/n) sum ||grad f_i(x*)||^2 as given."""
    at_best = torch.einsum("nij,j->ni", problem.hessians, problem.minimiser) - problem.linear
    now = float(at_best.square().sum(1).mean())
    return Quadratics(problem.hessians, problem.linear + (1 - math.sqrt(heterogeneity / now)) * at_best)


def deviation(problem: Quadratics, graph: topology.Topology, algorithm: str, lr: float) -> float:
    """Steady-state mean-square deviation per rank, over 60 runs and the second half of each."""
    noisy = Copies(problem, 60, 1.0)
    steps = round(40 / lr)
    path = simulate(
        noisy, graph.size, graph, algorithm, steps=steps, lr=lr, x0=noisy.minimiser, record_every=steps // 40
    )
    return float(np.mean(np.square(path.distances[20:]))) / noisy.copies


def noise() -> list[Row]:
    paper = "Yuan et al. 2020, bias correction (TSP)"
    n = 20
    base = Quadratics.random(n, 5, 50)
    graphs = {
        "ring": topology.ring(n),
        "nearly full": topology.from_matrix(0.9 * np.full((n, n), 1 / n) + 0.1 * np.eye(n)),
    }
    cases = [("ring", 5.3), ("ring", 0.0), ("nearly full", 5.3)]
    rates = (0.05, 0.02)
    ratios: dict[tuple[str, float], list[float]] = {}
    for graph, b2 in cases:
        problem = spread_to(base, b2)
        both = {
            name: [deviation(problem, graphs[graph], name, lr) for lr in rates] for name in ("atc", "exact_diffusion")
        }
        CURVES.setdefault("noise", {})[f"{graph}, b2 = {b2:g}"] = both
        ratios[graph, b2] = [ed / atc for ed, atc in zip(both["exact_diffusion"], both["atc"], strict=True)]
    # fmt: off
    return [
        row(paper,
            "MSD under noise, exact diffusion / diffusion, sparse and heterogeneous (ring of 20, b2 = 5.3), "
            f"lr = {numbers(rates)}", "well below 1", numbers(ratios["ring", 5.3]), max(ratios["ring", 5.3]) < 0.5),
        row(paper, "the same, homogeneous (b2 = 0): exact diffusion is worse", "above 1",
            numbers(ratios["ring", 0.0]), min(ratios["ring", 0.0]) > 1),
        row(paper, "the same, near-complete graph (rho = 0.1): worse, gap closing with lr", "above 1, falling",
            numbers(ratios["nearly full", 5.3]),
            ratios["nearly full", 5.3][0] > ratios["nearly full", 5.3][1] > 1),
    ]
    # fmt: on


# -- adaptive --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaled:
    """A problem whose gradients are multiplied by a number."""

    problem: Quadratics
    scale: float

    @property
    def minimiser(self) -> Tensor:
        return self.problem.minimiser

    def grad(self, step: int, X: Tensor) -> Tensor:
        return self.scale * self.problem.grad(step, X)


def adaptive() -> list[Row]:
    rates = [1e-2, 3e-3, 1e-3]
    options = {"steps": 6000, "optimizer": "Adam", "amsgrad": True, "x0": P.minimiser}
    plain, ours = ([run(name, lr=lr, **options).distances[-1] for lr in rates] for name in ("atc", "dag"))
    theory = [limit_atc(lr) for lr in rates]
    CURVES["adam"] = {"rates": rates, "D-Adam (atc)": plain, "dag": ours}
    scales = (1.0, 1e-2, 1e-4)
    errors: dict[str, list[float]] = {}
    for name in ("atc", "dag"):
        paths = [run(name, problem=Scaled(P, s), lr=1e-3, steps=5000, optimizer="Adam", x0=STARTS[0]) for s in scales]
        errors[name] = [path.mean_distances[-1] for path in paths]
    # fmt: off
    return [
        row("Ying et al., communicate then adapt (DAG-Adam)",
            f"D-Adam (AMSGrad) leaves x* by O(1) however small lr = {numbers(rates)}", "constant",
            numbers(plain), min(plain) > 0.5 * max(plain) > 0.1),
        row("Ying et al., communicate then adapt (DAG-Adam)",
            "our reconstruction `dag` leaves x* by O(lr): its limit is diffusion's", numbers(theory), numbers(ours),
            falls_linearly(ours, rates) and close(ours, theory, 1e-2)),
        row("our reconstruction of DAG-Adam",
            f"a known weakness: not invariant to gradient scale {numbers(scales)} (lr = 1e-3, 5,000 steps, error of mean)",
            "grows; D-Adam's stays", f"{numbers(errors['dag'])}; D-Adam {numbers(errors['atc'])}",
            errors["dag"][2] > 5 * errors["dag"][0] and close(errors["atc"][:2], errors["atc"][1:], 0.2)),
    ]
    # fmt: on


# -- directed graphs, precision, rhythm ------------------------------------------------------------------------------


def irregular() -> topology.Topology:
    """A directed ring with chords: out-degrees 1 to 4."""
    edges = [(i, (i + 1) % 8) for i in range(8)] + [(0, 2), (0, 4), (0, 6), (3, 0), (5, 1)]
    return topology.from_networkx(networkx.DiGraph(edges))


def push_sum() -> list[Row]:
    graph, rates = irregular(), [0.02, 0.01, 0.005]
    mean = float((run("push_sum", graph, steps=400, lr=0.0).X - STARTS.mean(0)).abs().max())
    errors = [run("push_sum", graph, steps=round(40 / a), lr=a).distances[-1] for a in rates]
    try:
        run("atc", graph, steps=1)
        refused = "accepted"
    except ValueError:
        refused = "refused"
    # fmt: off
    return [
        row("Assran et al. 2019, SGP", "push-sum averages exactly on an irregular digraph (lr = 0; largest error)",
            "0", f"{mean:.1g}", mean < 1e-13),
        row("Assran et al. 2019, SGP",
            f"its bias is O(lr), lr = {numbers(rates)}; atc, which would minimise a weighted sum there",
            "falls with lr; refused", f"{numbers(errors)}; {refused}",
            falls_linearly(errors, rates) and refused == "refused"),
    ]
    # fmt: on


def textbook_d2(steps: int, lr: float, marks: list[int]) -> list[float]:
    """||mean - x*|| of X+ = Wb (2 X - X_prev - lr (G - G_prev)) in float32, at the marked steps."""
    w = torch.from_numpy(RING.lazy().matrix()).float()
    x = STARTS.float()
    g = P.grad(0, x)
    previous, x, g_previous = x, w @ (x - lr * g), g
    errors = []
    for t in range(1, steps + 1):
        if t in marks:
            errors.append(float((x.double().mean(0) - P.minimiser).norm()))
        g = P.grad(t, x)
        previous, x, g_previous = x, w @ (2 * x - previous - lr * (g - g_previous)), g
    return errors


def precision() -> list[Row]:
    steps, lr = 20000, 0.005
    marks = [2000 * k for k in range(1, 11)]
    book = textbook_d2(steps, lr, marks)
    path = run("exact_diffusion", steps=steps, lr=lr, dtype=torch.float32, record_every=2000)
    ours = path.mean_distances[1:]
    CURVES["drift"] = {"steps": marks, "textbook D2": book, "fusedfog": ours}
    # fmt: off
    return [
        row("Tang et al. 2018, D2 (textbook recursion, fp32)",
            "rounding accumulates: ||mean - x*|| after 4,000 / 20,000 steps", "grows", numbers([book[1], book[-1]]),
            book[-1] > 3 * book[1] and book[-1] > 1e-3),
        row("ours: dual-difference form, fp32", "does not drift: the same", "< 1e-4", numbers([ours[1], ours[-1]]),
            max(ours[1:]) < 1e-4),
    ]
    # fmt: on


def schedule() -> list[Row]:
    periods = (1, 2, 6, 12, 48)
    averaged = [run("atc", steps=8064, global_average_every=every).distances[-1] for every in periods]
    plain = run("atc", steps=8064).distances[-1]
    ratios = {}
    for b in (0.0, 0.3, 0.5, 0.9):
        outer = Outer(every=1, lr=0.7, momentum=b)
        path = run("local", topology.random_matching(8, 0), steps=400, lr=0.0, outer=outer)
        ratios[b] = path.consensus[-1] / path.consensus[0]
    # fmt: off
    return [
        row("Chen et al. 2021, Gossip-PGA",
            f"a full average every H = {numbers(periods)} steps: error at the average, D-SGD's {plain:.3g} without",
            "0, growing with H, below D-SGD", numbers(averaged),
            averaged[0] < SMALL and sorted(averaged) == averaged and averaged[-1] < plain),
        row("Kolehmainen et al. 2025, NoLoCo",
            "outer momentum 0 / 0.3 / 0.5 (published: 0.5) / 0.9: consensus after 400 outer steps, relative",
            "0 / 0 / 0 / diverges", numbers(ratios.values(), 1),
            max(ratios[b] for b in (0.0, 0.3, 0.5)) < 1e-6 and ratios[0.9] > 10),
    ]
    # fmt: on


# -- report ----------------------------------------------------------------------------------------------------------

CHECKS: tuple[Callable[[], list[Row]], ...] = (
    one_peer,
    momentum,
    exact_methods,
    noise,
    adaptive,
    push_sum,
    precision,
    schedule,
)


def draw(path: Path) -> None:
    """Six panels from CURVES."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    for name, values in CURVES["consensus"].items():
        a.semilogy(np.maximum(values, 1e-17), label=name)
    a.set(title="Pure averaging, 32 ranks", xlabel="round", ylabel="consensus distance, relative")
    for name in ("atc", "decentlam", "quasi_global"):
        b.plot(CURVES["momentum"]["betas"], CURVES["momentum"][name], "o-", label=name)
    b.set(title="Limit error against momentum, lr = 0.005", xlabel="momentum b", ylabel="error")
    for name, (steps, values) in CURVES["exact"].items():
        c.semilogy(steps, values, label=name)
    c.set(title="Exact methods, ring of 8, lr = 0.02", xlabel="step", ylabel="error")
    places = np.arange(len(CURVES["noise"]))
    for k, name in enumerate(("atc", "exact_diffusion")):
        d.bar(places + 0.35 * k, [both[name][0] for both in CURVES["noise"].values()], 0.35, label=name)
    d.set_xticks(places + 0.175, list(CURVES["noise"]))
    d.set(title="Steady state under noise, 20 ranks, lr = 0.05", ylabel="mean-square deviation", yscale="log")
    for name in ("D-Adam (atc)", "dag"):
        e.loglog(CURVES["adam"]["rates"], CURVES["adam"][name], "o-", label=name)
    e.set(title="Adam's limit error against lr", xlabel="lr", ylabel="error")
    for name in ("textbook D2", "fusedfog"):
        f.semilogy(CURVES["drift"]["steps"], CURVES["drift"][name], "o-", label=name)
    f.set(title="Exact diffusion in float32", xlabel="step", ylabel="distance of the mean from x*")
    for panel in (a, b, c, d, e, f):
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    torch.set_num_threads(1)  # Tensors are small: threads would only wait for each other.
    begin, rows = time.perf_counter(), []
    for check in CHECKS:
        start = time.perf_counter()
        for one in check():
            rows.append(one)
            print(f"{one.verdict:>6} | {one.paper} | {one.claim} | expected {one.expected} | measured {one.measured}")
        print(f"       ({check.__name__}: {time.perf_counter() - start:.1f} s)", flush=True)
    RESULTS.mkdir(exist_ok=True)
    report = {"machine": machine(), "seconds": round(time.perf_counter() - begin), "rows": [asdict(r) for r in rows]}
    (RESULTS / "papers.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(RESULTS / "papers.png")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))


if __name__ == "__main__":
    main()
