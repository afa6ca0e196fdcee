"""Independent float64 oracle: each algorithm's paper recursion over n simulated ranks, in numpy alone.

It imports neither torch nor fusedfog, so that agreement with the engine means something. See `oracle_base` for the
common shape (grad, W, x0, lr, steps, ...) -> trajectory [steps + 1, n, d].
"""

from __future__ import annotations

import numpy as np

from support.oracle_adam import dag_adam, decentralized_amsgrad, gt_adam, quasi_global_adam
from support.oracle_base import (
    SGD,
    AccumAdam,
    Adam,
    Array,
    Mixing,
    circulant,
    complete,
    lazy,
    one_peer_exponential,
    one_peer_hypercube,
    pull_matrix,
    push_matrix,
    rhythm,
    ring,
    run,
    static_exponential,
    strengthened,
)
from support.oracle_outer import DiLoCo, NoLoCo, SlowMo, choco, top_k, with_outer
from support.oracle_sgd import (
    allreduce,
    atc,
    awc,
    cta,
    d2,
    decentlam,
    decentlam_heavy_ball,
    exact_diffusion,
    exact_diffusion_dual,
    extra,
    extra_one_state,
    local,
    quasi_global,
)
from support.oracle_track import (
    gradient_tracking,
    momentum_tracking,
    momentum_tracking_engine,
    overlap_push_sum,
    push_diging,
    push_pull,
    push_sum,
    relay_sgd,
)
from support.problems import Quadratics

__all__ = [
    "SGD",
    "AccumAdam",
    "Adam",
    "DiLoCo",
    "Mixing",
    "NoLoCo",
    "SlowMo",
    "allreduce",
    "atc",
    "awc",
    "choco",
    "circulant",
    "complete",
    "cta",
    "d2",
    "dag_adam",
    "decentlam",
    "decentlam_heavy_ball",
    "decentralized_amsgrad",
    "exact_diffusion",
    "exact_diffusion_dual",
    "extra",
    "extra_one_state",
    "gradient_tracking",
    "gt_adam",
    "lazy",
    "limit_atc",
    "limit_awc",
    "limit_cta",
    "local",
    "momentum_tracking",
    "momentum_tracking_engine",
    "one_peer_exponential",
    "one_peer_hypercube",
    "overlap_push_sum",
    "pull_matrix",
    "push_diging",
    "push_matrix",
    "push_pull",
    "push_sum",
    "quasi_global",
    "quasi_global_adam",
    "relay_sgd",
    "rhythm",
    "ring",
    "run",
    "static_exponential",
    "strengthened",
    "top_k",
    "with_outer",
]


def limit_atc(problem: Quadratics, w: Array, lr: float) -> Array:
    """Fixed point of ATC: (I - Wt (I - a Hb)) x = a Wt c with Wt = W kron I, Hb = blockdiag H_i.

    With heavy-ball momentum b DmSGD has the fixed point of step a/(1-b); DecentLaM and quasi-global have this one.
    """
    wt, hb, c, eye = _stacked(problem, w)
    return np.linalg.solve(eye - wt @ (eye - lr * hb), lr * wt @ c).reshape(problem.n, problem.d)


def limit_awc(problem: Quadratics, w: Array, lr: float) -> Array:
    """Fixed point of AWC: (I - Wt + a Hb) x = a c; AWC-DmSGD has that of step a/(1-b)."""
    wt, hb, c, eye = _stacked(problem, w)
    return np.linalg.solve(eye - wt + lr * hb, lr * c).reshape(problem.n, problem.d)


def limit_cta(problem: Quadratics, w: Array, lr: float) -> Array:
    """Fixed point of CTA: (I - (I - a Hb) Wt) x = a c."""
    wt, hb, c, eye = _stacked(problem, w)
    return np.linalg.solve(eye - (eye - lr * hb) @ wt, lr * c).reshape(problem.n, problem.d)


def _stacked(problem: Quadratics, w: Array) -> tuple[Array, Array, Array, Array]:
    n, d = problem.n, problem.d
    hb = np.zeros((n * d, n * d))
    for i in range(n):
        hb[i * d : (i + 1) * d, i * d : (i + 1) * d] = problem.hessians[i]
    return np.kron(w, np.eye(d)), hb, problem.linear.ravel(), np.eye(n * d)
