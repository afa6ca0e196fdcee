"""Whole optimizers on a device, held against torch.optim; each check takes the device and raises AssertionError.

`EchoLink` lets one process train with neighbours: what it receives is what it sent. Equal values are averaged to
themselves exactly, so training with any number of echoes must equal training alone. Neighbours on a `BentLink` send
something else, so that weights matter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fusedfog
from fusedfog import topology
from fusedfog.algorithms import algorithm_for
from fusedfog.comm.group import GroupView
from fusedfog.engine import between_phases
from fusedfog.engine.clock import StepSchedule
from fusedfog.engine.phases import Phase, Phases
from support.gpu_windows import check_windows
from support.recorded import record

LOOSE = {"rtol": 1e-5, "atol": 1e-6}


class EchoMessage:
    """Copies on a stream of their own, as NCCL's are; `bend` has its own way of making one."""

    last = None

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        stream: torch.cuda.Stream | None,
        bend: Callable[[int, Tensor, Tensor], object] | None = None,
    ) -> None:
        self._stream = stream
        if stream is None:
            _copy(pairs, bend)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _copy(pairs, bend)

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class EchoCommunicator:
    """Stands for a `fusedfog.comm` communicator: every neighbour sends what it is sent, or nothing at all with `silent`."""

    def __init__(self, device: torch.device, size: int, *, silent: bool = False) -> None:
        self.view, self.on_gpu, self.timeout = GroupView(0, size, None), device.type == "cuda", timedelta(minutes=1)
        self.silent, self.ended, self.device = silent, None, device
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None

    def tag(self, channel: int, number: int) -> int:
        return number

    def start(self, sends: Sequence[Any], recvs: Sequence[Any], *, tag: int, label: str) -> EchoMessage:
        pairs = [] if self.silent else [(inbox, sent) for (_, inbox), (_, sent) in zip(recvs, sends, strict=True)]
        return EchoMessage(pairs, None if self.silent else self._stream)

    def keep(self, message: EchoMessage) -> None:
        message.wait()


class BentCommunicator(EchoCommunicator):
    """Neighbour j sends 1 + j/16 times what it is sent; in rounds where as many are sent to as are received from."""

    def start(self, sends: Sequence[Any], recvs: Sequence[Any], *, tag: int, label: str) -> EchoMessage:
        pairs = [(inbox, sent) for (_, inbox), (_, sent) in zip(recvs, sends, strict=True)]
        return EchoMessage(pairs, self._stream, lambda i, inbox, sent: torch.mul(sent, 1 + recvs[i][0] / 16, out=inbox))


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], bend: Callable[[int, Tensor, Tensor], object] | None) -> None:
    for i, (inbox, sent) in enumerate(pairs):
        if bend is None:
            inbox.copy_(sent)
        else:
            bend(i, inbox, sent)


def among_echoes(
    optimizer: Any,
    algorithm: str,
    size: int,
    *,
    silent: bool = False,
    bent: topology.Topology | None = None,
    fused_backward: bool = False,
    schedule: StepSchedule | None = None,
) -> Any:
    """`optimizer`, built with algorithm="local", as one of `size` ranks on a ring whose others echo it.

    With `bent`, as one of the ranks of that topology whose others send something else.
    """
    device = optimizer._scheduler.segments[0].param.device
    graph, schedule = bent or topology.ring(size), schedule or StepSchedule(fused_backward=fused_backward)
    phase = Phase(algorithm_for(algorithm, optimizer._family), graph, schedule)
    return among(
        optimizer,
        EchoCommunicator(device, size, silent=silent) if bent is None else BentCommunicator(device, size),
        phase,
    )


def among(optimizer: Any, communicator: Any, phase: Phase, channel: int = 0) -> Any:
    """`optimizer`, built with algorithm="local", as one of a communicator's ranks."""
    engine = optimizer._scheduler
    # These communicators have no store in which ranks compare their numbers.
    with mock.patch.object(between_phases, "SameNumbers", lambda *_: None):
        optimizer._scheduler = type(engine)(
            optimizer.param_groups, engine.segments, Phases.of(phase), communicator, channel, 2**20
        )
    optimizer._scheduler.adopt_edits = engine.adopt_edits
    return optimizer


