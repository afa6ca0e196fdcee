"""The pass on CPU tensors: batches of parameters that stay in the caches while they are mixed and updated.

torch's own fused optimizers update a batch in one sweep, right after the neighbours were mixed into it, so that the
parameters are read from memory once. Weight decay has to act on the unmixed x, which they no longer see. Decoupled
decay goes into the mixing weights: they multiply what they find by c = 1 - lr*decay, so mixing with weights w/c gives

    c*(x + sum_k (w_k/c)*(inbox[k] - x)) = x + sum_k w_k*(inbox[k] - x) - lr*decay*x

Coupled decay is added to a copy of the gradient while x is still there. Compressed messages are taken before a batch and made
after it. On request, `compiled` takes large parameters, and all of them if messages are compressed.
Rules that torch has no fused optimizer for, and fp64, which should have the reference's very bits, take `torch_pass`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiled, torch_pass, wire
from .cuts import Cut, cut
from .hyper import Adam, Sgd
from .passes import Pass
from .reference import contain
from .region import Region
from .wire import CompressedChannel

# Elements of a batch: 4 MB of parameters, and as much of each neighbour, stay in a 32 MB L3; 25M parameters are 24 batches
# of 25 us dispatch each. AdamW with one neighbour, relative to torch's fused AdamW after lerp_, on one thread and on two:
# 0.96 and 1.00 at 524,288, 0.93 and 0.89 at 1,048,576, 0.95 and 1.00 at 2,097,152; on one thread 1.08 at 65,536.
WIDTH = 1 << 20

# Of x, once neighbours and decay are mixed in by lerps; with less, x drowns in rounding.
_SMALLEST_REMAINDER = 1e-3

# At least a vector of torch's loops, less one element.
_VECTOR = 64

Views = list[Tensor]


@dataclass(frozen=True)
class Plan:
    """Which parameters of a region, by position, are compiled, and the cut of the others."""

    compiled: tuple[int, ...]
    cut: Cut


_plans: weakref.WeakKeyDictionary[Region, dict[int, Plan]] = weakref.WeakKeyDictionary()


def _plan(region: Region, smallest: int) -> Plan:
    """How a region is gone over, if parameters of at least `smallest` elements are compiled where it is."""
    plans = _plans.setdefault(region, {})
    if smallest not in plans:
        chosen = [region.compiled and numel >= smallest for _, numel in region.spans]
        others = [p for p, own in enumerate(chosen) if not own]
        plans[smallest] = Plan(tuple(p for p, own in enumerate(chosen) if own), cut(region.spans, others, WIDTH))
    return plans[smallest]


@dataclass(frozen=True)
class Received:
    """What a neighbour of a weight that is not 0 has sent: a flat tensor, of codes if messages are compressed."""

    flat: Tensor
    weight: float
    scales: Tensor | None


@torch.no_grad()
def run_pass(work: Pass) -> None:
    """`fusedfog.kernels.run_pass` on CPU tensors.

    Raises:
        ValueError: as `torch_pass.run_pass`.
    """
    work = work.with_numbers_at_hand()
    mixing, gradient, compression = work.mixing, work.gradient, work.compression
    inbox = mixing.inbox[0] if mixing.inbox else ()
    scales = compression.scales[0] if compression.scales else (None,) * len(inbox)
    arrived = zip(inbox, mixing.weights, scales, strict=True)
    received = [Received(flat, float(weight), exponents) for flat, weight, exponents in arrived if weight]
    if not _knows(work, received):
        torch_pass.run_pass(work)
        return
    region = work.region
    found = torch_pass.in_memory_order(region, gradient.grads)
    if work.rule == "mix" or (gradient.found_inf is not None and gradient.found_inf.item() != 0):
        found = [None] * len(found)
    job = Job(
        work,
        received,
        found,
        None if gradient.steps is None else gradient.steps[region.first : region.first + len(found)] + 1,
        1.0 if gradient.grad_scale is None else gradient.grad_scale.item(),
        mixing.alarm if received and not compression.taken else None,
    )
    batched = not region.compiled or (_compressed(work) is None and _all_fp32(work, received))
    plan = _plan(region, compiled.SMALLEST if batched else 1)
    for position in plan.compiled:
        _run_compiled(job, position)
    if batched:
        _run_batches(job, plan.cut)
    torch_pass.advance_steps(work)


def _compressed(work: Pass) -> CompressedChannel | None:
    """This rank's end of what comes or goes compressed."""
    return next(iter((*work.compression.taken, *work.compression.given)), None)


