"""Ranks that do not wait, in float64 numpy: one list of events, sorted anew at every moment. Written from the recursions alone.

AWC weighs the newest value of each neighbour, used until a newer one comes. Push-sum deposits (z, mass), and rank i updates
z+ = z + sum_k (m_k / w+)(z_k - z) - (a / v_i) g, v being the Perron vector of the shares P (mean 1).

At one moment, messages arrive first, then all ranks that end a step read, then they write and send.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from support.oracle_base import Array

GradientOf = Callable[[int, Array], Array]
"""(rank, its x) -> gradient [d]."""


def async_awc(
    gradient: GradientOf,
    w: Array,
    x0: Array,
    lr: float,
    speeds: list[Fraction],
    until: int,
    delay: Fraction = Fraction(0),
) -> Array:
    """x [n, d] after all steps that end at `until` or before; a rank makes `speeds` steps a unit of time."""
    n = len(x0)
    x = x0.copy()
    newest: dict[tuple[int, int], Array] = {}
    steps = [0] * n
    mail = [(delay, i, x0[i].copy()) for i in range(n)]
    while True:
        now = min((steps[i] + 1) / speeds[i] for i in range(n))
        if now > until:
            return x
        for _, sender, value in [one for one in mail if one[0] <= now]:
            for receiver in range(n):
                newest[sender, receiver] = value
        mail = [one for one in mail if one[0] > now]
        stepping = [i for i in range(n) if (steps[i] + 1) / speeds[i] == now]
        fresh = {}
        for i in stepping:
            pull = sum(w[i, j] * (newest[j, i] - x[i]) for j in range(n) if j != i and w[i, j] and (j, i) in newest)
            fresh[i] = x[i] + pull - lr * gradient(i, x[i])
        for i, value in fresh.items():
            x[i] = value
            steps[i] += 1
            mail.append((now + delay, i, value.copy()))


def perron(p: Array) -> Array:
    """v = P v with mean 1, by powers."""
    v = np.ones(len(p))
    for _ in range(5000):
        v = p @ v
    return v / v.mean()


def async_push_sum(
    gradient: GradientOf,
    p: Array,
    x0: Array,
    lr: float,
    speeds: list[Fraction],
    until: int,
    delay: Fraction = Fraction(0),
) -> tuple[Array, Array]:
    """(z [n, d], the masses that ranks hold [n]); P is column-stochastic."""
    n = len(x0)
    z, held, v, steps = x0.copy(), np.ones(n), perron(p), [0] * n
    mail: list[tuple[Fraction, int, Array, float]] = []

    def send(i: int, now: Fraction) -> None:
        mail.extend((now + delay, k, z[i].copy(), p[k, i] * held[i]) for k in range(n) if k != i and p[k, i])
        held[i] *= p[i, i]

    for i in range(n):
        send(i, Fraction(0))
    while True:
        now = min((steps[i] + 1) / speeds[i] for i in range(n))
        if now > until:
            return z, held
        stepping = [i for i in range(n) if (steps[i] + 1) / speeds[i] == now]
        fresh = {}
        for i in stepping:
            # In terms of sums, which is what a deposit means: it makes no difference whether two of them were merged before.
            there = [(value, mass) for when, k, value, mass in mail if k == i and when <= now]
            mass = held[i] + sum(one for _, one in there)
            total = held[i] * z[i] + sum((one * value for value, one in there), np.zeros_like(z[i]))
            fresh[i] = (total / mass - lr / v[i] * gradient(i, z[i]), mass)
        mail = [one for one in mail if one[1] not in stepping or one[0] > now]
        for i, (value, mass) in fresh.items():
            z[i], held[i] = value, mass
            steps[i] += 1
        for i in stepping:
            send(i, now)


def synchronous_push_sum(gradient: Callable[[int, Array], Array], p: Array, x0: Array, lr: float, steps: int) -> Array:
    """What asynchronous push-sum is when all ranks step at once: z+ = diag(1/w+) P diag(w) z - (a / v) g, w+ = P w."""
    z, w, v = x0.copy(), np.ones(len(x0)), perron(p)
    for t in range(steps):
        new = p @ w
        z = (p @ (w[:, None] * z)) / new[:, None] - lr / v[:, None] * gradient(t, z)
        w = new
    return z