def convnet(device: torch.device, seed: int = 0) -> nn.Module:
    """A small convolutional model with odd sizes, in channels_last memory order."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 13, 3, padding=1), nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 17), nn.Tanh(), nn.Linear(17, 10),
    )  # fmt: skip
    return model.to(device, memory_format=torch.channels_last)


def give_gradients(model: nn.Module, step: int, factor: float = 1.0, absent: int | None = None) -> None:
    """The same random gradients for every copy of a model, on any device; one parameter may have none."""
    random = torch.Generator().manual_seed(step)
    for index, param in enumerate(model.parameters()):
        values = torch.randn(param.shape, generator=random) * factor
        param.grad = None if index == absent else torch.empty_like(param).copy_(values)


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or LOOSE))


def check_local_equals_torch(device: torch.device) -> None:
    """200 steps of SGD, Adam and AdamW with given gradients, one of them missing now and then."""
    for kind, options in (
        ("SGD", {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        ("Adam", {"weight_decay": 0.01}),
        ("AdamW", {"amsgrad": True}),
    ):
        ours, theirs = convnet(device), convnet(device)
        a = getattr(fusedfog, kind)(ours.parameters(), lr=1e-3, algorithm="local", **options)
        b = getattr(torch.optim, kind)(theirs.parameters(), lr=1e-3, **options)
        for step in range(200):
            for model, optimizer in ((ours, a), (theirs, b)):
                give_gradients(model, step, absent=2 if step % 3 == 0 else None)
                optimizer.step()
        assert_same(ours, theirs)


def check_training_equals_torch(device: torch.device) -> None:
    """20 steps of a convolutional model on its own gradients, with a learning-rate schedule and clipping."""
    x, y = torch.randn(64, 3, 12, 12, device=device), torch.randint(10, (64,), device=device)
    ours, theirs = convnet(device), convnet(device)
    a = fusedfog.SGD(ours.parameters(), lr=0.05, momentum=0.9, algorithm="local", max_grad_norm=0.5)
    b = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) for optimizer in (a, b)]
    losses = []
    for _ in range(20):
        for model, optimizer, schedule in ((ours, a, schedules[0]), (theirs, b, schedules[1])):
            loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            if optimizer is b:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert losses[-2] < losses[0], f"the loss did not fall: {losses[0]:.3f} to {losses[-2]:.3f}"
    # Convolutions' own backward is not deterministic on a GPU.
    assert_same(ours, theirs, rtol=1e-3, atol=1e-4)


def check_grad_scaler(device: torch.device) -> None:
    """A GradScaler's scale is undone, and a step with infinite gradients changes nothing but the scale."""
    ours, theirs = convnet(device), convnet(device)
    a = fusedfog.AdamW(ours.parameters(), lr=1e-2, algorithm="local")
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
    for step in range(10):
        scaler.scale(torch.zeros((), device=device))
        overflows = step in (0, 4)
        give_gradients(ours, step, scaler.get_scale())
        if overflows:
            next(iter(ours.parameters())).grad[0, 0, 0, 0] = float("inf")
        scaler.step(a)
        scaler.update()
        if not overflows:
            give_gradients(theirs, step)
            b.step()
    assert scaler.get_scale() == 256.0, f"two overflows should have halved the scale twice: {scaler.get_scale()}"
    assert_same(ours, theirs)


def check_fused_backward(device: torch.device) -> None:
    """Updates inside backward equal updates in step, bit for bit where backward repeats itself."""
    x = torch.randn(16, 40, device=device)
    models = []
    for fused in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 7)).to(device)
        optimizer = fusedfog.SGD(
            model.parameters(), lr=0.1, momentum=0.9, algorithm="local", fused_backward=fused, bucket_mb=1e-3
        )
        for _ in range(10):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same(models[0], models[1], rtol=1e-6, atol=1e-7)


def check_low_precision(device: torch.device) -> None:
    """bfloat16 and float16 parameters take the update that float32 arithmetic gives, rounded once."""
    for dtype, ulp in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        model = convnet(device).to(dtype)
        optimizer = fusedfog.SGD(model.parameters(), lr=0.1, algorithm="local")
        for step in range(5):
            give_gradients(model, step)
            expected = [param.detach().float() - 0.1 * param.grad.float() for param in model.parameters()]
            optimizer.step()
            for value, param in zip(expected, model.parameters(), strict=True):
                torch.testing.assert_close(param.detach(), value.to(dtype), rtol=ulp, atol=1e-6)


