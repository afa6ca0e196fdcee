"""Compressed messages whose replicas begin with a round's first exchange, as where members come and go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor

import fusedfog
from fusedfog.topology.admission import Admission

SIZES = (130, 7)
SLOW = pytest.mark.slow


def build(form: str | None, keywords: dict[str, Any]) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    params = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in SIZES]
    opt = fusedfog.SGD(params, **{"lr": 0.2, "topology": "ring", "sync_init": False, **keywords}, wire_dtype=form)
    opt._engine.exchanges.survive(_raise)
    return params, opt


def _raise(error: Exception) -> None:
    raise error


def steps(params: list[torch.nn.Parameter], opt: Any, count: int) -> Tensor:
    """Of the losses (1 + r/4) ||x - r||^2 / 2."""
    rank = dist.get_rank()
    for _ in range(count):
        for param in params:
            param.grad = (1 + rank / 4) * (param.detach() - rank)
        opt.step()
    return torch.cat([param.detach() for param in params])


def beginning(form: str, count: int, keywords: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """A step of each round, compressed and not; one more, compressed; and bytes of each step."""
    plain = steps(*build(None, keywords), count)
    params, opt = build(form, keywords)
    sent = [opt.stats()["bytes_sent"]]
    values = []
    for _ in range(count + 2):
        values.append(steps(params, opt, 1))
        sent.append(opt.stats()["bytes_sent"])
    return plain, values[count - 1], values[count], np.diff(sent).tolist()


CASES = [
    pytest.param(1, {}),
    pytest.param(2, {"topology": "one_peer_exponential", "momentum": 0.5}, marks=SLOW),
    pytest.param(1, {"algorithm": "atc"}, marks=SLOW),
    pytest.param(1, {"algorithm": "gradient_tracking", "bucket_mb": 1e-5}, marks=SLOW),
    pytest.param(1, {"algorithm": "exact_diffusion"}, marks=SLOW),
]


@pytest.mark.parametrize("form", ["int8", *(pytest.param(form, marks=SLOW) for form in ("bf16", "fp8"))])
@pytest.mark.parametrize(("rounds", "keywords"), CASES)
def test_the_first_exchange_of_each_round_is_exact_and_later_ones_are_small(
    ranks: Pool, form: str, rounds: int, keywords: dict[str, Any]
) -> None:
    for plain, first, _, sent in ranks.run(4, beginning, form, rounds, keywords):
        torch.testing.assert_close(first, plain, rtol=0, atol=1e-13)
        assert sent[-1] < 0.3 * max(sent), "codes follow"


def limit(form: str | None, keywords: dict[str, Any], count: int) -> tuple[Tensor, list[Tensor]]:
    params, opt = build(form, keywords)
    x = steps(params, opt, count)
    opt.drain()
    engine = opt._engine
    shown = [name for state in opt.state.values() for name in state if "replica" in name]
    assert not shown and not any("replica" in name for state in opt.state_dict()["state"].values() for name in state)
    return x, [value for segment in engine.segments for name, value in segment.states.items() if "replica" in name]


@pytest.mark.parametrize("form", ["int8", *(pytest.param(form, marks=SLOW) for form in ("bf16", "fp8"))])
@pytest.mark.parametrize(("rounds", "keywords"), CASES)
def test_the_limit_is_that_of_exact_messages(ranks: Pool, form: str, rounds: int, keywords: dict[str, Any]) -> None:
    keywords, count = ({**keywords, "lr": 0.1}, 400) if keywords else (keywords, 150)
    plain, ours = (ranks.run(4, limit, each, keywords, count) for each in (None, form))
    for (exact, none), (found, replicas) in zip(plain, ours, strict=True):
        assert not none and replicas
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


def disturbed(form: str | None, keywords: dict[str, Any]) -> Tensor:
    """Pauses behind each of the first steps, in which parameters are edited; a topology that is set; a state that is loaded."""
    params, opt = build(form, keywords)
    for _ in range(4):
        steps(params, opt, 1)
        with opt.paused(), torch.no_grad():
            params[0].add_(0.01)
    opt.set_topology("fully_connected")
    steps(params, opt, 3)
    opt.set_topology("ring")
    steps(params, opt, 3)
    opt.load_state_dict(opt.state_dict())
    return steps(params, opt, 150)


@pytest.mark.parametrize("keywords", [{}, pytest.param({"algorithm": "atc"}, marks=SLOW)])
def test_pauses_edits_and_states_that_are_loaded_do_not_move_the_limit(ranks: Pool, keywords: dict[str, Any]) -> None:
    plain, ours = (ranks.run(4, disturbed, form, keywords) for form in (None, "int8"))
    for exact, found in zip(plain, ours, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)


def admitted(form: str | None, keywords: dict[str, Any], count: int) -> Tensor:
    """Rank 2 is fresh: in exchange 0 it takes the mean of what ranks 1 and 3 have."""
    params, opt = build(form, keywords)
    opt._engine.exchanges.admit([2], 0)
    return steps(params, opt, count)


@pytest.mark.parametrize("keywords", [{}, pytest.param({"algorithm": "atc"}, marks=SLOW)])
def test_a_newcomer_is_admitted_exactly_and_its_weights_are_forgotten(ranks: Pool, keywords: dict[str, Any]) -> None:
    for count, tolerance in ((1, 1e-13), (2, 1e-13), (150, 1e-8)):
        plain, ours = (ranks.run(4, admitted, form, keywords, count) for form in (None, "int8"))
        for exact, found in zip(plain, ours, strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


def spoilt() -> str:
    params, opt = build("int8", {})
    if dist.get_rank() == 1:
        with torch.no_grad():
            params[0][3] = float("inf")
    try:
        steps(params, opt, 1)
    except fusedfog.NonFiniteError as error:
        return str(error)
    except fusedfog.ExchangeError:
        return "missed it"
    return "went on"


def test_a_value_that_is_not_finite_is_not_sent(ranks: Pool) -> None:
    """The rank that has it says so, before any neighbour gets it."""
    own = ranks.run(4, spoilt)[1]
    assert "rank 1: values that are not finite" in own


def test_an_admission_is_a_topology_without_period() -> None:
    """So that its exchange has replicas of its own; see `CompressedChannels.use_topology`."""
    assert Admission(fusedfog.topology.ring(4), [2], 0).period is None
