"""The update rules on the GPU: one device function each, the twin of the function of the same name in `reference.py`.

A rule is `RULE(x, mixed, g, states, step, hyper) -> (x_new, states_new, messages)` on fp32 blocks in registers;
`mixed`, `states` and `messages` are tuples of blocks, `step` and the floats of `hyper` run-time scalars. `hyper` has the
names that the twin's signature gives it. States beyond those that the pass was given are dropped.

Division and square root of blocks are correctly rounded, as numpy's are. (torch's square root on the CPU is not: one in six
fp32 results is off by one unit in the last place, so the last bits of Adam's steps differ between the two.) Triton 3.5's
take subnormal numbers for zero.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from . import reference

LEFT = {
    "descend": "x",
    "quasi_global_before": "x0",
    "exact_diffusion_before": "0",
    "quasi_global_adam_before": "x2",
}
"""Rule -> which of x and its states, by number, it returns as they were: they aren't stored. Others store all."""


@triton.jit
def one_minus_power(log_beta, step):
    """`1 - beta^step` from log(beta), to a few 1e-7 relative; beta^step itself would cancel four digits."""
    z = log_beta * step
    # Taylor's (exp(z) - 1) / z to z^9: relative error under 5e-8 for |z| < 1. Beyond, 1 - exp(z) cancels one bit.
    series = 1.0 + z * 0.1
    for n in tl.static_range(9, 1, -1):
        series = 1.0 + series * z * (1.0 / n)
    return tl.where(z > -1.0, -z * series, 1.0 - tl.exp(z))


@triton.jit
def descent(g, x, sign, decay):
    """`sign*g + decay*x`; without decay an x that isn't finite stays out of it, and out of the moments, as in torch."""
    return sign * g + tl.where(decay != 0.0, decay * x, 0.0)


@triton.jit
def mix(x, mixed, g, states, step, hyper):
    """Averaging alone."""
    return mixed[0], states, (mixed[0],)


@triton.jit
def sgd(x, mixed, g, states, step, hyper):
    """torch.optim.SGD; states () or (momentum_buffer,)."""
    d = descent(g, x, hyper.sign, hyper.decay)
    buf = d
    if len(states) == 1:
        buf = tl.where(step == 1.0, d, hyper.momentum * states[0] + hyper.undamped * d)
        d = tl.where(hyper.nesterov != 0.0, d + hyper.momentum * buf, buf)
    x_new = mixed[0] - hyper.lr * d
    return x_new, (buf,), (x_new,)


@triton.jit
def moments(m, v, d, hyper):
    """Adam's moments after d."""
    m = tl.where(hyper.undecayed1 < 0.5, m + hyper.undecayed1 * (d - m), d - hyper.beta1 * (d - m))
    return m, hyper.beta2 * v + hyper.undecayed2 * d * d


@triton.jit
def stride(x, start, m, v, step, hyper):
    """Adam's step from `start` with these moments and decoupled decay at x."""
    rescale = 1.0 / tl.sqrt_rn(one_minus_power(hyper.log_beta2, step))
    size = hyper.lr / one_minus_power(hyper.log_beta1, step)
    return start - tl.div_rn(size * m, tl.sqrt_rn(v) * rescale + hyper.eps) - hyper.lr * hyper.decoupled * x


@triton.jit
def adapt(x, start, d, states, step, hyper):
    """Adam's step from `start` along d, amsgrad's if there is a third state: x_new and the states after it."""
    m, v = moments(states[0], states[1], d, hyper)
    top = v
    if len(states) == 3:
        # torch's maximum keeps a NaN of either; the GPU's own takes the other operand.
        top = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)
    return stride(x, start, m, top, step, hyper), (m, v, top)


@triton.jit
def adam(x, mixed, g, states, step, hyper):
    """torch.optim.Adam and AdamW; states (exp_avg, exp_avg_sq[, max_exp_avg_sq])."""
    x_new, states = adapt(x, mixed[0], descent(g, x, hyper.sign, hyper.coupled), states, step, hyper)
    return x_new, states, (x_new,)


@triton.jit
def accum_adam(x, mixed, g, states, step, hyper):
    """AccumAdam and AccumAdamW; states (exp_avg, exp_avg_sq, accumulator)."""
    m, v, total = states
    d = descent(g, x, hyper.sign, hyper.coupled)
    # Correctly rounded, the quotient is an integer only for multiples of the period.
    k = tl.ceil(tl.div_rn(step, hyper.period))
    x_new, _ = adapt(x, mixed[0], d, (m, v), k, hyper)
    total += d * (1.0 / hyper.period)
    m_new, v_new = moments(m, v, total, hyper)
    commit = k * hyper.period == step
    return x_new, (tl.where(commit, m_new, m), tl.where(commit, v_new, v), tl.where(commit, 0.0, total)), (x_new,)


@triton.jit
def descend(x, mixed, g, states, step, hyper):
    """Before `decentlam` and `dag`; no states."""
    return x, (), (x - hyper.lr * descent(g, x, hyper.sign, hyper.decay),)


@triton.jit
def decentlam(x, mixed, g, states, step, hyper):
    """DecentLaM after `descend`; states (u,)."""
    x_new = tl.where(hyper.active != 0.0, mixed[0] - hyper.carry * states[0], mixed[0])
    return x_new, (tl.where(hyper.active != 0.0, x - x_new, states[0]),), ()


@triton.jit
def quasi_global_before(x, mixed, g, states, step, hyper):
    """Before `quasi_global`; states (mh,)."""
    d = descent(g, x, hyper.sign, hyper.decay)
    m = d + hyper.momentum * states[0]
    return x, states, (x - hyper.lr * tl.where(hyper.nesterov != 0.0, d + hyper.momentum * m, m),)


