"""Heterogeneous quadratics in float64 numpy: f_i(x) = x'H_i x / 2 - c_i'x on node i, all known in closed form.

`standard()` is the problem on which the reference numbers of the recursions were measured: n=8, d=10,
f_i(x) = ||A_i x - b_i||^2 / (2 m), m=20, A_i ~ N(0,1), b_i = A_i target_i + 0.1 noise, targets ~ N(0, I), all drawn in
that order from default_rng(0). Largest eigenvalue of any H_i: L=2.68; smallest of the mean H: mu=0.569; b2=13.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Quadratics:
    """n quadratics in d dimensions: `hessians` [n, d, d] symmetric, `linear` [n, d]; grad f_i(x) = H_i x - c_i."""

    hessians: Array
    linear: Array

    @property
    def n(self) -> int:
        return self.linear.shape[0]

    @property
    def d(self) -> int:
        return self.linear.shape[1]

    def grad(self, i: int, x: Array) -> Array:
        """Gradient of node i's own loss at x [d]."""
        return self.hessians[i] @ x - self.linear[i]

    def grads(self, x: Array) -> Array:
        """All gradients at once, row i being node i's at its own row of x [n, d]."""
        return np.einsum("nij,nj->ni", self.hessians, x) - self.linear

    def __call__(self, t: int, x: Array) -> Array:
        """The oracle's `grad(t, X)`, the same at every step."""
        return self.grads(x)

    def noisy(self, sigma: float, seed: int = 0) -> NoisyQuadratics:
        """Gradients with fresh N(0, sigma^2) noise per node and step, a function of (seed, t) alone."""
        return NoisyQuadratics(self, sigma, seed)

    def with_decay(self, weight_decay: float) -> Quadratics:
        """The problem that coupled weight decay turns this one into: H_i + wd I."""
        return Quadratics(self.hessians + weight_decay * np.eye(self.d), self.linear)

    def astype(self, dtype: type) -> Quadratics:
        return Quadratics(self.hessians.astype(dtype), self.linear.astype(dtype))

    @cached_property
    def x_star(self) -> Array:
        """Minimiser of the average loss."""
        return self.minimiser(np.full(self.n, 1 / self.n))

    def minimiser(self, weights: Array) -> Array:
        """Minimiser of sum_i weights_i f_i."""
        return np.linalg.solve(np.einsum("n,nij->ij", weights, self.hessians), weights @ self.linear)

    @cached_property
    def smoothness(self) -> float:
        """L, the largest eigenvalue of any H_i."""
        return float(np.linalg.eigvalsh(self.hessians).max())

    @cached_property
    def convexity(self) -> float:
        """mu, the smallest eigenvalue of the mean Hessian."""
        return float(np.linalg.eigvalsh(self.hessians.mean(0)).min())

    @cached_property
    def heterogeneity(self) -> float:
        """b2 = (1/n) sum_i ||grad f_i(x*)||^2."""
        return float((self.grads(np.tile(self.x_star, (self.n, 1))) ** 2).sum() / self.n)

    def error(self, x: Array) -> float:
        """Root mean square over nodes of ||x_i - x*||."""
        return float(np.sqrt(((x - self.x_star) ** 2).sum(-1).mean()))

    def mean_error(self, x: Array) -> float:
        """Distance of the average model from x*."""
        return float(np.linalg.norm(x.mean(0) - self.x_star))


@dataclass(frozen=True)
class NoisyQuadratics:
    """See `Quadratics.noisy`."""

    problem: Quadratics
    sigma: float
    seed: int

    def __call__(self, t: int, x: Array) -> Array:
        noise = np.random.default_rng((self.seed, t)).standard_normal(x.shape)
        return self.problem.grads(x) + self.sigma * noise


def consensus_distance(x: Array) -> float:
    """Root mean square over nodes of ||x_i - mean||."""
    return float(np.sqrt(((x - x.mean(0)) ** 2).sum(-1).mean()))


def least_squares(n: int, d: int, m: int, seed: int = 0, noise: float = 0.1, spread: float = 1.0) -> Quadratics:
    """n least-squares losses with m samples each; `spread` scales the targets (0: all nodes share one optimum)."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, m, d))
    targets = spread * rng.standard_normal((n, d))
    b = np.einsum("nmd,nd->nm", a, targets) + noise * rng.standard_normal((n, m))
    return Quadratics(np.einsum("nmi,nmj->nij", a, a) / m, np.einsum("nmi,nm->ni", a, b) / m)


def standard() -> Quadratics:
    """The problem of all published `err` values (module docstring)."""
    return least_squares(n=8, d=10, m=20)


def equal_data(n: int, d: int, seed: int = 0) -> Quadratics:
    """n copies of one loss: every decentralized method must then follow the single-node optimizer."""
    one = least_squares(1, d, 2 * d, seed)
    return Quadratics(np.repeat(one.hessians, n, 0), np.repeat(one.linear, n, 0))


def start(n: int, d: int, seed: int = 1, *, equal: bool = False) -> Array:
    """A starting point [n, d], different on each node unless `equal`."""
    x = np.random.default_rng(seed).standard_normal((n, d))
    return np.tile(x[0], (n, 1)) if equal else x
