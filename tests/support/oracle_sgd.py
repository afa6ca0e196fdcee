"""Dense recursions: D-SGD in its orders, data-parallel, DecentLaM, quasi-global momentum, exact diffusion, EXTRA."""

from __future__ import annotations

import numpy as np

from support.oracle_base import PLAIN_SGD, SGD, Array, Gradient, Mixing, Rate, Rule, lazy, matrices, rates, run


def awc(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: Rule = PLAIN_SGD) -> Array:
    """Adapt while combining: x+ = W x + (inner(x) - x), inner being torch's step at the node's own unmixed x.

    With SGD: x+ = W x - a g(x) (consensus / original D-PSGD; Lian et al. 2017), with momentum AWC-DmSGD; weight decay
    acts on the unmixed x. With Adam it is D-Adam of Decent-DP. `algorithm="awc"`.
    """
    mix, rate, inner = matrices(w), rates(lr), rule.start()
    return run(x0, steps, lambda t, x: mix(t) @ x + (inner(x, grad(t, x), rate(t)) - x))


def atc(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: Rule = PLAIN_SGD) -> Array:
    """Adapt then combine: x+ = W inner(x); with SGD x+ = W (x - a g(x)) (diffusion; DmSGD with momentum)."""
    mix, rate, inner = matrices(w), rates(lr), rule.start()
    return run(x0, steps, lambda t, x: mix(t) @ inner(x, grad(t, x), rate(t)))


def cta(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: Rule = PLAIN_SGD) -> Array:
    """Combine then adapt (Sayed): z = W x ; x+ = inner(z), the gradient taken at the mixed point."""
    mix, rate, inner = matrices(w), rates(lr), rule.start()

    def step(t: int, x: Array) -> Array:
        z = mix(t) @ x
        return inner(z, grad(t, z), rate(t))

    return run(x0, steps, step)


def allreduce(grad: Gradient, x0: Array, lr: Rate, steps: int, rule: Rule = PLAIN_SGD) -> Array:
    """Data-parallel training: every node applies the mean gradient with its own optimizer."""
    rate, inner = rates(lr), rule.start()

    def step(t: int, x: Array) -> Array:
        g = grad(t, x)
        return inner(x, np.broadcast_to(g.mean(0), g.shape), rate(t))

    return run(x0, steps, step)


def local(grad: Gradient, x0: Array, lr: Rate, steps: int, rule: Rule = PLAIN_SGD) -> Array:
    """Every node for itself."""
    rate, inner = rates(lr), rule.start()
    return run(x0, steps, lambda t, x: inner(x, grad(t, x), rate(t)))


def decentlam(
    grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, momentum: float = 0.0, weight_decay: float = 0.0
) -> Array:
    """DecentLaM (Yuan et al. 2021): gt = (x - W (x - a g)) / a ; m = b m + gt ; x+ = x - a m ; m^0 = 0.

    A step with a = 0 has no gt: it mixes and leaves m alone.
    """
    mix, rate = matrices(w), rates(lr)
    m = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal m
        a = rate(t)
        if a == 0:
            return mix(t) @ x
        m = momentum * m + (x - mix(t) @ (x - a * (grad(t, x) + weight_decay * x))) / a
        return x - a * m

    return run(x0, steps, step)


def decentlam_heavy_ball(
    grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, momentum: float = 0.0, weight_decay: float = 0.0
) -> Array:
    """DecentLaM without 1/a: x+ = W (x - a g) - b (a / a_prev) u ; u = x - x+, so u = a_prev m ; u^0 = 0.

    a_prev is the last rate that was not zero; a step with a = 0 mixes and leaves u and a_prev alone.
    """
    mix, rate = matrices(w), rates(lr)
    u, previous = np.zeros_like(x0), 1.0

    def step(t: int, x: Array) -> Array:
        nonlocal u, previous
        a = rate(t)
        if a == 0:
            return mix(t) @ x
        new = mix(t) @ (x - a * (grad(t, x) + weight_decay * x)) - momentum * (a / previous) * u
        u, previous = x - new, a
        return new

    return run(x0, steps, step)


def quasi_global(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mu: float | None = None,
) -> Array:
    """QG-DSGDm(-N) (Lin et al. 2021).

        m = b mh + g ; half = x - a m  (-N: x - a (g + b m)) ; x+ = W half
        mh+ = mu mh + (1 - mu) (x - x+) / a ; mh^0 = 0 ; mu = b unless given

    A step with a = 0 mixes and leaves mh alone.
    """
    mix, rate = matrices(w), rates(lr)
    mu = momentum if mu is None else mu
    mh = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal mh
        a = rate(t)
        if a == 0:
            return mix(t) @ x
        g = grad(t, x) + weight_decay * x
        m = momentum * mh + g
        new = mix(t) @ (x - a * (g + momentum * m if nesterov else m))
        mh = mu * mh + (1 - mu) * (x - new) / a
        return new

    return run(x0, steps, step)


