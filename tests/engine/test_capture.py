"""capturable=True: the same steps to the last bit, and passes that can be recorded once and replayed with other numbers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gpu_cases import all_cases
from support.gpu_checks import CHECKS, IRREGULAR, among_echoes
from support.pool import Pool
from support.recorded import StandInGraph
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import topology
from fusedfog.engine import scheduler
from fusedfog.engine.clock import StepSchedule
from fusedfog.gossip.neighbors import most_neighbours
from fusedfog.topology import Topology

triton = pytest.importorskip("triton")

from support import codegen  # noqa: E402

from fusedfog.kernels import fused_pass  # noqa: E402

_fresh_cache, compiler = codegen._fresh_cache, codegen.compiler  # pytest finds fixtures by these names
compiled_only = codegen.compiled_only
STEPS, WARM = 12, 2
TINY = 0.0004


def graphs(name: str, n: int) -> Topology | str:
    """Sequences whose rounds have different numbers of neighbours, or none, by names that travel to the ranks."""
    if name == "star, then pairs":
        return topology.star(n).then(topology.base_graph(n))
    if name == "no edges":
        return topology.from_rounds(n, lambda step: {}, 1)
    return name


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)


def everything(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    """Parameters and states by name."""
    found = dict(model.named_parameters())
    for number, state in opt.state_dict()["state"].items():
        found |= {f"{name} of {number}": torch.as_tensor(value).clone() for name, value in state.items()}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(how: str, kind: str, keywords: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """All there is after each step; `how` is "plain", "capturable" or "replayed", with an eager step now and then."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    if "topology" in keywords:
        keywords = keywords | {"topology": graphs(keywords["topology"], n)}
    if "mesh" in keywords:
        keywords = keywords | {"mesh": init_device_mesh("cpu", keywords["mesh"])}
    scaled, resumes = keywords.get("scaled"), keywords.get("resumes")
    keywords = {name: value for name, value in keywords.items() if name not in ("scaled", "resumes")}
    model = net(dtype)
    model.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=dtype)))  # never has a gradient
    own = nn.Parameter(torch.ones(70, dtype=dtype))
    groups = [{"params": list(model.parameters())}, {"params": [own], "mix": False}]
    model.register_parameter("own", own)
    if "wire_dtype" in keywords:
        groups = [{"params": model.parameters()}]
    opt = getattr(fusedfog, kind)(groups, lr=0.1, bucket_mb=TINY, capturable=how != "plain", **keywords)
    if how != "plain" and opt._engine.exchanges.mailbox is not None and "wire_dtype" not in keywords:
        for segment in opt._engine.segments:
            for tensor in sum(opt._engine.exchanges.mailbox.inboxes.inbox(segment, opt._engine.slots).tensors, ()):
                tensor.fill_(math.nan)  # What no neighbour has filled must not be read.
    graph, path, saved = StandInGraph(), [], None
    scale, overflow = torch.tensor(4.0), torch.zeros(())
    if scaled:
        opt.grad_scale, opt.found_inf = scale, overflow  # as a GradScaler does while a step lasts
    for param in model.parameters():
        param.grad = None if param is model.idle else torch.zeros_like(param)
    for t in range(STEPS):
        for group in opt.param_groups:
            group["lr"] = 0.0 if t == 5 else 0.05 * math.cos(t / 9)
        opt.zero_grad(set_to_none=False)
        generator = torch.Generator().manual_seed(100 * t + (dist.get_rank() if n > 1 else 0))
        x = torch.randn(4, 5, generator=generator).to(dtype)
        loss = model(x).pow(2).mean() + (own * x.mean()).pow(2).mean()
        (loss * scale if scaled else loss).backward()
        overflow.fill_(float(t == 6))
        if how == "replayed" and t == WARM:
            graph.capture(opt.step)
        if how == "replayed" and t >= WARM and t != 8:
            with opt.replaying():
                graph.replay()
        else:
            opt.step()
        path.append({name: param.detach().clone() for name, param in model.named_parameters()})
        if resumes and t == 3:
            saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        if saved is not None and t == 6:
            with opt.paused():
                model.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
    path.append(everything(model, opt))
    stats = opt.stats()
    path.append(
        {name: torch.tensor(stats[name]) for name in stats if name != "blocked_s" and not name.startswith("topology")}
    )
    return path


