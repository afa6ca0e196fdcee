"""What the oracle's tests share: the standard problem, its graphs, starts and a demanding lr schedule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from support import oracle as o
from support.problems import standard, start

P = standard()
N, D = P.n, P.d
W = o.ring(N)
SYMMETRIC_EXP = (o.static_exponential(N) + o.static_exponential(N).T) / 2
X0 = start(N, D)
EQUAL = start(N, D, equal=True)
A = 0.005


def irregular_digraph() -> np.ndarray:
    """Edges of the directed exponential graph with one removed and three added: out-degrees 2 to 4."""
    w = o.static_exponential(N)
    w[3, 2] = 0.0
    w[5, 1] = w[0, 3] = w[2, 3] = 1.0
    return w


EDGES = irregular_digraph()
PUSH, PULL = o.push_matrix(EDGES), o.pull_matrix(EDGES)


def still(t: int, x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x)


def warm_up(a: float) -> Callable[[int], float]:
    """lr = 0 for two steps, a ramp, a plateau, a pause at zero, then two drops."""

    def rate(t: int) -> float:
        if t < 2 or 30 <= t < 33:
            return 0.0
        return a * (min(1.0, t / 8) if t < 50 else 0.1 if t < 80 else 0.03)

    return rate


def same(x: np.ndarray, y: np.ndarray, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(x, y, rtol=0, atol=tol)
