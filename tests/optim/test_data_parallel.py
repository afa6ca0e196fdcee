"""Inside DistributedDataParallel: gradients stay local with `local_gradients`, and without it somebody says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedfog


class Branches(nn.Module):
    """Two layers and one that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def train(model: nn.Module, opt: Any, steps: int) -> list[torch.Tensor]:
    """The gradients of the last step."""
    for step in range(steps):
        opt.zero_grad()
        model(batch(step)).pow(2).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()]
        opt.step()
    return gradients


def last_gradients(local: bool, options: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients inside DDP, and those of a bare model that is trained the same."""
    bare, wrapped = Branches(), Branches()
    wanted = train(bare, fusedfog.SGD(bare.parameters(), lr=0.1, topology="ring"), 4)
    if not options.get("find_unused_parameters"):
        wrapped.unused.requires_grad_(False)
    ddp = DistributedDataParallel(wrapped, **options)
    if local:
        assert fusedfog.local_gradients(fusedfog.local_gradients(ddp)) is ddp
    opt = fusedfog.SGD(wrapped.parameters(), lr=0.1, topology="ring")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(ddp, opt, 4), wanted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "bucket_cap_mb": 1e-4},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ],
)
def test_local_gradients_are_those_of_the_bare_model(ranks: Pool, options: dict[str, Any]) -> None:
    results = ranks.run(3, last_gradients, True, options)
    for got, wanted in results:
        assert len(got) == len(wanted) == 4
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(results[0][0][0], results[1][0][0])


def test_without_it_ddp_makes_all_gradients_equal(ranks: Pool) -> None:
    results = ranks.run(3, last_gradients, False, {})
    assert torch.equal(results[0][0][0], results[1][0][0])


def warnings_of(kind: str, hook: str, before: bool, keywords: dict[str, Any]) -> list[str]:
    module = nn.Linear(4, 2).double()
    opt = getattr(fusedfog, kind)(module.parameters(), lr=0.1, **keywords) if before else None
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())] if hook == "alone" else []
    ddp = DistributedDataParallel(module, process_group=groups[dist.get_rank()] if groups else None)
    if hook == "local":
        fusedfog.local_gradients(ddp)
    opt = opt or getattr(fusedfog, kind)(module.parameters(), lr=0.1, **keywords)
    other = fusedfog.SGD(nn.Linear(4, 2).parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            ddp(batch(step)).sum().backward()
            opt.step()
            other.step()
    return [str(one.message) for one in caught if "DistributedDataParallel" in str(one.message)]


@pytest.mark.parametrize("before", [False, True])
def test_a_ddp_that_averages_gradients_is_warned_about_once(ranks: Pool, before: bool) -> None:
    for rank, texts in enumerate(ranks.run(2, warnings_of, "AdamW", "none", before, {"algorithm": "atc"})):
        assert len(texts) == 1
        assert texts[0].startswith(f"rank {rank}: AdamW")
        assert "fusedfog.local_gradients(ddp)" in texts[0]


@pytest.mark.parametrize(
    ("hook", "algorithm"), [("local", "awc"), ("alone", "awc"), ("none", "allreduce"), ("none", "local")]
)
def test_no_warning_where_nothing_is_wrong(ranks: Pool, hook: str, algorithm: str) -> None:
    assert ranks.run(2, warnings_of, "SGD", hook, False, {"algorithm": algorithm}) == [[], []]


def fuse_inside() -> None:
    ddp = fusedfog.local_gradients(DistributedDataParallel(nn.Linear(4, 2).double()))
    opt = fusedfog.SGD(ddp.parameters(), lr=0.1, fused_backward=True)
    ddp(batch(0)).sum().backward()
    opt.step()


def test_fused_backward_inside_ddp_is_refused(ranks: Pool) -> None:
    for outcome in ranks.outcomes(2, fuse_inside):
        assert outcome.error_type == "RuntimeError"
        assert "ddp.module" in outcome.message


def add_another_hook() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        fusedfog.local_gradients(nn.Linear(2, 2))
    ddp = DistributedDataParallel(nn.Linear(4, 2))
    ddp.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    fusedfog.local_gradients(ddp)


def test_a_second_hook_is_torchs_own_error(ranks: Pool) -> None:
    assert {outcome.error_type for outcome in ranks.outcomes(2, add_another_hook)} == {"RuntimeError"}


def test_alone_there_is_nothing_to_keep_local() -> None:
    model = nn.Linear(2, 2)
    assert fusedfog.local_gradients(model) is model
