"""What one pass does, as data: the tensors it goes over, what neighbours sent, and how results are stored.

A `Pass` has its rule and its own tensors, and groups of what belongs together: `Mixing`, `GradientInputs`, `Precision` and
`Compression`. Groups that a pass does not need are shared defaults, which cost a step nothing. Nobody changes a pass or a
group of it; those that every step makes are not frozen, since that would cost it 2 us.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .region import Gradients, Region
from .wire import CompressedChannel


@dataclass(eq=False)
class Mixing:
    """What neighbours sent, and the row of the mixing matrix that it is mixed by.

    Attributes:
        sent: M flat tensors [N], what the neighbours got from us, of any dtype that `param` may have; () means (param,).
            They may be `param` and states themselves.
        inbox: M tuples of K flat tensors [N], neighbours in ascending rank; () means no neighbours. A rule that leaves
            the parameters alone, as some that come before an exchange do, takes none.
        weights: K floats.
        row_sum: sum of the mixing matrix's row; 1 is exact.
        alarm: 16 bytes on the device, of param's dtype. With it a difference `inbox[m][k] - sent_m` that is not finite counts
            as 0, and ones are written to `alarm`, and nothing else, if there is one of a weight that is not 0. None: they
            spread. Not looked at where messages are compressed, which never bring such; see `wire`.
    """

    sent: Sequence[Tensor] = ()
    inbox: Sequence[Sequence[Tensor]] = ()
    weights: Sequence[float] = ()
    row_sum: float = 1.0
    alarm: Tensor | None = None


@dataclass(eq=False)
class GradientInputs:
    """This step's gradients, what becomes of them, and the updates that they make.

    Attributes:
        grads: this step's gradients. None means that the pass has none: the rule is applied everywhere, with g = 0.
        grad_scale: scalar tensor on the device that multiplies gradients, fp32, on CPUs also fp64; None means 1.
        found_inf: fp32 scalar tensor on the device; not zero means that all gradients are missing.
        missing: what a missing gradient means: "skip" that the parameter is only mixed, "zero" that g = 0.
        steps: fp32, how many updates were made before this one; None counts as 0. On the CPU [P], per parameter of the
            segment. On CUDA one for each row of `region.blocks`, equal for all rows of a parameter: a program reads and
            writes its own.
        advance: count this update in `steps` wherever one is made: not where a gradient is missing, unless that means zero.
    """

    grads: Gradients | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    missing: Literal["skip", "zero"] = "skip"
    steps: Tensor | None = None
    advance: bool = False


@dataclass(frozen=True, eq=False)
class Precision:
    """How 16-bit parameters and states are kept; see `rounding`.

    Attributes:
        remainder: flat [N], what bf16 or fp16 parameters lack of x: fp32, a master copy (x = remainder), or of param's
            dtype, a Kahan compensation (x = param + remainder). Where x does not round to `param`, somebody has written
            `param`, and x = param. None: x = param.
        seed: in [0, 2^24), for bf16 states, and without `remainder` for bf16 and fp16 parameters, which are then rounded
            stochastically. None rounds to nearest.
    """

    remainder: Tensor | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Compression:
    """Messages that travel compressed; see `wire`.

    Attributes:
        taken: per message, if it travels compressed, this rank's end of the exchange that came in `inbox` (of codes) and
            `scales`; sent_m is then what its codes mean, and differences add up in its neighbor_delta:
            neighbor_delta += sum_k weights[k]*(inbox[m][k] - sent_m);  mixed_m = row_sum*base_m + strength*neighbor_delta.
        scales: M tuples of K uint8 [N/16], the scales of the codes in `inbox`; None for formats without.
        strength: how much of neighbor_delta is mixed in. Weights cannot say it where it changes: they are in the sum for good.
        given: per message, if it is to travel compressed, where its codes are written.
        spoilt: fp32 [4], in which ones are written where codes leave out values that are not finite, and nothing else.
    """

    taken: Sequence[CompressedChannel] = ()
    scales: Sequence[Sequence[Tensor | None]] = ()
    strength: float = 1.0
    given: Sequence[CompressedChannel] = ()
    spoilt: Tensor | None = None


ALONE = Mixing()
NO_GRADIENTS = GradientInputs()
AS_STORED = Precision()
UNCOMPRESSED = Compression()


@dataclass(eq=False)
class Pass:
    """Mix, update and write back the parameters of a region, in place.

        mixed_m = row_sum*base_m + sum_k weights[k]*(inbox[m][k] - sent_m)
        x, states, messages = RULE(x, mixed, gradient*grad_scale, states, steps[p] + 1, (*hyper, extra))

    base_m is sent_m, but x where sent_m is `param`: the two differ if x is more precise than `param` can hold (`remainder`).
    Arithmetic is fp32 (fp64 for fp64 parameters, CPU only) whatever the storage. A neighbour of weight 0 is skipped,
    NaNs and all. Padding is left as it is.

    A gradient is missing where there is none, and everywhere if `found_inf` is not zero; its values are not read. The
    parameter is then mixed but not updated: it becomes mixed[0], its states stay, and message m is mixed[m]. Methods
    that correct the network's mean, as tracking does, need `missing="zero"`, which applies the rule with g = 0.

    Attributes:
        rule: one of `RULES`.
        param: flat parameters [N], fp32, bf16 or fp16, or fp64 on the CPU.
        states: flat states [N] of the rule, fp32 or bf16 (fp64 with fp64 parameters).
        hyper: the rule's floats, as the named tuple of its signature in `reference` or in the order of that.
        region: the parameters to go over.
        mixing: what comes from neighbours; without, mixed_m is base_m.
        gradient: the gradients, and the count of updates.
        precision: what is kept beside 16-bit parameters, and random rounding.
        compression: messages of fewer bits.
        messages: flat tensors [N] that the rule's messages are written to, in their own dtype; () writes none.
        extra: fp32 scalar tensor on the device (fp64 with fp64 parameters), a number that the host need not know, which
            is appended to `hyper`.
        norm_sums: [rows, 2] (fp32 on CUDA, fp64 on the CPU) that is overwritten with sums which the pass takes on its way:
            of (mixed[0] - row_sum*base[0])^2, how much neighbours disagree with this rank, and of (gradient*grad_scale)^2,
            which is not finite if a gradient is not. One row per row of `region.blocks` on CUDA, per parameter of the
            region on the CPU.
        numbers: (row_sum, *weights, *hyper, seed, strength) on the device, fp32 (fp64 on the CPU), read in the place of those
            given here, of which only how many there are counts: for passes that are recorded once and replayed. Without
            random rounding they have no seed, and without compressed messages in the inbox no strength.
    """

    rule: str
    param: Tensor
    states: Sequence[Tensor]
    hyper: Sequence[float]
    region: Region
    mixing: Mixing = ALONE
    gradient: GradientInputs = NO_GRADIENTS
    precision: Precision = AS_STORED
    compression: Compression = UNCOMPRESSED
    messages: Sequence[Tensor] = ()
    extra: Tensor | None = None
    norm_sums: Tensor | None = None
    numbers: Tensor | None = None

    def check(self, rules: Collection[str]) -> None:
        """Raise ValueError for an unknown rule or `missing`, a strange remainder or seed, or lengths that disagree."""
        mixing, missing, precision, compression = self.mixing, self.gradient.missing, self.precision, self.compression
        if self.rule not in rules:
            raise ValueError(f"unknown update rule {self.rule!r}; there are {', '.join(rules)}")
        if missing not in ("skip", "zero"):
            raise ValueError(f'missing is "skip" or "zero", not {missing!r}')
        messages = max(len(mixing.sent), 1)
        if mixing.inbox and len(mixing.inbox) != messages:
            raise ValueError(f"{len(mixing.inbox)} inboxes for {messages} messages sent")
        for received in mixing.inbox or ((),):
            if len(received) != len(mixing.weights):
                raise ValueError(f"{len(mixing.weights)} weights for inboxes of {[*map(len, mixing.inbox)]} neighbours")
        taken, scales = compression.taken, compression.scales
        if taken and (len(taken) != messages or [*map(len, scales)] != [*map(len, mixing.inbox)]):
            raise ValueError(f"{len(taken)} wires and {len(scales)} scales for {messages} messages")
        remainder, seed = precision.remainder, precision.seed
        if remainder is not None and remainder.dtype not in (torch.float32, self.param.dtype):
            raise ValueError(f"{self.param.dtype} parameters with a remainder of {remainder.dtype}")
        if seed is not None and self.numbers is None and not 0 <= seed < 1 << 24:
            raise ValueError(f"a seed is in [0, 2^24), not {seed}")

    def with_numbers_at_hand(self) -> Pass:
        """The same pass with `numbers` read; for the CPU, where reading them costs nothing."""
        if self.numbers is None:
            return self
        row_sum, *others = self.numbers.tolist()
        neighbours = len(self.mixing.weights)
        last = neighbours + len(self.hyper)
        seed = None if self.precision.seed is None else int(others[last])
        after_seed = last + (seed is not None)
        strength = others[after_seed] if self.compression.taken else self.compression.strength
        return replace(
            self,
            hyper=tuple(others[neighbours:last]),
            mixing=replace(self.mixing, row_sum=row_sum, weights=tuple(others[:neighbours])),
            precision=replace(self.precision, seed=seed),
            compression=replace(self.compression, strength=strength),
            numbers=None,
        )