@triton.jit
def quasi_global(x, mixed, g, states, step, hyper):
    """Quasi-global momentum after `quasi_global_before`; states (mh,)."""
    moving = hyper.lr != 0.0
    mh = hyper.mu * states[0] + hyper.undecayed / tl.where(moving, hyper.lr, 1.0) * (x - mixed[0])
    return mixed[0], (tl.where(moving, mh, states[0]),), ()


@triton.jit
def exact_diffusion_before(x, mixed, g, states, step, hyper):
    """SGD's step less y; states (y[, momentum_buffer])."""
    x_new, kept, _ = sgd(x, mixed, g, states[1:], step, hyper)
    x_new = x_new - states[0]
    return x_new, (states[0],) + kept, (x_new,)  # noqa: RUF005


@triton.jit
def exact_diffusion(x, mixed, g, states, step, hyper):
    """Exact diffusion after `exact_diffusion_before`; states (y,), row_sum 0."""
    return x + mixed[0], (states[0] - mixed[0],), ()


@triton.jit
def extra(x, mixed, g, states, step, hyper):
    """EXTRA; states (y[, momentum_buffer]), row_sum 0."""
    x_new, kept, _ = sgd(x, (x + mixed[0],), g, states[1:], step, hyper)
    x_new = x_new - states[0]
    return x_new, (states[0] - 0.5 * mixed[0],) + kept, (x_new,)  # noqa: RUF005


@triton.jit
def tracking(x, mixed, g, states, step, hyper):
    """Gradient and momentum tracking, of two messages; states (y, u)."""
    u = descent(g, x, hyper.sign, hyper.decay) + hyper.momentum * states[1]
    y = mixed[1] + (u - states[1])
    x_new = mixed[0] - hyper.lr * y
    return x_new, (y, u), (x_new, y)


@triton.jit
def adam_tracking(x, mixed, g, states, step, hyper):
    """GT-Adam, of two messages; states (y, g_prev, exp_avg, exp_avg_sq[, max_exp_avg_sq])."""
    d = descent(g, x, hyper.sign, hyper.coupled)
    y = mixed[1] + (d - states[1])
    x_new, kept = adapt(x, mixed[0], y, states[2:], step, hyper)
    return x_new, (y, d) + kept, (x_new, y)  # noqa: RUF005


@triton.jit
def dag(x, mixed, g, states, step, hyper):
    """Communicate, then adapt, after `descend`; states (exp_avg, exp_avg_sq[, max_exp_avg_sq])."""
    moving = hyper.lr != 0.0
    d = (x - mixed[0]) * (1.0 / tl.where(moving, hyper.lr, 1.0))
    x_new, kept = adapt(x, x, d, states, tl.maximum(step - 1.0, 1.0), hyper)
    new_states = ()
    for s in tl.static_range(len(states)):
        new_states = new_states + (tl.where(moving, kept[s], states[s]),)  # noqa: RUF005
    return tl.where(moving, x_new, mixed[0]), new_states, ()


@triton.jit
def quasi_global_adam_before(x, mixed, g, states, step, hyper):
    """Before `quasi_global_adam`; states (mh, vh, delta)."""
    mh, vh, delta = states
    mh_new, vh_new = moments(mh, vh, delta * hyper.inverse_norm, hyper)
    mh = tl.where(hyper.inverse_norm != 0.0, mh_new, mh)
    vh = tl.where(hyper.inverse_norm != 0.0, vh_new, vh)
    d = descent(g, x, hyper.sign, hyper.coupled)
    m, v = hyper.beta1 * mh + d, hyper.beta2 * vh + hyper.undecayed2 * d * d
    return x, (mh, vh, delta), (stride(x, x, m, v, step, hyper),)


@triton.jit
def quasi_global_adam(x, mixed, g, states, step, hyper):
    """The model's move, after `quasi_global_adam_before`; states (delta,)."""
    return mixed[0], (tl.where(hyper.active != 0.0, x - mixed[0], 0.0),), ()


@triton.jit
def outer(x, mixed, g, states, step, hyper):
    """DiLoCo's and NoLoCo's outer step; states (phi, m)."""
    pull = hyper.lr * (mixed[0] - states[0])
    m = hyper.momentum * states[1] + pull
    phi = states[0] + tl.where(hyper.nesterov != 0.0, pull + hyper.momentum * m, m)
    return phi, (phi, m), ()


class Names:
    """Gives a rule's numbers their names in device code, where it is a constexpr that is called.

    The named tuple's class can't be one itself: from 3.6 on Triton takes it for one of its instances. What is compiled is
    known on disk by `cache_key`, in which the names must stand, in order.
    """

    def __init__(self, names: Callable[..., tuple[Any, ...]]) -> None:
        self._names = names
        self.cache_key = " ".join(inspect.signature(names).parameters)

    def __call__(self, *numbers: Any) -> tuple[Any, ...]:
        """The named tuple of these numbers."""
        return self._names(*numbers)

    def __repr__(self) -> str:
        return f"Names({self.cache_key})"


@functools.cache
def names_of(rule: str) -> Names | None:
    """The names of a rule's numbers; None if its twin's signature says none."""
    names = reference.names_of(reference.RULES[rule])
    return None if names is None else Names(names)


@functools.cache
def left_by(rule: str) -> int:
    """What a rule leaves as it was, as bits: x, then each state."""
    return sum(1 << ("x0123456789".index(name)) for name in LEFT.get(rule, ""))