def compare(kind: str, keywords: dict[str, Any], dtype: torch.dtype) -> tuple[list[bool], list[bool], bool]:
    """Per step, whether capturable and replayed training equal plain training; whether that went anywhere."""
    plain, capturable, replayed = (train(how, kind, keywords, dtype) for how in ("plain", "capturable", "replayed"))
    finite = all(value.double().isfinite().all() for found in plain for value in found.values())
    moves = finite and not torch.equal(plain[0]["0.weight"], plain[-2]["0.weight"])
    return (
        [same(a, b) for a, b in zip(plain, capturable, strict=True)],
        [same(a, b) for a, b in zip(plain, replayed, strict=True)],
        moves,
    )


def by_step(step: int) -> float:
    return 0.0 if step == 4 else 1 / (1 + step)


def by_rate(step: int, rate: float) -> float:
    return rate**4


SGD_M = {"momentum": 0.9}
CASES: dict[str, tuple[int, str, dict[str, Any], torch.dtype]] = {
    "sgd-one-peer": (4, "SGD", SGD_M | {"topology": "one_peer_exponential"}, torch.float32),
    "sgd-float64-irregular": (
        5,
        "SGD",
        SGD_M | {"topology": "star, then pairs", "nesterov": True, "weight_decay": 0.1},
        torch.float64,
    ),
    "adam-base-graph": (3, "Adam", {"topology": "base_graph", "weight_decay": 0.1}, torch.float32),
    "adamw-amsgrad-irregular": (3, "AdamW", {"topology": "star, then pairs", "amsgrad": True}, torch.float32),
    "gradient-tracking": (3, "SGD", {"algorithm": "gradient_tracking", "topology": "base_graph"}, torch.float32),
    "momentum-tracking": (
        3,
        "SGD",
        SGD_M | {"algorithm": "momentum_tracking", "topology": "star, then pairs", "communicate_every": 3},
        torch.float64,
    ),
    "adam-tracking": (4, "Adam", {"algorithm": "gradient_tracking", "amsgrad": True}, torch.float32),
    "extra": (3, "SGD", SGD_M | {"algorithm": "extra", "topology": "ring"}, torch.float32),
    "accum-adamw": (4, "AccumAdamW", {"accum_steps": 3}, torch.float32),
    "communicate-every-2": (4, "AdamW", {"communicate_every": 2}, torch.float32),
    "global-average-every-3": (4, "AdamW", {"global_average_every": 3, "max_grad_norm": 0.5}, torch.float32),
    "averages-alone": (3, "SGD", {"topology": "no edges", "global_average_every": 2}, torch.float32),
    "resuming": (3, "AdamW", {"topology": "base_graph", "resumes": True, "communicate_every": 2}, torch.float32),
    "stochastic": (3, "AdamW", {"low_precision": "stochastic", "state_dtype": torch.bfloat16}, torch.bfloat16),
    "master": (2, "SGD", SGD_M | {"low_precision": "master", "measure": True}, torch.bfloat16),
    "int8-messages": (3, "AdamW", {"wire_dtype": "int8", "topology": "ring", "resumes": True}, torch.float32),
    "machines": (4, "AdamW", {"mesh": (2, 2), "inside": "parameters"}, torch.float32),
    "weaker-by-rate": (3, "AdamW", {"topology": "base_graph", "mix_strength": by_rate, "resumes": True}, torch.float32),
    "weaker-int8-messages": (
        3,
        "SGD",
        SGD_M | {"wire_dtype": "int8", "topology": "ring", "mix_strength": by_step},
        torch.float32,
    ),
    "grad-scaler": (2, "AdamW", {"scaled": True}, torch.float32),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_capturable_and_replayed_steps_equal_plain_ones_bit_for_bit(ranks: Pool, name: str) -> None:
    n, kind, keywords, dtype = CASES[name]
    for rank, (capturable, replayed, moves) in enumerate(ranks.run(n, compare, kind, keywords, dtype)):
        assert moves
        assert all(capturable), (rank, capturable)
        assert all(replayed), (rank, replayed)


def refusals() -> dict[str, str]:
    """What each refused set of keywords is told, before anything is changed."""
    told = {}
    refused: dict[str, tuple[str, dict[str, Any]]] = {
        **{name: ("SGD", {"algorithm": name}) for name in ("atc", "decentlam", "quasi_global", "exact_diffusion")},
        **{f"{name} ": ("AdamW", {"algorithm": name}) for name in ("atc", "dag", "quasi_global", "push_sum")},
        "allreduce": ("SGD", {"algorithm": "allreduce"}),
        "outer": ("SGD", {"algorithm": "local", "outer": fusedfog.Outer()}),
        "fused_backward": ("SGD", {"fused_backward": True}),
        "cpu_compile": ("SGD", {"cpu_compile": True}),
        "rounds": ("SGD", {"wire_dtype": "int8", "topology": "base_graph"}),
        "pauses": ("SGD", {"wire_dtype": "int8", "topology": "ring", "communicate_every": 2}),
        "averages": ("SGD", {"wire_dtype": "int8", "topology": "ring", "global_average_every": 2}),
        "endless": ("SGD", {"topology": topology.from_rounds(3, lambda step: {}, doubly_stochastic=True)}),
        "wrapped": ("Decentralized", {}),
    }
    for name, (kind, keywords) in refused.items():
        param = nn.Parameter(torch.zeros(3))
        home = param.data_ptr()
        with pytest.raises(ValueError, match=r"\w+") as caught:
            given: Any = torch.optim.SGD([param]) if kind == "Decentralized" else [param]
            getattr(fusedfog, kind)(given, capturable=True, **keywords)
        assert param.data_ptr() == home, name
        told[name] = str(caught.value)
    return told


def test_what_cannot_be_recorded_is_refused_at_construction_with_a_way_out(ranks: Pool) -> None:
    told, *others = ranks.run(3, refusals)
    assert others == [told, told]
    for name, text in told.items():
        assert "capturable" in text
        if name.rstrip() in ("atc", "decentlam", "dag", "quasi_global", "push_sum", "allreduce"):
            assert name.rstrip() in text
            assert "algorithm='awc'" in text
    assert "outer=" in told["outer"]
    assert "fused_backward" in told["fused_backward"]
    assert "cpu_compile" in told["cpu_compile"]
    assert all("static topology" in told[name] for name in ("rounds", "pauses", "averages"))
    assert "period" in told["endless"]
    assert "Decentralized" in told["wrapped"]


def with_gradients(**keywords: Any) -> Any:
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(70))]
    for param in params:
        param.grad = torch.ones_like(param)
    return fusedfog.SGD(params, lr=0.1, **keywords)


