"""The pass on CPU tensors: batches of parameters that stay in the caches while they are mixed and updated.

torch's own fused optimizers update a batch in one sweep, right after the neighbours were mixed into it, so that the
parameters are read from memory once. Weight decay has to act on the unmixed x, which they no longer see. Decoupled
decay goes into the mixing weights: they multiply what they find by c = 1 - lr*decay, so mixing with weights w/c gives

    c*(x + sum_k (w_k/c)*(inbox[k] - x)) = x + sum_k w_k*(inbox[k] - x) - lr*decay*x

Coupled decay is added to a copy of the gradient while x is still there. On request, `compiled` takes large parameters.
Rules that torch has no fused optimizer for, and fp64, which should have the reference's very bits, take `torch_pass`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compiled, torch_pass
from .hyper import Adam, Sgd
from .passes import Pass
from .reference import contain
from .region import ALIGNMENT, Region

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
class Cut:
    """How some parameters of a flat tensor are cut into pieces, and those into batches.

    Attributes:
        start, stop: the part of the tensor that holds them.
        sizes: lengths of all pieces and of what lies between them, in order of memory.
        pieces: for each piece its place in `sizes`, its parameter's position in the region and its offset in there.
        batches: ranges of pieces.
        runs: for each batch, the parts of the flat tensor that its pieces cover, with no more than padding in between.
    """

    start: int
    stop: int
    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]
    batches: tuple[range, ...]
    runs: tuple[tuple[slice, ...], ...]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat tensor."""
        if len(self.sizes) == 1:  # A split costs as much again, and a segment of one parameter little else.
            return [flat[self.start : self.stop]]
        parts = flat[self.start : self.stop].split(self.sizes)
        return [parts[place] for place, _, _ in self.pieces]


def cut(spans: Sequence[tuple[int, int]], positions: Sequence[int], width: int) -> Cut:
    """Cut the parameters at `positions` of `spans`, (start, numel) each, into pieces of at most `width` elements."""
    sizes: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    batches: list[range] = []
    runs: list[list[slice]] = [[]]
    first = filled = 0
    begin = end = spans[positions[0]][0] if positions else 0
    for position in positions:
        start, numel = spans[position]
        if start > end:
            sizes.append(start - end)
        for offset in range(0, numel, width):
            size = min(width, numel - offset)
            if filled and filled + size > width:
                batches.append(range(first, len(pieces)))
                first, filled = len(pieces), 0
                runs.append([])
            _extend(runs[-1], start + offset, size)
            pieces.append((len(sizes), position, offset))
            sizes.append(size)
            filled += size
        end = start + numel
    batches.append(range(first, len(pieces)))
    return Cut(begin, end, tuple(sizes), tuple(pieces), tuple(batches), tuple(map(tuple, runs)))


def _extend(runs: list[slice], start: int, size: int) -> None:
    """Add a piece to the runs of its batch."""
    stop = start + size
    if runs and start - runs[-1].stop < ALIGNMENT:
        start = runs.pop().start
    runs.append(slice(start, stop))


@dataclass(frozen=True)
class Plan:
    """Which parameters of a region, by position, are compiled, and the cut of the others."""

    compiled: tuple[int, ...]
    cut: Cut


_plans: weakref.WeakKeyDictionary[Region, Plan] = weakref.WeakKeyDictionary()


def _plan(region: Region, dtype: torch.dtype) -> Plan:
    if region not in _plans:
        smallest = compiled.SMALLEST if dtype == torch.float32 else 1
        chosen = [region.compiled and numel >= smallest for _, numel in region.spans]
        others = [p for p, own in enumerate(chosen) if not own]
        _plans[region] = Plan(tuple(p for p, own in enumerate(chosen) if own), cut(region.spans, others, WIDTH))
    return _plans[region]


@torch.no_grad()
def run_pass(work: Pass) -> None:
    """`fusedfog.kernels.run_pass` on CPU tensors.

    Raises:
        ValueError: as `torch_pass.run_pass`.
    """
    work = work.with_numbers_at_hand()
    mixing, gradient = work.mixing, work.gradient
    inbox = mixing.inbox[0] if mixing.inbox else ()
    received = [(tensor, float(w)) for tensor, w in zip(inbox, mixing.weights, strict=True) if w]
    if not _knows(work, received):
        torch_pass.run_pass(work)
        return
    region, param, states = work.region, work.param, tuple(work.states)
    found = torch_pass.in_memory_order(region, gradient.grads)
    if work.rule == "mix" or (gradient.found_inf is not None and gradient.found_inf.item() != 0):
        found = [None] * len(found)
    job = Job(
        work.rule,
        tuple(work.hyper),
        tuple(w for _, w in received),
        found,
        None if gradient.steps is None else gradient.steps[region.first : region.first + len(found)] + 1,
        1.0 if gradient.grad_scale is None else gradient.grad_scale.item(),
        mixing.alarm if received else None,
    )
    tensors = (param, states, tuple(tensor for tensor, _ in received))
    plan = _plan(region, param.dtype)
    for position in plan.compiled:
        start, numel = region.spans[position]
        _run_compiled(job, *tensors, position, slice(start, start + numel))
    _run_batches(job, *tensors, plan.cut, work.norm_sums.zero_() if work.norm_sums is not None else None)
    torch_pass.advance_steps(work)


