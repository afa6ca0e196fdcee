"""Three prices of a method: its step, its bytes, its loss; and what `fusedfog plan` makes of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedfog.cli.main import main
from fusedfog.cost.loss import TABLE, Measured, Way, expected, measured
from fusedfog.cost.prices import Price, best, fastest
from fusedfog.cost.timeline import Prediction
from fusedfog.plan import Layer, Link, Method, Network, Workload, predict, standard_methods
from fusedfog.plan.auto import explain_auto
from fusedfog.plan.report import predict_all, prices, table, wire_advice

MB = 1e6
RESULTS = Path(__file__).parents[2] / "bench" / "results"
MODEL = Workload((Layer(4 * MB, 0.02, 0.03),))
FLAT = Network(16, Link(0.0, 1e8))
MACHINES = Network(16, Link(0.0, 1e8), 4, Link(0.0, 1e10))


# -- the table of losses ---------------------------------------------------------------------------------------------


def percent(text: str) -> int | None:
    return None if text == "not reached" else int(text.removesuffix("%"))


def words(row: Measured) -> str:
    """What bench/loss.py calls a row's method."""
    parts = [row.algorithm.upper(), row.graph.replace("_", " ")]
    parts += [f"machines of {row.machine}"] * (row.machine > 1) + [f"{row.wire} messages"] * (row.wire is not None)
    return ", ".join(parts + [f"{row.start}% data-parallel start"] * (row.start > 0))


def test_the_table_of_losses_is_what_was_measured() -> None:
    rows = json.loads((RESULTS / "loss.json").read_text())["rows"]
    found = {(row["case"], row["method"]): row for row in rows}
    for row in TABLE:
        case = f"{row.task}, n={row.ranks}" + (", SGD" if row.optimizer == "SGD" else "")
        own, base = found[case, words(row)], found[case, "data-parallel"]
        assert float(own["above data-parallel, %"].split(" ± ")[0]) == row.above
        for line, reached in ((own, row.reached), (base, row.data_parallel)):
            assert (percent(line["its loss after"]), percent(line["within 1 % after"])) == reached
    assert len(set(TABLE)) == len(TABLE) > 20


def test_a_loss_is_that_of_the_nearest_number_of_ranks_and_of_the_worse_model() -> None:
    awc = Way("AdamW", "awc", "one_peer_exponential")
    picked = {n: measured(awc, n) for n in (2, 4, 5, 8, 12, 128)}
    assert {n: row.ranks for n, row in picked.items() if row} == {2: 4, 4: 4, 5: 4, 8: 8, 12: 16, 128: 16}
    assert picked[4] is not None and (picked[4].task, picked[4].steps) == ("GPT", None)
    assert measured(Way("AdamW", "awc", "ring"), 16) is None
    machines = measured(Way("AdamW", "awc", "one_peer_exponential", machines=True), 16)
    assert machines is not None and machines.steps == pytest.approx(84 / 77)


def test_what_was_not_measured_is_expected_to_do_as_the_like_of_it() -> None:
    def way(graph: str, wire: str | None = None, starts: bool = False) -> Way:
        return Way("AdamW", "awc", graph, wire=wire, starts=starts)

    def above(one: Way) -> tuple[float, bool] | None:
        found = expected(one, 16)
        return (found[0].above, found[1]) if found else None

    assert above(way("exponential", "int8")) == (1.8, True)
    assert above(way("exponential", "bf16")) == (1.9, False)
    assert above(way("one_peer_exponential", "int8")) == (8.4, False)
    sgd = expected(Way("SGD", "atc", "exponential", wire="int8"), 16)
    assert sgd is not None and (sgd[0].graph, sgd[0].ranks, sgd[1]) == ("one_peer_exponential", 4, False)
    assert expected(way("ring", "int8"), 16) is None
    machines = expected(Way("SGD", "awc", "exponential", machines=True, wire="int8"), 8)
    assert machines is not None and (machines[0].machine, machines[0].above, machines[1]) == (1, -0.3, False)


# -- prices ----------------------------------------------------------------------------------------------------------


def priced(methods: list[Method], network: Network, optimizer: str = "AdamW") -> list[Price]:
    return prices(methods, predict_all(MODEL, network, methods), network, optimizer)


def test_a_time_is_steps_needed_times_their_length_over_the_fastest_all_reduce() -> None:
    methods = [
        Method("ddp"),
        Method("ddp", collective="hierarchical"),
        Method("awc", "one_peer_exponential", mesh=True),
        Method("awc", "one_peer_exponential"),
        Method("awc", "ring"),
    ]
    ring, hierarchical, machines, ranks, unknown = priced(methods, MACHINES)
    base = min(ring.seconds, hierarchical.seconds)
    assert (ring.time, hierarchical.time) == (ring.seconds / base, hierarchical.seconds / base)
    assert machines.time == pytest.approx(84 / 77 * machines.seconds / base)
    assert (ranks.time, unknown.time) == (None, None)
    assert ranks.loss is not None and ranks.loss.above == 8.4 and unknown.loss is None


