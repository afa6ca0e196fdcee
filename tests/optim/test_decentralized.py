"""`Decentralized` around any torch optimizer: the fused optimizers' numbers, dense recursions, checkpoints, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import oracle, problems
from support.pool import Pool
from torch import Tensor, nn

import fusedfog

N = 4
TINY = 2e-4
GRAPHS: dict[str, Any] = {
    "ring": oracle.ring(N),
    "exponential": oracle.static_exponential(N),
    "one_peer_exponential": oracle.one_peer_exponential(N),
}
MUON = getattr(torch.optim, "Muon", None)


class Lion(torch.optim.Optimizer):
    """As users write optimizers (Chen et al. 2023): no hooks, no foreach, a closure it passes on."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(group["lr"] * m.lerp(p.grad, 1 - group["betas"][0]).sign())
                m.lerp_(p.grad, 1 - group["betas"][1])


class Regression(nn.Module):
    """||A W - B||^2 / 2, with A and B of the given rank; vectors too, unless `matrices`."""

    def __init__(self, rank: int, matrices: bool = False) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        a, b = rng.standard_normal((N, 8, 5)), rng.standard_normal((N, 8, 3))
        self.a, self.b = torch.from_numpy(a[rank]), torch.from_numpy(b[rank])
        self.weight = nn.Parameter(torch.from_numpy(rng.standard_normal((5, 3))))
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=not matrices)
        self.scale = nn.Parameter(torch.ones(8, 1, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.05 * (self.scale * (self.a @ self.weight + self.bias) - self.b).pow(2).sum()

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def vector(params: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in params]).numpy().copy()


def iterate(model: nn.Module, opt: Any, steps: int = 1) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model().backward()
        opt.step()


# -- numbers ----------------------------------------------------------------------------------------------------------

FUSED: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
]
CASES = list(product(range(len(FUSED)), ["awc", "atc"], GRAPHS, [1, 2]))


