"""Dense recursions around local steps (SlowMo, DiLoCo, NoLoCo) and with compressed messages (CHOCO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.oracle_base import PLAIN_SGD, SGD, Array, Gradient, Mixing, Rate, Rule, matrices, rates, run

OuterStep = Callable[[Array, Array, float, int], Array]
"""(phi, theta, lr of the last inner step, outer step's index) -> new phi, phi being the last outer step's result."""


@dataclass(frozen=True)
class SlowMo:
    """SlowMo (Wang et al. 2020): u = b u + (phi - mean theta) / a ; phi+ = phi - alpha a u."""

    momentum: float = 0.0
    alpha: float = 1.0

    def start(self, x0: Array) -> OuterStep:
        u = np.zeros_like(x0)

        def step(phi: Array, theta: Array, a: float, k: int) -> Array:
            nonlocal u
            u = self.momentum * u + (phi - theta.mean(0)) / a
            return phi - self.alpha * a * u

        return step


@dataclass(frozen=True)
class DiLoCo:
    """DiLoCo (Douillard et al. 2023): outer SGD on Delta = mean_i (phi - theta_i), Nesterov as torch.optim.SGD has it.

    buf = mu buf + Delta ; phi+ = phi - lr_o (Delta + mu buf)  (heavy ball: phi - lr_o buf).
    With `w` the mean over all nodes becomes the gossip average W (phi - theta), each node keeping its own phi.
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    w: Mixing | None = None

    def start(self, x0: Array) -> OuterStep:
        turn = SGD(momentum=self.momentum, nesterov=self.nesterov).direction()
        mix = None if self.w is None else matrices(self.w)

        def step(phi: Array, theta: Array, a: float, k: int) -> Array:
            delta = phi - theta
            delta = np.broadcast_to(delta.mean(0), delta.shape) if mix is None else mix(k) @ delta
            return phi - self.lr * turn(phi, delta)

        return step


@dataclass(frozen=True)
class NoLoCo:
    """NoLoCo (Kolehmainen et al. 2025, published code): m = mu m + lr_o (W theta - phi) ; phi+ = phi + m.

    W averages a random group (of two) in each outer step; one message, theta.
    """

    w: Mixing
    lr: float = 0.7
    momentum: float = 0.5

    def start(self, x0: Array) -> OuterStep:
        m, mix = np.zeros_like(x0), matrices(self.w)

        def step(phi: Array, theta: Array, a: float, k: int) -> Array:
            nonlocal m
            m = self.momentum * m + self.lr * (mix(k) @ theta - phi)
            return phi + m

        return step


def with_outer(
    grad: Gradient,
    x0: Array,
    lr: Rate,
    steps: int,
    every: int,
    outer: SlowMo | DiLoCo | NoLoCo,
    rule: Rule = PLAIN_SGD,
    w: Mixing | None = None,
) -> Array:
    """`every` inner steps, then theta = phi = outer(phi, theta); inner steps are local, or ATC with `w`.

    The inner optimizer's state lives on across outer steps. phi^0 = x^0.
    """
    rate, inner, outer_step = rates(lr), rule.start(), outer.start(x0)
    mix = matrices(np.eye(len(x0)) if w is None else w)
    phi = x0

    def step(t: int, x: Array) -> Array:
        nonlocal phi
        theta = mix(t) @ inner(x, grad(t, x), rate(t))
        if (t + 1) % every:
            return theta
        phi = outer_step(phi, theta, rate(t), (t + 1) // every - 1)
        return phi

    return run(x0, steps, step)


def top_k(k: int) -> Callable[[Array], Array]:
    """Compressor that keeps the k entries of each row with the largest magnitude."""

    def compress(x: Array) -> Array:
        small = np.argsort(np.abs(x), axis=1)[:, : x.shape[1] - k]
        out = x.copy()
        np.put_along_axis(out, small, 0.0, axis=1)
        return out

    return compress


def choco(
    grad: Gradient, w: Array, x0: Array, lr: Rate, steps: int, gamma: float, compress: Callable[[Array], Array]
) -> Array:
    """CHOCO-SGD (Koloskova et al. 2019): x = x - a g ; xh += C(x - xh) ; x+ = x + gamma (W xh - xh) ; xh^0 = 0."""
    rate = rates(lr)
    xh = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal xh
        x = x - rate(t) * grad(t, x)
        xh = xh + compress(x - xh)
        return x + gamma * (w @ xh - xh)

    return run(x0, steps, step)