def check_echoes(device: torch.device) -> None:
    """Training among neighbours that echo equals training alone: exchange, inbox, streams and mixing are in order."""
    for kind, algorithm, options in (
        ("SGD", "awc", {"momentum": 0.9}),
        ("SGD", "atc", {"momentum": 0.9}),
        ("SGD", "momentum_tracking", {"momentum": 0.9}),
        ("AdamW", "awc", {}),
    ):
        for size, fused in ((2, False), (4, False), (4, True)):
            alone, among = convnet(device), convnet(device)
            make = getattr(fusedfog, kind)
            a = make(alone.parameters(), lr=1e-2, algorithm="local", **options)
            b = make(among.parameters(), lr=1e-2, algorithm="local", bucket_mb=1e-3, **options)
            among_echoes(b, algorithm, size, fused_backward=fused)
            if algorithm == "momentum_tracking":
                among_echoes(a, algorithm, 2)
            x = torch.randn(8, 3, 12, 12, device=device)
            for step in range(10):
                for model, optimizer in ((alone, a), (among, b)):
                    if fused:
                        torch.manual_seed(step)
                        model.eval()(x).square().sum().backward()
                    else:
                        give_gradients(model, step)
                    optimizer.step()
                    optimizer.zero_grad()
            assert_same(among, alone, **({"rtol": 1e-3, "atol": 1e-4} if fused else {"rtol": 0.0, "atol": 0.0}))


def check_a_wrapped_optimizer(device: torch.device) -> None:
    """Any optimizer among echoes equals itself alone; neighbours that send zeros pull by their weights, 2/3 on a ring."""
    for algorithm in ("awc", "atc"):
        for silent in (False, True):
            among, alone = convnet(device), convnet(device)
            bare = torch.optim.RMSprop(alone.parameters(), lr=1e-2)
            wrapped = fusedfog.Decentralized(
                torch.optim.RMSprop(among.parameters(), lr=1e-2), algorithm="local", bucket_mb=1e-3
            )
            among_echoes(wrapped, algorithm, 4, silent=silent)
            for step in range(
                1 if silent else 3
            ):  # A silent communicator never clears an inbox, which the mixing writes to.
                before = [param.detach().clone() for param in alone.parameters()]
                for model, optimizer in ((among, wrapped), (alone, bare)):
                    give_gradients(model, step, absent=2)
                    optimizer.step()
                for param, old in zip(alone.parameters(), before, strict=True) if silent else ():
                    param.data -= 2 / 3 * (old if algorithm == "awc" else param.data)
            assert_same(among, alone)


def check_checkpoint(device: torch.device) -> None:
    """A checkpoint goes to torch.optim and back through torch's own map to the CPU."""
    ours, theirs = convnet(device), convnet(device)
    a = fusedfog.AdamW(ours.parameters(), lr=1e-2, algorithm="local")
    for step in range(3):
        give_gradients(ours, step)
        a.step()
    theirs.load_state_dict(ours.state_dict())
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3, 6):
        for model, optimizer in ((ours, a), (theirs, b)):
            give_gradients(model, step)
            optimizer.step()
    assert_same(ours, theirs)