@pytest.mark.parametrize("algorithm", ["allreduce", "atc", "awc"])
def test_a_rank_that_is_alone_may_record_whatever_the_algorithm(algorithm: str) -> None:
    opt, graph = with_gradients(algorithm=algorithm, capturable=True), StandInGraph()
    opt.step()
    graph.capture(opt.step)
    with opt.replaying():
        graph.replay()
    torch.testing.assert_close(opt.param_groups[0]["params"][0].detach(), torch.full((3, 2), 0.8))
    assert opt.stats()["steps"] == 2


def test_a_capture_is_no_step_and_needs_steps_like_it_before() -> None:
    opt, graph = with_gradients(capturable=True), StandInGraph()
    with pytest.raises(RuntimeError, match="a few eager steps first, on a side stream"):
        graph.capture(opt.step)
    with pytest.raises(RuntimeError, match="before any step"), opt.replaying():
        pass
    opt.step()
    opt.grad_scale, opt.found_inf = torch.ones(()), torch.zeros(())
    with pytest.raises(RuntimeError, match="if the captured step has one"):
        graph.capture(opt.step)
    del opt.grad_scale, opt.found_inf
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match="a few eager steps first"):
        graph.capture(opt.step)
    assert not opt.state
    assert "momentum_buffer" not in opt._engine.segments[0].states
    opt.param_groups[0]["momentum"] = 0
    before = [param.detach().clone() for param in opt.param_groups[0]["params"]]
    graph.capture(opt.step)
    assert opt.stats()["steps"] == 1
    for param, value in zip(opt.param_groups[0]["params"], before, strict=True):
        assert torch.equal(param, value)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="without any gradient"):
        StandInGraph().capture(opt.step)


