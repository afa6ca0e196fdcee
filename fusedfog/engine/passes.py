"""What a pass is made of: (segment, stage, inbox) -> `kernels.Pass`. Knows no order and starts no message.

Reads the engine through a small protocol, so that the engine can own its state and this file builds from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedfog.algorithm import Algorithm, Stage
from fusedfog.engine.clock import Clock, StepSchedule
from fusedfog.engine.exchanges import Exchanges
from fusedfog.engine.gradient_means import GradientMeans
from fusedfog.engine.mix_strength import first_mixed, rate_of
from fusedfog.engine.phases import Phase
from fusedfog.gossip.buckets import Inbox, PassGroup
from fusedfog.gossip.compression import CompressedChannels
from fusedfog.kernels import CompressedChannel, Compression, GradientInputs, Gradients, Mixing, Pass, Precision
from fusedfog.kernels.passes import AS_STORED, UNCOMPRESSED
from fusedfog.kernels.region import ALIGNMENT
from fusedfog.kernels.rounding import seed_of
from fusedfog.params.flat import FlatSegment
from fusedfog.params.shards import Sharding

_UNMIXED = 1 << 20
"""Seeds of segments that are not mixed are counted from here."""


@dataclass
class StepInputs:
    """What holds for one step: GradScaler's and clipping's gradient multiplier, the non-finite flag, numbers computed once.

    `unmixed_scale` is the multiplier of what is not mixed, which is clipped by itself where gradients are averaged: what ranks
    share would otherwise be clipped differently on each, and no longer be equal.
    `strength` is what a function has said.
    """

    grad_scale: Tensor | None = None
    unmixed_scale: Tensor | None = None
    found_inf: Tensor | None = None
    numbers: dict[tuple[int, str], tuple[float, ...]] = field(default_factory=dict)
    inverse_norm: Tensor | None = None
    strength: float | None = None


class Engine(Protocol):
    """What a pass depends on beside its buckets; see `Scheduler`."""

    groups: list[dict[str, Any]]
    segments: list[FlatSegment]
    algorithm: Algorithm
    schedule: StepSchedule
    clock: Clock
    inputs: StepInputs
    channels: CompressedChannels | None
    sharding: Sharding | None
    exchanges: Exchanges
    place: torch.device
    phase: Phase
    means: GradientMeans | None
    weight: float
    weight_of_gradients: Tensor | None

    @property
    def rank(self) -> int:
        """This rank, 0 where it is alone."""
        ...

    @property
    def node(self) -> int:
        """See `Scheduler`."""
        ...

    def codes_for(self, pass_group: PassGroup, following: tuple[int, int] | None) -> tuple[CompressedChannel, ...]:
        """Where a pass writes the codes of its messages; nowhere if they travel as they are, or not at all."""
        ...


def pass_of(
    engine: Engine,
    pass_group: PassGroup,
    stage: Stage,
    grads: Gradients | None,
    inbox: Inbox,
    following: tuple[int, int] | None = None,
) -> Pass:
    """A stage's pass over a pass group; `following` is the step and exchange that its messages are for, if it makes them."""
    segment, algorithm, inputs = pass_group.segment, engine.algorithm, engine.inputs
    group = engine.groups[segment.layout.group]
    region, first_half = pass_group.region, stage is algorithm.before
    makes_message = first_half and "message" in algorithm.messages
    takes_message = not first_half and algorithm.messages != ("param",)
    return Pass(
        stage.rule,
        segment.param,
        tuple(segment.state(name) for name in stage.states(group)),
        hyper_of(engine, segment.layout.group, stage),
        region,
        mixing=Mixing(
            sent=tuple(segment.tensor(name) for name in algorithm.messages) if takes_message else (),
            inbox=inbox.tensors,
            weights=weights_of(engine, inbox),
            row_sum=0.0 if stage.differences else inbox.row_sum,
            alarm=_alarm(engine, segment, inbox),
        ),
        gradient=GradientInputs(
            grads=grads,
            grad_scale=None if grads is None else _multiplier(engine, segment, stage),
            found_inf=inputs.found_inf if grads is not None else None,
            missing=stage.missing,
            steps=segment.steps_of(region),
            advance=grads is not None and algorithm.counts_updates(group),
        ),
        precision=_precision(engine, segment, first_half),
        compression=_compression(engine, pass_group, inbox, following),
        messages=(segment.tensor("message"),) if makes_message else (),
        extra=_inverse_norm(engine, segment, algorithm.normalized) if first_half and algorithm.normalized else None,
        norm_sums=segment.norm_sums(first_half, region) if engine.schedule.measure else None,
        numbers=inbox.numbers,
    )


def _multiplier(engine: Engine, segment: FlatSegment, stage: Stage) -> Tensor | None:
    """What gradients are multiplied by, the weight last: clipping is that of the gradient which a user sees."""
    if not segment.layout.mix:
        return engine.inputs.unmixed_scale
    scale, weight = engine.inputs.grad_scale, engine.weight_of_gradients
    if weight is None or stage.scaleless:
        return scale
    return weight if scale is None else scale * weight


def _alarm(engine: Engine, segment: FlatSegment, inbox: Inbox) -> Tensor | None:
    """Where a pass that mixes says that something is not finite."""
    quarantine = engine.exchanges.quarantine
    return quarantine.alarm_for(segment.param) if quarantine is not None and inbox.tensors else None


def _precision(engine: Engine, segment: FlatSegment, first_half: bool) -> Precision:
    """What 16-bit parameters lack, and the seed of random roundings."""
    if segment.remainder is None and not segment.rounds_stochastically:
        return AS_STORED
    seed = seed_of_pass(engine, segment, first_half) if segment.rounds_stochastically else None
    return Precision(segment.remainder, seed)


