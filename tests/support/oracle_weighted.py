"""The weighted problem in float64 numpy: ranks of different weight minimise sum_i p_i f_i, p_i = weight_i / (sum of all).

A method for the plain mean of n losses minimises it when rank i has n p_i f_i in the place of f_i; so the recursions of the
papers are those of the other oracles, with another gradient, and the fixed points theirs with other quadratics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from support.oracle_base import Array
from support.problems import Quadratics


@dataclass(frozen=True)
class Weighted:
    """A problem of n quadratics, and the ranks' weights [n]."""

    problem: Quadratics
    weights: Array

    @cached_property
    def shares(self) -> Array:
        """p [n]."""
        return self.weights / self.weights.sum()

    @cached_property
    def parts(self) -> Array:
        """n p [n, 1]."""
        return (self.problem.n * self.shares)[:, None]

    def __call__(self, t: int, x: Array) -> Array:
        """Each rank's gradient times n p."""
        return self.parts * self.problem.grads(x)

    def mean(self, t: int, x: Array) -> Array:
        """sum_i p_i g_i on every rank, what data-parallel training steps by."""
        return np.broadcast_to(self.shares @ self.problem.grads(x), x.shape)

    @cached_property
    def minimiser(self) -> Array:
        """Of sum_i p_i f_i."""
        return self.problem.minimiser(self.shares)

    @cached_property
    def losses(self) -> Quadratics:
        """The n p_i f_i."""
        return Quadratics(self.problem.hessians * self.parts[:, :, None], self.problem.linear * self.parts)
