"""The recursion tests' two sides: ranks that train the standard least squares, and the oracle's graphs by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from support import oracle, problems
from support.pool import Pool
from support.training import train


def trained(ranks: Pool, n: int, d: int, kind: str, rates: list[float], **keywords: Any) -> tuple[Any, Any, Any]:
    problem = problems.least_squares(n, d, 2 * d, seed=n)
    x0 = problems.start(n, d)
    if n == 8 and not keywords.get("fused_backward"):
        keywords["bucket_mb"] = 1  # one bucket: eight ranks on two cores pay for every message
    paths = ranks.run(n, train, kind, problem.hessians, problem.linear, x0, rates, **keywords)
    return problem, x0, np.stack(paths, axis=1)


def w_of(name: str, n: int) -> Any:
    return {
        "ring": oracle.ring(n),
        "exponential": oracle.static_exponential(n),
        "one_peer_exponential": oracle.one_peer_exponential(n),
        "fully_connected": oracle.complete(n),
    }[name]