def exact_diffusion(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: SGD = PLAIN_SGD,
    *,
    lazily: bool = True,
) -> Array:
    """Exact diffusion, psi form (Yuan et al. 2018), with Wb = (I + W) / 2 unless `lazily` is False.

    psi = x - a g ; phi = psi + x - psi_prev ; x+ = Wb phi ; psi_prev^0 = x^0. W static. `rule` may replace g by a
    momentum direction (EDM; torch's momentum instead of the paper's (1-b)-scaled one).
    """
    wb, rate, turn = _combine(w, lazily), rates(lr), rule.direction()
    previous = x0

    def step(t: int, x: Array) -> Array:
        nonlocal previous
        psi = x - rate(t) * turn(x, grad(t, x))
        phi = psi + x - previous
        previous = psi
        return wb @ phi

    return run(x0, steps, step)


def d2(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: SGD = PLAIN_SGD,
    *,
    lazily: bool = True,
) -> Array:
    """D2 (Tang et al. 2018): x^{k+1} = Wb (2 x^k - x^{k-1} - a_k g^k + a_{k-1} g^{k-1}) ; x^1 = Wb (x^0 - a_0 g^0).

    The OLD rate goes with the old gradient: a_k (g^k - g^{k-1}) would converge to a wrong point after an lr change.
    """
    wb, rate, turn = _combine(w, lazily), rates(lr), rule.direction()
    x_old, push_old = x0, np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal x_old, push_old
        push = rate(t) * turn(x, grad(t, x))
        phi = 2 * x - x_old - push + push_old
        x_old, push_old = x, push
        return wb @ phi

    return run(x0, steps, step)


def exact_diffusion_dual(
    grad: Gradient,
    w: Mixing,
    x0: Array,
    lr: Rate,
    steps: int,
    rule: SGD = PLAIN_SGD,
    *,
    lazily: bool = True,
) -> Array:
    """Exact diffusion, dual-difference form: the one that does not drift in low precision.

    phi = x - a g - y ; D_i = sum_j wb_ij (phi_j - phi_i) ; x+ = phi + D ; y+ = y - D ; y^0 = 0.
    The differences are formed before they are weighted, as the fused pass does.
    """
    wb, rate, turn = _combine(w, lazily), rates(lr), rule.direction()
    y = np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal y
        phi = x - rate(t) * turn(x, grad(t, x)) - y
        differences = phi[None, :, :] - phi[:, None, :]
        delta = (wb[:, :, None] * differences).sum(1)
        y = y - delta
        return phi + delta

    return run(x0, steps, step)


def extra(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: SGD = PLAIN_SGD) -> Array:
    """EXTRA (Shi et al. 2015): x^{k+1} = (I+W) x^k - (I+W)/2 x^{k-1} - (a_k g^k - a_{k-1} g^{k-1}).

    x^1 = W x^0 - a_0 g^0. The old rate goes with the old gradient, as in `d2`.
    """
    mix, rate, turn = matrices(w), rates(lr), rule.direction()
    x_old, push_old = x0, np.zeros_like(x0)

    def step(t: int, x: Array) -> Array:
        nonlocal x_old, push_old
        push = rate(t) * turn(x, grad(t, x))
        w_now = mix(t)
        new = w_now @ x - push if t == 0 else x + w_now @ x - lazy(w_now) @ x_old - push + push_old
        x_old, push_old = x, push
        return new

    return run(x0, steps, step)


def extra_one_state(grad: Gradient, w: Mixing, x0: Array, lr: Rate, steps: int, rule: SGD = PLAIN_SGD) -> Array:
    """EXTRA with one buffer: x+ = x + W x - a g - z_prev ; z = (x + W x)/2 - a g ; z_prev^0 = x^0."""
    mix, rate, turn = matrices(w), rates(lr), rule.direction()
    z = x0

    def step(t: int, x: Array) -> Array:
        nonlocal z
        push, mixed = rate(t) * turn(x, grad(t, x)), mix(t) @ x
        new = x + mixed - push - z
        z = (x + mixed) / 2 - push
        return new

    return run(x0, steps, step)


def _combine(w: Mixing, lazily: bool) -> Array:
    if callable(w):
        raise TypeError("exact diffusion is defined for a static matrix")
    return lazy(w) if lazily else w
