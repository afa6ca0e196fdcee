"""Step mode with several buckets: where messages come late, each is waited for as late as its own pass needs it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn

import fusedfog
from fusedfog.engine.exchanges import Exchanges
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.mailbox import Mailbox

BUCKET_MB = 0.01
"""Of 10 kB: a layer of 64 x 64 has 16, so that each has a bucket of its own."""

SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "adamw": ("AdamW", {}),
    "tracking": ("SGD", {"algorithm": "gradient_tracking"}),
    "extra": ("SGD", {"algorithm": "extra", "topology": "ring"}),
    "int8": ("AdamW", {"wire_dtype": "int8"}),
    "rare": ("SGD", {"communicate_every": 2, "global_average_every": 3}),
    "measure": ("AdamW", {"measure": True}),
    "moments in bf16": ("AdamW", {"state_dtype": torch.bfloat16}),
    "heal": ("SGD", {"nonfinite": "heal"}),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])


def train(kind: str, keywords: dict[str, Any], apart: bool | None) -> tuple[list[Tensor], dict[str, Any]]:
    """Parameters and figures after six steps, whose messages come together, apart, or as they come (None)."""
    model = net()
    opt: Any = getattr(fusedfog, kind)(model.parameters(), lr=0.01, bucket_mb=BUCKET_MB, **keywords)
    assert len(opt._engine.buckets.all) == 4
    with ExitStack() as stack:
        stack.enter_context(mock.patch("fusedfog.engine.exchanges.APART", 1))
        if apart is not None:
            stack.enter_context(mock.patch.object(Exchanges, "come_together", lambda self, pass_group: not apart))
        for step in range(6):
            source = torch.Generator().manual_seed(100 * step + dist.get_rank())
            opt.zero_grad()
            model(torch.randn(4, 64, generator=source)).square().mean().backward()
            opt.step()
    opt.drain()
    found = {name: opt.stats().get(name) for name in ("bytes_sent", "exchanges", "gradient_norm", "disagreement")}
    return [p.detach().clone() for p in model.parameters()], found


def both(kind: str, keywords: dict[str, Any]) -> bool:
    (one, told), (other, also), (third, too) = (train(kind, keywords, apart) for apart in (False, True, None))
    return told == also == too and all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, other, third, strict=True)
    )


@pytest.mark.parametrize("name", SETUPS)
def test_results_are_the_same_to_the_last_bit_however_messages_come(ranks: Pool, name: str) -> None:
    assert ranks.run(4, both, *SETUPS[name]) == [True] * 4


def order(late: bool) -> list[str]:
    """What rank 1 does in its third step, where all messages but the first are seen to have come only when waited for."""
    model, told = net(), []
    opt = fusedfog.SGD(model.parameters(), lr=0.01, bucket_mb=BUCKET_MB)
    wait, make, send = Mailbox.wait, Scheduler.make_pass, Mailbox.send

    def waiting(self: Mailbox, bucket: Any, **keywords: Any) -> None:
        told.append(f"wait {bucket.number}")
        wait(self, bucket, **keywords)

    def passing(self: Scheduler, pass_group: Any, *others: Any) -> None:
        told.append("pass " + " ".join(str(number) for number in pass_group.numbers))
        make(self, pass_group, *others)

    def sending(self: Mailbox, bucket: Any, *others: Any, **keywords: Any) -> None:
        told.append(f"send {bucket.number}")
        send(self, bucket, *others, **keywords)

    for step in range(3):
        opt.zero_grad()
        model(torch.ones(2, 64)).square().mean().backward()
        if step == 2:
            for bucket in opt._engine.buckets.all:
                assert bucket.transfer is not None
                bucket.transfer.wait()  # All have come.
            told.clear()
        with ExitStack() as stack:
            for owner, name, replacement in (
                (Mailbox, "wait", waiting),
                (Mailbox, "send", sending),
                (Scheduler, "make_pass", passing),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            stack.enter_context(mock.patch("fusedfog.engine.exchanges.APART", 1))
            if late:
                stack.enter_context(mock.patch("fusedfog.comm.transfer.Transfer.done", lambda self: False))
            opt.step()
    opt.drain()
    return told


def small() -> bool:
    """Whether buckets that are too small to gain are asked whether they have come."""
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, bucket_mb=BUCKET_MB)
    with mock.patch.object(Mailbox, "come_together") as asked:
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(2, 64)).square().mean().backward()
            opt.step()
    opt.drain()
    return bool(asked.called)


def test_small_buckets_are_passed_at_once(ranks: Pool) -> None:
    assert ranks.run(2, small) == [False, False]


def test_a_bucket_is_passed_and_sent_before_later_ones_are_waited_for(ranks: Pool) -> None:
    apart, together = ranks.run(2, order, True)[1], ranks.run(2, order, False)[1]
    assert apart == ["wait 0", *(f"{what} {number}" for number in range(4) for what in ("wait", "pass", "send"))]
    waits, sends = [f"wait {number}" for number in range(4)], [f"send {number}" for number in range(4)]
    assert together == ["wait 0", *waits, "pass 0 1 2 3", *sends]