def fused_and_wrapped() -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of CASES: where the fused and the wrapped optimizer end."""
    ends = []
    for number, algorithm, topology, every in CASES:
        kind, options = FUSED[number]
        keywords = {"algorithm": algorithm, "topology": topology, "communicate_every": every, "bucket_mb": TINY}
        fused, wrapped = Regression(dist.get_rank()), Regression(dist.get_rank())
        one = getattr(fusedfog, kind)(fused.parameters(), lr=0.03, **options, **keywords)
        inner = getattr(torch.optim, kind)(wrapped.parameters(), lr=0.03, **options)
        other = fusedfog.Decentralized(inner, **keywords)
        iterate(fused, one, 10)
        iterate(wrapped, other, 10)
        assert one.stats()["exchanges"] == other.stats()["exchanges"] == 10 // every
        assert one.stats()["bytes_sent"] == other.stats()["bytes_sent"]
        ends.append((vector(fused.parameters()), vector(wrapped.parameters())))
    return ends


def test_torchs_sgd_and_adamw_inside_equal_the_fused_ones(ranks: Pool) -> None:
    results = ranks.run(N, fused_and_wrapped)
    for number, case in enumerate(CASES):
        for rank, ends in enumerate(results):
            np.testing.assert_allclose(*ends[number], rtol=1e-12, atol=1e-12, err_msg=f"rank {rank}, {case}")
    assert np.abs(results[0][0][0] - results[1][0][0]).max() > 1e-3


def dense(inner: Any, options: dict[str, Any], algorithm: str, mixing: Callable[[int], Any], steps: int) -> np.ndarray:
    """n copies of the bare optimizer, mixed by hand with the whole matrix: [n, d]."""
    models = [Regression(rank, inner is MUON) for rank in range(N)]
    opts = [inner(model.trained(), **options) for model in models]
    for step in range(steps):
        old = np.stack([vector(model.trained()) for model in models])
        for model, opt in zip(models, opts, strict=True):
            iterate(model, opt)
        new = np.stack([vector(model.trained()) for model in models])
        mixed = mixing(step) @ old + (new - old) if algorithm == "awc" else mixing(step) @ new
        for model, row in zip(models, mixed, strict=True):
            nn.utils.vector_to_parameters(torch.from_numpy(row), model.trained())
    return np.stack([vector(model.trained()) for model in models])


def train(inner: Any, options: dict[str, Any], steps: int, keywords: dict[str, Any]) -> np.ndarray:
    model = Regression(dist.get_rank(), inner is MUON)
    opt = fusedfog.Decentralized(inner(model.trained(), **options), bucket_mb=TINY, **keywords)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterate(model, opt, steps)
    assert opt.stats()["torn_messages"] == 0
    return vector(model.trained())


OTHERS: dict[str, tuple[Any, dict[str, Any], float]] = {
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}, 1e-11),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}, 1e-11),
    "Lion": (Lion, {}, 1e-11),
    # Newton-Schulz in bfloat16 turns a difference in the last bit of a gradient into one of 2^-8 of the update.
    "Muon": (MUON, {"lr": 0.02, "weight_decay": 0.1}, 2e-3),
}


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
@pytest.mark.parametrize("name", OTHERS)
def test_any_optimizer_equals_its_dense_recursion(ranks: Pool, name: str, algorithm: str) -> None:
    inner, options, tolerance = OTHERS[name]
    if inner is None:
        pytest.skip("this torch has no Muon")
    topology = list(GRAPHS)[(list(OTHERS).index(name) + (algorithm == "atc")) % 3]
    keywords: dict[str, Any] = {"algorithm": algorithm, "topology": topology}
    keywords |= {"communicate_every": 2, "global_average_every": 5} if name in ("RMSprop", "Muon") else {}
    mixing = oracle.rhythm(GRAPHS[topology], keywords.get("communicate_every", 1), keywords.get("global_average_every"))
    want = dense(inner, options, algorithm, mixing, 12)
    got = ranks.run(N, train, inner, options, 12, keywords)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    assert problems.consensus_distance(want) > 10 * tolerance


def mix_dtypes(algorithm: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters before and after a step with one gradient: zeros for the rest, so that only mixing moves them."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    params = [nn.Parameter(torch.full((3, 5), 1.0 + dist.get_rank(), dtype=dtype)) for dtype in dtypes]
    params.append(nn.Parameter(torch.full((70,), 1.0 + dist.get_rank())))
    own = nn.Parameter(torch.full((4,), float(dist.get_rank())))
    inner = torch.optim.SGD([{"params": params}, {"params": [own], "mix": False}], lr=0.5)
    opt = fusedfog.Decentralized(inner, topology="fully_connected", algorithm=algorithm, sync_init=False)
    for p in (*params[:-1], own):
        p.grad = torch.full_like(p, 1.0 + dist.get_rank())
    opt.step()
    return [p.detach() for p in params], [own.detach()]


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_dtypes_mix_each_in_its_own_and_a_parameter_without_gradient_is_only_mixed(ranks: Pool, algorithm: str) -> None:
    for rank, (params, own) in enumerate(ranks.run(N, mix_dtypes, algorithm)):
        updated = 2.5 - 0.5 * (1 + rank) if algorithm == "awc" else 2.5 - 0.5 * 2.5
        for p in params[:-1]:
            torch.testing.assert_close(p, torch.full_like(p, updated), rtol=1e-2, atol=0)
        torch.testing.assert_close(params[-1], torch.full_like(params[-1], 2.5))
        torch.testing.assert_close(own[0], torch.full_like(own[0], rank - 0.5 * (1 + rank)))


# -- loops ------------------------------------------------------------------------------------------------------------


def clip_and_scale(algorithm: str, fused: bool) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], float]:
    """The ends with clipping from outside and inside under a scaler, and a path on which rank 1 overflows in step 2."""
    keywords: dict[str, Any] = {"algorithm": algorithm, "topology": "fully_connected"}
    outside, inside, overflowing = (Regression(dist.get_rank()) for _ in range(3))
    plain = fusedfog.Decentralized(torch.optim.RMSprop(outside.parameters()), **keywords)
    for _ in range(5):
        plain.zero_grad()
        outside().backward()
        nn.utils.clip_grad_norm_(outside.parameters(), 0.1)
        plain.step()
    clipped = fusedfog.Decentralized(torch.optim.RMSprop(inside.parameters()), max_grad_norm=0.1, **keywords)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(5):
        clipped.zero_grad()
        scaler.scale(inside()).backward()
        scaler.step(clipped)
        scaler.update()
    opt = fusedfog.Decentralized(torch.optim.SGD(overflowing.parameters(), lr=0.1, fused=fused), **keywords)
    path = []
    for step in range(4):
        opt.zero_grad()
        scaler.scale(overflowing() * (float("inf") if step == 2 and dist.get_rank() == 1 else 1)).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        path.append(vector(overflowing.parameters()))
    assert opt.stats()["exchanges"] == 4
    return vector(outside.parameters()), vector(inside.parameters()), path, scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
def test_clipping_and_grad_scaling_and_an_overflow_that_skips_one_rank(ranks: Pool, fused: bool) -> None:
    """A fused inner optimizer skips by the device's flag; for others the host looks at it."""
    results = ranks.run(N, clip_and_scale, "awc", fused)
    for rank, (outside, inside, path, scale) in enumerate(results):
        np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-6)
        assert np.isfinite(path).all()
        assert scale == 2.0**10 / (2 if rank == 1 else 1)
    mean = np.mean([path[1] for _, _, path, _ in results], 0)
    np.testing.assert_allclose(results[1][2][2], mean, rtol=1e-12)
    assert np.abs(results[0][2][2] - mean).max() > 1e-4


