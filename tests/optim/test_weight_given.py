"""A weight as it is given: what is none, what does not go with one, checkpoints that hold it, switches that change it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.batches import BATCHES, batch, build, net, steps_of, values
from support.pool import Pool
from torch import Tensor, nn

import fusedfog
from fusedfog.simulate import Quadratics, simulate


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (0, ValueError, "positive and finite, got 0"),
        (-2.0, ValueError, "positive and finite"),
        (float("nan"), ValueError, "positive and finite"),
        (float("inf"), ValueError, "positive and finite"),
        (True, TypeError, "weight is a number"),
        (torch.tensor(True), TypeError, "weight is a number"),
        ("8", TypeError, "weight is a number.*got '8'"),
        ([1.0], TypeError, "weight is a number"),
        (1j, TypeError, "weight is a number"),
        (torch.ones(2), ValueError, r"tensor of shape \(2,\)"),
        (torch.zeros(1), ValueError, "positive and finite"),
    ],
)
def test_what_is_no_weight_is_refused_before_anything_is_sent(weight: Any, error: type[Exception], text: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    home = p.data_ptr()
    with pytest.raises(error, match=text):
        fusedfog.SGD([p], lr=0.1, weight=weight)
    assert p.data_ptr() == home
    with pytest.raises(error, match=text):
        simulate(Quadratics.random(2, 3), 2, steps=1, lr=0.1, weights=[1.0, weight])


@pytest.mark.parametrize("weight", [2, 0.5, np.float32(3), np.int64(4), torch.tensor([2.5])])
def test_one_rank_has_the_whole_weight(weight: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = fusedfog.SGD([p], lr=0.1, weight=weight)
    p.grad = torch.ones(3)
    opt.step()
    assert torch.equal(p.detach(), torch.full((3,), 0.9))
    assert "share" not in opt.stats()


def refused_by_agreement(weights: list[Any]) -> tuple[str, str]:
    p = nn.Parameter(torch.zeros(3))
    home = p.data_ptr()
    try:
        fusedfog.SGD([p], lr=0.1, weight=weights[dist.get_rank()])
    except ValueError as error:
        assert p.data_ptr() == home
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("weights", "kind", "text"),
    [
        ([1.0, None], "MismatchError", "weight is none on rank 1 but given on rank 0"),
        ([1.0, 1e-30], "ValueError", "weight=1e-30 on rank 1 is nothing beside weight=1.0 on rank 0"),
    ],
)
def test_ranks_whose_weights_do_not_go_together_are_told(ranks: Pool, weights: list[Any], kind: str, text: str) -> None:
    for name, said in ranks.run(2, refused_by_agreement, weights):
        assert name == kind
        assert text in said


def test_what_has_nothing_to_weigh_refuses(ranks: Pool) -> None:
    with pytest.raises(ValueError, match=r"'local' does not work with weight=2.0: it exchanges nothing"):
        fusedfog.SGD([nn.Parameter(torch.zeros(3))], lr=0.1, algorithm="local", weight=2)
    with pytest.raises(ValueError, match="'local' does not work with weight"):
        simulate(Quadratics.random(2, 3), 2, algorithm="local", steps=1, lr=0.1, weights=[1, 2])
    for weights in ([1, 2, 3], [1, None], [None, 1], []):
        with pytest.raises(ValueError, match="one number for each of 2 ranks, got"):
            simulate(Quadratics.random(2, 3), 2, steps=1, lr=0.1, weights=weights)

    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None: ...

    with pytest.raises(ValueError, match="multiplies lr, and there is none"):
        fusedfog.Decentralized(WithoutRate([nn.Parameter(torch.zeros(3))]), weight=2)


def resumed(changed: bool) -> tuple[bool, list[str], float]:
    """Whether a resumed run is the uninterrupted one, what was said on loading, and the share after it."""
    rank, keywords = dist.get_rank(), {"algorithm": "gradient_tracking", "topology": "ring"}
    one, other = net(), net()
    opt = build("AdamW", one.parameters(), weight=BATCHES[rank], **keywords)
    steps_of(one, opt, range(3), [rank])
    saved, weights = (
        torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, opt.state_dict()),
        values(one),
    )
    steps_of(one, opt, range(3, 6), [rank])
    again = build("AdamW", other.parameters(), weight=BATCHES[rank] + changed * rank, **keywords)
    with again.paused(), torch.no_grad():
        for p, value in zip(other.parameters(), weights, strict=True):
            p.copy_(value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fusedfog.ForeignCheckpointWarning)
        again.load_state_dict(saved)
    steps_of(other, again, range(3, 6), [rank])
    said = [str(one.message) for one in caught if one.category is fusedfog.ForeignCheckpointWarning]
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True)), said, again.stats()["share"]


def test_a_checkpoint_holds_the_weights_and_says_so_if_they_are_others(ranks: Pool) -> None:
    for rank, (equal, said, share) in enumerate(ranks.run(4, resumed, False)):
        assert equal
        assert said == []
        assert share == pytest.approx(BATCHES[rank] / 16)
    for rank, (equal, said, _) in enumerate(ranks.run(4, resumed, True)):
        assert not equal
        assert len(said) == 1
        assert (
            f"rank {rank}: AdamW: this checkpoint was saved by ranks whose shares were 0.1875, 0.0625, 0.5, 0.25"
            in said[0]
        )
        assert "0.1364, 0.09091, 0.4545, 0.3182" in said[0]


def switched() -> tuple[list[float], list[Tensor]]:
    model, rank = net(), dist.get_rank()
    opt = build("SGD", model.parameters(), algorithm="atc", topology="fully_connected", weight=1.0)
    steps_of(model, opt, range(3), [rank])
    before = opt.stats().get("share", 0.25)
    opt.switch(**({"weight": BATCHES[rank]} if BATCHES[rank] != 1 else {}))  # Rank 1 keeps its own.
    steps_of(model, opt, range(3, 6), [rank])
    opt.drain()
    return [before, opt.stats()["share"]], values(model)


def test_a_switch_changes_weights_in_mid_run(ranks: Pool) -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        opt.zero_grad()
        losses = [model(batch(step, rank)).square().mean() for rank in range(4)]
        shares = [0.25] * 4 if step < 3 else [size / 16 for size in BATCHES]
        sum(share * loss for share, loss in zip(shares, losses, strict=True)).backward()
        opt.step()
    for rank, (shares, found) in enumerate(ranks.run(4, switched)):
        assert shares == pytest.approx([0.25, BATCHES[rank] / 16])
        torch.testing.assert_close(found, values(model), rtol=1e-10, atol=1e-12)
