"""The predictor of step times: closed forms, an independent simulation, and real torch for what it claims of torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from support.plan_oracle import slow_finish_times

import fusedfog.topology as ft
from fusedfog.cli.main import main
from fusedfog.cost.links import Links
from fusedfog.cost.units import parse_count, parse_rate, parse_time
from fusedfog.cost.workload import PROFILES, read_layers
from fusedfog.params import layout
from fusedfog.plan import (
    Layer,
    Link,
    Method,
    Network,
    Workload,
    allreduce_seconds,
    finish_times,
    predict,
    scaling,
    standard_methods,
)

MB = 1e6
SLOW = Link(latency_s=1e-3, bandwidth=1e8)
ONE_LAYER = Workload((Layer(4 * MB, 0.02, 0.03),))
"""One bucket: nothing overlaps unless the algorithm lets it. A transfer on `SLOW` takes 41 ms of a step of 50."""


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("25Gb/s", 3.125e9),
        ("3 GB/s", 3e9),
        ("100 Mbit/s", 12.5e6),
        ("200Gbps", 25e9),
        ("1.5e3 MB/s", 1.5e9),
        ("64 KiB/s", 65536),
        ("8b/s", 1),
    ],
)
def test_rates(text: str, bytes_per_second: float) -> None:
    assert parse_rate(text) == pytest.approx(bytes_per_second, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30us", 3e-5), ("0.2 ms", 2e-4), ("1e-5s", 1e-5), ("0ns", 0), ("5µs", 5e-6)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds, rel=1e-12)


def test_counts() -> None:
    assert [parse_count(text) for text in ("25.6e6", "25.6M", "7B", "128")] == [
        25_600_000,
        25_600_000,
        7_000_000_000,
        128,
    ]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_rate, text) for text in ("25", "Gb/s", "-1Gb/s", "0Gb/s", "25Gb", "1..2Gb/s", "inf Gb/s")),
        *((parse_time, text) for text in ("30", "us", "-1us", "3 minutes")),
        *((parse_count, text) for text in ("0", "2.5", "many", "-3", "1e40")),
    ],
)
def test_quantities_without_sense_are_named(parse: Any, text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse(text)


# -- closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8, 128])
@pytest.mark.parametrize("algorithm", ["ddp", "allreduce"])
def test_one_bucket_all_reduced_after_backward(n: int, algorithm: str) -> None:
    network = Network(n, SLOW)
    ring = 2 * (n - 1) * (1e-3 + 4 * MB / (n * 1e8))
    assert predict(ONE_LAYER, network, Method(algorithm)).step_s == pytest.approx(0.05 + ring, rel=1e-9)
    tree = 2 * math.ceil(math.log2(n)) * 1e-3 + 2 * 4 * MB / 1e8
    assert predict(ONE_LAYER, network, Method(algorithm, collective="tree")).step_s == pytest.approx(
        0.05 + tree, rel=1e-9
    )


def test_all_reduces_on_machines() -> None:
    network = Network(32, SLOW, 8, Link(1e-5, 1e9))
    hops = 4 * 1e-3 + 28 * 1e-5  # once round the ring: 4 links between machines, 28 inside
    assert allreduce_seconds(network, MB) == pytest.approx(2 * 31 / 32 * MB / 1e8 + 2 * 31 / 32 * hops, rel=1e-12)
    inside = 2 * 7 * (1e-5 + MB / 8 / 1e9)
    across = 2 * 3 * (1e-3 + MB / 4 / 1e8)
    assert allreduce_seconds(network, MB, "hierarchical") == pytest.approx(inside + across, rel=1e-12)
    assert allreduce_seconds(Network(1, SLOW), MB) == 0


@pytest.mark.parametrize(
    ("topology", "messages"), [("one_peer_exponential", 1), ("exponential", 3), ("ring", 2), ("star", 7)]
)
def test_messages_through_one_port_add_up(topology: str, messages: int) -> None:
    transfer = 1e-3 + messages * 4 * MB / 1e8
    network = Network(8, SLOW)
    assert predict(ONE_LAYER, network, Method("atc", topology)).step_s == pytest.approx(0.05 + transfer, rel=1e-9)
    assert predict(ONE_LAYER, network, Method("awc", topology)).step_s == pytest.approx(max(0.05, transfer), rel=1e-9)


@pytest.mark.parametrize("towards", [True, False])
def test_a_port_is_as_slow_to_receive_as_to_send(towards: bool) -> None:
    weights = np.eye(8)
    if towards:
        weights[0] = 1 / 8  # Everyone sends to rank 0 ...
    else:
        weights[:, 0], weights[range(1, 8), range(1, 8)] = 0.5, 0.5  # ... or it to everyone.
        weights[0, 0] = 1.0
    method = Method("push_sum", ft.from_matrix(weights))
    first = finish_times(ONE_LAYER, Network(8, Link(0.0, 1e8)), method, np.ones((1, 8)))
    np.testing.assert_allclose(first, 0.05 + 7 * 0.04, rtol=1e-9)


def test_awc_hides_a_transfer_that_is_shorter_than_a_step() -> None:
    workload = Workload.even(25e6, step_s=0.1)
    for rate, exposed in ((1.01e9, 0.0), (0.5e9, 0.1)):
        predicted = predict(workload, Network(8, Link(0.0, rate)), Method("awc"))
        assert predicted.local_s == pytest.approx(0.1)
        assert predicted.exposed_s == pytest.approx(exposed, abs=1e-9)


def test_communicating_every_fourth_step_exposes_a_quarter() -> None:
    slow = Network(8, Link(0.0, 1e7))  # A transfer takes 400 ms, a step 50.
    assert predict(ONE_LAYER, slow, Method("awc", communicate_every=4)).step_s == pytest.approx((3 * 0.05 + 0.4) / 4)
    assert predict(ONE_LAYER, slow, Method("atc", communicate_every=4)).step_s == pytest.approx((4 * 0.05 + 0.4) / 4)


def test_fused_backward_sends_early_buckets_under_the_rest_of_backward() -> None:
    workload = Workload((Layer(2 * MB, 0.01, 0.02), Layer(2 * MB, 0.01, 0.02)))
    network = Network(2, Link(0.0, 1e8))
    early = Method("atc", "ring", fused_backward=True, bucket_mb=1)
    # The deep layer's 20 ms travel under the shallow one's backward, the shallow one's are exposed.
    assert predict(workload, network, early).step_s == pytest.approx(0.06 + 0.02)
    assert predict(workload, network, Method("atc", "ring", bucket_mb=1)).step_s == pytest.approx(0.06 + 0.04)


def test_only_what_travels_under_computation_has_graded_buckets() -> None:
    workload = Workload(tuple(Layer(MB, 0.01, 0.02) for _ in range(12)))
    pipelined = (Method("atc", "ring"), Method("awc", fused_backward=True), Method("allreduce"))
    assert [len(method.buckets(workload)) for method in pipelined] == [12] * 3
    assert [len(method.buckets(workload)) for method in (Method("awc"), Method("ddp"))] == [1, 2]


def test_two_messages_take_twice_as_long() -> None:
    network = Network(8, Link(0.0, 1e8))
    plain, tracking = (predict(ONE_LAYER, network, Method(name, "ring")) for name in ("awc", "gradient_tracking"))
    assert tracking.sent == 2 * plain.sent == pytest.approx(16 * MB)
    assert (plain.step_s, tracking.step_s) == (pytest.approx(0.08), pytest.approx(0.16))


def test_ranks_of_a_machine_share_its_network_card() -> None:
    inside = Link(0.0, math.inf)
    network = Network(32, Link(0.0, 1e8), 8, inside)
    # Rank i sends to i + 8: all eight leave the machine. By machine, or one rank at a time, only one model does.
    shift = ft.from_rounds(32, lambda _: {i: {(i - 8) % 32: 0.5} for i in range(32)}, period=1, doubly_stochastic=True)
    for method, models in (
        (Method("atc", shift), 8),
        (Method("atc", "one_peer_exponential", mesh=True), 1),
        (Method("atc", ft.inner_outer_ring(4, 8)), 1),
    ):
        first = finish_times(ONE_LAYER, network, method, np.ones((1, 32)))
        assert first.max() == pytest.approx(0.05 + models * 0.04, rel=1e-9)
        assert predict(ONE_LAYER, network, method).sent_by_machine == pytest.approx(models * 4 * MB, rel=1e-9)


def test_a_mesh_pays_for_both_phases_inside() -> None:
    network = Network(8, Link(2e-3, 1e8), 4, Link(1e-3, 1e9))
    within = 3 / 4 * 4 * MB / 1e9 + 1e-3
    predicted = predict(ONE_LAYER, network, Method("atc", "ring", mesh=True, inside="parameters"))
    assert predicted.exposed_s == pytest.approx(2 * within + 2e-3 + 4 * MB / 1e8, rel=1e-9)
    assert predicted.sent == pytest.approx((2 * 3 / 4 + 1 / 4) * 4 * MB)


def test_machines_that_average_gradients_wait_for_the_last_bucket_of_them() -> None:
    network = Network(8, Link(2e-3, 1e8), 4, Link(1e-3, 1e9))
    means = 2 * 3 * (1e-3 + MB / 1e9)  # One bucket, whose last gradient ends backward.
    within = 3 / 4 * 4 * MB / 1e9 + 1e-3
    atc, awc = (predict(ONE_LAYER, network, Method(name, "ring", mesh=True)) for name in ("atc", "awc"))
    assert atc.exposed_s == pytest.approx(means + 2e-3 + 4 * MB / 1e8 + within, rel=1e-9)
    assert awc.exposed_s == pytest.approx(means, rel=1e-9)  # The rest travels under the next step's compute.
    assert atc.sent == awc.sent == pytest.approx((3 * 3 / 4 + 1 / 4) * 4 * MB)
    early = predict(ONE_LAYER, network, Method("atc", "ring", mesh=True, fused_backward=True))
    assert early.step_s == atc.step_s


def test_passes_cost_their_traffic() -> None:
    workload = Workload(ONE_LAYER.layers, optimizer_tensors=7, memory_bandwidth=1e9)
    tensor = 4 * MB / 1e9
    quick = Network(8, Link(0.0, math.inf))
    steps = {name: predict(workload, quick, Method(name, "ring")).step_s - 0.05 for name in ("awc", "atc")}
    assert steps["awc"] == pytest.approx((7 + 2) * tensor)
    assert steps["atc"] == pytest.approx((7 + 2 + 2) * tensor)
    assert predict(workload, quick, Method("local")).step_s - 0.05 == pytest.approx(7 * tensor)


# -- stragglers ----------------------------------------------------------------------------------------------------------


def test_a_nap_reaches_only_neighbours_of_the_round() -> None:
    pace = np.ones((3, 8))
    pace[1, 0] = 3.0  # Rank 0 takes 100 ms more in step 1; AWC hides a step's worth of lateness.
    quick = Network(8, Link(0.0, math.inf))
    for method, late in ((Method("awc", "ring"), {0, 1, 7}), (Method("ddp"), set(range(8)))):
        finish = finish_times(ONE_LAYER, quick, method, pace)
        assert set(np.flatnonzero(finish[2] > 0.15 + 1e-9)) == late


def test_all_reduce_waits_for_the_slowest_of_all() -> None:
    pace = np.exp(0.3 * np.random.default_rng(0).standard_normal((50, 16)))
    quick = Network(16, Link(0.0, math.inf))
    finish = finish_times(ONE_LAYER, quick, Method("ddp"), pace)
    np.testing.assert_allclose(finish, 0.05 * np.cumsum(pace.max(axis=1))[:, None] * np.ones(16), rtol=1e-12)
    gossip = finish_times(ONE_LAYER, quick, Method("awc"), pace)[-1].mean()
    alone = finish_times(ONE_LAYER, quick, Method("local"), pace)[-1].mean()
    assert alone < gossip < finish[-1].mean()


GRAPHS = ("ring", "one_peer_exponential", "exponential", "star", "base_graph")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Workload, Network, Method]:
    times = st.floats(0.001, 0.1)
    layers = draw(st.lists(st.builds(Layer, st.floats(0.1 * MB, 4 * MB), times, times), min_size=1, max_size=4))
    workload = Workload(tuple(layers), memory_bandwidth=draw(st.sampled_from([math.inf, 2e9])))
    local = draw(st.sampled_from([1, 1, 2]))
    links = st.builds(Link, st.floats(0, 0.02), st.floats(1e7, 1e9))
    network = Network(local * draw(st.integers(1, 4)), draw(links), local, draw(links))
    method = Method(
        draw(st.sampled_from(["ddp", "allreduce", "awc", "atc", "gradient_tracking"])),
        draw(st.sampled_from(GRAPHS)),
        fused_backward=draw(st.booleans()),
        bucket_mb=draw(st.sampled_from([1, 4])),
        communicate_every=1,
        mesh=draw(st.booleans()),
        inside=draw(st.sampled_from(["gradients", "parameters"])),
    )
    if draw(st.booleans()) and not method.reduces:
        method = Method(**{**vars(method), "communicate_every": 3})
    return workload, network, method


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2**32))
@example((ONE_LAYER, Network(1, SLOW), Method("awc", "ring")), 0)
def test_against_a_rank_by_rank_simulation(case: tuple[Workload, Network, Method], seed: int) -> None:
    workload, network, method = case
    pace = np.exp(0.5 * np.random.default_rng(seed).standard_normal((7, network.ranks)))
    got = finish_times(workload, network, method, pace)
    np.testing.assert_allclose(got, slow_finish_times(workload, network, method, pace), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(1, 10))
def test_a_faster_network_never_costs_time(case: tuple[Workload, Network, Method], factor: float) -> None:
    workload, network, method = case
    if method.fused_backward and method.algorithm in ("awc", "gradient_tracking"):
        return  # A message that comes earlier moves its pass into backward, ahead of other work: not monotone by design.
    inside = network.inside
    faster = Network(
        network.ranks,
        Link(network.across.latency_s, network.across.bandwidth * factor),
        network.local,
        inside and Link(inside.latency_s / factor, inside.bandwidth),
    )
    assert predict(workload, faster, method).step_s <= predict(workload, network, method).step_s * (1 + 1e-9)


# -- workloads -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.sampled_from([1, 4, 25]), st.booleans())
def test_buckets_are_those_of_torch_and_of_our_layout(blocks: list[int], cap_mb: int, graded: bool) -> None:
    sizes = [64 * 1024 * count for count in blocks]  # elements; whole blocks, so that our layout adds no padding
    workload = Workload(tuple(Layer(4 * size, 0.0, 1.0) for size in sizes))
    tensors = [torch.empty(size, device="meta") for size in sizes]
    limits = [2**20 if cap_mb == 25 else cap_mb * 2**20, cap_mb * 2**20]
    assigned = dist._compute_bucket_assignment_by_size(tensors[::-1], limits)[0]
    want = [4 * sum(sizes[::-1][i] for i in indices) for indices in assigned]
    assert [bucket.size for bucket in workload.ddp_buckets(cap_mb)] == want

    specs = [layout.ParamSpec(str(i), (size,), (1,), torch.float32, 0, True, i) for i, size in enumerate(sizes)]
    (segment,) = layout.build_layout(specs, cap_mb * 2**20, graded=graded)
    ordered = [segment.buckets[b] for _, b in layout.backward_order([segment])]
    got = [(bucket.size, bucket.ready_s) for bucket in workload.buckets(cap_mb, graded=graded)]
    assert got == [(4 * (bucket.stop - bucket.start), len(sizes) - bucket.first) for bucket in ordered]


def test_resnet50_profile_has_its_published_size() -> None:
    parameters, work = (sum(column) for column in zip(*PROFILES["resnet50"](), strict=True))
    assert parameters == 25_557_032  # torchvision's
    assert work == pytest.approx(4.09e9, rel=1e-3)  # multiply-adds at 224 x 224, torchvision's figure


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a list of layers"),
        ('[{"params": 1}]', "layer 0 must have params, forward_ms, backward_ms"),
        (
            '[{"params": -1, "forward_ms": 1, "backward_ms": 1}]',
            "layer 0: a layer has bytes and seconds of zero or more",
        ),
    ],
)
def test_bad_layer_files_say_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layers(tmp_path / "layers.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(-1, 1), "latency must be zero or more"),
        (lambda: Link(0, 0), "bandwidth must be positive"),
        (lambda: Network(10, SLOW, 4, SLOW), "10 ranks do not fill machines of 4"),
        (lambda: Network(8, SLOW, 4), "need a link inside"),
        (lambda: Method("ring"), "unknown algorithm 'ring'"),
        (lambda: Method("exact_diffusion", communicate_every=2), "does not work with communicate_every=2"),
        (lambda: Method("ddp", communicate_every=2), "reduces gradients in every step"),
        (lambda: predict(ONE_LAYER, Network(8, SLOW), Method("awc", ft.ring(4))), "for 4 ranks but the group has 8"),
        (lambda: predict(ONE_LAYER, Network(8, SLOW), Method("awc"), sigma=-1), "sigma must be zero or more"),
        (lambda: Workload.even(1e9, 0.0), "leaves no time to compute"),
        (lambda: ONE_LAYER.buckets(0), "bucket size must be positive"),
    ],
)
def test_impossible_inputs_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scaling_follows_methods_by_name() -> None:
    network = Network(2, Link(0.0, 1e8))
    curves = scaling(ONE_LAYER, network, [2, 8], lambda grown: {"all": Method("ddp"), "one": Method("awc")})
    assert [(curve.method, curve.ranks) for curve in curves] == [("all", (2, 8)), ("one", (2, 8))]
    assert curves[0].efficiency == pytest.approx((0.05 / 0.09, 0.05 / 0.12))
    assert curves[1].efficiency == pytest.approx((1.0, 1.0))


# -- commands ------------------------------------------------------------------------------------------------------------

ASK = ["plan", "--params=25.6e6", "--step-ms=200", "--bandwidth=25Gb/s", "--latency=30us"]


def test_plan_prints_its_table_and_marks_the_best(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*ASK, "--ranks=16", f"--json={tmp_path / 'p.json'}"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [method.name for method in standard_methods(Network(16, SLOW))]
    (winner,) = [row for row in rows if row["best"]]
    (taken,) = [row for row in rows if row["auto"]]
    (quickest,) = [row for row in rows if row["fastest"]]
    assert winner["time_to_ddp_loss"] == min(row["time_to_ddp_loss"] for row in rows if row["time_to_ddp_loss"])
    assert quickest["step_s"] == pytest.approx(min(row["step_s"] for row in rows))
    for mark, row in (("*", winner), ("+", quickest), (">", taken)):
        (line,) = [line for line in printed.splitlines() if line[3:].startswith(f" {row['method']}  ")]
        assert mark in line[:3]
    assert "25 Gb/s (3.12 GB/s), 30 us" in printed and "102 MB" in printed


def test_plan_compares_a_method_of_ones_own_on_machines(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--algorithm=atc", "--topology=ring", "--mesh", "--communicate-every=2", "--fused-backward"]
    assert main([*ASK, "--ranks=16", "--local=4", "--sigma=0.1", *own]) == 0
    printed = capsys.readouterr().out
    assert (
        "atc ring by machine fused_backward H=2" in printed and "DDP (ring)" in printed and "4 machines of 4" in printed
    )


def test_plan_reads_layers_and_links_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    layers, links, plot = tmp_path / "layers.json", tmp_path / "links.json", tmp_path / "p.png"
    layers.write_text(json.dumps([{"params": 1e6, "forward_ms": 20, "backward_ms": 30}] * 2))
    Links(4, Link(1e-5, 1e10), SLOW, 1e10).write(links)
    assert main(["plan", "--ranks=512", f"--layers={layers}", f"--links={links}", f"--plot={plot}", "--mesh"]) == 0
    assert "128 machines of 4" in capsys.readouterr().out
    pixels = image.imread(plot)
    assert min(pixels.shape[:2]) > 400 and (pixels[..., :3].min(axis=2) < 0.5).mean() > 0.002


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ranks=10", "--local=4"], "10 ranks do not fill machines of 4"),
        (["--ranks=8", "--topology=rnig"], "unknown topology 'rnig'"),
        (["--ranks=8", "--algorithm=sgd"], "unknown algorithm 'sgd'"),
        (["--ranks=12", "--topology=hypercube"], "base_graph(12) exist for it"),
        (["--ranks=8", "--step-ms=-1"], "--step-ms must be positive"),
        (["--ranks=8", "--step-ms=1", "--memory-bandwidth=1GB/s"], "the optimizer alone takes"),
        (["--ranks=8", "--layers=/no/such.json"], "leave --params and --step-ms out"),
        (["--ranks=8", "--links=/no/such.json"], "/no/such.json"),
        (["--ranks=8", "--sigma=-1"], "sigma must be zero or more"),
    ],
)
def test_plan_says_what_does_not_fit(change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, *change]) == 2
    assert message in capsys.readouterr().err


def test_plan_asks_for_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--ranks=8", "--params=1e6", "--step-ms=1"], "give --bandwidth"),
        (["--ranks=8", "--params=1e6", "--step-ms=1", "--bandwidth=1Gb/s"], "give --latency"),
        (["--ranks=8", "--bandwidth=1Gb/s", "--latency=1us"], "give --params and --step-ms"),
    ):
        assert main(["plan", *arguments]) == 2
        assert message in capsys.readouterr().err
    Links(4, Link(1e-5, 1e10), None, 1e10).write(tmp_path / "links.json")
    links = f"--links={tmp_path / 'links.json'}"
    assert main(["plan", "--ranks=8", "--params=1e6", "--step-ms=1", links]) == 2
    assert "measured on one machine of 4 ranks, which 8 ranks exceed" in capsys.readouterr().err
    assert main(["plan", "--ranks=4", "--params=1e6", "--step-ms=9", links]) == 0
    with pytest.raises(SystemExit):
        main([*ASK, "--ranks=8", "--bandwidth=25"])
    assert "'25' is not a rate; write bits as 25Gb/s or bytes as 3GB/s" in capsys.readouterr().err
