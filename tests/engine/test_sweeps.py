"""One pass for all buckets of a segment is, bit for bit, one pass for each of them: the GPU's order of things, on gloo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.algorithms import TABLE
from fusedfog.engine import scheduler
from fusedfog.kernels import Pass

TINY = 0.0004


class Net(nn.Module):
    """Two dtypes, a frozen parameter, one that only some steps use, and one that is never communicated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.spare = nn.Linear(5, 20), nn.Linear(20, 20), nn.Linear(5, 3)
        self.wide = nn.Linear(20, 2).double()
        self.own = nn.Parameter(torch.ones(70))
        self.second.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        loss = self.wide(hidden.double()).pow(2).mean() + (self.own * x.mean()).pow(2).mean()
        return loss + self.spare(x).pow(2).mean() if (step + dist.get_rank()) % 3 else loss


def sweeping(opt: Any, pass_groups: bool) -> Any:
    """Make an optimizer pass whole segments in step mode, or bucket by bucket as it does elsewhere."""
    opt._engine._by_segment = pass_groups
    return opt


def train(kind: str, pass_groups: bool, keywords: dict[str, Any], micro: int = 1) -> tuple[list[torch.Tensor], int]:
    """Seven steps with a checkpoint loaded in between: parameters after each, and the number of passes."""
    passes = 0

    def count(work: Pass) -> None:
        nonlocal passes
        passes += 1
        run_pass(work)

    run_pass, scheduler.run_pass = scheduler.run_pass, count
    if "mesh" in keywords:
        keywords = keywords | {"mesh": init_device_mesh("cpu", keywords["mesh"])}
    try:
        net = Net()
        mixed = [p for name, p in net.named_parameters() if name != "own"]
        groups = [{"params": mixed}, {"params": [net.own], "mix": False}]
        opt = getattr(fusedfog, kind)(groups, lr=0.03, bucket_mb=TINY, **keywords)
        opt = sweeping(opt, pass_groups)
        path = []
        for step in range(7):
            opt.zero_grad()
            for part in range(micro):
                generator = torch.Generator().manual_seed(1000 * dist.get_rank() + 10 * step + part)
                net(torch.randn(4, 5, generator=generator), step).backward()
            opt.step()
            if step == 3:
                saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
                with opt.paused():
                    net.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
            path.append(torch.cat([p.detach().double().flatten() for p in net.parameters()]))
        return path, passes
    finally:
        scheduler.run_pass = run_pass


EVERY = [
    pytest.param(kind, name, marks=pytest.mark.slow if kind == "AdamW" else ())
    for kind, family in (("SGD", "SGD"), ("AdamW", "Adam"))
    for name in TABLE[family]
]


def check(ranks: Pool, n: int, kind: str, keywords: dict[str, Any], micro: int = 1) -> tuple[int, int]:
    """Both ways must agree on every rank; the number of passes of rank 0, bucket by bucket and swept."""
    bucketwise = ranks.run(n, train, kind, False, keywords, micro)
    swept = ranks.run(n, train, kind, True, keywords, micro)
    for (one, _), (other, _) in zip(bucketwise, swept, strict=True):
        for step, (a, b) in enumerate(zip(one, other, strict=True)):
            assert torch.equal(a, b), f"step {step}"
    return bucketwise[0][1], swept[0][1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "algorithm"), EVERY)
def test_every_algorithm_gives_the_same_bits(ranks: Pool, kind: str, algorithm: str) -> None:
    keywords: dict[str, Any] = {"algorithm": algorithm}
    if kind == "SGD" and algorithm != "gradient_tracking":
        keywords["momentum"] = 0.9
    one, other = check(ranks, 4, kind, keywords)
    # Three segments. What sends in the middle of a step keeps to the buckets.
    pipelined = TABLE["SGD" if kind == "SGD" else "Adam"][algorithm].before is not None
    assert other == (one if pipelined else 3 * 7)
    assert one > 3 * 7


@pytest.mark.parametrize("algorithm", ["awc", "atc", "push_sum", "momentum_tracking"])
def test_steps_without_an_exchange_too(ranks: Pool, algorithm: str) -> None:
    one, other = check(ranks, 4, "SGD", {"algorithm": algorithm, "momentum": 0.9, "communicate_every": 2})
    assert other < one


@pytest.mark.parametrize(
    "keywords", [{"global_average_every": 3}, {"max_grad_norm": 0.1}, {"topology": "ring"}], ids=str
)
def test_options_change_nothing(ranks: Pool, keywords: dict[str, Any]) -> None:
    check(ranks, 4, "AdamW", keywords, micro=2)


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_on_a_mesh(ranks: Pool, algorithm: str) -> None:
    check(ranks, 4, "SGD", {"algorithm": algorithm, "mesh": (2, 2), "topology": "ring", "momentum": 0.9})


def edit_between_steps(pass_groups: bool) -> int:
    net = Net()
    opt = fusedfog.SGD(net.parameters(), lr=0.1, topology="ring", bucket_mb=TINY)
    opt = sweeping(opt, pass_groups)
    for step in range(4):
        opt.step()
        if step == 1:
            with torch.no_grad():
                net.first.weight.mul_(0.5)
    return int(opt.stats()["torn_messages"])


@pytest.mark.filterwarnings("ignore::fusedfog.errors.TornMessageWarning")
@pytest.mark.parametrize("pass_groups", [False, True])
def test_an_edit_in_flight_is_counted_for_its_bucket_alone(ranks: Pool, pass_groups: bool) -> None:
    assert ranks.run(2, edit_between_steps, pass_groups) == [1, 1]


def test_what_hooks_have_passed_is_not_passed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    opt = fusedfog.SGD(net.parameters(), lr=0.1, bucket_mb=TINY, fused_backward=True)
    passes: list[Any] = []
    monkeypatch.setattr(scheduler, "run_pass", lambda work: passes.append(work.region))
    net(torch.ones(2, 20)).sum().backward()
    assert passes == [pass_group.region for pass_group in opt._engine.buckets.singles]
    opt.step()
    assert len(passes) == len(opt._engine.buckets.singles) > 1
