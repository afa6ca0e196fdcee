"""Dense recursions with adaptive steps beyond plain D-Adam, which is `awc` or `atc` with `rule=Adam(...)`."""

from __future__ import annotations

import numpy as np

from support.oracle_base import PLAIN_ADAM, Adam, Array, Gradient, Mixing, Rate, matrices, rates, run


def dag_adam(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: Adam = PLAIN_ADAM) -> Array:
    """Communicate then adapt (DAG-Adam; our reconstruction from the abstract of Ying et al., ICLR 2022 submission).

    gt = (x - W (x - a g)) / a = W g + (I - W) x / a ; x+ = x - a Adam(gt). Coupled decay is part of g, decoupled decay
    shrinks the node's own x. A step with a = 0 mixes and leaves moments and step count alone.
    """
    mix, rate, scale = matrices(w), rates(lr), rule.scaling()

    def step(t: int, x: Array) -> Array:
        a = rate(t)
        if a == 0:
            return mix(t) @ x
        gt = (x - mix(t) @ (x - a * rule.signed(x, grad(t, x)))) / a
        shrink = 1 - a * rule.weight_decay if rule.decoupled else 1.0
        return x * shrink - a * scale(gt)

    return run(x0, steps, step)


def quasi_global_adam(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: Adam = PLAIN_ADAM,
    norm_eps: float = 1e-8,
) -> Array:
    """QG-DAdam (Lin et al. 2021, published code): moments remember the normalized move of the model, not the gradient.

        m = b1 mh + g ; v = b2 vh + (1-b2) g^2          (no (1-b1): as published)
        half = x - a (m/(1-b1^t)) / (sqrt(v)/sqrt(1-b2^t) + eps) ; x+ = W half
        d = (x - x+) / (||x - x+||_2 + norm_eps), norm over the whole model of the node
        mh = b1 mh + (1-b1) d ; vh = b2 vh + (1-b2) d^2

    Decoupled decay shrinks x in `half`. A step with a = 0 mixes and leaves mh, vh and t alone.
    """
    mix, rate = matrices(w), rates(lr)
    b1, b2 = rule.betas
    mh = vh = np.zeros_like(x0)
    count = 0

    def step(t: int, x: Array) -> Array:
        nonlocal mh, vh, count
        a = rate(t)
        if not np.any(a):  # One rate, or one for each node [n, 1].
            return mix(t) @ x
        count += 1
        g = rule.signed(x, grad(t, x))
        m, v = b1 * mh + g, b2 * vh + (1 - b2) * g * g
        shrink = 1 - a * rule.weight_decay if rule.decoupled else 1.0
        move = (m / (1 - b1**count)) / (np.sqrt(v) / np.sqrt(1 - b2**count) + rule.eps)
        new = mix(t) @ (x * shrink - a * move)
        d = (x - new) / (np.linalg.norm(x - new, axis=1, keepdims=True) + norm_eps)
        mh, vh = b1 * mh + (1 - b1) * d, b2 * vh + (1 - b2) * d * d
        return new

    return run(x0, steps, step)


def gt_adam(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: Adam = PLAIN_ADAM,
    trackers: list | None = None,
) -> Array:
    """GT-Adam (Carnevale et al. 2020): y = W y + g - g_prev ; x+ = W x - a Adam(y), decay as in `awc`.

    As in `momentum_tracking_engine`, x^t and y^{t-1} are mixed by step t's matrix. `trackers` collects (y, g).
    """
    mix, rate, scale = matrices(w), rates(lr), rule.scaling()
    g = y = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal g, y
        g_new = rule.signed(x, grad(t, x))
        y, g = mix(t) @ y + g_new - g, g_new
        if trackers is not None:
            trackers.append((y, g))
        decay = rate(t) * rule.weight_decay * x if rule.decoupled else 0.0
        return mix(t) @ x - decay - rate(t) * scale(y)

    return run(x0, steps, step)


def decentralized_amsgrad(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> Array:
    """Decentralized AMSGrad (Chen et al. 2023): the second moment is tracked, so all nodes divide by nearly the same.

    m = b1 m + (1-b1) g ; v = b2 v + (1-b2) g^2 ; vh_new = max(vh, v)
    ut = W u ; x+ = W x - a m / sqrt(max(ut, eps)) ; u+ = ut - vh + vh_new ; vh = v = u = eps at first
    """
    mix, rate = matrices(w), rates(lr)
    b1, b2 = betas
    m = np.zeros_like(x0)
    v = vh = u = np.full_like(x0, eps)

    def step(t: int, x: Array) -> Array:
        nonlocal m, v, vh, u
        g = grad(t, x)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        top = np.maximum(vh, v)
        ut = mix(t) @ u
        new = mix(t) @ x - rate(t) * m / np.sqrt(np.maximum(ut, eps))
        u, vh = ut - vh + top, top
        return new

    return run(x0, steps, step)