def _compression(engine: Engine, pass_group: PassGroup, inbox: Inbox, following: tuple[int, int] | None) -> Compression:
    """Codes that came and codes that are to be sent, if messages travel compressed."""
    if engine.channels is None:
        return UNCOMPRESSED
    given = engine.codes_for(pass_group, following)
    strength = strength_of(engine) if inbox.channels and inbox.numbers is None else 1.0
    return Compression(inbox.channels, inbox.scales, strength, given, engine.channels.flag)


def weights_of(engine: Engine, inbox: Inbox) -> tuple[float, ...]:
    """What a pass weighs the neighbours' differences by. Compressed ones have the strength of mixing as another number."""
    if engine.schedule.mix_strength.constant == 1 or not inbox.weights or inbox.channels or inbox.numbers is not None:
        return inbox.weights
    strength = strength_of(engine)
    return inbox.weights if strength == 1 else tuple([strength * weight for weight in inbox.weights])


def strength_of(engine: Engine) -> float:
    """s of this step, which mixes with I + s (W - I); a function is asked once a step.

    Raises:
        ValueError: as `MixStrength.at`.
    """
    strength, inputs = engine.schedule.mix_strength, engine.inputs
    if strength.constant is not None:
        return strength.constant
    if inputs.strength is None:
        lr = float(engine.groups[first_mixed(engine.groups)].get("lr") or 0.0) if strength.takes_rate else 0.0
        rate = rate_of(lr * engine.phase.lr_scale, engine.clock.largest_lr)
        inputs.strength = strength.at(engine.rank, engine.clock.steps, rate)
    return inputs.strength


def hyper_of(engine: Engine, number: int, stage: Stage) -> tuple[float, ...]:
    """A stage's numbers for param group `number`, worked out once a step."""
    numbers = engine.inputs.numbers
    if (number, stage.rule) not in numbers:
        group = engine.groups[number]
        factor = engine.phase.lr_scale * engine.exchanges.rate
        if stage.scaleless and group["mix"]:
            factor *= engine.weight
        if factor != 1.0:
            group = {**group, "lr": group["lr"] * factor}
        previous = engine.clock.previous_lr.get(number, float(group.get("lr") or 1.0))
        numbers[number, stage.rule] = stage.hyper(group, previous)
    return numbers[number, stage.rule]


def seed_of_pass(engine: Engine, segment: FlatSegment, first_half: bool) -> int:
    """Of a pass' random roundings: other ones on every node, in every step and pass, the same after a resume."""
    mix = segment.layout.mix
    # What a rank does not mix may be there on that rank alone, and changes nothing for the others.
    place = [one for one in engine.segments if one.layout.mix == mix].index(segment) + (0 if mix else _UNMIXED)
    return seed_of(engine.node if mix else engine.rank, engine.clock.steps, 2 * place + first_half)


def _inverse_norm(engine: Engine, segment: FlatSegment, name: str) -> Tensor:
    """1 / (||s|| + 1e-8), s being this rank's whole state `name`; 0 while it is zero."""
    if engine.inputs.inverse_norm is None:
        states = [one.state(name) for one in engine.segments]
        norm = torch.stack([torch.linalg.vector_norm(state).double() for state in states]).norm()
        norm = norm if engine.sharding is None else engine.sharding.norm(norm)
        engine.inputs.inverse_norm = torch.where(norm > 0, 1.0 / (norm + 1e-8), 0.0)
    return engine.inputs.inverse_norm.to(segment.state(name).dtype)


def passes_to_warm(engine: Engine, pass_group: PassGroup, neighbours: set[int]) -> Iterator[Pass]:
    """Passes like those that steps will make over a pass group, one for each kernel: none is to be compiled in mid-training.

    Only dtypes, alignment and numbers of tensors make a kernel, so what neighbours send is stood in for by small tensors.

    Args:
        neighbours: the numbers of neighbours, of weight 0 too, that rounds have.
    """
    algorithm, segment = engine.algorithm, pass_group.segment
    grads = Gradients([None] * len(segment.params), segment.gradient_table, segment.layout.dtype)
    scale = segment.param.new_zeros((), dtype=torch.float32) if engine.schedule.max_grad_norm is not None else None
    with stand_in_inputs(engine, scale):
        if algorithm.before is not None:
            yield pass_of(engine, pass_group, algorithm.before, grads, Inbox())
        for count in sorted(neighbours) if segment.layout.mix else [0]:
            inbox = stand_ins(engine, segment, count)
            yield pass_of(engine, pass_group, algorithm.after, None if algorithm.before is not None else grads, inbox)


@contextlib.contextmanager
def stand_in_inputs(engine: Engine, scale: Tensor | None = None) -> Iterator[None]:
    """Inside, a step's inputs are others, with any strength: what the first step takes, as learning rates, is not known yet.

    Args:
        scale: of gradients.
    """
    real, engine.inputs = engine.inputs, StepInputs(grad_scale=scale, unmixed_scale=scale, strength=1.0)
    try:
        yield
    finally:
        engine.inputs = real


def stand_ins(engine: Engine, segment: FlatSegment, count: int) -> Inbox:
    """An inbox of so many neighbours whose tensors are like those that come, but small."""
    names, weights = engine.algorithm.messages, (0.0,) * count
    if engine.channels is None or not count:
        sent = [segment.tensor(name) for name in names]
        return Inbox(tuple(tuple(flat.new_zeros(ALIGNMENT) for _ in range(count)) for flat in sent), weights)
    ends = tuple(CompressedChannel.zeros(segment.param.new_zeros(ALIGNMENT), engine.channels.dtype) for _ in names)
    codes = tuple((end.codes,) * count for end in ends)
    scales = tuple((end.scales,) * count for end in ends)
    return Inbox(codes, weights, scales=scales, channels=ends)
