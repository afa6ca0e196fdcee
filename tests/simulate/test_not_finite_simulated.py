"""A rank whose gradients are not finite, simulated: bit for bit the real ranks, and nobody else's values are lost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import problems
from support.pool import Pool
from support.training import train
from test_simulate import RATES, Autograd

from fusedfog.algorithms import TABLE
from fusedfog.simulate import simulate

SICK = 2
KINDS = {"SGD": "SGD", "Adam": "AdamW", "AccumAdam": "AccumAdamW"}
CONTAINING = [
    (KINDS[family], row.name)
    for family, rows in TABLE.items()
    for row in rows.values()
    if not row.conserves and row.exchanges != "nothing"
]


def problem_of(n: int, d: int = 13) -> tuple[problems.Quadratics, np.ndarray]:
    """One element of one rank's gradient is NaN from the first step on."""
    data = problems.least_squares(n, d, 2 * d, seed=n)
    data.linear[SICK, 3] = math.nan
    return data, problems.start(n, d)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        ("SGD", {"algorithm": "awc", "topology": "exponential", "momentum": 0.9}),
        ("SGD", {"algorithm": "atc", "topology": "ring"}),
        ("AdamW", {"algorithm": "quasi_global", "topology": "one_peer_exponential"}),
        ("AdamW", {"algorithm": "awc", "topology": "ring", "global_average_every": 3}),
        ("SGD", {"algorithm": "allreduce"}),
    ],
    ids=str,
)
def test_simulated_ranks_are_real_ranks(ranks: Pool, kind: str, keywords: dict[str, Any]) -> None:
    data, x0 = problem_of(4)
    # Averages leave out a rank's whole bucket, which a simulated model is one of.
    real = ranks.run(4, train, kind, data.hessians, data.linear, x0, RATES, bucket_mb=1.0, **keywords)
    problem = Autograd(data, x0)
    path = simulate(problem, 4, optimizer=kind, steps=len(RATES), lr=RATES.__getitem__, x0=x0, **keywords)
    ours, theirs = torch.stack([*problem.seen, path.X]), torch.from_numpy(np.stack(real, axis=1))
    # gloo adds up in an order of its own.
    summed_by_gloo = "global_average_every" in keywords or keywords["algorithm"] == "allreduce"
    tolerance = 1e-13 if summed_by_gloo else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize(("kind", "algorithm"), CONTAINING)
def test_no_other_rank_is_lost(kind: str, algorithm: str, n: int) -> None:
    data, x0 = problem_of(n)
    path = simulate(Autograd(data, x0), n, algorithm=algorithm, optimizer=kind, steps=20, lr=0.02, x0=x0)
    assert [row for row in range(n) if not path.X[row].isfinite().all()] in ([SICK], [])
