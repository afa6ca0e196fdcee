"""How many messages a step makes, and which of its passes are made inside backward on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ordered_backend
from support.fake_cuda import pretend
from support.pool import Pool
from torch import nn

import fusedfog


@pytest.fixture(scope="module", autouse=True)
def _backend() -> None:
    ordered_backend.build()


def messages(options: dict[str, Any]) -> int:
    """Exchanges started by one step of 34 MB of parameters, the next ones included."""
    params = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(8)] + [nn.Parameter(torch.zeros(1 << 19))]
    opt = fusedfog.SGD(params, lr=0.1, topology="ring", **options)
    started = 0
    start = opt._engine.communicator.start

    def count(*args: Any, **named: Any) -> Any:
        nonlocal started
        started += 1
        return start(*args, **named)

    opt._engine.communicator.start = count  # type: ignore[method-assign]
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        before = started
        opt.step()
    opt.drain()
    return started - before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"bucket_mb": 4}, 8),
        ({"algorithm": "atc"}, 9),
        ({"fused_backward": True}, 9),
        ({"fused_backward": True, "bucket_mb": 5}, 9),
    ],
    ids=str,
)
def test_a_segment_is_one_message_where_nothing_is_gained_from_buckets(
    ranks: Pool, options: dict[str, Any], expected: int
) -> None:
    assert ranks.run(2, messages, options) == [expected] * 2


def passed_in_backward(late: float) -> tuple[int, int]:
    """How many buckets had their pass inside backward, and how many there are, when messages come `late` seconds late."""
    ordered_backend.open_world(20.0)
    with pretend():
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
        opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", fused_backward=True, bucket_mb=1e-4)
        for step in range(3):
            if step == 1:
                ordered_backend.delay(late)  # of the messages that this step sends, and the next one takes
            model(torch.ones(2, 6)).square().sum().backward()
            passed = opt._engine.hooks.passed
            opt.step()
        ordered_backend.delay(0.0)
        opt.drain()
        return passed, sum(len(segment.layout.buckets) for segment in opt._engine.segments)


def test_on_a_gpu_hooks_pass_every_bucket_however_late_its_message_is(ranks: Pool) -> None:
    """A wait orders streams there: asking whether a message is over would leave every bucket to `step`."""
    for passed, buckets in ranks.run(2, passed_in_backward, 0.3, init=False):
        assert passed == buckets > 2
