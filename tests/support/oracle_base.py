"""What every oracle recursion shares: schedules, mixing matrices and torch's inner optimizer steps in numpy.

A recursion is a function (grad, W, x0, lr, steps, ...) -> trajectory [steps + 1, n, d] whose row 0 is x0, with
    grad(t, X) -> [n, d]   gradient of each node's loss at its own row of X
    W        a matrix [n, n] or a callable t -> matrix; W[i, j] is what node i gives to j's message: X+ = W X
    lr       a number or a callable t -> a_t
Steps count from 0. Arithmetic happens in x0's dtype if matrices and gradients share it, so float32 runs are possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Gradient = Callable[[int, Array], Array]
Mixing = Array | Callable[[int], Array]
Rate = float | Callable[[int], float]
Inner = Callable[[Array, Array, float], Array]
"""One optimizer step (x, gradient, lr) -> new x, with its own state."""


def matrices(w: Mixing) -> Callable[[int], Array]:
    return w if callable(w) else lambda t: w


def rates(lr: Rate) -> Callable[[int], float]:
    return lr if callable(lr) else lambda t: lr


def run(x0: Array, steps: int, step: Callable[[int, Array], Array]) -> Array:
    """Trajectory of x <- step(t, x)."""
    out = np.empty((steps + 1, *x0.shape), x0.dtype)
    out[0] = x0
    for t in range(steps):
        out[t + 1] = step(t, out[t])
    return out


def rhythm(w: Mixing, every: int = 1, average_every: int | None = None) -> Callable[[int], Array]:
    """Mixing matrix of step t under `communicate_every` and `global_average_every`.

    Steps with (t + 1) % every == 0 exchange and use round (t + 1) // every - 1, so rounds count exchanges; the others
    use W = I. Steps with (t + 1) % average_every == 0 average over all nodes instead (Gossip-PGA, Chen et al. 2021).
    """
    at = matrices(w)
    n = at(0).shape[0]

    def matrix(t: int) -> Array:
        if average_every is not None and (t + 1) % average_every == 0:
            return np.full((n, n), 1 / n)
        return at((t + 1) // every - 1) if (t + 1) % every == 0 else np.eye(n)

    return matrix


def strengthened(w: Mixing, s: Rate) -> Mixing:
    """I + s (W - I), for each step if either changes: the mixing matrix under `mix_strength`."""
    if not callable(w) and not callable(s):
        return np.eye(len(w)) + s * (w - np.eye(len(w)))
    at, strength = matrices(w), rates(s)
    return lambda t: np.eye(len(at(t))) + strength(t) * (at(t) - np.eye(len(at(t))))


def circulant(n: int, weights: dict[int, float]) -> Array:
    """W[i, (i - hop) mod n] = weights[hop]: node i receives from i - hop."""
    w = np.zeros((n, n))
    for hop, weight in weights.items():
        for i in range(n):
            w[i, (i - hop) % n] += weight
    return w


def ring(n: int, self_weight: float = 1 / 3) -> Array:
    side = (1 - self_weight) / 2
    return circulant(n, {0: self_weight, 1: side, -1: side})


def complete(n: int) -> Array:
    return np.full((n, n), 1 / n)


def static_exponential(n: int) -> Array:
    """Directed: weight 1/(tau+1) on self and on hops 1, 2, 4, ..; tau = ceil(log2 n) (Ying et al. 2021)."""
    tau = (n - 1).bit_length()
    return circulant(n, {0: 1 / (tau + 1)} | {2**k: 1 / (tau + 1) for k in range(tau)})


def one_peer_exponential(n: int) -> Callable[[int], Array]:
    """Step t: half own value, half that of the node 2^(t mod tau) back (Ying et al. 2021)."""
    tau = (n - 1).bit_length()
    rounds = [circulant(n, {0: 0.5, 2**k: 0.5}) for k in range(tau)]
    return lambda t: rounds[t % tau]


def one_peer_hypercube(n: int) -> Callable[[int], Array]:
    """Step t: averages the pairs (i, i xor 2^(t mod log2 n)); symmetric."""
    tau = (n - 1).bit_length()
    rounds = [0.5 * (np.eye(n) + np.eye(n)[np.arange(n) ^ 2**k]) for k in range(tau)]
    return lambda t: rounds[t % tau]


def lazy(w: Array) -> Array:
    """(I + W) / 2."""
    return (np.eye(len(w), dtype=w.dtype) + w) / 2


def push_matrix(w: Array) -> Array:
    """Column-stochastic on W's edges: sender j splits 1/(outdegree_j + 1), self included (Assran et al. 2019)."""
    edges = (w != 0) | np.eye(len(w), dtype=bool)
    return edges / edges.sum(0, keepdims=True)


