"""Optimizers with compressed messages: the limit of exact ones, fewer bytes, and nothing lost on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog

FORMATS = ("bf16", "int8", "fp8")
TINY = 6e-4


class Quadratics(nn.Module):
    """Every rank has a minimiser of its own; parameters of odd sizes, several buckets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = nn.ParameterList([torch.randn(size, dtype=torch.float64) for size in (70, 1, 9)])
        torch.manual_seed(10 + dist.get_rank())
        self.aims = [torch.randn(p.shape, dtype=torch.float64) for p in self.parts]
        self.curves = [torch.rand(p.shape, dtype=torch.float64) + 0.5 for p in self.parts]

    def forward(self) -> torch.Tensor:
        return sum(
            (curve * (p - aim) ** 2).sum() / 2 for p, aim, curve in zip(self.parts, self.aims, self.curves, strict=True)
        )

    def vector(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.parts])


def limit(
    kind: str, steps: int, formats: tuple[str | None, ...], keywords: dict[str, Any]
) -> dict[str | None, tuple[torch.Tensor, float, torch.Tensor]]:
    """Where training ends, bytes sent a step, and what the averaged model is, for each format."""
    found = {}
    for form in formats:
        model = Quadratics()
        opt = getattr(fusedfog, kind)(model.parameters(), bucket_mb=TINY, wire_dtype=form, **keywords)
        for _ in range(steps):
            opt.zero_grad()
            model().backward()
            opt.step()
        with opt.averaged():
            mean = model.vector()
        found[form] = (model.vector(), opt.stats()["bytes_sent"] / steps, mean)
    return found


SLOW = pytest.mark.slow
ONE_QUICK = ["int8", *(pytest.param(form, marks=SLOW) for form in ("bf16", "fp8"))]
CASES = [
    pytest.param(160, {"lr": 0.3, "topology": "ring"}),
    pytest.param(200, {"lr": 0.15, "topology": "one_peer_exponential", "momentum": 0.5}, marks=SLOW),
    pytest.param(
        200,
        {"lr": 0.3, "topology": "ring", "algorithm": "atc", "communicate_every": 2, "fused_backward": True},
        marks=SLOW,
    ),
    pytest.param(400, {"lr": 0.1, "algorithm": "gradient_tracking", "topology": "ring"}, marks=SLOW),
    pytest.param(300, {"lr": 0.2, "algorithm": "exact_diffusion"}, marks=SLOW),
    pytest.param(300, {"lr": 0.2, "algorithm": "extra"}, marks=SLOW),
    pytest.param(300, {"lr": 0.2, "algorithm": "decentlam", "momentum": 0.5}, marks=SLOW),
    pytest.param(
        100,
        {"lr": 0.1, "topology": "one_peer_exponential", "global_average_every": 5, "fused_backward": True},
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("steps", "keywords"), CASES)
def test_the_limit_is_that_of_exact_messages(ranks: Pool, steps: int, keywords: dict[str, Any]) -> None:
    # Full averages come at another rhythm than the topology's rounds, so differences stay as large as what they move.
    every = keywords.get("global_average_every")
    for found in ranks.run(4, limit, "SGD", steps, (None, *FORMATS), keywords):
        exact, exact_bytes, mean = found[None]
        for form in FORMATS:
            ours, sent, our_mean = found[form]
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-2 if every else 1e-8)
            torch.testing.assert_close(our_mean, mean, rtol=0, atol=1e-3 if every else 1e-8)
            # 64-bit parameters; scales are a byte for sixteen elements. The last codes wait for a step that never comes.
            share = {"bf16": 2 / 8, "int8": 1.0625 / 8, "fp8": 1.0625 / 8}[form]
            assert sent / exact_bytes == pytest.approx(share, rel=1e-3) or every


def mean_is_kept(form: str) -> float:
    model = Quadratics()
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parts:
            p.copy_(torch.randn(p.shape, dtype=torch.float64))
    opt = fusedfog.SGD(model.parameters(), lr=0.0, sync_init=False, wire_dtype=form, topology="one_peer_exponential")
    with opt.averaged():
        before = model.vector()
    for _ in range(60):
        for p in model.parts:
            p.grad = torch.zeros_like(p)
        opt.step()
    with opt.averaged():
        drift = (model.vector() - before).abs().max().item()
    return max(drift, opt.consensus_distance())


@pytest.mark.parametrize("form", ONE_QUICK)
def test_averaging_alone_finds_the_mean_and_keeps_it(ranks: Pool, form: str) -> None:
    assert max(ranks.run(4, mean_is_kept, form)) < 1e-12


# -- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    """Processes that have seen nothing of a run that is resumed in them."""
    pool = Pool()
    yield pool
    pool.close()


