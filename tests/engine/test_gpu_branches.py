"""The GPU's branches on CPU memory: over the stand-ins for NCCL and torch.cuda, with the CPU's passes for the kernel.

Their numbers are the gloo path's bit for bit, and nothing they do to memory that travels is left to chance.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import fake_cuda, ordered_backend
from support.pool import Pool
from support.waits import await_said, await_true, meet, say, unhurried
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm import transfer, watchdog
from fusedfog.gossip.by_machine import Chain

STEPS = 5
TINY = 2e-4
"""MB: several buckets."""

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    # One-peer graphs have two rounds on four ranks, and with them inboxes that not every step fills.
    "sgd awc": ("SGD", {"momentum": 0.9, "nesterov": True, "topology": "one_peer_exponential"}),
    "sgd awc static": ("SGD", {"topology": "exponential", "communicate_every": 2}),
    "sgd awc hooks": ("SGD", {"momentum": 0.9, "fused_backward": True}),
    "sgd atc": ("SGD", {"momentum": 0.9, "algorithm": "atc"}),
    "sgd atc hooks": ("SGD", {"algorithm": "atc", "fused_backward": True, "topology": "ring"}),
    "sgd tracking": ("SGD", {"momentum": 0.9, "algorithm": "momentum_tracking", "topology": "ring"}),
    "sgd push-sum": ("SGD", {"algorithm": "push_sum"}),
    "sgd averaging": ("SGD", {"global_average_every": 3}),
    "sgd int8": ("SGD", {"wire_dtype": "int8", "topology": "ring"}),
    "sgd mesh": ("SGD", {"mesh": True, "inside": "parameters", "topology": "ring"}),
    "sgd machines": ("SGD", {"mesh": True, "topology": "ring", "momentum": 0.5}),
    "adamw start": ("AdamW", {"data_parallel_steps": 3}),
    "sgd allreduce": ("SGD", {"algorithm": "allreduce", "momentum": 0.9}),
    "sgd measured": ("SGD", {"measure": True, "max_grad_norm": 1.0}),
    "wrapped awc": ("Decentralized", {"topology": "one_peer_exponential"}),
    "wrapped awc static": ("Decentralized", {"topology": "exponential", "mix_strength": lambda step, rate: 0.5 * rate}),
    "wrapped atc": ("Decentralized", {"algorithm": "atc"}),
    "wrapped averaging": ("Decentralized", {"algorithm": "atc", "global_average_every": 3, "topology": "ring"}),
    "wrapped allreduce": ("Decentralized", {"algorithm": "allreduce"}),
    "adamw awc": ("AdamW", {"weight_decay": 0.1}),
    "adamw awc hooks": ("AdamW", {"fused_backward": True, "topology": "exponential"}),
    # Numbers that fp32 holds: on a GPU recorded passes read them in fp32, on the CPU in fp64.
    "sgd capturable": ("SGD", {"momentum": 0.5, "capturable": True}),
    "sgd recorded": ("SGD", {"momentum": 0.5, "capturable": True, "recorded": True}),
}


class Model(nn.Module):
    """With a parameter that never has a gradient, and one that isn't row-major."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.idle = nn.Parameter(torch.randn(5))
        self.across = nn.Parameter(torch.randn(4, 9).t())
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)) @ self.across)