def _all_fp32(work: Pass, received: Sequence[Received]) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in (work.param, *work.states, *(one.flat for one in received)))


def _knows(work: Pass, received: Sequence[Received]) -> bool:
    """Whether a pass is one that torch's fused optimizers, or the compiled loop, can make."""
    mixing, gradient, precision = work.mixing, work.gradient, work.precision
    plain = mixing.row_sum == 1 and not mixing.sent and not work.messages and work.extra is None
    plain = plain and gradient.missing == "skip" and precision.remainder is None and precision.seed is None
    known = work.rule == "mix" or (work.rule in _UPDATES and gradient.grads is not None and gradient.steps is not None)
    if not (plain and known):
        return False
    if _compressed(work) is not None and (work.norm_sums is not None or len(work.compression.given) > 1):
        return False
    if work.region.compiled:
        return _can_compile(work, received)
    compressed = bool(work.compression.taken)
    # Averages by powers of two are exact, which the reciprocals in a chain of lerps would spoil.
    simple = work.rule != "mix" or len(received) <= 1 or compressed
    left = _left_by_decay(work.rule, work.hyper) if received else 1.0
    weights = [] if compressed else [one.weight for one in received]
    possible = all(_shares(weights, part) is not None for part in (left, 1.0)) and abs(left) >= _SMALLEST_REMAINDER
    return simple and possible and _all_fp32(work, () if compressed else received)


def _can_compile(work: Pass, received: Sequence[Received]) -> bool:
    end = _compressed(work)
    narrow = end is None or end.replica.dtype == torch.float32
    tensors = (work.param, *work.states, *(one.flat for one in received))
    return narrow and work.norm_sums is None and compiled.takes(tensors)


@dataclass(frozen=True)
class Job:
    """A pass, and what was found out about it.

    Attributes:
        gradients: flat in memory order, by position in the region; None where there is none.
        ahead: fp32 [P], the step that each parameter takes; None if no rule needs it.
        scale: multiplies gradients.
        alarm: as `Mixing.alarm`; None without neighbours, and where messages are compressed.
    """

    work: Pass
    received: Sequence[Received]
    gradients: Sequence[Tensor | None]
    ahead: Tensor | None
    scale: float
    alarm: Tensor | None


def _run_compiled(job: Job, position: int) -> None:
    work, compression, gradient = job.work, job.work.compression, job.gradients[position]
    start, numel = work.region.spans[position]
    here, stop = slice(start, start + numel), start + numel
    how = compiled.MIX
    if gradient is not None and job.ahead is not None:
        how = compiled.Update(work.rule, work.hyper, job.ahead[position].item(), job.scale)
    found = compiled.update(
        how,
        work.param[here],
        gradient,
        [state[here] for state in work.states] if how is not compiled.MIX else (),
        compiled.Received(
            [one.flat[here] for one in job.received],
            [one.weight for one in job.received],
            [wire.scales_of(one.scales, start, stop) for one in job.received],
            job.alarm is not None,
            wire.cut(compression.taken[0], start, stop) if compression.taken else None,
            compression.strength,
        ),
        wire.cut(compression.given[0], start, stop) if compression.given else None,
    )
    for tensor, bad in zip((job.alarm, compression.spoilt), found, strict=True):
        if bad and tensor is not None:
            tensor.fill_(1)


