"""A data-parallel start, and other changes in mid-run: what goes over, what begins, and that nothing depends on resumes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn

import fusedfog

START = 5
SGD, MOMENTUM = {"kind": "SGD"}, {"kind": "SGD", "momentum": 0.9}
SETUPS: dict[str, dict[str, Any]] = {
    "SGD awc": MOMENTUM,
    "SGD atc": {**MOMENTUM, "algorithm": "atc"},
    "decentlam": {**MOMENTUM, "algorithm": "decentlam", "topology": "ring"},
    "quasi_global": {**MOMENTUM, "algorithm": "quasi_global"},
    "exact_diffusion": {**SGD, "algorithm": "exact_diffusion"},
    "extra": {**SGD, "algorithm": "extra"},
    "momentum_tracking": {**MOMENTUM, "algorithm": "momentum_tracking", "topology": "ring"},
    "push_sum": {**MOMENTUM, "algorithm": "push_sum", "topology": "exponential"},
    "outer": {**MOMENTUM, "algorithm": "local", "outer": fusedfog.Outer(every=3), "topology": "ring"},
    "AdamW awc": {},
    "AdamW atc hooks": {"algorithm": "atc", "fused_backward": True},
    "AdamW amsgrad every": {"amsgrad": True, "communicate_every": 3},
    "AdamW int8": {"wire_dtype": "int8"},
    "AdamW clipped": {"max_grad_norm": 0.1, "lr_scale": 2.0},
    "AdamW stochastic": {"low_precision": "stochastic", "state_dtype": torch.bfloat16},
    "AdamW master": {"low_precision": "master"},
    "dag": {"algorithm": "dag"},
    "AccumAdamW": {"kind": "AccumAdamW", "accum_steps": 2},
    "Decentralized": {"kind": "Decentralized", "lr_scale": 2.0},
}


def build(params: Any, kind: str = "AdamW", **keywords: Any) -> Any:
    if kind == "Decentralized":
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=0.02), **keywords)
    return getattr(fusedfog, kind)(params, lr=0.05 if kind == "SGD" else 0.02, **keywords)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def dtype_of(keywords: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if "low_precision" in keywords else torch.float32


def batch(step: int, dtype: torch.dtype = torch.float32, seed: int | None = None) -> Tensor:
    source = torch.Generator().manual_seed(100 * step + (dist.get_rank() if seed is None else seed))
    return torch.randn(4, 5, generator=source).to(dtype)


def train(model: nn.Module, opt: Any, steps: range, seed: int | None = None) -> None:
    for step in steps:
        opt.zero_grad()
        model(batch(step, next(model.parameters()).dtype, seed)).square().mean().backward()
        opt.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def resumed(keywords: dict[str, Any], at: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after ten steps without and with a resume after `at` of them."""
    dtype = dtype_of(keywords)
    one = net(dtype)
    opt = build(one.parameters(), data_parallel_steps=START, **keywords)
    train(one, opt, range(at))
    saved, weights = opt.state_dict(), {name: value.clone() for name, value in one.state_dict().items()}
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
    train(one, opt, range(at, 10))
    other = net(dtype)
    again = build(other.parameters(), data_parallel_steps=START, **keywords)
    with again.paused():
        other.load_state_dict(weights)
    again.load_state_dict(saved)
    train(other, again, range(at, 10))
    return values(one), values(other)


USUAL = ("SGD awc", "decentlam", "AdamW int8", "AdamW clipped", "AdamW stochastic", "Decentralized")
"""What `make test` tries of the slower ones."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else [pytest.mark.slow]) for n in SETUPS])
def test_a_resume_around_the_hand_over_is_the_uninterrupted_run(ranks: Pool, name: str) -> None:
    for at in (START - 1, START, START + 1):
        for one, other in ranks.run(4, resumed, SETUPS[name], at):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), at


def ranks_apart(keywords: dict[str, Any]) -> list[float]:
    """How far this rank's parameters are from rank 0's, step by step."""
    model = net(dtype_of(keywords))
    opt = build(model.parameters(), data_parallel_steps=START, **keywords)
    found = []
    for step in range(START + 3):
        train(model, opt, range(step, step + 1))
        own = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        first = own.clone()
        dist.broadcast(first, 0)
        found.append((own - first).abs().max().item())
    return found


@pytest.mark.parametrize("name", SETUPS)
def test_ranks_are_equal_to_the_last_bit_in_the_start_and_go_their_own_ways_after(ranks: Pool, name: str) -> None:
    apart = ranks.run(4, ranks_apart, SETUPS[name])
    assert all(found[:START] == [0.0] * START for found in apart)
    assert all(found[-1] > 0 for found in apart[1:])


def on_the_same_data(keywords: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """A run with a start, and torch's own optimizer, where all ranks have the same data and nothing can come of mixing."""
    keywords = {name: value for name, value in keywords.items() if name != "lr_scale"}
    model, other = net(), net()
    opt = build(model.parameters(), data_parallel_steps=START, **keywords)
    inner = (
        torch.optim.SGD(other.parameters(), lr=0.05, momentum=keywords.get("momentum", 0))
        if keywords.get("kind") == "SGD"
        else torch.optim.AdamW(other.parameters(), lr=0.02)
    )
    for model_, opt_ in ((model, opt), (other, inner)):
        train(model_, opt_, range(14), seed=1)
    return values(model), values(other)