def train(kind: str, options: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """A few steps of a rank on data of its own, the last ones with other learning rates, across a pause and a drain."""
    options = {"bucket_mb": TINY} | options
    recorded = options.pop("recorded", False)
    if options.pop("mesh", False):
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    torch.manual_seed(0)
    model = Model()
    # As a warm-up schedule does, the rate of the first step is set after kernels have been compiled.
    given: Any = model.parameters()
    if kind == "Decentralized":
        given = torch.optim.SGD(given, lr=1.0, momentum=0.9)
    else:
        options["lr"] = 1.0
    opt = getattr(fusedfog, kind)(given, **options)
    data = torch.Generator().manual_seed(1 + dist.get_rank())
    graph = None
    for step in range(STEPS):
        inputs, wanted = (torch.randn(8, size, generator=data) for size in (6, 3))
        opt.param_groups[0]["lr"] = 0.125 / (1 + step // 3)
        opt.zero_grad(set_to_none=not recorded)
        (model(inputs) - wanted).square().mean().backward()
        if graph is None:
            opt.step()
        else:
            with opt.replaying():
                graph.replay()
        if recorded and step == 1 and torch.cuda.is_initialized():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
        if step == 2:
            opt.drain()
        elif step == 3:
            with opt.paused():
                model.last.bias.data.mul_(0.5)
    opt.drain()
    return [param.detach().clone() for param in model.parameters()], opt


def train_all(names: list[str]) -> dict[str, Any]:
    """Each by name, in one world; its parameters as bytes, or what went wrong."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            params, _ = train(*TRAINED[name])
            found[name] = [param.numpy().tobytes() for param in params]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@contextlib.contextmanager
def gpu_world(timeout: float = 20.0, **options: Any) -> Iterator[fake_cuda.Gpu]:
    ordered_backend.open_world(timeout, **options)
    with fake_cuda.pretend() as gpu:
        yield gpu


def train_all_on_gpu(names: list[str]) -> tuple[dict[str, Any], list[str], int]:
    with gpu_world() as gpu, gpu.watching():
        # So late that what does not wait for a message meets other values.
        ordered_backend.delay(0.001)
        return train_all(names), gpu.races, len(gpu.passes)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


@pytest.fixture(scope="module")
def trained(ranks: Pool) -> tuple[list[dict[str, Any]], list[Any]]:
    names = list(TRAINED)
    return ranks.run(4, train_all, names), ranks.run(4, train_all_on_gpu, names, init=False)


@pytest.mark.parametrize("name", TRAINED)
def test_gpu_branches_train_as_the_gloo_path_does(trained: Any, name: str) -> None:
    for expected, (found, _, _) in zip(*trained, strict=True):
        assert not isinstance(expected[name], str), expected[name]
        assert not isinstance(found[name], str), found[name]
        if "allreduce" in name or "start" in name:
            # The sum over ranks has another order: on CPUs it goes through memory that they share.
            for mine, theirs in zip(found[name], expected[name], strict=True):
                pair = [torch.frombuffer(bytearray(values), dtype=torch.float32) for values in (mine, theirs)]
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
        else:
            assert found[name] == expected[name]
    assert len({b"".join(found[name]) for found in trained[0]}) > 1 or "allreduce" in name


def test_nothing_is_left_to_chance(trained: Any) -> None:
    """Every use of memory that travels, on whatever stream, is ordered after the uses that it must not meet."""
    for _, races, passes in trained[1]:
        assert races == []
        assert passes > STEPS * len(TRAINED)


# --------------------------------------------------------------------------------------------- operations on plain tensors


def operate() -> dict[str, list[int]]:
    """What operations return, as bytes; of the asynchronous ones, waited for on a stream of the caller's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2))
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(rank))
    right, left = (rank + 1) % size, (rank - 1) % size
    residual = torch.zeros_like(x)
    calls: dict[str, Callable[..., Any]] = {
        "allreduce": lambda **kw: fusedfog.neighbor_allreduce(x, **kw),
        "one peer": lambda **kw: fusedfog.neighbor_allreduce(x, "one_peer_exponential", 1, **kw),
        "bf16": lambda **kw: fusedfog.neighbor_allreduce(x.bfloat16(), **kw).float(),
        "fp64": lambda **kw: fusedfog.neighbor_allreduce(x.double(), "ring", **kw),
        "complex": lambda **kw: fusedfog.neighbor_allreduce(torch.complex(x, -x), **kw),
        "weights": lambda **kw: fusedfog.neighbor_allreduce(
            x, self_weight=0.25, recv_weights={left: 0.5}, send_weights={right: 2.0}, **kw
        ),
        "int8": lambda **kw: fusedfog.neighbor_allreduce(x, wire_dtype="int8", residual=residual, **kw),
        "allgather": lambda **kw: fusedfog.neighbor_allgather(x[: rank + 1], **kw),
        "integers": lambda **kw: fusedfog.neighbor_allgather(torch.arange(3, dtype=torch.int16) + rank, "ring", **kw),
        "gossip": lambda **kw: fusedfog.pair_gossip(x, rank ^ 1, weight=0.25, **kw),
        "machines": lambda **kw: fusedfog.hierarchical_neighbor_allreduce(x, "ring", mesh=mesh, **kw),
    }
    found = {name: _bytes(call()) for name, call in calls.items()}
    for name in ("allreduce", "allgather", "gossip", "machines"):
        work = calls[name](async_op=True)
        while not work.is_completed():
            time.sleep(0.001)
        found[f"{name} later"] = _bytes(work.wait())
    return found


def _bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def operate_on_gpu() -> tuple[dict[str, list[int]], list[str]]:
    with gpu_world() as gpu, gpu.watching():
        return operate(), gpu.races


def test_operations_give_what_they_give_over_gloo(ranks: Pool) -> None:
    for expected, (found, races) in zip(ranks.run(4, operate), ranks.run(4, operate_on_gpu, init=False), strict=True):
        assert [name for name in expected if found[name] != expected[name]] == []
        assert races == []


# -------------------------------------------------------------------------------------------------------------- streams


def drain_elsewhere(forgetful: bool) -> list[str]:
    """Steps on one stream, `drain()` on another that nothing is ordered after."""
    forget = (
        mock.patch.object(transfer.Transfer, "_order_stream", _wait_once) if forgetful else contextlib.nullcontext()
    )
    with gpu_world() as gpu, forget:
        model = Model()
        opt = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, bucket_mb=TINY)
        side = torch.cuda.Stream()
        with gpu.watching():
            for _ in range(3):
                step_once(model, opt)
                with torch.cuda.stream(side):
                    opt.drain()
            return gpu.races


def _wait_once(message: transfer.Transfer) -> None:
    """As waits were before: the first stream that waits lets go of the works."""
    while message.pending:
        message.pending.pop()[0].wait()


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_drain_on_another_stream_takes_no_order_from_the_step(ranks: Pool, forgetful: bool) -> None:
    for races in ranks.run(2, drain_elsewhere, forgetful, init=False):
        assert bool(races) == forgetful, races


