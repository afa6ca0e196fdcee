"""A checkpoint of another rank, number of ranks or topology is named, and never mixed up with compressed messages' replicas."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog


def build(group: dist.ProcessGroup | None = None, **keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    return model, fusedfog.SGD(model.parameters(), lr=0.05, momentum=0.9, group=group, **keywords)


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(1000 * step + dist.get_rank())
        opt.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        opt.step()


def load(opt: Any, saved: dict[str, Any]) -> str:
    """What was said: the warning, the error, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fusedfog.ForeignCheckpointWarning)
        try:
            opt.load_state_dict(saved)
        except ValueError as error:
            return f"ValueError: {error}"
    return "; ".join(str(one.message) for one in caught if one.category is fusedfog.ForeignCheckpointWarning)


def exchange_states(opt: Any) -> list[dict[str, Any]]:
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, opt.state_dict())
    return states


def load_all(algorithm: str) -> dict[str, str]:
    model, opt = build(algorithm=algorithm, topology="ring")
    train(model, opt, 0, 3)
    states, rank, encoded = exchange_states(opt), dist.get_rank(), {}
    encoded["own"] = load(opt, states[rank])
    encoded["rank 0's"] = load(opt, states[0])
    _, elsewhere = build(algorithm=algorithm, topology="exponential")
    encoded["other topology"] = load(elsewhere, states[rank])
    pair = dist.new_group([rank // 2 * 2, rank // 2 * 2 + 1], use_local_synchronization=True)
    _, fewer = build(pair, algorithm=algorithm, topology="ring")
    encoded["fewer ranks"] = load(fewer, states[rank])
    encoded["torch's"] = load(opt, torch.optim.SGD(build(algorithm="local")[0].parameters(), lr=0.05).state_dict())
    return encoded


@pytest.mark.parametrize("algorithm", ["awc", "push_sum"])
def test_what_was_saved_elsewhere_is_named_with_the_way_out(ranks: Pool, algorithm: str) -> None:
    for rank, encoded in enumerate(ranks.run(4, load_all, algorithm)):
        assert encoded["own"] == encoded["torch's"] == ""
        assert (encoded["rank 0's"] == "") == (rank == 0)
        if rank:
            assert (
                f"rank {rank}: SGD: this checkpoint was saved by rank 0 of 4, and this is rank {rank}"
                in encoded["rank 0's"]
            )
            assert "load_checkpoint" in encoded["rank 0's"]
        assert (
            "on topology ring" in encoded["other topology"]
            and "the optimizer has exponential" in encoded["other topology"]
        )
        if algorithm == "push_sum":
            assert encoded["fewer ranks"].startswith("ValueError") and "load_checkpoint" in encoded["fewer ranks"]
        else:
            assert f"this is rank {rank % 2} of 2" in encoded["fewer ranks"]


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def go_on_compressed(change: str) -> tuple[str, float, float]:
    model, opt = build(topology="ring", wire_dtype="int8")
    train(model, opt, 0, 6)
    states, rank = exchange_states(opt), dist.get_rank()
    saved = states[0 if change == "rank 0's" else rank]
    if change == "a message is missing" and rank == 2:
        for state in saved["state"].values():
            del state["param_encoded"]
    model, opt = build(topology="exponential" if change == "other topology" else "ring", wire_dtype="int8")
    encoded = load(opt, saved)
    train(model, opt, 6, 8)
    apart = opt.consensus_distance()
    with opt.averaged():
        mean = vector(model)
    opt.param_groups[0]["lr"] = 0.0  # steps only mix now: if all replicas agree, ranks meet where their mean was
    train(model, opt, 8, 200)
    return encoded, apart, float((vector(model) - mean).norm())


@pytest.mark.parametrize("change", ["nothing", "rank 0's", "other topology", "a message is missing"])
def test_replicas_that_do_not_fit_begin_anew(ranks: Pool, change: str) -> None:
    results = ranks.run(4, go_on_compressed, change)
    named = {"rank 0's": (1, 2, 3), "other topology": (0, 1, 2, 3), "a message is missing": (2,)}.get(change, ())
    assert [rank for rank, (encoded, _, _) in enumerate(results) if encoded] == list(named)
    if change == "a message is missing":
        assert "rank 2: SGD: this checkpoint lacks param_encoded of 4 parameters" in results[2][0]
    for _, apart, off in results:
        assert apart > 1e-3 and off < 1e-3 * apart
