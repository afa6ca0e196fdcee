"""Dense recursions that follow the average gradient or an average weight: tracking methods, push-sum, relays."""

from __future__ import annotations

import numpy as np

from support.oracle_base import PLAIN_SGD, Array, Gradient, Mixing, Rate, Rule, matrices, rates, run


def gradient_tracking(
    grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, order: str = "diging", trackers: list | None = None
) -> Array:
    """Gradient tracking; y^0 = g^0, and `trackers` collects every y with its gradients.

    diging (Nedic et al. 2017):  x+ = W x - a y    ; y+ = W y + g(x+) - g(x)
    atc:                         x+ = W (x - a y)  ; y+ = W (y + g(x+) - g(x))
    semi_atc:                    x+ = W (x - a y)  ; y+ = W y + g(x+) - g(x)
    Step t's matrix mixes both x^t and y^t.
    """
    mix, rate = matrices(w), rates(lr)
    g = grad(0, x0)
    y = g

    def step(t: int, x: Array) -> Array:
        nonlocal g, y
        if trackers is not None:
            trackers.append((y, g))
        w_now = mix(t)
        new = w_now @ x - rate(t) * y if order == "diging" else w_now @ (x - rate(t) * y)
        g_new = grad(t + 1, new)
        y = w_now @ (y + g_new - g) if order == "atc" else w_now @ y + g_new - g
        g = g_new
        return new

    if order not in ("diging", "atc", "semi_atc"):
        raise ValueError(order)
    return run(x0, steps, step)


def momentum_tracking(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    consensual_start: bool = False,
) -> Array:
    """Momentum tracking (Takezawa et al. 2023): u = b u + g ; x+ = W x - a (u - c) ; c+ = W (c - u) + u.

    c^0 = u^0 = 0, or with `consensual_start` the published code's c = u = (g_i - mean g) / (1 - b).
    """
    mix, rate = matrices(w), rates(lr)
    u = c = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal u, c
        g = grad(t, x) + weight_decay * x
        if t == 0 and consensual_start:
            u = c = (g - g.mean(0)) / (1 - momentum)
        u = momentum * u + g
        new = mix(t) @ x - rate(t) * (u - c)
        c = mix(t) @ (c - u) + u
        return new

    return run(x0, steps, step)


def momentum_tracking_engine(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    trackers: list | None = None,
) -> Array:
    """Momentum tracking with both messages known before forward: y = W y + u - u_prev ; x+ = W x - a y ; u = b u + g.

    u, u_prev, y start at 0 (so y^0 = u^0). Equals Takezawa's form for a static W; b = 0 is DIGing. Messages x^t and
    y^{t-1} leave together, so in a sequence of graphs step t's matrix mixes both: for y one round later than on paper.
    `trackers` collects (y, u).
    """
    mix, rate = matrices(w), rates(lr)
    u = y = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal u, y
        u_new = momentum * u + grad(t, x) + weight_decay * x
        y = mix(t) @ y + u_new - u
        u = u_new
        if trackers is not None:
            trackers.append((y, u))
        return mix(t) @ x - rate(t) * y

    return run(x0, steps, step)


def push_sum(
    grad: Gradient,
    p: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: Rule = PLAIN_SGD,
    scalars: list | None = None,
) -> Array:
    """SGP (Assran et al. 2019): half = x - a d(z) ; x+ = P half ; v+ = P v ; z = x / v ; trajectory of z.

    P column-stochastic (`oracle_base.push_matrix`), v^0 = 1. d is the inner optimizer's step at the de-biased z, weight
    decay included: half = x + (inner(z) - z). `scalars` collects v.
    """
    mix, rate, inner = matrices(p), rates(lr), rule.start()
    x, v = x0, np.ones((len(x0), 1), x0.dtype)

    def step(t: int, z: Array) -> Array:
        nonlocal x, v
        x = mix(t) @ (x + (inner(z, grad(t, z), rate(t)) - z))
        v = mix(t) @ v
        if scalars is not None:
            scalars.append(v[:, 0])
        return x / v

    return run(x0, steps, step)


