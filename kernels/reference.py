"""The pass and its update rules in plain torch: the specification of the GPU kernel, and the path CPU tensors take.

A rule is `RULE(x, mixed, g, states, step, hyper) -> (x_new, states_new, messages)`. All tensors have one shape and the
arithmetic dtype (fp32; fp64 for fp64 parameters); `mixed`, `states` and `messages` are tuples of tensors, `step` is the
step being taken, from 1, and `hyper` a tuple of floats (see `hyper`). A rule is elementwise and changes none of its
arguments, so it works as well on stacked [n, N] tensors, one row per rank.

Every rule is `x_new = mixed[0] + (inner(x) - x)`, where inner is torch.optim's step at the rank's own unmixed x: weight
decay acts on x, and without neighbours the rule is torch's local step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .region import Gradients, Region

Tensors = tuple[Tensor, ...]
Rule = Callable[[Tensor, Tensors, Tensor, Tensors, float, tuple[float, ...]], tuple[Tensor, Tensors, Tensors]]

# Elements per chunk and thread. A chunk's temporaries stay in a core's caches, and torch gives each thread one piece of
# a chunk. AdamW with one neighbour on 4M elements, one core with 1 MB of L2: 21 ms at 16,384, 15 at 32,768, 12 at
# 65,536, 36 at 1M.
CHUNK = 65536


def mix(
    x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: tuple[float, ...]
) -> tuple[Tensor, Tensors, Tensors]:
    """Averaging alone: `x_new = mixed[0]`. No states, no hyper; its message is x_new."""
    return mixed[0], states, (mixed[0],)


def sgd(
    x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: tuple[float, ...]
) -> tuple[Tensor, Tensors, Tensors]:
    """torch.optim.SGD.

        d = sign*g + weight_decay*x;  buf = momentum*buf + (1-dampening)*d, or d at step 1;
        x_new = mixed[0] - lr * (d + momentum*buf if nesterov else buf)

    hyper is `hyper.sgd_hyper`; states is () for momentum 0, where d takes the place of buf, or (momentum_buffer,). Its
    message is x_new.
    """
    lr, momentum, undamped, decay, sign, nesterov = hyper
    d = _descent(g, x, sign, decay)
    if states:
        buf = d if step == 1 else (states[0] * momentum).add_(d, alpha=undamped)
        d = d.add(buf, alpha=momentum) if nesterov else buf
        states = (buf,)
    x_new = mixed[0].add(d, alpha=-lr)
    return x_new, states, (x_new,)


def adam(
    x: Tensor, mixed: Tensors, g: Tensor, states: Tensors, step: float, hyper: tuple[float, ...]
) -> tuple[Tensor, Tensors, Tensors]:
    """torch.optim.Adam (coupled weight decay) and AdamW (decoupled); amsgrad if there is a third state.

        d = sign*g + coupled*x;  m += (1-beta1)*(d - m);  v = beta2*v + (1-beta2)*d^2;  top = v, or max(top, v);
        x_new = mixed[0] - lr*decoupled*x - lr/(1-beta1^t) * m / (sqrt(top)/sqrt(1-beta2^t) + eps)

    hyper is `hyper.adam_hyper`; states is (exp_avg, exp_avg_sq) or (exp_avg, exp_avg_sq, max_exp_avg_sq). Its message
    is x_new.
    """
    lr, beta1, undecayed1, beta2, undecayed2, _, _, eps, coupled, decoupled, sign = hyper
    d = _descent(g, x, sign, coupled)
    m = states[0].lerp(d, undecayed1)
    v = (states[1] * beta2).addcmul_(d, d, value=undecayed2)
    states = (m, v, torch.maximum(states[2], v)) if len(states) == 3 else (m, v)
    denominator = states[-1].sqrt().mul_((1.0 - beta2**step) ** -0.5).add_(eps)
    x_new = torch.addcdiv(mixed[0], m, denominator, value=-lr / (1.0 - beta1**step))
    if decoupled:
        x_new = x_new.add_(x, alpha=-lr * decoupled)
    return x_new, states, (x_new,)


def _descent(g: Tensor, x: Tensor, sign: float, decay: float) -> Tensor:
    """`sign*g + decay*x`, as torch forms it: without decay, x is not looked at."""
    d = g if sign == 1 else g * sign
    return d.add(x, alpha=decay) if decay else d


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (mix, sgd, adam)}
"""Every rule by name; the device twin of each has the same name in `rules.py`."""


def mix_messages(base: Tensor, inbox: Sequence[Tensor], weights: Sequence[float], row_sum: float = 1.0) -> Tensor:
    """`row_sum*base + sum_k weights[k]*(inbox[k] - base)`, summed in the order given.

    The difference form keeps a consensus exactly (equal messages give base, whatever the rounding of the weights). A
    neighbour of weight zero is skipped, so a NaN in its buffer stays there.

    Args:
        base: what the neighbours got from us, any shape, in the arithmetic dtype.
        inbox: K tensors of that shape, of the same or a narrower dtype.
        weights: K floats.
        row_sum: the sum of a row of the mixing matrix, our own weight included.

    Returns:
        A tensor like base; base itself if nothing is mixed in and row_sum is 1.

    Raises:
        ValueError: if inbox and weights differ in length.
    """
    mixed = base if row_sum == 1 else base * row_sum
    for received, weight in zip(inbox, weights, strict=True):
        if weight:
            # Not add(alpha=weight), which fuses multiplication and addition where the CPU can: this gives the kernel's
            # bits on every machine.
            mixed = (received - base).mul_(weight).add_(mixed)
    return mixed


@torch.no_grad()
def run_pass(
    rule: str,
    param: Tensor,
    states: Sequence[Tensor],
    hyper: Sequence[float],
    region: Region,
    grads: Gradients | None,
    steps: Tensor | None,
    sent: Sequence[Tensor],
    inbox: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    row_sum: float,
    messages: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`fusedfog.kernels.run_pass` on CPU tensors, parameter by parameter, in chunks that stay in cache.

    Raises:
        ValueError: if a gradient has not its parameter's number of elements, or states or messages (unless empty) are
            not as many as the rule makes.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    function, hyper = RULES[rule], tuple(hyper)
    inbox = tuple(inbox) or ((),) * max(len(sent), 1)
    skip = found_inf is not None and found_inf.item() != 0
    scale = 1.0 if grad_scale is None else grad_scale.item()
    width = CHUNK * torch.get_num_threads()
    for index, (start, numel) in enumerate(region.spans, region.first):
        gradient = None if grads is None or skip else _in_memory_order(grads.tensors[index], numel, index)
        step = 1.0 if steps is None else steps[index].item() + 1.0
        for low in range(0, numel, width):
            high = min(low + width, numel)
            here = slice(start + low, start + high)
            home, kept = param[here], tuple(state[here] for state in states)
            out = tuple(message[here] for message in messages)
            x = home.to(dtype)
            bases = tuple(tensor[here].to(dtype) for tensor in sent) or (x,)
            mixed = tuple(
                mix_messages(base, [tensor[here] for tensor in received], weights, row_sum)
                for base, received in zip(bases, inbox, strict=True)
            )
            if grads is not None and gradient is None:
                _store(rule, "messages", out, tuple(mixed[m] if m < len(mixed) else mixed[0] for m in range(len(out))))
                home.copy_(mixed[0])
                continue
            g = torch.zeros_like(x) if gradient is None else gradient[low:high].to(dtype)
            x_new, states_new, made = function(x, mixed, g if scale == 1 else g * scale, kept, step, hyper)
            _store(rule, "states", kept, states_new)
            _store(rule, "messages", out, made if out else ())
            # Last: x, mixed or a message may be a view of param.
            home.copy_(x_new)


@torch.no_grad()
def advance_steps(steps: Tensor, grads: Gradients, found_inf: Tensor | None = None) -> None:
    """`fusedfog.kernels.advance_steps` on CPU tensors."""
    if found_inf is None or found_inf.item() == 0:
        steps += torch.tensor([gradient is not None for gradient in grads.tensors], dtype=steps.dtype)


def _in_memory_order(gradient: Tensor | None, numel: int, index: int) -> Tensor | None:
    """The gradient's elements as they lie in memory, which is the flat buffer's order whatever its strides."""
    if gradient is None:
        return None
    if gradient.numel() != numel:
        raise ValueError(f"the gradient of parameter {index} has {gradient.numel()} elements, its parameter {numel}")
    return gradient.as_strided((numel,), (1,))


def _store(rule: str, what: str, targets: Sequence[Tensor], values: Tensors) -> None:
    if len(targets) != len(values):
        raise ValueError(f"rule {rule!r} makes {len(values)} {what}, but {len(targets)} were given")
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