def pull_matrix(w: Array) -> Array:
    """Row-stochastic matrix on W's edges: receiver i weighs itself and its in-neighbours alike."""
    edges = (w != 0) | np.eye(len(w), dtype=bool)
    return edges / edges.sum(1, keepdims=True)


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD: g += wd x ; buffer = g at first, then b buffer + (1 - dampening) g ; nesterov: g + b buffer."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def direction(self) -> Callable[[Array, Array], Array]:
        """Fresh state; returns (x, g) -> the vector that is multiplied by the rate and subtracted."""
        buffer: Array | None = None

        def turn(x: Array, g: Array) -> Array:
            nonlocal buffer
            g = (-g if self.maximize else g) + self.weight_decay * x
            if self.momentum == 0:
                return g
            buffer = g if buffer is None else self.momentum * buffer + (1 - self.dampening) * g
            return g + self.momentum * buffer if self.nesterov else buffer

        return turn

    def start(self) -> Inner:
        turn = self.direction()
        return lambda x, g, a: x - a * turn(x, g)


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam (coupled decay) and, with `decoupled`, AdamW; amsgrad divides by the largest v so far."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False

    def signed(self, x: Array, g: Array) -> Array:
        """Gradient with the sign of `maximize` and coupled decay."""
        g = -g if self.maximize else g
        return g if self.decoupled else g + self.weight_decay * x

    def scaling(self) -> Callable[[Array], Array]:
        """Fresh state; returns g -> mhat / (sqrt(vhat) + eps)."""
        b1, b2 = self.betas
        m = v = top = np.zeros(())
        t = 0

        def scale(g: Array) -> Array:
            nonlocal m, v, top, t
            t += 1
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            top = np.maximum(top, v)
            second = top if self.amsgrad else v
            return (m / (1 - b1**t)) / (np.sqrt(second) / np.sqrt(1 - b2**t) + self.eps)

        return scale

    def start(self) -> Inner:
        scale = self.scaling()

        def step(x: Array, g: Array, a: float) -> Array:
            shrink = 1 - a * self.weight_decay if self.decoupled else 1.0
            return x * shrink - a * scale(self.signed(x, g))

        return step


@dataclass(frozen=True)
class AccumAdam:
    """AccumAdam(W) of Decent-DP (Wang et al., ICLR 2025): moments commit every s steps, on the mean gradient.

    A += g/s ; cm = b1 m + (1-b1) g ; cv = b2 v + (1-b2) g^2            provisional, never stored
    x -= a/(1-b1^k) cm / (sqrt(cv)/sqrt(1-b2^k) + eps)                  k = ceil(t/s), t from 1
    every s-th step: m = b1 m + (1-b1) A ; v = b2 v + (1-b2) A^2 ; A = 0
    """

    accum_steps: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True

    def start(self) -> Inner:
        b1, b2 = self.betas
        s = self.accum_steps
        m = v = total = np.zeros(())
        t = 0

        def step(x: Array, g: Array, a: float) -> Array:
            nonlocal m, v, total, t
            t += 1
            k = -(-t // s)
            base = x * (1 - a * self.weight_decay) if self.decoupled else x
            g = g if self.decoupled else g + self.weight_decay * x
            total = total + g / s
            cm, cv = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            if t % s == 0:
                m, v = b1 * m + (1 - b1) * total, b2 * v + (1 - b2) * total * total
                total = np.zeros(())
            return base - a / (1 - b1**k) * cm / (np.sqrt(cv) / np.sqrt(1 - b2**k) + self.eps)

        return step


Rule = SGD | Adam | AccumAdam
PLAIN_SGD = SGD()
PLAIN_ADAM = Adam()