@pytest.mark.parametrize(
    "name",
    [
        "SGD awc",
        "SGD atc",
        "decentlam",
        "exact_diffusion",
        "extra",
        "momentum_tracking",
        "push_sum",
        "AdamW awc",
        "dag",
    ],
)
def test_momentum_and_moments_go_on_where_ranks_have_the_same_data(ranks: Pool, name: str) -> None:
    for one, other in ranks.run(4, on_the_same_data, SETUPS[name]):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def moments(steps: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Second moments before and after the hand-over, and this rank's gradients."""
    model = net()
    opt = fusedfog.AdamW(model.parameters(), lr=0.02, data_parallel_steps=steps)
    own = []
    for step in range(steps):
        opt.zero_grad()
        loss = model(batch(step)).square().mean()
        alone = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        own.append(np.array([g.double().square().sum().item() for g in alone]))
        means = [p.grad.clone() for p in model.parameters()]
        own.append(np.array([g.double().square().sum().item() for g in means]))
        if step == steps - 1:
            beta2 = 0.999
            before = [opt.state[p]["exp_avg_sq"] * beta2 + (1 - beta2) * p.grad**2 for p in model.parameters()]
        opt.step()
    after = [opt.state[p]["exp_avg_sq"] for p in model.parameters()]
    return [one.numpy().copy() for one in before], [one.detach().numpy().copy() for one in after], own


def test_second_moments_are_scaled_by_the_measured_ratio(ranks: Pool) -> None:
    steps = 21  # All of the first 16 are measured, then every eighth.
    results = ranks.run(4, moments, steps)
    measured = [step for step in range(steps) if step < 16 or step % 8 == 0]
    sums = np.zeros((2, 4))
    for step in measured:
        squares = np.mean([own[2 * step] for _, _, own in results], axis=0), results[0][2][2 * step + 1]
        sums = 0.9 * sums + np.stack(squares)
    ratio = np.clip(sums[0] / sums[1], 1, 4)
    assert ((ratio > 1) & (ratio < 4)).any()
    for before, after, _ in results:
        for one, other, factor in zip(before, after, ratio, strict=True):
            np.testing.assert_allclose(other, one * factor, rtol=2e-5)


def switches() -> list[list[Tensor]]:
    """The same run by `data_parallel_steps` and by `switch`, and where all ranks are after a switch back."""
    one, other = net(), net()
    first = fusedfog.AdamW(one.parameters(), lr=0.02, data_parallel_steps=START)
    train(one, first, range(10))
    second = fusedfog.AdamW(other.parameters(), lr=0.02, algorithm="allreduce")
    train(other, second, range(START))
    second.switch(algorithm="awc")
    train(other, second, range(START, 10))
    found = [values(one), values(other)]
    second.switch(algorithm="atc", topology="ring", communicate_every=2)
    train(other, second, range(10, 13))
    assert repr(second).startswith("AdamW (atc on ring, 4 ranks")
    second.switch(algorithm="allreduce")
    found.append([*values(other), *(second.state[p]["exp_avg_sq"].clone() for p in other.parameters())])
    train(other, second, range(13, 15))
    found.append(values(other))
    assert second.stats()["steps"] == 15
    return found


def test_a_switch_is_a_hand_over_and_into_allreduce_ranks_become_equal(ranks: Pool) -> None:
    results = ranks.run(4, switches)
    for one, other, common, after in results:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for found, wanted in ((common, results[0][2]), (after, results[0][3])):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def every_pair(names: list[str]) -> int:
    """Switches between all pairs of algorithms, each followed by steps; how many of them there were."""
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.01, momentum=0.0, topology="symmetric_exponential")
    made = 0
    for one, two in itertools.permutations(names, 2):
        for name in (one, two):
            opt.switch(algorithm=name)
            train(model, opt, range(2))
            made += 1
    assert all(p.isfinite().all() for p in model.parameters())
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    train(model, opt, range(2))
    return made


def test_any_algorithm_follows_any_other(ranks: Pool) -> None:
    names = [
        "awc",
        "atc",
        "decentlam",
        "extra",
        "exact_diffusion",
        "gradient_tracking",
        "push_sum",
        "allreduce",
        "local",
    ]
    assert ranks.run(4, every_pair, names) == [2 * 9 * 8] * 4


def refused(change: dict[str, Any], later: bool = False) -> str:
    """The error of a switch, after which training goes on as if nothing had been asked."""
    model, other = net(), net()
    opts = [fusedfog.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True) for m in (model, other)]
    for m, opt in zip((model, other), opts, strict=True):
        train(m, opt, range(3))
    if later and dist.get_rank() == 1:
        change = {"algorithm": "awc"}
    try:
        opts[0].switch(**change)
        text = ""
    except ValueError as error:
        text = str(error)
    for m, opt in zip((model, other), opts, strict=True):
        train(m, opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    return text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"algorithm": "atx"}, "did you mean"),
        ({"algorithm": "decentlam"}, "nesterov"),
        ({"algorithm": "extra", "communicate_every": 2}, "communicate_every=2"),
        ({"topology": "rings"}, "did you mean"),
        ({"communicate_every": 0}, "communicate_every must be a whole number"),
    ],
)
def test_a_switch_to_what_does_not_go_together_changes_nothing(ranks: Pool, change: dict[str, Any], text: str) -> None:
    assert all(text in found for found in ranks.run(2, refused, change))