def overlap_push_sum(
    grad: Gradient, p: Array, x0: Array, lr: Rate, steps: int, delay: int, totals: list | None = None
) -> Array:
    """OSGP (Assran et al. 2019): every `delay` steps a node sends its shares and keeps p_ii; they arrive `delay` later.

    `totals` collects (sum of held and travelling x, the same of v): without gradients both are conserved.
    """
    rate, keep = rates(lr), np.diag(p)[:, None]
    away = p - np.diag(np.diag(p))
    x, v = x0, np.ones((len(x0), 1), x0.dtype)
    flying: tuple[Array, Array] = (np.zeros_like(x0), np.zeros_like(v))

    def step(t: int, z: Array) -> Array:
        nonlocal x, v, flying
        x = x - rate(t) * grad(t, z)
        if t % delay == 0:
            x, v = x + flying[0], v + flying[1]
            flying = (away @ x, away @ v)
            x, v = keep * x, keep * v
        if totals is not None:
            totals.append(((x + flying[0]).sum(0), float((v + flying[1]).sum())))
        return x / v

    return run(x0, steps, step)


def push_diging(grad: Gradient, p: Mixing, x0: Array, lr: Rate, steps: int) -> Array:
    """push-DIGing (Nedic et al. 2017): u+ = P (u - a y) ; v+ = P v ; x+ = u+ / v+ ; y+ = P y + g(x+) - g(x)."""
    mix, rate = matrices(p), rates(lr)
    g = grad(0, x0)
    u, v, y = x0, np.ones((len(x0), 1)), g

    def step(t: int, x: Array) -> Array:
        nonlocal g, u, v, y
        u, v = mix(t) @ (u - rate(t) * y), mix(t) @ v
        new = u / v
        g_new = grad(t + 1, new)
        y, g = mix(t) @ y + g_new - g, g_new
        return new

    return run(x0, steps, step)


def push_pull(grad: Gradient, r: Mixing, p: Mixing, x0: Array, lr: Rate, steps: int) -> Array:
    """AB / push-pull (Xin & Khan 2018): x+ = R (x - a y) ; y+ = P y + g(x+) - g(x) ; R row-, P column-stochastic."""
    pull, push, rate = matrices(r), matrices(p), rates(lr)
    g = grad(0, x0)
    y = g

    def step(t: int, x: Array) -> Array:
        nonlocal g, y
        new = pull(t) @ (x - rate(t) * y)
        g_new = grad(t + 1, new)
        y, g = push(t) @ y + g_new - g, g_new
        return new

    return run(x0, steps, step)


def relay_sgd(grad: Gradient, edges: list[tuple[int, int]], x0: Array, lr: Rate, steps: int) -> Array:
    """RelaySGD (Vogels et al. 2021) on a tree: relayed sums, missing shares filled with the initial model.

    m_ij = half_i + sum_{k != j} m_ki (last step's) ; c_ij = 1 + sum c_ki
    x+ = (half_i + sum_j m_ji + (n - c_i) x_i^0) / n ; c_i = 1 + sum_j c_ji
    """
    n, rate = len(x0), rates(lr)
    neighbours: dict[int, list[int]] = {i: [] for i in range(n)}
    for i, j in edges:
        neighbours[i].append(j)
        neighbours[j].append(i)
    pairs = [(i, j) for i in range(n) for j in neighbours[i]]
    message = {pair: np.zeros_like(x0[0]) for pair in pairs}
    count = dict.fromkeys(pairs, 0)

    def step(t: int, x: Array) -> Array:
        nonlocal message, count
        half = x - rate(t) * grad(t, x)
        message, count = (
            {(i, j): half[i] + sum(message[k, i] for k in neighbours[i] if k != j) for i, j in pairs},
            {(i, j): 1 + sum(count[k, i] for k in neighbours[i] if k != j) for i, j in pairs},
        )
        new = np.empty_like(x)
        for i in range(n):
            held = 1 + sum(count[j, i] for j in neighbours[i])
            new[i] = (half[i] + sum(message[j, i] for j in neighbours[i]) + (n - held) * x0[i]) / n
        return new

    return run(x0, steps, step)
