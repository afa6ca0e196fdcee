"""The update rules in plain torch: the specification of the device functions in `rules`, and what CPU passes apply.

A rule is `RULE(x, mixed, g, states, step, hyper) -> (x_new, states_new, messages)`. All tensors have one shape and the
arithmetic dtype (fp32; fp64 for fp64 parameters); `mixed`, `states` and `messages` are tuples of tensors, `step` is the
step being taken, from 1, and `hyper` the named tuple of floats that the signature says, from `hyper.py`. A rule is
elementwise and changes none of its arguments, so it works as well on stacked [n, N] tensors, one row per rank.

torch's rules are `x_new = mixed[0] + (inner(x) - x)`, where inner is torch.optim's step at the rank's own unmixed x:
weight decay acts on x, as it does in all rules, and without neighbours the rule is torch's local step. A method that
does something on both sides of its exchange is two rules.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .hyper import (
    AccumAdam,
    Active,
    Adam,
    Adams,
    DecentLam,
    Descent,
    Outer,
    QuasiGlobal,
    QuasiGlobalAdam,
    QuasiGlobalSgd,
    Sgd,
    Tracking,
)

Tensors = tuple[Tensor, ...]
Result = tuple[Tensor, Tensors, Tensors]
Rule = Callable[[Tensor, Tensors, Tensor, Tensors, float, Sequence[Any]], Result]


def mix(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: tuple[()]) -> Result:
    """Averaging alone: `x_new = mixed[0]`. No states, no hyper; its message is x_new."""
    return mixed[0], states, (mixed[0],)


def sgd(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Sgd) -> Result:
    """torch.optim.SGD.

        d = sign*g + weight_decay*x;  buf = momentum*buf + (1-dampening)*d, or d at step 1;
        x_new = mixed[0] - lr * (d + momentum*buf if nesterov else buf)

    states is () for momentum 0, where d takes the place of buf, or (momentum_buffer,). Its message is x_new.
    """
    d = _descent(g, x, hyper.sign, hyper.decay)
    if states:
        buf = d if step == 1 else (states[0] * hyper.momentum).add_(d, alpha=hyper.undamped)
        d = d.add(buf, alpha=hyper.momentum) if hyper.nesterov else buf
        states = (buf,)
    x_new = mixed[0].add(d, alpha=-hyper.lr)
    return x_new, states, (x_new,)


def adam(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Adam) -> Result:
    """torch.optim.Adam (coupled weight decay) and AdamW (decoupled); amsgrad if there is a third state.

        d = sign*g + coupled*x;  m += (1-beta1)*(d - m);  v = beta2*v + (1-beta2)*d^2;  top = v, or max(top, v);
        x_new = mixed[0] - lr*decoupled*x - lr/(1-beta1^t) * m / (sqrt(top)/sqrt(1-beta2^t) + eps)

    states is (exp_avg, exp_avg_sq) or (exp_avg, exp_avg_sq, max_exp_avg_sq). Its message is x_new.
    """
    d = _descent(g, x, hyper.sign, hyper.coupled)
    x_new, states = _adapt(x, mixed[0], d, states, step, hyper)
    return x_new, states, (x_new,)


def accum_adam(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: AccumAdam) -> Result:
    """AccumAdam and AccumAdamW of Decent-DP (Wang et al. 2025): moments that remember the mean gradient of s steps.

        d = sign*g + coupled*x;  A += d/s;  x_new = Adam's from provisional moments of d, with t = ceil(step/s);
        every s-th step the moments take A instead of d, and A = 0; at other steps they stay

    The averaged gradient is less noisy, so v is too. s is hyper.period, and 1 is `adam`. states is (exp_avg, exp_avg_sq,
    accumulator). Its message is x_new.
    """
    d = _descent(g, x, hyper.sign, hyper.coupled)
    x_new, _ = _adapt(x, mixed[0], d, states[:2], math.ceil(step / hyper.period), hyper)
    total = states[2].add(d, alpha=1.0 / hyper.period)
    if step % hyper.period:
        return x_new, (*states[:2], total), (x_new,)
    return x_new, (*_moments(states[0], states[1], total, hyper), torch.zeros_like(total)), (x_new,)


def descend(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Descent) -> Result:
    """The pass before `decentlam` and `dag`: x stays, and the message is `x - lr*(sign*g + decay*x)`. No states."""
    return x, states, (x.add(_descent(g, x, hyper.sign, hyper.decay), alpha=-hyper.lr),)


def decentlam(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: DecentLam) -> Result:
    """DecentLaM (Yuan et al. 2021) after `descend`, in the heavy ball form, which never divides by lr.

        x_new = mixed[0] - carry*u;  u = x - x_new

    With carry = momentum*lr/(lr of the step before) this is the paper's m = momentum*m + (x - mixed[0])/lr and
    x_new = x - lr*m, u being lr*m. states is (u,), 0 at first. It makes no message.
    """
    if not hyper.active:
        return mixed[0], states, ()
    x_new = mixed[0].add(states[0], alpha=-hyper.carry)
    return x_new, (x - x_new,), ()


def quasi_global_before(
    x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: QuasiGlobalSgd
) -> Result:
    """The pass before `quasi_global` (QG-DSGDm and, with nesterov, QG-DSGDm-N of Lin et al. 2021); x and mh stay.

        d = sign*g + decay*x;  m = momentum*mh + d;  message = x - lr*(d + momentum*m if nesterov else m)

    states is (mh,), 0 at first.
    """
    d = _descent(g, x, hyper.sign, hyper.decay)
    m = d.add(states[0], alpha=hyper.momentum)
    return x, states, (x.add(d.add(m, alpha=hyper.momentum) if hyper.nesterov else m, alpha=-hyper.lr),)


def quasi_global(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: QuasiGlobal) -> Result:
    """Quasi-global momentum (Lin et al. 2021): mh follows the move of the model, averaging included.

        x_new = mixed[0];  mh = mu*mh + (1-mu)*(x - x_new)/lr

    With lr = 0, mh stays. states is (mh,). It makes no message.
    """
    if hyper.lr == 0:
        return mixed[0], states, ()
    return mixed[0], ((states[0] * hyper.mu).add_(x - mixed[0], alpha=hyper.undecayed / hyper.lr),), ()


def exact_diffusion_before(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Sgd) -> Result:
    """The pass before `exact_diffusion`, in place: `x_new = sgd(x) - y`, which is also the message; y stays.

    states is (y,) or (y, momentum_buffer).
    """
    x_new, kept, _ = sgd(x, mixed, g, states[1:], step, hyper)
    x_new = x_new - states[0]
    return x_new, (states[0], *kept), (x_new,)


def exact_diffusion(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: tuple[()]) -> Result:
    """Exact diffusion (Yuan et al. 2018), also known as D2 (Tang et al. 2018), after `exact_diffusion_before`.

        x_new = x + D;  y = y - D;  D = mixed[0], the neighbours' weighted differences alone (a pass with row_sum = 0)

    The dual-difference form: y sums what the averaging has moved. For a symmetric W the ranks' D cancel in pairs to the
    last bit, so mean(y) stays zero and rounding does not accumulate as it does in the textbook forms; (x + D) - x in the
    place of D would lose that (fp32: ||mean - x*|| 2.6e-3 after 4,000 steps). W is static, with (I+W)/2 in the place of
    W. states is (y,), 0 at first. It makes no message.
    """
    return x + mixed[0], (states[0] - mixed[0],), ()


def extra(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Sgd) -> Result:
    """EXTRA (Shi et al. 2015) in dual-difference form, which does not drift: y is the sum of (I-W)x/2 so far.

        x_new = sgd(x) + D - y;  y = y - D/2;  D = mixed[0] of a pass with row_sum = 0, as in `exact_diffusion`

    states is (y,) or (y, momentum_buffer), y being 0 at first. Its message is x_new.
    """
    x_new, kept, _ = sgd(x, (x + mixed[0],), g, states[1:], step, hyper)
    x_new = x_new - states[0]
    return x_new, (states[0].sub(mixed[0], alpha=0.5), *kept), (x_new,)


def tracking(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Tracking) -> Result:
    """Momentum tracking (Takezawa et al. 2023); with momentum 0 gradient tracking, DIGing (Nedic et al. 2017).

        u_new = momentum*u + sign*g + decay*x;  y = mixed[1] + (u_new - u);  x_new = mixed[0] - lr*y

    Two messages, x and y, are mixed, both known before the gradient. y follows the network's mean of u: the means of
    both are equal at every step. states is (y, u), both 0 at first. Its messages are x_new and y.
    """
    u = _descent(g, x, hyper.sign, hyper.decay).add(states[1], alpha=hyper.momentum)
    y = mixed[1] + (u - states[1])
    x_new = mixed[0].add(y, alpha=-hyper.lr)
    return x_new, (y, u), (x_new, y)


def adam_tracking(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Adam) -> Result:
    """GT-Adam (Carnevale et al. 2020): Adam on the tracked gradient y.

        d = sign*g + coupled*x;  y = mixed[1] + (d - g_prev);  g_prev = d;  m, v, x_new = adam's with y for its d

    Messages as in `tracking`. states is (y, g_prev, exp_avg, exp_avg_sq) and, for amsgrad, max_exp_avg_sq, all 0 at
    first. Its messages are x_new and y.
    """
    d = _descent(g, x, hyper.sign, hyper.coupled)
    y = mixed[1] + (d - states[1])
    x_new, moments = _adapt(x, mixed[0], y, states[2:], step, hyper)
    return x_new, (y, d, *moments), (x_new, y)


def dag(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Adam) -> Result:
    """Communicate, then adapt (our reconstruction, from its abstract, of Ying et al.'s DAG-Adam), after `descend`.

        d = (x - mixed[0])/lr;  m, v = adam's;  x_new = x - lr*decoupled*x - lr*(adam's direction)

    d is the gradient that DecentLaM uses, W g + (I-W)x/lr. Sign and coupled decay are in the message already. With
    lr = 0 x_new is mixed[0] and the states stay. The pass before has advanced the step table, so t is step - 1 here.
    states are adam's. It makes no message.
    """
    if hyper.lr == 0:
        return mixed[0], states, ()
    x_new, states = _adapt(x, x, (x - mixed[0]).mul_(1.0 / hyper.lr), states, max(step - 1.0, 1.0), hyper)
    return x_new, states, ()


def quasi_global_adam_before(
    x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: QuasiGlobalAdam
) -> Result:
    """The pass before `quasi_global_adam` (QG-DAdam of Lin et al. 2021, as published in code); x and delta stay.

        e = delta/|delta|;    mh += (1-beta1)*(e - mh);  vh = beta2*vh + (1-beta2)*e^2
        d = sign*g + coupled*x;  m = beta1*mh + d;       v = beta2*vh + (1-beta2)*d^2
        message = x - lr*decoupled*x - lr/(1-beta1^t) * m / (sqrt(v)/sqrt(1-beta2^t) + eps)

    m has no factor 1 - beta1: published so. The norm is that of the rank's whole model, hence known only once the pass
    before is over: 1/|delta| comes from `extra`, and 0, for no delta yet, leaves mh and vh. states is (mh, vh, delta), all 0
    at first.
    """
    mh, vh, delta = states
    if isinstance(hyper.inverse_norm, Tensor) or hyper.inverse_norm:
        moved = _moments(mh, vh, delta * hyper.inverse_norm, hyper)
        known = torch.as_tensor(hyper.inverse_norm, device=x.device) != 0
        mh, vh = torch.where(known, moved[0], mh), torch.where(known, moved[1], vh)
    d = _descent(g, x, hyper.sign, hyper.coupled)
    m, v = d.add(mh, alpha=hyper.beta1), (vh * hyper.beta2).addcmul_(d, d, value=hyper.undecayed2)
    return x, (mh, vh, delta), (_stride(x, x, m, v, step, hyper),)


def quasi_global_adam(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Active) -> Result:
    """Remembers the model's move for the next `quasi_global_adam_before`: `x_new = mixed[0]; delta = x - x_new`.

    A step with lr = 0 is not active and leaves delta = 0. Its norm is 0 then, so that the move of pure averaging enters no
    moment. states is (delta,). It makes no message.
    """
    return mixed[0], (x - mixed[0] if hyper.active else torch.zeros_like(x),), ()


def outer(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Outer) -> Result:
    """The outer step after many inner ones: DiLoCo (Douillard et al. 2023) and NoLoCo (Kolehmainen et al. 2025).

        m = momentum*m + lr*(mixed[0] - phi);  phi += lr*(mixed[0] - phi) + momentum*m if nesterov else m;  x_new = phi

    phi is the last outer step's result. DiLoCo is the mean of all ranks with nesterov, torch.optim.SGD's for a constant
    lr; NoLoCo is the mean of a pair without, as in its published code. states is (phi, m), the parameters and 0 at first. It
    makes no message.
    """
    phi, m = states
    pull = (mixed[0] - phi) * hyper.lr
    m = pull.add(m, alpha=hyper.momentum)
    phi = phi + (pull.add(m, alpha=hyper.momentum) if hyper.nesterov else m)
    return phi, (phi, m), ()


def _descent(g: Tensor, x: Tensor, sign: float, decay: float) -> Tensor:
    """`sign*g + decay*x`, as torch forms it: without decay, x is not looked at."""
    d = g if sign == 1 else g * sign
    return d.add(x, alpha=decay) if decay else d


def _moments(m: Tensor, v: Tensor, d: Tensor, hyper: Adams) -> tuple[Tensor, Tensor]:
    """Adam's moments after d."""
    return m.lerp(d, hyper.undecayed1), (v * hyper.beta2).addcmul_(d, d, value=hyper.undecayed2)


