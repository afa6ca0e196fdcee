"""The CPU path, in batches or compiled, equals the plain reference; its cuts cover every element once."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_rules import ROWS
from support.passes import make_pass
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.comm.group import GroupView
from fusedfog.engine import compile as compilation
from fusedfog.kernels import Gradients, Region, compile_now, cpu_pass, cuts, run_pass, torch_pass

SHORT = [name for name, row in ROWS.items() if row.rule in ("mix", "sgd", "adam")]
SIZES = (1, 64, 700, 5, 129)


class Case:
    """Flat tensors with NaN in their padding, some gradients missing, and one pass over them."""

    def __init__(self, name: str, neighbours: int, dtype: torch.dtype = torch.float32, **options) -> None:
        self.row = ROWS[name]
        starts = [0]
        for size in SIZES:
            starts.append(starts[-1] + -(-size // 64) * 64)
        self.spans = tuple(zip(starts, SIZES, strict=False))
        self.valid = torch.zeros(starts[-1], dtype=torch.bool)
        for start, size in self.spans:
            self.valid[start : start + size] = True
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.param, *inbox = (self.random(seed).to(dtype) for seed in range(1 + neighbours))
        self.states = tuple(self.random(20 + s).abs().to(wide) for s in range(self.row.states))
        drawn = torch.Generator().manual_seed(30)
        # Some are small beside the states: what should be forgotten must not drown them.
        sizes = [(size, 1e-3 if size == 700 else 1.0) for size in SIZES]
        tensors = [scale * torch.randn(n, generator=drawn, dtype=dtype) if n != 64 else None for n, scale in sizes]
        self.arguments = {
            "grads": Gradients(tensors, None, dtype),
            "steps": torch.tensor([0.0, 3.0, 0.0, 7.0, 1.0]),
            "inbox": (tuple(inbox),) if neighbours else (),
            "weights": tuple(0.6 / neighbours for _ in range(neighbours)),
            **options,
        }

    def random(self, seed: int) -> torch.Tensor:
        values = torch.randn(self.valid.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(self.valid, values, math.nan)

    def run(self, region: Region) -> list[torch.Tensor]:
        param, states = self.param.clone(), tuple(state.clone() for state in self.states)
        run_pass(make_pass(self.row.rule, param, states, self.row.hyper, region, **self.arguments))
        return [param, *states]

    def expected(self) -> list[torch.Tensor]:
        param, states = self.param.clone(), tuple(state.clone() for state in self.states)
        region = Region(0, self.spans, None)
        torch_pass.run_pass(make_pass(self.row.rule, param, states, self.row.hyper, region, **self.arguments))
        return [param, *states]

    def check(self, region: Region) -> None:
        for ours, theirs in zip(self.run(region), self.expected(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)
            assert ours[~self.valid].isnan().all()

    def region(self, compiled: bool = False) -> Region:
        return Region(0, self.spans, None, compiled)


OPTIONS = {
    "plain": {},
    "scaled": {"grad_scale": torch.tensor(0.25)},
    "overflow": {"grad_scale": torch.tensor(math.nan), "found_inf": torch.ones(())},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("neighbours", [0, 1, 2, 5])
@pytest.mark.parametrize("name", SHORT)
def test_batches_equal_the_reference(monkeypatch, name, neighbours, options):
    monkeypatch.setattr(cpu_pass, "WIDTH", 256)
    case = Case(name, neighbours, **OPTIONS[options])
    case.check(case.region())


@pytest.mark.parametrize("name", SHORT)
def test_the_short_forms_are_what_runs(monkeypatch, name):
    monkeypatch.setattr(torch_pass, "run_pass", lambda *arguments: pytest.fail("the reference was called"))
    case = Case(name, 1)
    case.run(case.region())


@pytest.mark.parametrize("name", SHORT)
def test_double_precision_has_the_references_bits(name):
    case = Case(name, 2, torch.float64)
    for ours, theirs in zip(case.run(case.region()), case.expected(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weights", [(0.5,), (0.25, 0.25), (1 / 3, 1 / 3), (0.1, 0.7, 0.15)])
def test_a_consensus_stays_to_the_last_bit(weights):
    case = Case("sgd", len(weights))
    x, nothing = case.param.clone(), (0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    grads = case.arguments["grads"]
    options = {"inbox": ((x.clone(),) * len(weights),), "weights": weights, "grads": grads}
    run_pass(make_pass("sgd", x, (), nothing, case.region(), steps=torch.zeros(5), **options))
    assert torch.equal(x[case.valid], case.param[case.valid])


def test_a_neighbour_of_weight_zero_is_not_looked_at():
    case = Case("adamw", 2)
    case.arguments["inbox"][0][0].fill_(math.nan)
    case.arguments["weights"] = (0.0, 0.5)
    case.check(case.region())


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.0, 1.0), st.floats(0.5, 1.0))
def test_lerps_one_after_the_other_have_the_weights_asked_for(weights, own, left):
    total = sum(weights) + own
    weights = [weight / total for weight in weights]
    shares = cpu_pass._shares(weights, left)
    if shares is None:
        return
    x, received, exact = 0.3, [1.7 * k - 1 for k in range(len(weights))], 0.3 * left
    for weight, value in zip(weights, received, strict=True):
        exact += weight * (value - 0.3)
    for share, value in zip(shares, received, strict=True):
        x += share * (value - x)
    assert left * x == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("own", [0.0, 1e-5])
def test_a_rank_that_keeps_nothing_of_its_own_is_left_to_the_reference(own):
    case = Case("adamw", 2)
    case.arguments["weights"] = (0.0, 1.0 - own)
    case.check(case.region())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 60), st.data())
def test_a_cut_covers_its_parameters_once(sizes, width, data):
    spans, start = [], 128
    for size in sizes:
        spans.append((start, size))
        start += -(-size // 64) * 64
    positions = [p for p in range(len(sizes)) if data.draw(st.booleans())]
    found = cuts.cut(spans, positions, width)
    flat = torch.zeros(start)
    for view in found.views(flat):
        assert 0 < len(view) <= width
        view += 1
    expected = torch.zeros(start)
    for p in positions:
        expected[spans[p][0] : spans[p][0] + spans[p][1]] = 1
    assert torch.equal(flat, expected)
    assert [i for batch in found.batches for i in batch] == list(range(len(found.pieces)))
    assert all(sum(found.sizes[found.pieces[i][0]] for i in batch) <= width for batch in found.batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("neighbours", [0, 1, 3])
@pytest.mark.parametrize("name", SHORT)
def test_compiled_passes_equal_the_reference(monkeypatch, name, neighbours, dtype):
    monkeypatch.setattr(cpu_pass.compiled, "SMALLEST", 5)
    for options in OPTIONS.values():
        case = Case(name, neighbours, dtype, **options)
        for ours, theirs in zip(case.run(case.region(True)), case.expected(), strict=True):
            tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(ours.dtype, 2e-6)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
            assert ours[~case.valid].isnan().all()


@pytest.mark.parametrize("name", SHORT)
def test_the_compiled_loop_is_what_runs(monkeypatch, name):
    monkeypatch.setattr(torch_pass, "run_pass", lambda *arguments: pytest.fail("the reference was called"))
    monkeypatch.setattr(cpu_pass, "_run_batches", lambda job, cut: cut.pieces and pytest.fail("batches were made"))
    monkeypatch.setattr(cpu_pass.compiled, "SMALLEST", 1)
    case = Case(name, 3)
    case.run(case.region(True))


def test_threads_share_a_compiled_loop_and_change_no_bit(monkeypatch):
    monkeypatch.setattr(cpu_pass.compiled, "SMALLEST", 1)
    monkeypatch.setattr(sys.modules[__name__], "SIZES", (1, 255, 5_000, 256, 70_001))
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        case = Case("adamw", 2)
        case.arguments["grads"] = Gradients([torch.ones(size) for size in SIZES], None, torch.float32)
        results.append(case.run(case.region(True)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_without_a_compiler_there_is_a_warning_and_the_default_path(monkeypatch):
    def refuse():
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(compilation, "compile_now", refuse)
    with pytest.warns(RuntimeWarning, match=r"no way to compile \(RuntimeError: no C\+\+ compiler\)"):
        assert not compilation.compile_everywhere(GroupView(0, 1, None), None, "AdamW")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(compilation, "compile_now", lambda: None)
        assert compilation.compile_everywhere(GroupView(0, 1, None), None, "AdamW")


def train_compiled(algorithm: str, cpu_compile: bool) -> list[float]:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))
    opt = fusedfog.AdamW(model.parameters(), lr=1e-3, algorithm=algorithm, topology="ring", cpu_compile=cpu_compile)
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(8, 200)).square().sum().backward()
        opt.step()
    opt.drain()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["awc", "atc", "allreduce"])
def test_ranks_train_the_same_with_compiled_passes(ranks: Pool, algorithm: str) -> None:
    compiled, plain = (ranks.run(4, train_compiled, algorithm, choice) for choice in (True, False))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=1e-5, atol=1e-6)


def refused(rank_without_compiler: int) -> None:
    if dist.get_rank() == rank_without_compiler:
        compilation.compile_now = lambda: (_ for _ in ()).throw(RuntimeError("no C++ compiler"))
    else:
        compilation.compile_now = lambda: None
    try:
        fusedfog.SGD([nn.Parameter(torch.ones(5))], lr=0.1, cpu_compile=True)
    finally:
        compilation.compile_now = compile_now


@pytest.mark.slow
def test_one_rank_without_a_compiler_is_named(ranks: Pool) -> None:
    for outcome in ranks.outcomes(4, refused, 2):
        assert outcome.error_type == "MismatchError"
        assert "compiled passes is RuntimeError: no C++ compiler on rank 2 but yes on rank 0" in outcome.message


def test_algorithms_whose_passes_cannot_be_compiled_say_so():
    with pytest.raises(ValueError, match="cpu_compile=True compiles the passes of SGD and Adam"):
        fusedfog.AccumAdamW([nn.Parameter(torch.ones(5))], cpu_compile=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("neighbours", [0, 1, 3])
@pytest.mark.parametrize("name", ["sgd-momentum-all", "adamw", "mix"])
def test_figures_are_sums_over_what_is_mixed_and_the_gradients(monkeypatch, name, neighbours, options):
    monkeypatch.setattr(cpu_pass, "WIDTH", 256)
    case, norm_sums = Case(name, neighbours, **OPTIONS[options]), torch.full((5, 2), math.nan, dtype=torch.float64)
    case.arguments["norm_sums"] = norm_sums
    case.run(case.region())
    scale = case.arguments.get("grad_scale", torch.ones(())).item()
    for p, (start, size) in enumerate(case.spans):
        here = slice(start, start + size)
        received = case.arguments["inbox"][0] if neighbours else ()
        apart = sum((0.6 / neighbours * (r[here] - case.param[here]).double() for r in received), torch.zeros(size))
        assert norm_sums[p, 0].item() == pytest.approx(apart.square().sum().item(), rel=1e-5)
        gradient = case.arguments["grads"].tensors[p]
        if name != "mix":  # which looks at no gradients
            counts = gradient is not None and options != "overflow"
            expected = (gradient.double() * scale).square().sum().item() if counts else 0.0
            assert norm_sums[p, 1].item() == pytest.approx(expected, rel=1e-5)