@contextmanager
def without_waiting(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Inside, it is an error if the host waits for the GPU."""
    wanted = wanted and device.type == "cuda"
    if wanted:
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if wanted:
            torch.cuda.set_sync_debug_mode("default")


def check_no_host_sync(device: torch.device) -> None:
    """A steady step, alone or among neighbours, never makes the host wait for the GPU."""
    for algorithm, size in (("local", 1), ("awc", 4), ("atc", 4)):
        model = convnet(device)
        optimizer = fusedfog.AdamW(model.parameters(), lr=1e-2, algorithm="local", bucket_mb=1e-3)
        if size > 1:
            among_echoes(optimizer, algorithm, size)
        give_gradients(model, 0)
        for _ in range(3):
            optimizer.step()
        with without_waiting(device):
            optimizer.step()


IRREGULAR = topology.star(4).then(topology.one_peer_hypercube(4))
"""Rank 0 has three neighbours in every other round and one in the others."""


def check_captured_steps(device: torch.device) -> None:
    """Captured once, replayed with other learning rates and rounds: eager training, to the last bit."""
    for kind, algorithm, options, dtype in (
        ("SGD", "awc", {"momentum": 0.9}, torch.float32),
        ("AdamW", "awc", {"amsgrad": True}, torch.float32),
        ("SGD", "momentum_tracking", {"momentum": 0.9}, torch.float32),
        ("AdamW", "local", {}, torch.float32),
        ("AdamW", "awc", {"low_precision": "stochastic"}, torch.bfloat16),
    ):
        models = [convnet(device).to(dtype) for _ in range(2)]
        eager, captured = (
            getattr(fusedfog, kind)(
                model.parameters(), lr=0.1, algorithm="local", bucket_mb=1e-3, capturable=capturable, **options
            )
            for model, capturable in zip(models, (False, True), strict=True)
        )
        if algorithm != "local":
            schedule = StepSchedule(communicate_every=2 if algorithm == "momentum_tracking" else 1)
            for optimizer in (eager, captured):
                among_echoes(optimizer, algorithm, 4, bent=IRREGULAR, schedule=schedule)
        for param in models[1].parameters():
            param.grad = torch.zeros_like(param)
        replay = None
        for step in range(14):
            rate = 0.0 if step == 6 else 0.02 * math.cos(step / 9)
            give_gradients(models[0], step)
            for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
                ours.grad.copy_(theirs.grad)
            for optimizer in (eager, captured):
                optimizer.param_groups[0]["lr"] = rate
            eager.step()
            if step == 3:
                replay = record(device, captured.step)
            if replay is None or step == 9:
                captured.step()
                continue
            with without_waiting(device, step > 4), captured.replaying():
                replay()
        assert captured.stats()["steps"] == eager.stats()["steps"] == 14
        assert_same(models[1], models[0], rtol=0.0, atol=0.0)


def check_captured_training(device: torch.device) -> None:
    """Forward, backward, clipping and step in one graph, its gradients in the graph's own memory, against eager training."""
    if device.type != "cuda":
        return  # nothing else records a backward
    generator = torch.Generator(device).manual_seed(3)
    batches = [torch.randn(16, 40, device=device, generator=generator) for _ in range(14)]
    paths = []
    for capturable in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 7)).to(device)
        optimizer = fusedfog.AdamW(
            model.parameters(), lr=0.1, algorithm="local", max_grad_norm=0.01, capturable=capturable, bucket_mb=1e-3
        )
        among_echoes(optimizer, "awc", 4, bent=IRREGULAR, schedule=StepSchedule(max_grad_norm=0.01))
        static, losses = torch.zeros_like(batches[0]), []

        def whole(model: nn.Module = model, optimizer: Any = optimizer, static: Tensor = static) -> Tensor:
            loss = model(static).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        replays: list[tuple[Callable[[], None], list[Tensor]]] = []
        side = torch.cuda.Stream(device)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            static.copy_(batch)
            if capturable and step in (3, 6):  # a second graph of the same step, with gradients of its own
                optimizer.zero_grad()
                out: list[Tensor] = []
                replays.append((record(device, lambda out=out: out.append(whole())), out))
            if replays and step != 9:
                replay, out = replays[step % len(replays)]
                with optimizer.replaying():
                    replay()
                losses.append(out[0].item())
                continue
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                optimizer.zero_grad()
                losses.append(whole().item())
            torch.cuda.current_stream().wait_stream(side)
        paths.append((model, losses))
    (eager, expected), (captured, losses) = paths
    # Matrix products may take other ways inside a capture.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert_same(captured, eager, rtol=1e-3, atol=1e-4)


def check_captured_grad_scaler(device: torch.device) -> None:
    """A GradScaler's step and update inside the graph: a replay with infinite gradients updates nothing but the scale."""
    if device.type != "cuda":
        return
    torch.manual_seed(1)
    model = nn.Linear(8, 4, device=device)
    optimizer = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, algorithm="local", capturable=True)
    scaler, static = torch.amp.GradScaler("cuda", init_scale=1024.0), torch.randn(5, 8, device=device)

    def whole() -> None:
        scaler.scale(model(static).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            whole()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    replay = record(device, whole)
    for bad in (False, True, False):
        before, scale = model.weight.detach().clone(), scaler.get_scale()
        static.fill_(float("inf") if bad else 0.5)
        with optimizer.replaying():
            replay()
        assert torch.equal(model.weight.detach(), before) == bad
        assert scaler.get_scale() == (scale / 2 if bad else scale)
    assert optimizer.stats()["steps"] == 6


CHECKS: dict[str, Callable[[torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
} | {"windows": check_windows}
"""Every check by name."""