def _stride(x: Tensor, start: Tensor, m: Tensor, v: Tensor, step: float, hyper: Adams) -> Tensor:
    """Adam's step from `start` with these moments and decoupled decay at x."""
    denominator = v.sqrt().mul_((1.0 - hyper.beta2**step) ** -0.5).add_(hyper.eps)
    x_new = torch.addcdiv(start, m, denominator, value=-hyper.lr / (1.0 - hyper.beta1**step))
    return x_new.add_(x, alpha=-hyper.lr * hyper.decoupled) if hyper.decoupled else x_new


def _adapt(x: Tensor, start: Tensor, d: Tensor, states: Tensors, step: float, hyper: Adams) -> tuple[Tensor, Tensors]:
    """Adam's step from `start` along d, amsgrad's if there is a third state: x_new and the states after it."""
    m, v = _moments(states[0], states[1], d, hyper)
    states = (m, v, torch.maximum(states[2], v)) if len(states) == 3 else (m, v)
    return _stride(x, start, m, states[-1], step, hyper), states


def names_of(rule: Callable[..., Result]) -> Callable[..., tuple[Any, ...]] | None:
    """The named tuple that a rule's signature wants for `hyper`, or None if any tuple will do."""
    wanted = typing.get_type_hints(rule).get("hyper")
    return wanted if isinstance(wanted, type) and hasattr(wanted, "_fields") else None