def forget_the_event() -> list[str]:
    with gpu_world() as gpu, mock.patch.object(Chain, "wait", lambda chain: None), gpu.watching():
        train("SGD", {"mesh": True, "topology": "ring"})
        return gpu.races


def test_a_stream_that_is_not_waited_for_is_seen(ranks: Pool) -> None:
    assert all(ranks.run(4, forget_the_event, init=False))


def steps_without_syncs() -> dict[str, str]:
    """By name, the first thing in a step that would have the host wait for the GPU."""
    found: dict[str, str] = {}
    with gpu_world() as gpu:
        for name in (
            "sgd awc",
            "sgd awc hooks",
            "sgd atc",
            "sgd tracking",
            "sgd mesh",
            "sgd int8",
            "sgd allreduce",
            "sgd machines",
            "adamw awc",
        ):
            kind, options = TRAINED[name]
            options = {"bucket_mb": TINY} | options
            if options.pop("mesh", False):
                options["mesh"] = init_device_mesh("cpu", (2, 2))
            model = Model()
            if name in ("sgd allreduce", "sgd machines"):
                # Whether another rank has the gradient that this one lacks, the host has to know, as under DDP.
                model.idle.requires_grad_(False)
            opt = getattr(fusedfog, kind)(model.parameters(), lr=0.125, **options)
            for step in range(4):
                with gpu.without_syncs() if step > 1 else contextlib.nullcontext():
                    try:
                        step_once(model, opt)
                    except AssertionError as error:
                        found.setdefault(name, str(error))
    return found


def test_no_step_has_the_host_wait_for_the_gpu(ranks: Pool) -> None:
    assert ranks.run(4, steps_without_syncs, init=False) == [{}] * 4


# ------------------------------------------------------------------------------------------------------------- watchdog


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged inside."""
    encoded: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: encoded.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fusedfog").addHandler(handler)
    yield encoded
    logging.getLogger("fusedfog").removeHandler(handler)


def step_once(model: Model, opt: Any) -> None:
    model(torch.ones(2, 6)).sum().backward()
    opt.step()


WAITING = "rank 0: step 3, bucket 0: receiving from ranks [1], sending to ranks [1]: still waiting after 1 s. "


def shorten(communicator: Any) -> None:
    """From now on the watchdog speaks after about a second, and a wait ends two seconds later, however busy the machine is."""
    ordered_backend.shorten(communicator, 3.5)
    communicator._watchdog._patience = 1.2


@unhurried()
def step_with_a_late_peer() -> tuple[list[str], str]:
    with heard() as encoded, gpu_world():
        model = Model()
        opt = fusedfog.SGD(model.parameters(), lr=0.1, bucket_mb=TINY, topology="ring")
        for _ in range(2):
            step_once(model, opt)
        meet("trained")
        failure = "none"
        if dist.get_rank() == 0:
            shorten(opt._engine.communicator)
            with pytest.raises(fusedfog.PeerTimeout) as error:
                for _ in range(2):
                    step_once(model, opt)
            failure = str(error.value)
            # What it says it has asked others for, which may take longer than the rest of the timeout.
            await_true(lambda: any(line.startswith(WAITING) for line in encoded))
            say("told")
        await_said("told")
    return encoded, failure


def test_the_watchdog_names_step_bucket_and_peers_before_the_timeout(ranks: Pool) -> None:
    (encoded, failure), _ = ranks.run(2, step_with_a_late_peer, init=False)
    found = [line.removeprefix(WAITING) for line in encoded if line.startswith(WAITING)]
    assert found[0].startswith("rank 0 is in step() 3, rank 1 is in no call of fusedfog, its last was step() ")
    assert "step 3, bucket 0: receiving from ranks [1]" in failure


def step_after_a_rank_has_left() -> tuple[list[str], str]:
    with heard() as encoded, gpu_world(), mock.patch.object(watchdog, "_LATE", 0.1):
        model = Model()
        opt = fusedfog.SGD(model.parameters(), lr=0.1, bucket_mb=TINY, topology="ring")
        failure = "none"
        for _ in range(2):
            step_once(model, opt)
        if dist.get_rank() == 0:
            await_said("left")
            shorten(opt._engine.communicator)
            with pytest.raises(fusedfog.RankLeft) as error:
                for _ in range(2):
                    step_once(model, opt)
            failure = str(error.value)
            with pytest.raises(fusedfog.RankLeft):
                step_once(model, opt)
            say("told")
        else:
            opt.leave()
            say("left")
        await_said("told")
    return encoded, failure


def test_who_waits_for_a_rank_that_left_is_told(ranks: Pool) -> None:
    """By the watchdog: whoever has queued a wait on a GPU asks nobody."""
    (encoded, failure), _ = ranks.run(2, step_after_a_rank_has_left, init=False)
    assert "left with opt.leave(): rank 1 after 2 steps" in failure
    assert any("step 3, bucket 0" in text and "left with opt.leave()" in text for text in encoded), encoded