def test_losses_are_those_of_the_optimizer() -> None:
    flat = Network(4, Link(0.0, 1e8))
    methods = [Method("ddp"), Method("awc", "one_peer_exponential")]
    adam, sgd = (priced(methods, flat, name)[1] for name in ("AdamW", "SGD"))
    assert adam.time is None
    assert sgd.time is not None and sgd.loss is not None and sgd.loss.above == -0.3


def price(seconds: float, time: float | None) -> Price:
    return Price(Prediction("", 4, seconds, 0.1, 0.0, 0.0), None, True, time)


def test_the_best_is_the_soonest_where_that_is_known_and_the_fastest_where_not() -> None:
    slow, soon, quick = price(3.0, 1.0), price(2.0, 0.7), price(1.0, None)
    assert best([slow, soon, quick]) is soon
    assert fastest([slow, soon, quick]) is quick
    assert best([quick, price(2.0, None)]) is quick
    almost = price(1.001, 0.7001)
    assert best([almost, soon]) is almost and fastest([almost, quick]) is almost


def test_a_line_shows_all_prices() -> None:
    methods = [Method("ddp"), Method("awc", "one_peer_exponential", mesh=True), Method("awc", "one_peer_exponential")]
    found = priced(methods, MACHINES)
    lines = table(found, machines=True).splitlines()
    assert re.search(r"by machine +loss +time$", lines[0])
    assert re.search(r"^    DDP .* 0 +1\.00$", lines[1])
    assert re.search(r"^\*\+? +awc .* by machine .* \+0\.5% n=16 +0\.\d\d$", lines[2])
    assert re.search(r"^    awc .* \+8\.4% n=16 +never$", lines[3])


# -- wires and starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "part"), [("bf16", 0.5), ("int8", 17 / 64), ("fp8", 17 / 64)])
def test_messages_of_a_smaller_format_travel_so_much_faster(wire: str, part: float) -> None:
    exact, small = (predict(MODEL, FLAT, Method("atc", "ring", wire=one)) for one in (None, wire))
    assert small.sent == pytest.approx(part * exact.sent)
    assert small.exposed_s == pytest.approx(part * exact.exposed_s)


def test_passes_with_a_smaller_format_move_more_of_their_own() -> None:
    quick, tensor = Network(8, Link(0.0, 1e30)), 4 * MB / 1e9
    workload = Workload(MODEL.layers, memory_bandwidth=1e9)
    exact, small = (predict(workload, quick, Method("awc", "ring", wire=one)).step_s for one in (None, "bf16"))
    assert small - exact == pytest.approx((2 * 0.5 + 4 - 2) * tensor)


