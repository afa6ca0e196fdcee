"""Small buckets of many param groups travel as one message, and nobody sees that in the numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import Tensor, nn

import fusedfog
from fusedfog.gossip import packs

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"algorithm": "atc"}),
    ("SGD", {"algorithm": "atc", "fused_backward": True}),
    ("SGD", {"fused_backward": True}),
    ("SGD", {"algorithm": "momentum_tracking", "momentum": 0.5}),
    ("SGD", {"algorithm": "exact_diffusion", "topology": "ring"}),
    ("SGD", {"algorithm": "push_sum", "topology": "exponential"}),
    ("AdamW", {}),
    ("AdamW", {"communicate_every": 2, "global_average_every": 3}),
    ("AdamW", {"capturable": True}),
    ("AdamW", {"wire_dtype": "int8", "topology": "ring"}),
    ("AdamW", {"topology": "equi_dynamic"}),
    ("AdamW", {"algorithm": "dag", "topology": "exponential"}),
]


def parameters(seed: int) -> list[nn.Parameter]:
    """Eleven small ones of odd sizes, one of which is bf16, and one of 1.2 MB."""
    source = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(7 * i + 1, generator=source)) for i in range(10)]
    return [*made, nn.Parameter(torch.randn(300_000, generator=source)), nn.Parameter(made[3].detach().bfloat16())]


def train(kind: str, options: dict[str, Any], fewest: int, edits: bool = False) -> tuple[list[Tensor], int, int]:
    """Parameters after eight steps in a group each, transfers that a step starts, and bytes sent."""
    before, packs.FEWEST = packs.FEWEST, fewest
    try:
        params = parameters(5)
        opt = getattr(fusedfog, kind)([{"params": [p]} for p in params[:-1]], lr=0.05, **options)
        communicator = opt._engine.communicator
        start, started = communicator.start, itertools.count()
        communicator.start = lambda *args, **named: (next(started), start(*args, **named))[1]
        for step in range(8):
            if step == 4:
                opt.add_param_group({"params": [params[-1]]})
            if step == 6 and edits:
                with torch.no_grad():
                    params[2].mul_(3)
                params[4].data.fill_(1)
            loss = sum((p.float() - i - communicator.view.rank).square().sum() for i, p in enumerate(params))
            opt.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            opt.step()
        opt.drain()
        return [p.detach().clone() for p in params], next(started), opt.stats()["bytes_sent"]
    finally:
        packs.FEWEST = before


def compare(kind: str, options: dict[str, Any], edits: bool) -> tuple[bool, int, int, bool]:
    apart, many, sent = train(kind, options, 10**9, edits)
    together, few, also = train(kind, options, 4, edits)
    equal = all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    return equal, many, few, sent == also


def walk(methods: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [(*method, *compare(*method, edits=i % 2 == 0)) for i, method in enumerate(methods)]


def test_packed_messages_give_the_same_parameters_to_the_last_bit(ranks: Pool) -> None:
    for rank in ranks.run(3, walk, METHODS, timeout=200):
        for kind, options, equal, many, few, same_bytes in rank:
            assert equal and same_bytes, (kind, options)
            assert few == many if "wire_dtype" in options else few < many, (kind, options)


def test_three_hundred_groups_are_one_message(ranks: Pool) -> None:
    def sizes(given: list[int]) -> list[int]:
        params = [nn.Parameter(torch.zeros(n)) for n in given]
        opt = fusedfog.SGD([{"params": [p]} for p in params], lr=0.1, algorithm="local")
        return [len(pack.buckets) for pack in packs.packs_of(opt._engine.buckets.all)]

    assert sizes([4096] * 300) == [300]
    assert sizes([4096] * 3) == []
    assert sizes([100_000] * 9) == []
    assert sizes([65_536] * 70) == [32, 32, 6]


@pytest.mark.parametrize("frozen", [0, 3])
def test_groups_that_are_not_mixed_are_in_no_pack(frozen: int) -> None:
    params = [nn.Parameter(torch.zeros(64), requires_grad=i >= frozen) for i in range(12)]
    groups = [{"params": [p], "mix": i % 2 == 0} for i, p in enumerate(params)]
    opt = fusedfog.SGD(groups, lr=0.1, algorithm="local")
    packed = [bucket for pack in packs.packs_of(opt._engine.buckets.all) for bucket in pack.buckets]
    assert packed == [bucket for bucket in opt._engine.buckets.all if bucket.segment.layout.mix]