def with_names(rule: Callable[..., Result]) -> Rule:
    """The rule, for numbers in a plain tuple too: here they get their names."""
    names = names_of(rule)
    if names is None:
        return rule

    @functools.wraps(rule)
    def named(x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: Sequence[Any]) -> Result:
        return rule(x, mixed, g, states, step, names(*hyper))

    return named


RULES: dict[str, Rule] = {
    rule.__name__: with_names(rule)
    for rule in (
        mix,
        sgd,
        adam,
        accum_adam,
        descend,
        decentlam,
        quasi_global_before,
        quasi_global,
        exact_diffusion_before,
        exact_diffusion,
        extra,
        tracking,
        adam_tracking,
        dag,
        quasi_global_adam_before,
        quasi_global_adam,
        outer,
    )
}
"""Every rule by name, for numbers in a plain tuple too; the device twin of each has the same name in `rules.py`."""


def mix_messages(
    base: Tensor,
    inbox: Sequence[Tensor],
    weights: Sequence[float],
    row_sum: float = 1.0,
    sent: Tensor | None = None,
    alarm: Tensor | None = None,
) -> Tensor:
    """`row_sum*base + sum_k weights[k]*(inbox[k] - sent)`, summed in the order given.

    The difference form keeps a consensus exactly (equal messages give base, whatever the rounding of the weights). A
    neighbour of weight zero is skipped, so a NaN in its buffer stays there.

    Args:
        base: the rank's own value, any shape, in the arithmetic dtype.
        inbox: K tensors of that shape, of the same or a narrower dtype.
        weights: K floats.
        row_sum: the sum of a row of the mixing matrix, our own weight included.
        sent: what the neighbours got from us, if that is not base to the last bit.
        alarm: as `Mixing.alarm`, on the CPU.

    Returns:
        A tensor like base; base itself if nothing is mixed in and row_sum is 1.

    Raises:
        ValueError: if inbox and weights differ in length.
    """
    mixed = base if row_sum == 1 else base * row_sum
    own = base if sent is None else sent
    for received, weight in zip(inbox, weights, strict=True):
        if weight:
            # Not add(alpha=weight), which fuses multiplication and addition where the CPU can: this gives the kernel's
            # bits on every machine.
            difference = received - own
            if alarm is not None:
                contain(difference, alarm)
            mixed = difference.mul_(weight).add_(mixed)
    return mixed


def contain(difference: Tensor, alarm: Tensor) -> None:
    """Make elements that are not finite zero, in place, and write ones to `alarm` if there are some. On the CPU."""
    # A sum tells in one look that all is well; one of finite values that overflows is looked at again.
    if not math.isfinite(difference.sum().item()):
        finite = difference.isfinite()
        if not finite.all():
            difference.masked_fill_(~finite, 0.0)
            alarm.fill_(1)