def _knows(work: Pass, received: Sequence[tuple[Tensor, float]]) -> bool:
    """Whether a pass is one that torch's fused optimizers, or compiled loops, can make."""
    mixing, gradient, precision, compression = work.mixing, work.gradient, work.precision, work.compression
    plain = mixing.row_sum == 1 and not mixing.sent and not work.messages and work.extra is None
    plain = plain and gradient.missing == "skip" and precision.remainder is None and precision.seed is None
    plain = plain and not compression.taken and not compression.given
    # Averages by powers of two are exact, which the reciprocals in a chain of lerps would spoil.
    known = (work.rule == "mix" and len(received) <= 1) or (
        work.rule in _UPDATES and gradient.grads is not None and gradient.steps is not None
    )
    tensors = (work.param, *work.states, *(tensor for tensor, _ in received))
    single = all(tensor.dtype == torch.float32 for tensor in tensors)
    left = _left_by_decay(work.rule, work.hyper) if received and known else 1.0
    possible = all(_shares([w for _, w in received], part) is not None for part in (left, 1.0))
    possible = possible and not (work.region.compiled and work.norm_sums is not None)
    return plain and known and (single or work.region.compiled) and possible


@dataclass(frozen=True)
class Job:
    """What a pass does, apart from the flat tensors it does it to.

    Attributes:
        gradients: flat in memory order, by position in the region; None where there is none.
        ahead: fp32 [P], the step that each parameter takes; None if no rule needs it.
        scale: multiplies gradients.
        alarm: as `Mixing.alarm`; None without neighbours.
    """

    rule: str
    hyper: tuple[float, ...]
    weights: tuple[float, ...]
    gradients: Sequence[Tensor | None]
    ahead: Tensor | None
    scale: float
    alarm: Tensor | None


def _run_compiled(
    job: Job, param: Tensor, states: tuple[Tensor, ...], inbox: tuple[Tensor, ...], position: int, here: slice
) -> None:
    gradient = job.gradients[position]
    received = [tensor[here] for tensor in inbox]
    if job.alarm is not None and not _all_finite(inbox, (here,)):
        received = [_contained(param[here], one, job.alarm) for one in received]
    if gradient is None or job.ahead is None:
        compiled.update("mix", param[here], None, (), received, job.weights, 1.0, (), 1.0)
        return
    kept = [state[here] for state in states]
    step = job.ahead[position].item()
    compiled.update(job.rule, param[here], gradient, kept, received, job.weights, step, job.hyper, job.scale)


def _run_batches(
    job: Job, param: Tensor, states: tuple[Tensor, ...], inbox: tuple[Tensor, ...], cut: Cut, norm_sums: Tensor | None
) -> None:
    x, kept, received = cut.views(param), [cut.views(state) for state in states], [cut.views(flat) for flat in inbox]
    gradients = [_part(job.gradients[p], offset, x[i].numel()) for i, (_, p, offset) in enumerate(cut.pieces)]
    ahead = job.ahead.unbind() if job.ahead is not None else ()
    left = _left_by_decay(job.rule, job.hyper) if inbox else 1.0
    fresh, decayed = _shares(job.weights, 1.0), _shares(job.weights, left)
    decay, sign = _coupled(job.rule, job.hyper)
    scratch = torch.empty(WIDTH) if job.scale != 1 or (decay and inbox) else None
    for batch, runs in zip(cut.batches, cut.runs, strict=True):
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
        if not live:
            continue
        here, g = [x[i] for i in live], [gradient for i in batch if (gradient := gradients[i]) is not None]
        if scratch is not None:
            g = _descents(g, here, scratch, sign * job.scale, decay)
        _mix(here, [[views[i] for i in live] for views in received], decayed or ())
        steps = [ahead[cut.pieces[i][1]] for i in live]
        _UPDATES[job.rule](here, g, [[views[i] for i in live] for views in kept], steps, job.hyper, scratch is None)


def _all_finite(inbox: Sequence[Tensor], runs: Sequence[slice]) -> bool:
    """Whether what neighbours sent is finite in these parts; false also if its sum overflows.

    A NaN of this rank's own, which taints nobody but itself, is not looked for, and neither are differences of finite values
    that overflow: each look at a tensor takes a seventh of the pass' time (AdamW, one thread, 0.12 ms for a million elements).
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
    for received, weight in zip(inbox, job.weights, strict=True):
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