def test_a_capture_needs_capturable_and_so_does_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = with_gradients()
    with pytest.raises(RuntimeError, match="capturable=True"), opt.replaying():
        pass
    monkeypatch.setattr("fusedfog.optim.base.recording", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()


def test_a_step_that_is_no_longer_the_captured_one_is_found_out() -> None:
    opt, graph = with_gradients(capturable=True), StandInGraph()
    opt.step()
    graph.capture(opt.step)
    for change in ("momentum", "group"):
        if change == "momentum":
            opt.param_groups[0]["momentum"] = 0.9
        else:
            opt.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
        with pytest.raises(RuntimeError, match="out of date"), opt.replaying():
            pass
        opt.step()
        graph = StandInGraph()
        graph.capture(opt.step)
        with opt.replaying():
            graph.replay()
    with opt.paused(), pytest.raises(RuntimeError, match="paused"), opt.replaying():
        pass


def test_autograd_still_sees_that_a_replay_has_written_parameters() -> None:
    opt, graph = with_gradients(capturable=True), StandInGraph()
    opt.step()
    graph.capture(opt.step)
    (param, _) = opt.param_groups[0]["params"]
    loss = (param * param).sum()
    with opt.replaying():
        graph.replay()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def changing_topologies() -> list[Any]:
    model = net(torch.float32)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="ring", capturable=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    opt.step()
    graph = StandInGraph()
    graph.capture(opt.step)
    seen: list[Any] = [opt._engine.slots]
    for name in ("base_graph", "fully_connected"):
        opt.set_topology(name)
        try:
            with opt.replaying():
                graph.replay()
            seen.append("replayed")
        except RuntimeError as error:
            seen.append(str(error))
        dist.barrier()
    try:
        opt.set_topology(topology.from_rounds(4, lambda step: {}, doubly_stochastic=True))
    except ValueError as error:
        seen.append(str(error))
    return [*seen, opt._engine.slots, opt.stats()["steps"], opt.stats()["torn_messages"]]


def test_graphs_outlive_topologies_with_no_more_neighbours(ranks: Pool) -> None:
    for slots, base, full, endless, more, steps, torn in ranks.run(4, changing_topologies):
        assert (slots, base, more, steps, torn) == (2, "replayed", 3, 2, 0)
        assert "out of date" in full
        assert "period" in endless


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (topology.one_peer_exponential(8), [1] * 8),
        (topology.star(5), [4, 1, 1, 1, 1]),
        (topology.star(4).then(topology.ring(4)), [3, 2, 2, 2]),
        (topology.base_graph(5), [1] * 5),
        (topology.random_matching(6, 0), [1] * 6),
    ],
    ids=str,
)
def test_passes_have_room_for_the_most_neighbours_of_any_round(graph: Topology, expected: list[int]) -> None:
    assert [most_neighbours(graph, rank) for rank in range(graph.size)] == expected


def test_the_check_for_gpus_holds_on_the_cpu() -> None:
    CHECKS["captured_steps"](torch.device("cpu"))


@compiled_only
@pytest.mark.parametrize(("kind", "algorithm"), [("AdamW", "awc"), ("SGD", "momentum_tracking")])
def test_one_kernel_serves_all_rounds_rates_and_recordings(
    kind: str, algorithm: str, compiler: codegen.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "run_pass", fused_pass.launch)
    model = nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 9, bias=False))  # three addresses are no multiple of 16 bytes
    opt = getattr(fusedfog, kind)(model.parameters(), lr=1.0, algorithm="local", capturable=True)
    for segment in opt._engine.segments:
        segment._make_tables()
    among_echoes(opt, algorithm, 4, bent=IRREGULAR, schedule=StepSchedule(communicate_every=3))
    graphs: list[StandInGraph] = []
    for step, rate in enumerate((1.0, 0.0, 0.5, 1, 0, 1e-30, 16.0, 0.1, 0.2)):
        opt.param_groups[0]["lr"] = rate
        opt.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
        opt.step()
        if step in (3, 4):
            graphs.append(StandInGraph())
            graphs[-1].capture(opt.step)
    for graph in graphs:
        with opt.replaying():
            graph.replay()
    assert len(compiler.compiled()) == 1
    # Each recording has an address table of its own.
    tables = {work.gradient.grads.addresses.data_ptr() for graph in graphs for work in graph.passes}
    assert len(tables) == 2


def test_passes_read_their_numbers_from_memory_alone() -> None:
    cases = [case for case in all_cases() if case.recorded]
    assert len(cases) > 10
    for case in cases:
        case.check(torch.device("cpu"))


@compiled_only
@pytest.mark.parametrize(("name", "neighbours"), [("sgd-momentum", 1), ("adamw", 2), ("tracking", 4)])
def test_numbers_from_memory_cost_no_registers_and_narrow_loads_alone(
    name: str, neighbours: int, compiler: codegen.Compiler, tmp_path: Path
) -> None:
    codegen.launch(name, neighbours, torch.float32)
    codegen.launch(name, neighbours, torch.float32, numbers=torch.zeros(64))
    plain, recorded = compiler.compiled()
    usage = codegen.resources(recorded, tmp_path)
    # Tracking with four neighbours takes 74, since passes count their updates themselves.
    assert usage["REG"] <= 76, usage
    assert (usage["STACK"], usage["LOCAL"], recorded.metadata.shared) == (0, 0, 0), usage
    added = codegen.accesses(recorded) - codegen.accesses(plain)
    assert set(added) == {"ld b32"}
    assert added["ld b32"] <= 1 + neighbours + len(codegen.ROWS[name].hyper)
    assert not codegen.accesses(plain) - codegen.accesses(recorded)