def build(keywords: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    model = model.bfloat16() if "low_precision" in keywords else model
    return model, fusedfog.AdamW(model.parameters(), lr=0.02, bucket_mb=TINY, **keywords)


def train(model: nn.Module, opt: Any, first: int, last: int) -> list[torch.Tensor]:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        torch.manual_seed(1000 * step + dist.get_rank())
        opt.zero_grad()
        model(torch.randn(8, 5, dtype=dtype)).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def save_in_between(path: str, keywords: dict[str, Any]) -> list[torch.Tensor]:
    model, opt = build(keywords)
    train(model, opt, 0, 10)
    fusedfog.save_checkpoint(path, model, opt)
    return train(model, opt, 10, 20)


def resume(path: str, keywords: dict[str, Any]) -> list[torch.Tensor]:
    model, opt = build(keywords)
    fusedfog.load_checkpoint(path, model, opt)
    return train(model, opt, 10, 20)


RESUMED = [
    {"wire_dtype": "int8"},
    {"wire_dtype": "fp8", "algorithm": "atc"},
    {"wire_dtype": "bf16", "topology": "one_peer_exponential", "fused_backward": True},
    {"wire_dtype": "int8", "algorithm": "gradient_tracking", "communicate_every": 2},
    {"wire_dtype": "fp8", "low_precision": "kahan", "topology": "one_peer_exponential"},
    {"low_precision": "master"},
    {"low_precision": "stochastic", "state_dtype": torch.bfloat16, "algorithm": "atc"},
]


@pytest.mark.parametrize(
    "keywords", [pytest.param(one, marks=() if i in (0, 4, 6) else SLOW) for i, one in enumerate(RESUMED)], ids=str
)
def test_new_processes_go_on_bit_for_bit(ranks: Pool, others: Pool, tmp_path: Path, keywords: dict[str, Any]) -> None:
    path = str(tmp_path / "saved")
    whole = ranks.run(4, save_in_between, path, keywords)
    for ours, theirs in zip(others.run(4, resume, path, keywords), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def resume_elsewhere(path: str, keywords: dict[str, Any]) -> float:
    model, opt = build(keywords)
    fusedfog.load_checkpoint(path, model, opt)
    train(model, opt, 10, 14)
    return opt.consensus_distance()


@pytest.mark.parametrize("keywords", [pytest.param(RESUMED[0], marks=SLOW), RESUMED[4]], ids=str)
def test_another_number_of_ranks_starts_with_new_replicas(
    ranks: Pool, tmp_path: Path, keywords: dict[str, Any]
) -> None:
    path = str(tmp_path / "saved")
    ranks.run(4, save_in_between, path, keywords)
    assert max(ranks.run(2, resume_elsewhere, path, keywords)) < 1


def interrupted(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pauses, checkpoints taken and evaluations on the way change nothing; a new topology starts replicas anew."""
    results = []
    for disturb in (False, True):
        model = Quadratics()
        opt = fusedfog.SGD(model.parameters(), lr=0.3, bucket_mb=TINY, topology="ring", wire_dtype=form)
        for step in range(160):
            opt.zero_grad()
            model().backward()
            opt.step()
            if disturb and step % 7 == 0:
                with opt.paused():
                    pass
                with opt.averaged():
                    pass
                opt.drain()
                opt.state_dict()
            if disturb and step == 20:
                opt.set_topology("exponential")
            if disturb and step == 40:
                opt.set_topology("ring")
        results.append(model.vector())
    return results[0], results[1]


@pytest.mark.parametrize("form", ONE_QUICK)
def test_pauses_and_changes_of_topology_do_not_move_the_limit(ranks: Pool, form: str) -> None:
    for plain, disturbed in ranks.run(4, interrupted, form):
        torch.testing.assert_close(disturbed, plain, rtol=0, atol=1e-8)


def a_checkpoint_of_exact_messages() -> float:
    model = Quadratics()
    exact = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring")
    for _ in range(5):
        exact.zero_grad()
        model().backward()
        exact.step()
    saved = exact.state_dict()
    del exact
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", wire_dtype="int8", sync_init=False)
    opt.load_state_dict(saved)
    for _ in range(40):
        opt.zero_grad()
        model().backward()
        opt.step()
    return opt.consensus_distance()


def test_a_run_of_exact_messages_may_go_on_compressed(ranks: Pool) -> None:
    distances = ranks.run(4, a_checkpoint_of_exact_messages)
    assert max(distances) == pytest.approx(min(distances)) and distances[0] < 10


# -- bad input -------------------------------------------------------------------------------------------------------


def spoil(form: str) -> str:
    model, opt = build({"wire_dtype": form})
    train(model, opt, 0, 3)
    with opt.paused(), torch.no_grad():
        if dist.get_rank() == 2:
            model[2].weight[1, 3] = float("inf")
    answer = "finite"
    try:
        for _ in range(3):
            opt.zero_grad()
            opt.step()
    except (fusedfog.NonFiniteError, fusedfog.RankLeft) as error:
        answer = str(error)
    opt.leave()
    spread = dist.get_rank() != 2 and not all(p.isfinite().all() for p in model.parameters())
    return f"spread; {answer}" if spread else answer


@pytest.mark.parametrize("form", ["fp8", "int8", "bf16"])
def test_values_that_are_not_finite_are_named_and_not_spread(ranks: Pool, form: str) -> None:
    messages = [
        outcome.value if outcome.error_type is None else outcome.message for outcome in ranks.outcomes(4, spoil, form)
    ]
    assert "rank 2: values that are not finite in 2 (" in messages[2]
    assert all("spread" not in (message or "") for message in messages)


REFUSED = [
    ({"wire_dtype": "int4"}, "wire_dtype is 'bf16', 'fp8'"),
    ({"wire_dtype": torch.float16}, "wire_dtype is 'bf16', 'fp8'"),
    ({"wire_dtype": "int8", "algorithm": "push_sum"}, "conserved exactly"),
    ({"wire_dtype": "int8", "algorithm": "allreduce"}, "it sends gradients"),
    ({"wire_dtype": "int8", "topology": "random"}, "has none"),
    ({"low_precision": "master"}, "is for bf16 and fp16 parameters"),
    ({"low_precision": "posit"}, "low_precision is one of"),
    ({"state_dtype": torch.bfloat16, "algorithm": "gradient_tracking"}, "must be exact"),
    ({"state_dtype": torch.float16}, r"torch\.bfloat16"),
]


def refuse(keywords: dict[str, Any]) -> str:
    if keywords.get("topology") == "random":
        keywords = keywords | {"topology": fusedfog.topology.random_matching(dist.get_world_size(), seed=0)}
    model = nn.Linear(3, 3)
    try:
        fusedfog.SGD(model.parameters(), lr=0.1, **keywords)
    except ValueError as error:
        return str(error)
    return "accepted"


def refuse_all(cases: list[dict[str, Any]]) -> list[str]:
    return [refuse(keywords) for keywords in cases]


def test_what_cannot_be_is_refused_before_anything_is_sent(ranks: Pool) -> None:
    answers = ranks.run(3, refuse_all, [keywords for keywords, _ in REFUSED])[0]
    for answer, (_, expected) in zip(answers, REFUSED, strict=True):
        assert re.search(expected, answer), (answer, expected)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedfog.algorithms import algorithm_for
    from fusedfog.environment import missing_instructions
    from fusedfog.optim.compatibility import check
    from fusedfog.optim.features import Setup

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    place, row = torch.device("cuda", 0), algorithm_for("awc", "SGD")
    lacking = missing_instructions(place, {"messages": torch.float8_e4m3fn})
    with pytest.raises(ValueError, match=r"compute capability 8\.0 .* use wire_dtype='int8'"):
        check(Setup("SGD", row, place=place, lacking=lacking))
    assert missing_instructions(place, {"messages": torch.int8}) is None


# -- plain tensors ---------------------------------------------------------------------------------------------------


def gossip(form: str, dtype: torch.dtype, feedback: bool) -> tuple[float, float, bool]:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(77, dtype=dtype)
    mean = x.double()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    residual = torch.zeros_like(x) if feedback else None
    kept = x.clone()
    path = torch.zeros(77, dtype=torch.float64)
    for step in range(200):
        x = fusedfog.neighbor_allreduce(x, "ring", step, wire_dtype=form, residual=residual)
        path += x.double() / 200
    total = x.double()
    dist.all_reduce(total)
    same = fusedfog.neighbor_allreduce(torch.full((9,), 0.3), "ring", wire_dtype=form)
    assert torch.equal(kept, kept.clone())
    return (
        (total / dist.get_world_size() - mean).abs().max().item(),
        (path - mean).abs().max().item(),
        torch.equal(same, torch.full((9,), 0.3)),
    )


@pytest.mark.parametrize("form", ONE_QUICK)
def test_compressed_averages_of_tensors_keep_the_mean(ranks: Pool, form: str) -> None:
    for drift, apart, same in ranks.run(4, gossip, form, torch.float64, True):
        assert drift < 1e-12 and same
        assert apart < {"bf16": 2e-2, "int8": 2e-2, "fp8": 5e-2}[form]


def bad_tensor(case: str) -> str:
    x, named = torch.ones(5), {"wire_dtype": "int8"}
    if case == "inf" and dist.get_rank() == 1:
        x[3] = float("inf")
    if case == "format":
        named = {"wire_dtype": "int8" if dist.get_rank() else "fp8"}
    if case == "factors":
        named |= {"send_weights": dict.fromkeys(range(dist.get_world_size()), 0.5)}
        named["send_weights"].pop(dist.get_rank())
    try:
        fusedfog.neighbor_allreduce(x, "fully_connected", **named)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "expected"), [("inf", "not finite"), ("format", "sent as"), ("factors", "same for all receivers")]
)
def test_tensors_that_cannot_be_compressed_raise_on_every_rank(ranks: Pool, case: str, expected: str) -> None:
    assert all(expected in message for message in ranks.run(3, bad_tensor, case))