def _run_batches(job: Job, cut: Cut) -> None:
    work, compression = job.work, job.work.compression
    inbox = [] if compression.taken else [one.flat for one in job.received]
    weights, norm_sums = [one.weight for one in job.received if inbox], work.norm_sums
    if norm_sums is not None:
        norm_sums.zero_()
    x, kept, received = cut.views(work.param), [*map(cut.views, work.states)], [*map(cut.views, inbox)]
    pulls = cut.views(compression.taken[0].neighbor_delta) if compression.taken else []
    gradients = [_part(job.gradients[p], offset, x[i].numel()) for i, (_, p, offset) in enumerate(cut.pieces)]
    ahead = job.ahead.unbind() if job.ahead is not None else ()
    left = _left_by_decay(work.rule, work.hyper) if inbox or pulls else 1.0
    fresh, decayed = _shares(weights, 1.0), _shares(weights, left)
    decay, sign = _coupled(work.rule, work.hyper)
    scratch = torch.empty(WIDTH) if job.scale != 1 or (decay and (inbox or pulls)) else None
    for batch, runs in zip(cut.batches, cut.runs, strict=True):
        if pulls:
            _take(job, cut, batch)
        if job.alarm is not None and not _all_finite(inbox, runs):
            for views in received:
                for i in batch:
                    views[i] = _contained(x[i], views[i], job.alarm)
        if norm_sums is not None:
            for i in batch:
                _measure(norm_sums[cut.pieces[i][1]], x[i], [views[i] for views in received], gradients[i], job)
        live = [i for i in batch if gradients[i] is not None]
        if len(live) < len(batch):
            idle = [i for i in batch if gradients[i] is None]
            _mix([x[i] for i in idle], [[views[i] for i in idle] for views in received], fresh or ())
            _pull([x[i] for i in idle], [pulls[i] for i in idle if pulls], compression.strength)
        if live:
            here, g = [x[i] for i in live], [gradient for i in batch if (gradient := gradients[i]) is not None]
            if scratch is not None:
                g = _descents(g, here, scratch, sign * job.scale, decay)
            _mix(here, [[views[i] for i in live] for views in received], decayed or ())
            _pull(here, [pulls[i] for i in live if pulls], compression.strength / left)
            steps = [ahead[cut.pieces[i][1]] for i in live]
            states = [[views[i] for i in live] for views in kept]
            _UPDATES[work.rule](here, g, states, steps, work.hyper, scratch is None)
        if compression.given:
            _give(job, cut, batch)


def _take(job: Job, cut: Cut, batch: range) -> None:
    """Have what neighbours' codes mean in neighbor_delta."""
    end, received = job.work.compression.taken[0], job.received
    for start, stop in _chunks(job, cut, batch):
        inbox = [one.flat[start:stop] for one in received]
        scales = [wire.scales_of(one.scales, start, stop) for one in received]
        wire.take(wire.cut(end, start, stop), inbox, scales, [one.weight for one in received])


def _give(job: Job, cut: Cut, batch: range) -> None:
    """Write the codes of new parameters."""
    compression = job.work.compression
    for start, stop in _chunks(job, cut, batch):
        wire.give(wire.cut(compression.given[0], start, stop), job.work.param[start:stop], compression.spoilt)


def _chunks(job: Job, cut: Cut, batch: range) -> Iterator[tuple[int, int]]:
    """Where pieces begin and end in the flat tensors, in chunks whose temporaries stay in a core's caches."""
    width = torch_pass.CHUNK * torch.get_num_threads()
    for place, position, offset in (cut.pieces[i] for i in batch):
        first = job.work.region.spans[position][0] + offset
        stop = first + cut.sizes[place]
        for low in range(first, stop, width):
            yield low, min(low + width, stop)


def _all_finite(inbox: Sequence[Tensor], runs: Sequence[slice]) -> bool:
    """Whether what neighbours sent is finite in these parts; false also if its sum overflows.

    A NaN of this rank's own, which taints nobody but itself, is not looked for, and neither are differences of finite values
    that overflow: each look at a tensor takes a seventh of the pass' time (AdamW, one thread, 0.12 ms for a million elements).
    It comes first, as x is gone after mixing in place. The compiled loop looks on its way.
    """
    return all(math.isfinite(one[run].sum().item()) for run in runs for one in inbox)


def _contained(x: Tensor, received: Tensor, alarm: Tensor) -> Tensor:
    """What a neighbour sent, with the rank's own values where the two have no finite difference."""
    difference = received - x
    contain(difference, alarm)
    return torch.where(difference == 0, x, received)


def _measure(sums: Tensor, x: Tensor, inbox: Views, gradient: Tensor | None, job: Job) -> None:
    """Add a piece's part of `run_pass`'s norm sums, just before it is in the caches anyway."""
    apart, between = torch.zeros_like(x), torch.empty_like(x)
    for received, weight in zip(inbox, [one.weight for one in job.received], strict=True):
        apart.add_(torch.sub(received, x, out=between), alpha=weight)
    sums[0] += torch_pass.square_sum(apart)
    if gradient is not None:
        sums[1] += torch_pass.square_sum(gradient).double() * job.scale**2