def test_a_start_costs_its_part_of_data_parallel_steps() -> None:
    first, later, both = (
        predict(MODEL, FLAT, one)
        for one in (Method("allreduce"), Method("awc", "ring"), Method("awc", "ring", start=0.1))
    )
    assert both.step_s == pytest.approx(0.1 * first.step_s + 0.9 * later.step_s)
    assert both.sent == pytest.approx(0.1 * first.sent + 0.9 * later.sent)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"algorithm": "awc", "wire": "int8", "mesh": True, "inside": "parameters"},
            "mesh= with inside='parameters' does not work with wire_dtype='int8'",
        ),
        ({"algorithm": "awc", "wire": "int7"}, "int7"),
        ({"algorithm": "allreduce", "start": 0.1}, "all its steps are data-parallel"),
        ({"algorithm": "awc", "start": 1.0}, "start is a part of all steps"),
    ],
)
def test_what_does_not_go_together_is_refused_as_by_the_optimizers(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Method(**keywords)


def test_a_tight_network_is_advised_a_smaller_wire_and_a_wide_one_is_not() -> None:
    for rate, advised in ((5e7, True), (1e11, False)):
        network = Network(16, Link(0.0, rate))
        methods = standard_methods(network)
        advice = wire_advice(priced(methods, network), methods)
        assert advice.startswith("the network is tight: awc one_peer_exponential int8 takes 0.") == advised
        assert bool(advice) == advised


# -- auto ------------------------------------------------------------------------------------------------------------


ALONE, SHARED = "every rank has a machine of its own", "the ranks of a machine share its link"
SHORTEST = "the shortest step of {} ways, none of which is known to reach DDP's loss: {} a step, loss {}"
LEAST = "the least time to DDP's loss of {} ways, {} of DDP's: {} a step, loss {}"


@pytest.mark.parametrize(
    ("network", "taken", "why"),
    [
        # 4 MB in 50 ms of computing: at 10 MB/s no message hides, at 10 GB/s all do.
        (
            Network(8, Link(1e-5, 1e7)),
            "exponential, int8 messages",
            f"{ALONE}; {SHORTEST.format(3, '319 ms and 3.19 MB', '+1.8% n=16')}",
        ),
        (
            Network(8, Link(1e-6, 1e10)),
            "one_peer_exponential",
            f"{ALONE}; {SHORTEST.format(3, '50 ms and 4 MB', '+2.3% n=8')}",
        ),
        # Of equally short steps that with the smaller loss.
        (
            Network(16, Link(1e-6, 1e10)),
            "exponential",
            f"{ALONE}; {SHORTEST.format(3, '50 ms and 16 MB', '+1.9% n=16')}",
        ),
        (
            Network(16, Link(1e-5, 1e7), 8, Link(1e-6, 1e10)),
            "one_peer_exponential over 2 machines of 8 ranks, int8 messages",
            f"{SHARED}; {LEAST.format(5, '0.26', '106 ms and 8.06 MB', '~+0.5% n=16')}",
        ),
        (
            Network(16, Link(1e-6, 1e10), 4, Link(1e-6, 1e11)),
            "one_peer_exponential over 4 machines of 4 ranks",
            f"{SHARED}; {LEAST.format(7, '1.08', '50.1 ms and 10 MB', '+0.5% n=16')}",
        ),
    ],
)
def test_plan_explains_autos_choice(network: Network, taken: str, why: str) -> None:
    words, method = explain_auto(MODEL, network)
    assert words == f"topology='auto' takes {taken}: {why}"
    assert method is not None
    assert (method.mesh, method.wire) == ("over" in taken, "int8" if "int8" in taken else None)


def test_of_a_topology_that_nothing_needs_nothing_is_said() -> None:
    assert explain_auto(MODEL, FLAT, "ddp") == ("", None)


def test_autos_choice_is_the_best_of_what_there_is_to_choose() -> None:
    """By brute force over the same ways as methods, priced by themselves."""
    for rate in (1e7, 1e8, 1e9, 1e10):
        for local in (1, 4):
            network = Network(16, Link(1e-5, rate), local, Link(1e-6, 1e10))
            _, taken = explain_auto(MODEL, network, optimizer="SGD")
            graphs = [(False, "one_peer_exponential"), (False, "exponential")]
            graphs += [(True, name) for _, name in graphs] * (local > 1)
            ways = [Method("awc", graph, mesh=mesh) for mesh, graph in graphs]
            ways += [
                replace(way, wire="int8") for way in ways if way.topology == "exponential" or (way.mesh and local == 4)
            ]
            everything = [Method("ddp", collective="hierarchical"), Method("ddp", collective="ring"), *ways]
            found = priced(everything, network, "SGD")[2:]
            own = next(one for one, way in zip(found, ways, strict=True) if taken and _same(way, taken, network))
            known = [one.time for one in found if one.time is not None]
            assert own.time == pytest.approx(min(known), rel=0.002)


def _same(one: Method, other: Method, network: Network) -> bool:
    graphs = (way.graph(network) for way in (one, other))
    names = {graph.name for graph in graphs if graph is not None}
    return len(names) == 1 and (one.mesh, one.wire) == (other.mesh, other.wire)


def test_the_command_prints_the_advice_and_the_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = [
        "plan",
        "--params=25.6e6",
        "--step-ms=200",
        "--bandwidth=1Gb/s",
        "--latency=30us",
        "--ranks=16",
        "--local=4",
    ]
    assert main([*asked, f"--json={tmp_path / 'p.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "topology='auto' takes one_peer_exponential over 4 machines of 4 ranks, int8 messages" in printed
    rows = {row["method"]: row for row in json.loads((tmp_path / "p.json").read_text())["rows"]}
    machines, small = rows["awc one_peer_exponential by machine"], rows["awc one_peer_exponential by machine int8"]
    assert machines["loss_above_percent"] == 0.5 and machines["loss_measured_on"] == 16 and machines["loss_is_its_own"]
    assert small["best"] and small["auto"] and small["loss_above_percent"] == 0.5 and not small["loss_is_its_own"]
    assert re.search(r"\n>\*\+? +awc one_peer_exponential by machine int8 .* ~\+0\.5% n=16 +0\.\d\d\n", printed)
    assert main([*asked, "--algorithm=awc", "--wire=int8", "--topology=exponential", "--start=0.1"]) == 0
    assert "awc exponential int8 start 10%" in capsys.readouterr().out
