"""Compressed messages on the CPU: the compiled loop has the reference's codes bit for bit, batches up to the rounding of x."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernel_rules import ROWS
from support.passes import make_pass

from fusedfog.kernels import CompressedChannel, Gradients, Pass, Region, cpu_pass, torch_pass, wire

SIZES = (1, 64, 700, 5, 256, 3_001)
formats = pytest.mark.parametrize("dtype", tuple(wire.FORMATS), ids=str)


class Side:
    """A rank's parameters and its end of an exchange, the same for the same seed."""

    def __init__(self, dtype: torch.dtype, name: str, neighbours: int, spread: float = 1.0) -> None:
        starts = [0]
        for size in SIZES:
            starts.append(starts[-1] + -(-size // 64) * 64)
        self.spans, count = tuple(zip(starts, SIZES, strict=False)), starts[-1]
        random = torch.Generator().manual_seed(0)

        def drawn() -> torch.Tensor:
            # Of many magnitudes, or groups would meet neither the smallest scale nor the formats' subnormals.
            powers = torch.exp2(spread * torch.randn(count, generator=random))
            return torch.randn(count, generator=random) * powers

        self.name, self.x = name, drawn()
        self.states = [drawn().abs() for _ in range(ROWS[name].states)]
        self.gradients = [drawn()[:size].clone() for size in SIZES]
        self.end = CompressedChannel.zeros(self.x, dtype)
        self.end.replica.copy_(drawn())
        wire.give(self.end, drawn())
        self.end.neighbor_delta.copy_(drawn())
        self.others = [CompressedChannel.zeros(self.x, dtype) for _ in range(neighbours)]
        for other in self.others:
            wire.give(other, drawn())
        self.spoilt = torch.zeros(4)

    def work(self, compiled: bool, take: bool = True, give: bool = True) -> Pass:
        row, others = ROWS[self.name], self.others if take else []
        return make_pass(
            row.rule,
            self.x,
            tuple(self.states),
            row.hyper,
            Region(0, self.spans, None, compiled),
            grads=Gradients(self.gradients, None, torch.float32) if row.grads else None,
            steps=torch.full((len(SIZES),), 2.0),
            inbox=(tuple(other.codes for other in others),) if take else (),
            scales=(tuple(other.scales for other in others),) if take else (),
            weights=tuple(0.4 / k for k in range(1, len(others) + 1)),
            taken=(self.end,) if take else (),
            given=(self.end,) if give else (),
            strength=0.75,
            spoilt=self.spoilt,
        )

    def kept(self) -> list[torch.Tensor]:
        end = self.end
        scales = [] if end.scales is None else [end.scales]
        return [self.x, end.neighbor_delta, end.replica, end.codes.view(torch.uint8), *scales, self.spoilt]


def both(dtype: torch.dtype, name: str, neighbours: int, spread: float, compiled: bool, **parts: bool) -> list[Side]:
    """The same pass by `cpu_pass`, which must not leave it to the reference, and by the reference."""
    sides = [Side(dtype, name, neighbours, spread) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_pass, "run_pass", lambda work: pytest.fail("the reference was called"))
        if compiled:
            patch.setattr(cpu_pass, "_run_batches", lambda *arguments: pytest.fail("batches were made"))
        patch.setattr(cpu_pass, "WIDTH", 1024)
        patch.setattr(torch_pass, "CHUNK", 256)
        cpu_pass.run_pass(sides[0].work(compiled, **parts))
    torch_pass.run_pass(sides[1].work(False, **parts))
    return sides


@formats
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("parts", [{}, {"take": False}, {"give": False}], ids=str)
def test_codes_and_sums_are_the_references_to_the_last_bit(dtype, spread, parts):
    ours, theirs = both(dtype, "mix", 2, spread, True, **parts)
    for one, other in zip(ours.kept(), theirs.kept(), strict=True):
        assert torch.equal(one, other)


@formats
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["mix", "sgd-momentum-all", "adamw", "adam-coupled-maximize", "adamw-amsgrad"])
def test_updates_are_told_as_by_the_reference(dtype, name, compiled):
    ours, theirs = both(dtype, name, 3, 1.0, compiled)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-5, atol=1e-5)
    # What a value is rounded to may be one step off, where x is by a last bit.
    for one, other in zip(ours.kept()[1:3], theirs.kept()[1:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0.13, atol=0.13)
    apart = (ours.end.codes.float() != theirs.end.codes.float()).float().mean()
    assert apart < 0.01


@formats
@pytest.mark.parametrize("compiled", [False, True])
def test_values_that_are_not_finite_are_left_out_and_noted(dtype, compiled):
    sides = [Side(dtype, "mix", 1) for _ in range(2)]
    for side, maker in zip(sides, (cpu_pass, torch_pass), strict=True):
        for place, bad in ((3, math.nan), (130, math.inf), (side.spans[-1][0] + 3_000, -math.inf)):
            side.x[place] = bad
        maker.run_pass(side.work(compiled and maker is cpu_pass))
    ours, theirs = ([end.scales, end.codes.float().isfinite()] for end in (side.end for side in sides))
    assert torch.equal(ours[1], theirs[1]) and (ours[0] is None or torch.equal(ours[0], theirs[0]))
    assert sides[0].spoilt.tolist() == [1.0] * 4 == sides[1].spoilt.tolist() and sides[0].end.replica.isfinite().all()


def test_without_neighbours_and_gradients_codes_are_made_all_the_same() -> None:
    for compiled in (False, True):
        side = Side(torch.int8, "adamw", 0)
        work = side.work(compiled, take=False)
        work.gradient.found_inf = torch.ones(())
        cpu_pass.run_pass(work)
        for start, size in side.spans:
            here = slice(start, start + size)
            torch.testing.assert_close(side.end.replica[here], side.x[here], rtol=0.02, atol=0.5)