def test_ranks_that_switch_to_different_things_are_told(ranks: Pool) -> None:
    found = ranks.run(2, refused, {"algorithm": "atc"}, True)
    assert all("SGD.switch" in text and "algorithm" in text and "atc" in text and "awc" in text for text in found)


BAD = [
    ({"data_parallel_steps": -1}, "data_parallel_steps must be a whole number"),
    ({"data_parallel_steps": 2.5}, "data_parallel_steps must be a whole number"),
    ({"data_parallel_steps": True}, "data_parallel_steps must be a whole number"),
    ({"lr_scale": 0.0}, "lr_scale must be positive"),
    ({"lr_scale": float("nan")}, "lr_scale must be positive"),
    ({"data_parallel_steps": 3, "algorithm": "allreduce"}, "all its steps are data-parallel"),
    ({"data_parallel_steps": 3, "algorithm": "local"}, "it exchanges nothing"),
    ({"lr_scale": 2.0, "algorithm": "allreduce"}, "never mixes"),
    ({"data_parallel_steps": 3, "capturable": True}, "capturable"),
]


@pytest.mark.parametrize(("keywords", "text"), BAD)
def test_starts_that_make_no_sense_are_refused(keywords: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fusedfog.SGD(net().parameters(), lr=0.1, **keywords)


def by_hand(change: Callable[[Any, nn.Module, int], None] | str, keywords: dict[str, Any]) -> tuple[bool, int]:
    """Training with something in the middle of the start; whether ranks were equal until its end, and its length."""
    model = net()
    opt = build(model.parameters(), data_parallel_steps=START, **keywords)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step < START + 1 else 1.0)
    equal = True
    for step in range(START + 4):
        if step == 2 and change == "topology":
            opt.set_topology("ring")
        if step == 2 and change == "group":
            extra = nn.Linear(3, 3)
            opt.add_param_group({"params": list(extra.parameters())})
            model.append(extra)
        opt.zero_grad()
        loss = model(batch(step)).square().mean()
        if change == "scaler":
            loss = scaler.scale(loss)
            if step in (START - 1, START) and dist.get_rank() == 1:
                loss = loss * float("inf")  # Skipped on all ranks in the start, and on this one after it.
            loss.backward()
            scaler.step(opt)
            scaler.update()
        else:
            loss.backward()
            opt.step()
        if change == "warm-up":
            schedule.step()
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        equal &= step >= START or torch.equal(mine, first)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return equal and finite, opt._engine.exchanges.clock.exchanges


@pytest.mark.parametrize("change", ["topology", "group", "scaler", "warm-up"])
@pytest.mark.parametrize(
    "keywords", [{}, {"kind": "SGD", "momentum": 0.9, "algorithm": "decentlam", "topology": "ring"}]
)
def test_the_start_survives_what_happens_in_it(ranks: Pool, change: str, keywords: dict[str, Any]) -> None:
    assert ranks.run(2, by_hand, change, keywords) == [(True, 4)] * 2


def doubled(keywords: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """lr_scale=2 beside a rate that is doubled by hand at the hand-over."""
    one, other = net(), net()
    opt = build(one.parameters(), data_parallel_steps=START, lr_scale=2.0, **keywords)
    by_hand = build(other.parameters(), data_parallel_steps=START, **keywords)
    train(one, opt, range(9))
    train(other, by_hand, range(START))
    for group in by_hand.param_groups:
        group["lr"] *= 2
    train(other, by_hand, range(START, 9))
    assert opt.param_groups[0]["lr"] == by_hand.param_groups[0]["lr"] / 2
    return values(one), values(other)


@pytest.mark.parametrize("name", ["SGD awc", "decentlam", "AdamW awc", "dag", "outer"])
def test_lr_scale_is_a_factor_on_the_rate_once_gossip_has_begun(ranks: Pool, name: str) -> None:
    for one, other in ranks.run(2, doubled, SETUPS[name]):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def beyond() -> tuple[bool, str, int]:
    """A start that never ends is data-parallel training."""
    one, other = net(), net()
    opt = fusedfog.AdamW(one.parameters(), lr=0.02, data_parallel_steps=10**9)
    baseline = fusedfog.AdamW(other.parameters(), lr=0.02, algorithm="allreduce")
    train(one, opt, range(6))
    train(other, baseline, range(6))
    equal = all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))
    return equal, repr(opt).split(",")[1], opt.stats()["exchanges"]


def test_a_start_beyond_the_end_of_the_run_is_data_parallel_training(ranks: Pool) -> None:
    assert ranks.run(2, beyond) == [(True, " after 1000000000 data-parallel steps", 0)] * 2
