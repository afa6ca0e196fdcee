"""The reference rules, put together as methods and run on stacked ranks, equal the dense float64 recursions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support import oracle

from fusedfog.kernels import adam_hyper, reference

N, D, STEPS, MOMENTUM, DECAY = 5, 6, 40, 0.8, 0.05
RATES = [0.0 if t in (0, 13) else 0.03 + 0.01 * math.sin(t) for t in range(STEPS)]
W = oracle.ring(N)
_random = np.random.default_rng(0)
CURVATURE, TARGET, START = (_random.normal(size=size) for size in ((N, D, D), (N, D), (N, D)))


def slope(t: int, x: np.ndarray) -> np.ndarray:
    return np.einsum("nji,njk,nk->ni", CURVATURE, CURVATURE, x) / D - TARGET * (1 + 0.1 * math.sin(t))


def mixed(tensor: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.from_numpy(W) @ tensor,)


def adam_numbers(lr: float, decoupled: bool) -> tuple[float, ...]:
    group = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY, "maximize": False}
    return adam_hyper({**group, "decoupled_weight_decay": decoupled})


class Stacked:
    """All ranks at once, one row each: the rules of one method, called on their states by name."""

    def __init__(self) -> None:
        self.states: dict[str, torch.Tensor] = {}

    def message(self, rule: str, x, mix, g, names: str, hyper, step: float = 1.0):
        return self._apply(rule, x, mix, g, names, hyper, step)[1][0]

    def __call__(self, rule: str, x, mix, g, names: str, hyper, step: float = 1.0):
        return self._apply(rule, x, mix, g, names, hyper, step)[0]

    def _apply(self, rule: str, x, mix, g, names: str, hyper, step: float):
        states = tuple(self.states.get(name, torch.zeros_like(x)) for name in names.split())
        x_new, states, messages = reference.RULES[rule](x, mix, g, states, step, hyper)
        self.states.update(zip(names.split(), states, strict=True))
        return x_new, messages


def decentlam(run: Stacked, t: int, x, g, lr: float):
    message = run.message("descend", x, (x,), g, "", (lr, DECAY, 1.0))
    previous = next((rate for rate in reversed(RATES[:t]) if rate), 1.0)
    return run("decentlam", x, mixed(message), g, "u", (MOMENTUM * lr / previous, float(lr != 0)))


def quasi_global(run: Stacked, t: int, x, g, lr: float):
    message = run.message("quasi_global_before", x, (x,), g, "mh", (lr, MOMENTUM, DECAY, 1.0, 1.0))
    return run("quasi_global", x, mixed(message), g, "mh", (lr, MOMENTUM, 1 - MOMENTUM))


def exact_diffusion(run: Stacked, t: int, x, g, lr: float):
    numbers = (lr, MOMENTUM, 1.0, DECAY, 1.0, 1.0)
    phi = run("exact_diffusion_before", x, (x,), g, "y buf", numbers, t + 1.0)
    return run("exact_diffusion", phi, ((mixed(phi)[0] - phi) / 2,), g, "y", ())


def extra(run: Stacked, t: int, x, g, lr: float):
    return run("extra", x, (mixed(x)[0] - x,), g, "y buf", (lr, MOMENTUM, 1.0, DECAY, 1.0, 1.0), t + 1.0)


def tracking(run: Stacked, t: int, x, g, lr: float):
    y = run.states.get("y", torch.zeros_like(x))
    return run("tracking", x, mixed(x) + mixed(y), g, "y u", (lr, MOMENTUM, DECAY, 1.0))


def adam_tracking(run: Stacked, t: int, x, g, lr: float):
    y = run.states.get("y", torch.zeros_like(x))
    return run("adam_tracking", x, mixed(x) + mixed(y), g, "y g m v top", adam_numbers(lr, True), t + 1.0)


def dag(run: Stacked, t: int, x, g, lr: float):
    message = run.message("descend", x, (x,), g, "", (lr, DECAY, 1.0))
    count = sum(rate != 0 for rate in RATES[: t + 1])
    return run("dag", x, mixed(message), g, "m v", adam_numbers(lr, False), count + 1.0)


def quasi_global_adam(run: Stacked, t: int, x, g, lr: float):
    norm = run.states.get("delta", torch.zeros_like(x)).norm(dim=1, keepdim=True)
    numbers = (*adam_numbers(lr, True), torch.where(norm > 0, 1 / (norm + 1e-8), 0.0))
    count = sum(rate != 0 for rate in RATES[: t + 1])
    message = run.message("quasi_global_adam_before", x, (x,), g, "mh vh delta", numbers, max(count, 1.0))
    return run("quasi_global_adam", x, mixed(message), g, "delta", (float(lr != 0),))


def accum_adam(run: Stacked, t: int, x, g, lr: float):
    return run("accum_adam", x, mixed(x), g, "m v A", (*adam_numbers(lr, True), 4.0), t + 1.0)


def noloco(run: Stacked, t: int, x, g, lr: float):
    run.states.setdefault("phi", torch.from_numpy(START))
    x = x - lr * g
    return x if (t + 1) % 5 else run("outer", x, mixed(x), g, "phi m", (0.7, 0.5, 0.0))


def diloco(run: Stacked, t: int, x, g, lr: float):
    run.states.setdefault("phi", torch.from_numpy(START).mean(0).expand(N, D))
    x = x - lr * g
    return x if (t + 1) % 5 else run("outer", x, (x.mean(0).expand(N, D),), g, "phi m", (0.7, 0.9, 1.0))


SGD_RULE = oracle.SGD(momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
ADAM_RULE = oracle.Adam(weight_decay=DECAY)
ADAMW_RULE = oracle.Adam(weight_decay=DECAY, decoupled=True)
ACCUM_RULE = oracle.AccumAdam(accum_steps=4, weight_decay=DECAY)
METHODS = [
    (decentlam, oracle.decentlam, {"momentum": MOMENTUM, "weight_decay": DECAY}),
    (quasi_global, oracle.quasi_global, {"momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}),
    (exact_diffusion, oracle.exact_diffusion, {"rule": SGD_RULE}),
    (extra, oracle.extra, {"rule": SGD_RULE}),
    (tracking, oracle.momentum_tracking, {"momentum": MOMENTUM, "weight_decay": DECAY}),
    (adam_tracking, oracle.gt_adam, {"rule": dataclasses.replace(ADAMW_RULE, amsgrad=True)}),
    (dag, oracle.dag_adam, {"rule": ADAM_RULE}),
    (quasi_global_adam, oracle.quasi_global_adam, {"rule": ADAMW_RULE}),
    (accum_adam, oracle.awc, {"rule": ACCUM_RULE}),
]


@pytest.mark.parametrize(("method", "recursion", "options"), METHODS, ids=[method.__name__ for method, *_ in METHODS])
def test_methods_equal_the_dense_recursions(method, recursion, options):
    check_path(method, recursion(slope, W, START, RATES.__getitem__, STEPS, **options))


@pytest.mark.parametrize(("method", "outer"), [(noloco, oracle.NoLoCo(W)), (diloco, oracle.DiLoCo())])
def test_outer_steps_equal_the_dense_recursions(method, outer):
    start = START if method is noloco else np.broadcast_to(START.mean(0), START.shape)
    check_path(method, oracle.with_outer(slope, start, RATES.__getitem__, STEPS, 5, outer))


def check_path(method, want: np.ndarray) -> None:
    run, x = Stacked(), torch.tensor(want[0])
    for t in range(STEPS):
        x = method(run, t, x, torch.from_numpy(slope(t, x.numpy())), RATES[t])
        np.testing.assert_allclose(x.numpy(), want[t + 1], rtol=1e-12, atol=1e-12)
