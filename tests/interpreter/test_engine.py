"""An optimizer whose passes are the kernel's, in the interpreter: block tables, gradient addresses, sweeps."""

from __future__ import annotations

import pytest
import torch
from support.gpu_checks import IRREGULAR, among_echoes
from support.recorded import StandInGraph
from torch import nn

import fusedfog
from fusedfog.engine import scheduler
from fusedfog.kernels import Pass, fused_pass, run_pass
from fusedfog.params.flat import FlatSegment


class Net(nn.Module):
    """A channels_last convolution, parameters of odd sizes and of no elements, one without and one with a stray gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 9, 3).to(memory_format=torch.channels_last)
        self.line, self.unused = nn.Linear(45, 33), nn.Linear(3, 3)
        self.empty, self.stray = nn.Parameter(torch.empty(0, 2)), nn.Parameter(torch.ones(70))

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in (self.conv.weight, self.conv.bias, self.line.weight, self.line.bias):
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=torch.preserve_format)
        self.conv.weight.grad = self.conv.weight.grad.to(memory_format=torch.channels_last)
        self.empty.grad = torch.empty(0, 2)
        # Not 16-byte aligned, so that it cannot be read where it lies.
        self.stray.grad = torch.randn(71, generator=generator)[1:]
        if step % 2:
            self.line.bias.grad = None


def counts(segments: list[FlatSegment]) -> list[torch.Tensor]:
    """How often each parameter was updated; one without elements has no blocks on GPUs, and does not count."""
    return [
        torch.stack([segment.step_of(p) * bool(slot.spec.numel) for p, slot in enumerate(segment.layout.slots)])
        for segment in segments
    ]


def train(kernel: bool, whole: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], int]:
    net = Net()
    opt = fusedfog.AdamW(net.parameters(), lr=0.1, bucket_mb=0.003)
    engine = opt._engine
    passes = 0

    def launch(work: Pass) -> None:
        nonlocal passes
        passes += 1
        (fused_pass.launch if kernel else run_pass)(work)

    monkeypatch.setattr(scheduler, "run_pass", launch)
    if kernel:
        for segment in engine.segments:
            segment._make_tables()
        engine.rebuild_buckets()
    engine._by_segment = whole
    for step in range(3):
        net.set_gradients(step)
        opt.step()
    flat = [segment.param.clone() for segment in engine.segments]
    return flat + counts(engine.segments), passes


@pytest.mark.parametrize("whole", [False, True])
def test_the_engine_with_the_kernel_is_the_engine_with_the_reference(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, buckets = train(False, False, monkeypatch)
    got, passes = train(True, whole, monkeypatch)
    assert passes == (3 if whole else buckets)
    assert buckets > 3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-20, atol=2**-20)


def replay_train(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Six steps among neighbours with changing rates and rounds; with the kernel, two graphs take turns from step 2 on."""
    net = Net()
    opt = fusedfog.AdamW(net.parameters(), lr=0.1, algorithm="local", capturable=kernel)
    monkeypatch.setattr(scheduler, "run_pass", fused_pass.launch if kernel else run_pass)
    if kernel:
        for segment in opt._engine.segments:
            segment._make_tables()
    among_echoes(opt, "awc", 4, bent=IRREGULAR)
    graphs: list[tuple[StandInGraph, list[torch.Tensor | None]]] = []
    for step in range(6):
        net.set_gradients(2 * step)
        opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        if not kernel or step < 2:
            opt.step()
            continue
        if len(graphs) < 2:
            # Its aligned copy would be another kernel, which the stand-in does not keep.
            net.stray.grad = net.stray.grad.clone()
            graphs.append((StandInGraph(), [p.grad for p in net.parameters()]))
            graphs[-1][0].capture(opt.step)
        graph, homes = graphs[step % 2]
        for p, home in zip(net.parameters(), homes, strict=True):
            if home is not None:
                home.copy_(p.grad)
        with opt.replaying():
            graph.replay()
    return [segment.param.clone() for segment in opt._engine.segments] + counts(opt._engine.segments)


def test_recorded_passes_read_numbers_and_addresses_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = replay_train(False, monkeypatch)
    for ours, theirs in zip(replay_train(True, monkeypatch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-18, atol=2**-18)


def test_addresses_are_uploaded_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(40, 40)
    (segment,) = fusedfog.SGD(net.parameters(), lr=0.1)._engine.segments
    segment._make_tables()
    copies = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, *args, **named: copies.append(self) or copy_(self, *args, **named)
    )
    net.weight.grad = torch.ones(40, 40)
    first = segment.gradients(0, 2).addresses
    assert first.tolist() == [net.weight.grad.data_ptr(), 0]
    segment.gradients(0, 2)
    assert len(copies) == 1
    net.bias.grad = torch.ones(40)
    assert segment.gradients(1, 2).addresses.tolist() == [net.weight.grad.data_ptr(), net.bias.grad.data_ptr()]
    net.weight.grad = None
    assert segment.gradients(0, 2).addresses.tolist() == [0, net.bias.grad.data_ptr()]
    assert len(copies) == 3
