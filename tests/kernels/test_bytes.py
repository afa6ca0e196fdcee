"""What a step moves: per element in the compiled kernel, and per step in whole tensors. Counts, no times.

AdamW needs 28 bytes an element (parameter, two moments read and written, gradient read) and 4 for each neighbour.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedfog
from fusedfog.comm.communicator import Communicator
from fusedfog.engine import scheduler
from fusedfog.kernels import BLOCK, Pass

triton = pytest.importorskip("triton")

from support import codegen  # noqa: E402

_fresh_cache, compiler = codegen._fresh_cache, codegen.compiler  # pytest finds fixtures by these names
compiled_only = codegen.compiled_only

# -- the kernel ----------------------------------------------------------------------------------------------------------


def bytes_per_element(name: str, neighbours: int, dtype: torch.dtype, compiler: Any, **options: Any) -> float:
    codegen.launch(name, neighbours, dtype, **options)
    (kernel,) = compiler.compiled()
    accesses = Counter(codegen.full_block(kernel.asm["ptx"]))
    # Scalars, the same for all threads of a block: its row, addresses, flags, the step.
    assert sum(count for (_, width), count in accesses.items() if ".v" not in width) <= 9
    widths = {".v2.b32": 8, ".v4.b32": 16}
    moved = sum(count * widths[width] for (_, width), count in accesses.items() if ".v" in width)
    return moved / (BLOCK // (32 * kernel.metadata.num_warps))


@pytest.mark.sampled(3)
@compiled_only
@pytest.mark.parametrize("neighbours", [0, 1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "dtype", "own"),
    [
        ("adamw", torch.float32, 28),
        ("adamw-amsgrad", torch.float32, 36),
        ("sgd-momentum", torch.float32, 20),
        ("sgd", torch.float32, 12),
        ("adamw", torch.bfloat16, 6 + 16),
        ("sgd-momentum", torch.bfloat16, 6 + 8),
        ("sgd", torch.bfloat16, 6),
    ],
)
def test_a_pass_moves_what_its_rule_needs_and_one_message_a_neighbour(
    name: str, dtype: torch.dtype, own: int, neighbours: int, compiler: Any
) -> None:
    assert bytes_per_element(name, neighbours, dtype, compiler) == own + dtype.itemsize * neighbours


@compiled_only
@pytest.mark.parametrize(
    ("name", "neighbours", "messages", "needed"),
    [
        ("mix", 2, False, 4 + 4 + 2 * 4),  # x in and out, two messages
        ("quasi-global-before", 0, True, 4 * 4),  # x, g and the momentum in, the message out
        ("descend", 0, True, 3 * 4),  # x and g in, the message out
        ("decentlam", 2, False, 5 * 4 + 2 * 4),  # x and the move in and out, what was sent, two messages
        ("tracking", 1, False, 7 * 4 + 2 * 4),  # x, y and u in and out, g, a message of each of x and y
        ("exact-diffusion", 2, False, 4 * 4 + 2 * 4),  # x and y in and out, two messages
    ],
)
def test_methods_with_messages_move_no_more_either(
    name: str, neighbours: int, messages: bool, needed: int, compiler: Any
) -> None:
    assert bytes_per_element(name, neighbours, torch.float32, compiler, messages=messages) == needed


@compiled_only
def test_steps_without_gradients_to_read_move_less(compiler: Any) -> None:
    assert bytes_per_element("sgd-momentum", 1, torch.float32, compiler, grads=None) == 16 + 4


# -- the step ------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Names of the operations that touch tensors of a bucket's size, unless they only look at them another way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(t.numel() >= 64 for t in tensors) and not func.is_view:
            self.seen.append(str(func))
        return result


def one_step(algorithm: str) -> dict[str, Any]:
    """What the third step hands to passes and to the link, with passes that do nothing."""
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    opt = fusedfog.AdamW(net.parameters(), lr=0.01, algorithm=algorithm, topology="ring", bucket_mb=0.0012)
    (segment,) = opt._engine.segments
    passes: list[Pass] = []
    sent: list[tuple[int, int]] = []
    start = Communicator.start

    def watched_start(communicator: Communicator, sends: Any, recvs: Any, **named: Any) -> Any:
        sent.extend((tensor.untyped_storage().data_ptr(), tensor.numel()) for _, tensor in sends)
        return start(communicator, sends, recvs, **named)

    def step() -> None:
        net(torch.ones(2, 16)).sum().backward()
        opt.step()
        opt.zero_grad()

    run_pass = scheduler.run_pass
    try:
        step()
        step()
        Communicator.start = watched_start
        scheduler.run_pass = passes.append
        net(torch.ones(2, 16)).sum().backward()
        homes = [p.grad.data_ptr() for p in net.parameters()]
        with Watch() as watch:
            opt.step()
    finally:
        Communicator.start, scheduler.run_pass = start, run_pass
    return {
        "operations": [name for name in watch.seen if not name.startswith("c10d")],
        "regions": [work.region.first for work in passes],
        "buckets": [bucket.first for bucket in segment.layout.buckets],
        "flat tensors": [
            1 + len(work.states) + sum(map(len, work.mixing.inbox)) + len(work.messages) for work in passes
        ],
        "gradients": sorted(
            (p, grad.data_ptr() == homes[p])
            for work in passes
            if work.gradient.grads is not None
            for p, grad in enumerate(work.gradient.grads.tensors)
            if grad is not None
        ),
        "sent from": [home == segment.param.untyped_storage().data_ptr() for home, _ in sent],
        "sent": sum(numel for _, numel in sent),
        "elements": segment.layout.numel,
    }


def test_a_step_of_awc_is_one_pass_and_nothing_else(ranks: Pool) -> None:
    for step in ranks.run(4, one_step, "awc"):
        assert step["operations"] == [], "no copy to send, nothing zeroed, nothing read twice"
        assert step["regions"] == step["buckets"][:1], "from the first bucket on, over all of them"
        assert len(step["buckets"]) > 2
        assert step["flat tensors"] == [1 + 2 + 2]
        assert step["gradients"] == [(p, True) for p in range(8)], "read once, where autograd left them"
        assert all(step["sent from"])
        assert step["sent"] == 2 * step["elements"], "the parameters themselves, to two neighbours"


def test_a_step_of_atc_is_two_passes_a_bucket_and_sends_the_parameters_too(ranks: Pool) -> None:
    for step in ranks.run(4, one_step, "atc"):
        assert step["operations"] == []
        assert sorted(step["regions"]) == sorted(2 * step["buckets"])
        assert step["gradients"] == [(p, True) for p in range(8)]
        assert all(step["sent from"])
        assert step["sent"] == 2 * step["elements"]
