"""The update rules on the GPU: one device function each, the twin of the function of the same name in `reference.py`.

A rule is `RULE(x, mixed, g, states, step, hyper) -> (x_new, states_new, messages)` on fp32 blocks in registers;
`mixed`, `states` and `messages` are tuples of blocks, `step` and the floats of `hyper` run-time scalars. Division and
square root of blocks are the correctly rounded ones, as torch's are.
"""

import triton
import triton.language as tl


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
def mix(x, mixed, g, states, step, hyper):
    """Averaging alone."""
    return mixed[0], states, (mixed[0],)


@triton.jit
def sgd(x, mixed, g, states, step, hyper):
    """torch.optim.SGD; states () or (momentum_buffer,)."""
    lr, momentum, undamped, decay, sign, nesterov = hyper
    d = sign * g + decay * x
    buf = d
    if len(states) == 1:
        buf = tl.where(step == 1.0, d, momentum * states[0] + undamped * d)
        d = tl.where(nesterov != 0.0, d + momentum * buf, buf)
    x_new = mixed[0] - lr * d
    return x_new, (buf,), (x_new,)


@triton.jit
def adam(x, mixed, g, states, step, hyper):
    """torch.optim.Adam and AdamW; states (exp_avg, exp_avg_sq[, max_exp_avg_sq])."""
    lr, beta1, undecayed1, beta2, undecayed2, log1, log2, eps, coupled, decoupled, sign = hyper
    d = sign * g + coupled * x
    m = states[0]
    m = tl.where(undecayed1 < 0.5, m + undecayed1 * (d - m), d - beta1 * (d - m))
    v = beta2 * states[1] + undecayed2 * d * d
    top = v
    if len(states) == 3:
        top = tl.maximum(states[2], v)
    rescale = 1.0 / tl.sqrt_rn(one_minus_power(log2, step))
    size = lr / one_minus_power(log1, step)
    x_new = mixed[0] - tl.div_rn(size * m, tl.sqrt_rn(top) * rescale + eps) - lr * decoupled * x
    return x_new, (m, v, top), (x_new,)
