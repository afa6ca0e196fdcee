"""Passes to hold a device against the CPU reference with: every rule, on memory where what nobody may touch is NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedfog.kernels import BLOCK, Gradients, Pass, Region, run_pass, torch_pass
from support.kernel_rules import ROWS, SHAPES
from support.passes import make_pass, with_fields

NUMELS = (1, 63, 64, 65, 1000, 1024, 1025, 2500)
TOLERANCE = {
    torch.float32: {"rtol": 2**-22, "atol": 2**-22},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-22},
    torch.float16: {"rtol": 2**-10, "atol": 2**-22},
}
"""Two units in the last place of 1, the scale of all inputs, and one of a stored value whose rounding they may turn."""

_GUARD = 1024
"""NaNs before and after each gradient, in bytes."""


@dataclass(frozen=True)
class Case:
    """One pass over a region of parameters of the sizes NUMELS.

    Attributes:
        name: the use of a rule, in `kernel_rules.ROWS`.
        messages: whether rules that also change the parameters write their messages out.
        absent: parameters without a gradient.
        first: the region's first parameter.
        recorded: numbers come from the device, those of the host are NaN, and so is the inbox of one more neighbour, of
            weight 0; the reference has them as arguments.
    """

    name: str
    dtype: torch.dtype = torch.float32
    neighbours: int = 1
    grad_dtype: torch.dtype | None = None
    messages: bool = False
    absent: tuple[int, ...] = ()
    grad_scale: float | None = None
    found_inf: float | None = None
    missing: str = "skip"
    row_sum: float = 1.0
    first: int = 0
    recorded: bool = False

    def __str__(self) -> str:
        changed = [f"{key}={value}" for key, value in vars(self).items() if key not in ("name", "dtype", "neighbours")]
        plain = [f"{key}={value}" for key, value in vars(Case(self.name)).items()]
        return " ".join(
            [self.name, str(self.dtype)[6:], f"K={self.neighbours}", *(c for c in changed if c not in plain)]
        )

    def check(self, device: torch.device) -> float:
        """The largest error in units of the tolerance.

        Raises:
            AssertionError: the device disagrees with the reference, or touched what it may not.
        """
        expected, got = self._run(torch.device("cpu"), torch_pass.run_pass), self._run(device)
        valid, worst = self._valid(), 0.0
        for number, (want, have, before) in enumerate(zip(expected, got, self._tensors()[0], strict=True)):
            bits = {4: torch.int32, 2: torch.int16}[have.element_size()]
            untouched = torch.equal(have.view(bits)[~valid], before.view(bits)[~valid])
            assert untouched, f"{self}: output {number}: padding or another region was changed"
            want, have = want[valid].double(), have[valid].double()
            assert have.isfinite().all(), (
                f"{self}: output {number} has {int((~have.isfinite()).sum())} non-finite values"
            )
            allowed = TOLERANCE[before.dtype]
            errors = (have - want).abs() / (allowed["atol"] + allowed["rtol"] * want.abs())
            at = int(errors.argmax())
            assert errors[at] <= 1, (
                f"{self}: output {number}: {int((errors > 1).sum())} of {len(errors)} values are off, worst at {at}: "
                f"{have[at]:.9g} for {want[at]:.9g}"
            )
            worst = max(worst, float(errors[at]))
        return worst

    def bits(self, device: torch.device) -> list[Tensor]:
        """What the pass leaves behind: parameters, states and messages."""
        return self._run(device)

    def _spans(self) -> list[tuple[int, int]]:
        starts = itertools.accumulate((-(-numel // 64) * 64 for numel in NUMELS), initial=0)
        return list(zip(starts, NUMELS, strict=False))

    def _valid(self) -> Tensor:
        spans = self._spans()
        valid = torch.zeros(-(-sum(spans[-1]) // 64) * 64, dtype=torch.bool)
        for start, numel in spans[self.first :]:
            valid[start : start + numel] = True
        return valid

    def _tensors(self) -> tuple[list[Tensor], Tensor, list[Tensor | None], tuple[tuple[Tensor, ...], ...]]:
        """What is written (parameters, states, messages), the message buffer, gradients and inbox, on the CPU."""
        row, valid = ROWS[self.name], self._valid()
        random = torch.Generator().manual_seed(self.neighbours + 10 * row.states)

        def flat(dtype: torch.dtype, low: float = -1.0) -> Tensor:
            values = torch.rand(len(valid), generator=random) * (1 - low) + low
            return torch.where(valid, values, math.nan).to(dtype)

        made = row.messages if self.messages or "x" not in row.writes else 0
        states = [flat(torch.float32, -1.0 if s == 0 else 0.0) for s in range(row.states)]
        blanks = [torch.full((len(valid),), math.nan, dtype=self.dtype) for _ in range(made)]
        written, message = [flat(self.dtype), *states, *blanks], flat(self.dtype)
        gradients: list[Tensor | None] = [
            None
            if p in self.absent
            else (torch.rand(numel, generator=random) * 2 - 1).to(self.grad_dtype or self.dtype)
            for p, numel in enumerate(NUMELS)
        ]
        if self.found_inf:
            gradients = [gradient if gradient is None else gradient.fill_(math.inf) for gradient in gradients]
        bases = self._sent(written, message) or (written[0],)
        inbox = tuple(tuple(flat(base.dtype) for _ in range(self.neighbours)) for base in bases)
        return written, message, gradients, inbox

    def _sent(self, written: list[Tensor], message: Tensor) -> tuple[Tensor, ...]:
        named = {"x": written[0], "message": message}
        return tuple(named[part] if part in named else written[1 + int(part)] for part in ROWS[self.name].sent)

    def _run(self, device: torch.device, run: Callable[..., None] = run_pass) -> list[Tensor]:
        row = ROWS[self.name]
        written, message, gradients, inbox = self._tensors()
        written, message = [tensor.to(device) for tensor in written], message.to(device)
        gradients = [None if gradient is None else _guarded(gradient, device) for gradient in gradients]
        blocks = [
            (index, offset, min(BLOCK, numel - offset), start + offset)
            for index, (start, numel) in enumerate(self._spans())
            for offset in range(0, numel, BLOCK)
            if index >= self.first
        ]
        on_gpu = device.type == "cuda"
        homes = torch.tensor([0 if gradient is None else gradient.data_ptr() for gradient in gradients])
        grads = Gradients(gradients, homes.to(device) if on_gpu else None, self.grad_dtype or self.dtype)

        def scalar(value: float | None) -> Tensor | None:
            return None if value is None else torch.tensor(value, device=device)

        region = Region(
            self.first, tuple(self._spans()[self.first :]), torch.tensor(blocks).to(device) if on_gpu else None
        )
        work = make_pass(
            row.rule,
            written[0],
            tuple(written[1 : 1 + row.states]),
            row.hyper,
            region,
            grads=grads if row.grads else None,
            steps=(torch.tensor(blocks)[:, 0] if on_gpu else torch.arange(len(NUMELS))).float().to(device),
            sent=self._sent(written, message),
            inbox=tuple(tuple(tensor.to(device) for tensor in received) for received in inbox),
            weights=tuple(0.5 / 2**k for k in range(self.neighbours)),
            row_sum=self.row_sum,
            messages=tuple(written[1 + row.states :]),
            grad_scale=scalar(self.grad_scale),
            found_inf=scalar(self.found_inf),
            missing=self.missing,
            extra=scalar(row.extra),
        )
        run(_recorded(work) if self.recorded and run is run_pass else work)
        return [tensor.cpu() for tensor in written]


def _recorded(work: Pass) -> Pass:
    device = work.param.device
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    numbers = torch.tensor([work.mixing.row_sum, *work.mixing.weights, 0.0, *work.hyper], dtype=dtype, device=device)
    return with_fields(
        work,
        inbox=tuple((*received, torch.full_like(received[0], math.nan)) for received in work.mixing.inbox),
        weights=(math.nan,) * (len(work.mixing.weights) + 1),
        row_sum=math.nan,
        hyper=(math.nan,) * len(work.hyper),
        numbers=numbers,
    )


def _guarded(gradient: Tensor, device: torch.device) -> Tensor:
    """The gradient in the middle of NaNs, 16-byte aligned and no better on a GPU."""
    room = torch.full((gradient.numel() + 2 * _GUARD // gradient.element_size(),), math.nan, dtype=gradient.dtype)
    begin = 16 // gradient.element_size()
    room = room.to(device)
    return room[begin : begin + gradient.numel()].copy_(gradient)


def all_cases() -> Iterator[Case]:
    """Every rule with the dtypes and numbers of neighbours that are timed, and every option of a pass."""
    halves = (torch.float32, torch.bfloat16)
    for name, dtype, neighbours in itertools.product(ROWS, halves, (0, 1, 2, 4)):
        yield Case(name, dtype, neighbours)
    for name in SHAPES:
        yield Case(name, torch.float16)
    for name, dtype in itertools.product((n for n in SHAPES if ROWS[n].messages and "x" in ROWS[n].writes), halves):
        yield Case(name, dtype, 2, messages=True)
    for name in ("mix", "sgd-momentum", "adamw-amsgrad", "tracking"):
        yield Case(name, neighbours=8)
        yield Case(name, first=3)
        yield Case(name, row_sum=0.75)
    for name, dtype in itertools.product((n for n in SHAPES if "x" in ROWS[n].writes), halves):
        yield Case(name, dtype, 2, recorded=True)
    for name in (n for n in SHAPES if ROWS[n].grads):
        yield Case(name, torch.bfloat16, grad_dtype=torch.float32, grad_scale=0.25, found_inf=0.0)
        for missing, absent in itertools.product(("skip", "zero"), ((), (0, 4, 7))):
            yield Case(name, absent=absent, missing=missing, found_inf=0.0, grad_scale=0.5)
            # What must not be read: the values of gradients that overflowed, and their scale.
            yield Case(name, absent=absent, missing=missing, found_inf=1.0, grad_scale=math.nan)


def check_beyond_int32(device: torch.device) -> None:
    """Elements behind number 2^31 are mixed like the first ones; about 9 GB.

    Raises:
        AssertionError: they are not.
    """
    numel = 2**31 + 4 * BLOCK
    ends = torch.tensor([0, BLOCK, numel - 2 * BLOCK, numel - BLOCK])
    blocks = torch.stack([torch.zeros_like(ends), ends, torch.full_like(ends, BLOCK), ends], dim=1).to(device)
    param = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    received = torch.ones(numel, dtype=torch.bfloat16, device=device)
    region = Region(0, ((0, numel),), blocks)
    run_pass(make_pass("mix", param, (), (), region, inbox=((received,),), weights=(0.5,)))
    inside = torch.cat([param[end : end + BLOCK] for end in ends.tolist()])
    assert (inside == 0.5).all(), "blocks at both ends of a tensor of more than 2^31 elements were not mixed"
    assert param.count_nonzero() == 4 * BLOCK, "elements outside the region were changed"