def live(algorithm: str) -> tuple[float, float, list[float], list[bool], float]:
    """Schedules, pauses, averages, another topology and a later group, all in one run."""
    model, late = Regression(dist.get_rank()), nn.Parameter(torch.full((3,), float(dist.get_rank())))
    inner = torch.optim.Adam(model.parameters(), lr=0.08)
    opt = fusedfog.Decentralized(inner, algorithm=algorithm, topology="ring", model=model)
    one = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    calls: list[str] = []
    inner.register_step_post_hook(lambda *_: calls.append("inner"))
    opt.register_step_pre_hook(lambda *_: calls.append("outer"))
    assert opt.step(lambda: calls.append("closure") or 3.0) == 3.0
    assert calls == ["outer", "closure", "inner"]
    one.step()
    iterate(model, opt, 3)
    with opt.paused(), torch.no_grad():
        model.weight.mul_(0.9)
    iterate(model, opt, 3)
    before = vector(model.parameters())
    with opt.averaged():
        assert opt.consensus_distance() < 1e-12
        with pytest.raises(RuntimeError, match=r"step\(\) inside averaged"):
            opt.step()
    assert np.array_equal(before, vector(model.parameters()))
    opt.add_param_group({"params": [late], "lr": 0.0})
    opt.set_topology("fully_connected")
    opt.drain()
    iterate(model, opt, 3)
    groups = [group is shared for group, shared in zip(inner.param_groups, opt.param_groups, strict=True)]
    return inner.param_groups[0]["lr"], opt.stats()["torn_messages"], late.tolist(), groups, opt.consensus_distance()


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_the_rest_of_the_optimizer_works_as_it_does_on_the_fused_ones(ranks: Pool, algorithm: str) -> None:
    results = ranks.run(N, live, algorithm)
    for lr, torn, late, groups, distance in results:
        assert lr == 0.04
        assert torn == 0
        assert late == [0.0] * 3  # rank 0's, by sync_init
        assert groups == [True, True]
        assert distance == results[0][-1] < (0.5 if algorithm == "awc" else 1e-12)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def resume(inner: Any, keywords: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    def make() -> tuple[Regression, fusedfog.Decentralized]:
        model = Regression(dist.get_rank())
        return model, fusedfog.Decentralized(inner(model.parameters(), lr=0.01), bucket_mb=TINY, **keywords)

    model, opt = make()
    iterate(model, opt, 20)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    iterate(model, opt, 20)
    again, resumed = make()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    iterate(again, resumed, 20)
    return vector(model.parameters()), vector(again.parameters())


@pytest.mark.parametrize("inner", [torch.optim.RMSprop, torch.optim.Adafactor, Lion])
@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(ranks: Pool, algorithm: str, inner: Any) -> None:
    keywords = {"algorithm": algorithm, "topology": "one_peer_exponential", "communicate_every": 2}
    for one, other in ranks.run(N, resume, inner, keywords):
        assert np.array_equal(one, other)


def test_checkpoints_are_the_wrapped_optimizers_and_load_both_ways() -> None:
    models = [Regression(0) for _ in range(3)]
    inner = [torch.optim.Adamax(model.parameters(), lr=0.02) for model in models]
    bare, opt, direct = inner[0], fusedfog.Decentralized(inner[1]), fusedfog.Decentralized(inner[2])
    iterate(models[0], bare, 5)
    opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    inner[2].load_state_dict(copy.deepcopy(bare.state_dict()))
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, one in zip(models, (bare, opt, direct), strict=True):
        iterate(model, one, 5)
        np.testing.assert_allclose(vector(model.parameters()), vector(models[0].parameters()), rtol=1e-13)
    saved = opt.state_dict()
    assert saved["fusedfog"]["steps"] == 5
    assert opt.param_groups is inner[1].param_groups
    assert direct.param_groups is inner[2].param_groups
    bare.load_state_dict(saved)
    torch.testing.assert_close(bare.state_dict()["state"], saved["state"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="algorithm 'atc'"):
        opt.load_state_dict(saved | {"fusedfog": {"algorithm": "atc"}})


def test_one_rank_is_the_wrapped_optimizer_and_may_be_copied() -> None:
    model = Regression(0)
    opt = fusedfog.Decentralized(torch.optim.Adam(model.parameters(), lr=0.05))
    iterate(model, opt, 3)
    other, copied = copy.deepcopy((model, opt))
    third, unpickled = pickle.loads(pickle.dumps((model, opt)))
    alone = Regression(0)
    iterate(alone, torch.optim.Adam(alone.parameters(), lr=0.05), 6)
    for one, its in ((model, opt), (other, copied), (third, unpickled)):
        iterate(one, its, 3)
        assert its.param_groups is its.inner.param_groups
        np.testing.assert_allclose(vector(one.parameters()), vector(alone.parameters()), rtol=1e-13)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"algorithm": "decentlam"}, r"'awc', 'atc', 'allreduce' or 'local', not 'decentlam'.*fusedfog\.SGD"),
        ({"fused_backward": True}, "fused_backward.*all parameters at once"),
        ({"outer": fusedfog.Outer()}, "outer"),
        ({"cpu_compile": True}, "cpu_compile"),
        ({"measure": True}, "measure"),
        ({"communicate_every": 0}, "communicate_every must be"),
    ],
)
def test_what_needs_fusedfogs_own_update_is_refused(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fusedfog.Decentralized(torch.optim.SGD(nn.Linear(2, 2).parameters()), **keywords)


def test_only_optimizers_that_step_from_gradients_are_wrapped() -> None:
    params = list(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"LBFGS.step\(\) needs a closure"):
        fusedfog.Decentralized(torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match=r"fusedfog.SGD is decentralized already"):
        fusedfog.Decentralized(fusedfog.SGD(params, algorithm="local"))
    with pytest.raises(TypeError, match="got list"):
        fusedfog.Decentralized(params)  # type: ignore[arg-type]


def differ() -> None:
    kind = torch.optim.Adam if dist.get_rank() == 1 else torch.optim.AdamW
    fusedfog.Decentralized(kind(nn.Linear(2, 2).parameters(), weight_decay=0.0))


def test_ranks_that_wrap_different_optimizers_are_told(ranks: Pool) -> None:
    for outcome in ranks.outcomes(2, differ):
        assert outcome.error_type == "MismatchError"
        assert "Decentralized(Adam) on rank 1 but Decentralized(AdamW) on rank 0" in outcome.message
