"""What `loss.py` compares: cases (a model, ranks, a batch, an optimizer), the methods of each, and in which order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """What all methods have in common where they are compared; data-parallel training of the same case is 0 %."""

    task: str
    ranks: int
    batch: int = 1
    """How many times the task's own batch a rank has."""
    optimizer: str = "AdamW"

    @property
    def name(self) -> str:
        extra = [f"batch x{self.batch}"] * (self.batch > 1) + [self.optimizer] * (self.optimizer != "AdamW")
        return ", ".join([self.task, f"n={self.ranks}", *extra])


@dataclass(frozen=True)
class Method:
    """A row: an algorithm on a graph, what comes before and after it, and how messages travel.

    Attributes:
        graph: a name of `fusedfog.topology`, or "exponential base 4", whose hops are the powers of four.
        start: the part of all steps, at the beginning, that is data-parallel training at *its* best rate.
        wire: the format of messages, which are coded differences; None for fp32.
        average_until, average_from: where all ranks' parameters are averaged in every step instead of gossip, as parts
            of all steps.
        machine: ranks of a machine, over which gradients are averaged: one node of the graph with so many times the batch.
    """

    algorithm: str = "awc"
    graph: str = "one_peer_exponential"
    start: float = 0.0
    wire: str | None = None
    average_until: float = 0.0
    average_from: float = 1.0
    machine: int = 1

    @property
    def name(self) -> str:
        if self.algorithm == "allreduce":
            return "data-parallel"
        words = [self.algorithm.upper() if self.algorithm in ("awc", "atc") else self.algorithm]
        words += ["all parameters averaged every step" if self.average_until == 1 else self.graph.replace("_", " ")]
        words += [f"{self.wire} messages"] * bool(self.wire) + [f"machines of {self.machine}"] * (self.machine > 1)
        words += [f"{self.start:.0%} data-parallel start"] * bool(self.start)
        if 0 < self.average_until < 1:
            words.append(f"all parameters averaged in the first {self.average_until:.0%}")
        if self.average_from < 1:
            words.append(f"all parameters averaged in the last {1 - self.average_from:.0%}")
        return ", ".join(words)


DATA_PARALLEL = Method("allreduce", "none")
AWC, ATC = Method(), Method("atc")
DENSE = Method("atc", average_until=1.0)
STATIC = Method(graph="exponential")
INT8 = Method(graph="exponential", wire="int8")
ATC_INT8 = replace(INT8, algorithm="atc")
BF16 = Method(graph="exponential base 4", wire="bf16")


def start(method: Method, part: float) -> Method:
    """The method after a data-parallel start of that part of all steps."""
    return replace(method, start=part)


GRAPHS = (
    "one_peer_exponential",
    "one_peer_hypercube",
    "exponential",
    "ring",
    "hypercube",
    "symmetric_exponential",
    "fully_connected",
)
DAG = tuple(Method("dag", graph) for graph in GRAPHS)
MACHINES = tuple(replace(method, machine=4) for method in (AWC, ATC, start(AWC, 0.1), start(ATC, 0.1)))

GPT_4, GPT_8, GPT_16 = Case("GPT", 4), Case("GPT", 8), Case("GPT", 16)
MLP_4, MLP_8, MLP_16, MLP_16_X4 = Case("MLP", 4), Case("MLP", 8), Case("MLP", 16), Case("MLP", 16, batch=4)
DIGITS_8, DIGITS_8_SGD, MLP_4_SGD = (
    Case("digits", 8),
    Case("digits", 8, optimizer="SGD"),
    Case("MLP", 4, optimizer="SGD"),
)

Group = tuple[Case, int, Sequence[Method]]
"""A case, the number of seeds, and methods."""

_MAIN = (DATA_PARALLEL, AWC, start(AWC, 0.1), ATC)

PLAN: tuple[Group, ...] = (
    (GPT_4, 8, _MAIN),
    (MLP_4, 8, (DATA_PARALLEL, AWC, start(AWC, 0.1), start(AWC, 0.2), ATC, start(ATC, 0.2), DENSE)),
    (MLP_16, 4, (DATA_PARALLEL, AWC, start(INT8, 0.2), start(AWC, 0.2), MACHINES[0])),
    (GPT_16, 2, (DATA_PARALLEL, start(INT8, 0.1), start(ATC_INT8, 0.1), *MACHINES[2:])),
    (GPT_16, 4, (DATA_PARALLEL, MACHINES[3])),
    (GPT_4, 4, (start(ATC, 0.1),)),
    (GPT_8, 2, (DATA_PARALLEL, start(AWC, 0.1), start(ATC, 0.1))),
    (MLP_16, 4, (ATC, start(ATC, 0.2), *MACHINES[1:3], STATIC, INT8, ATC_INT8, start(STATIC, 0.2), start(BF16, 0.2))),
    (GPT_16, 2, (AWC, start(AWC, 0.1), start(STATIC, 0.1), *MACHINES[:2])),
    (DIGITS_8, 16, (DATA_PARALLEL, AWC, start(AWC, 0.1), ATC, *DAG)),
    (MLP_8, 2, (DATA_PARALLEL, AWC, *DAG)),
    (DIGITS_8_SGD, 16, (DATA_PARALLEL, AWC, ATC)),
    (MLP_4_SGD, 4, (DATA_PARALLEL, AWC)),
    (MLP_4, 8, (Method(average_until=0.2), Method(average_from=0.8))),
    (MLP_4_SGD, 8, (DATA_PARALLEL, AWC, ATC)),
    (GPT_4, 4, (start(AWC, 0.05), start(AWC, 0.2), DENSE)),
    (MLP_16_X4, 3, (DATA_PARALLEL, AWC, ATC, start(AWC, 0.1))),
    (MLP_16, 4, (start(AWC, 0.1), start(STATIC, 0.1), BF16, DENSE)),
    (MLP_8, 4, (DATA_PARALLEL, AWC, *DAG)),
    (GPT_16, 3, (*_MAIN, start(INT8, 0.1), start(STATIC, 0.1), start(BF16, 0.1), *MACHINES)),
    (GPT_4, 6, (Method(average_until=0.2), Method(average_from=0.8))),
)
"""In order of importance; what comes again gets more seeds."""

FIRST_RATES = {
    GPT_4: (0.016, 0.064),
    GPT_8: (0.032, 0.064),
    GPT_16: (0.032, 0.064),
    MLP_4: (0.032, 0.064),
    MLP_8: (0.064, 0.064),
    MLP_16: (0.064, 0.064),
    MLP_16_X4: (0.064, 0.064),
    MLP_4_SGD: (1.024, 1.024),
    DIGITS_8: (0.016, 0.016),
    DIGITS_8_SGD: (0.128, 0.128),
}
"""Rates at which the search begins: for data-parallel training, and for all others."""


def first_rate(case: Case, method: Method) -> float:
    """Where the search for a method's rate begins; every rate of a search is this one times a power of two."""
    return FIRST_RATES[case][method.algorithm != "allreduce"]