def _shares(weights: Sequence[float], left: float) -> list[float] | None:
    """Weights of one lerp after the other that give `left*x_new = left*x + sum_k weights[k]*(inbox[k] - x)`.

    None where there are none: x would have to come back from a lerp that leaves nothing of it.
    """
    found: list[float] = []
    for weight in reversed(weights):
        # What is mixed in later shrinks what is there already.
        remains = math.prod(1.0 - share for share in found) * left
        if abs(remains) < _SMALLEST_REMAINDER:
            return None
        found.append(weight / remains)
    return found[::-1]


def _mix(x: Views, inbox: Sequence[Views], shares: Sequence[float]) -> None:
    for received, share in zip(inbox, shares, strict=True):
        if x:
            torch._foreach_lerp_(x, received, share)


def _pull(x: Views, pulls: Views, strength: float) -> None:
    if pulls:
        torch._foreach_add_(x, pulls, alpha=strength)


def _part(gradient: Tensor | None, offset: int, numel: int) -> Tensor | None:
    return gradient if gradient is None or gradient.numel() == numel else gradient[offset : offset + numel]


def _coupled(rule: str, hyper: Sequence[float]) -> tuple[float, float]:
    """Coupled weight decay and the gradient's sign."""
    if rule == "sgd":
        sgd = Sgd(*hyper)
        return sgd.decay, sgd.sign
    if rule == "adam":
        adam = Adam(*hyper)
        return adam.coupled, adam.sign
    return 0.0, 1.0


def _left_by_decay(rule: str, hyper: Sequence[float]) -> float:
    if rule != "adam":
        return 1.0
    adam = Adam(*hyper)
    return 1.0 - adam.lr * adam.decoupled


def _descents(gradients: Views, x: Views, scratch: Tensor, factor: float, decay: float) -> Views:
    """`factor*gradient + decay*x` of each piece, in scratch."""
    places = scratch.split([*(len(g) for g in gradients), len(scratch) - sum(len(g) for g in gradients)])
    descents = list(places[: len(gradients)])
    for g, here, descent in zip(gradients, x, descents, strict=True):
        torch.mul(g, factor, out=descent)
        if decay:
            descent.add_(here, alpha=decay)
    return descents


def _sgd(x: Views, g: Views, states: list[Views], steps: Views, hyper: Sequence[float], raw: bool) -> None:
    sgd = Sgd(*hyper)
    # torch takes whether a buffer begins, as its first gradient, for all pieces of a call.
    begins = [bool(states) and step.item() == 1 for step in steps]
    for first in (False, True):
        some = [i for i, begin in enumerate(begins) if begin == first]
        if some:
            torch._fused_sgd_(
                [x[i] for i in some],
                [g[i] for i in some],
                [buffer[i] for buffer in states for i in some],
                weight_decay=sgd.decay if raw else 0.0,
                momentum=sgd.momentum if states else 0.0,
                lr=sgd.lr,
                dampening=1.0 - sgd.undamped,
                nesterov=bool(sgd.nesterov),
                maximize=raw and sgd.sign < 0,
                is_first_step=first,
            )


def _adam(x: Views, g: Views, states: list[Views], steps: Views, hyper: Sequence[float], raw: bool) -> None:
    adam = Adam(*hyper)
    native = torch._fused_adam_ if raw and adam.coupled else torch._fused_adamw_
    native(
        x,
        g,
        states[0],
        states[1],
        states[2] if len(states) == 3 else [],
        steps,
        amsgrad=len(states) == 3,
        lr=adam.lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=adam.decoupled or (adam.coupled if raw else 0.0),
        eps=adam.eps,
        maximize=raw and adam.sign < 0,
    )
    if len(states) == 3:
        # torch's loop over whole vectors keeps a NaN of either, the one over what is left behind them does not.
        ends = [[state[-_VECTOR:] for state in views] for views in states[1:]]
        torch._foreach_maximum_(ends[1], ends[0])


_UPDATES: dict[str, Callable[[Views, Views, list[Views], Views, Sequence[float], bool], None]] = {
    "sgd": _sgd,
    "adam": _adam,
}
"""rule -> update of mixed pieces x by gradients g; `raw` says that sign and coupled decay are not in g yet."""
