"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedfog
import fusedfog.topology as ft
from fusedfog.cli.main import main
from fusedfog.topology.guide import guide_table


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    assert main(["topology", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:26].strip(): line[26:] for line in lines}


def test_topology_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "one_peer_exponential", "-n", "16")
    assert found["topology"] == "one_peer_exponential(16)"
    assert found["degree"].startswith("1 ")
    assert found["period"] == "4 rounds"
    assert found["doubly stochastic"] == "yes" and found["symmetric"] == "no"
    assert found["rounds to exact average"] == "4" and found["contraction per period"] == "0"
    assert found["bytes per step"].startswith("100,000,000 for 25,000,000 parameters in fp32")
    assert found["algorithms"] == "all but decentlam, exact_diffusion, extra"
    found = figures(capsys, "exponential", "-n", "32", "--params", "1e9")
    assert found["spectral gap"] == "0.333333" and found["rounds to exact average"] == "never"
    assert found["bytes per step"].startswith("20,000,000,000 for 1,000,000,000")
    assert found["period"] == "1 round"


def test_several_model_sizes_and_endless_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "equi_dynamic", "-n", "9", "--params", "10", "--params", "20"]) == 0
    output = capsys.readouterr().out
    assert "40 for 10 parameters" in output and "80 for 20 parameters" in output
    assert "endless" in output and "contraction per period" not in output


def test_matrix_prints_every_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "one_peer_hypercube", "-n", "4", "--matrix"]) == 0
    output = capsys.readouterr().out
    assert "W(0) =\n[[0.5 0.5 0.  0. ]\n [0.5 0.5 0.  0. ]" in output
    assert "W(1) =\n[[0.5 0.  0.5 0. ]" in output and "W(2)" not in output


def test_hierarchical_topologies_take_machines(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "alternating_exponential_ring", "--machines", "4", "--local", "2")
    assert found["ranks"] == "8" and found["rounds to exact average"] == "4" and found["degree"].startswith("3 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnig", "-n", "4"], "unknown topology 'rnig'; `fusedfog topologies` lists all"),
        (["ring"], "give -n N"),
        (["ring", "-n", "0"], "n must be at least 1, got 0"),
        (["hypercube", "-n", "12"], "base_graph(12) exist for it"),
        (["inner_outer_ring", "-n", "8"], "needs --machines M and --local L"),
        (["inner_outer_ring", "-n", "9", "--machines", "2", "--local", "4"], "2 machines of 4 ranks are not -n 9"),
        (["ring", "-n", "8", "--machines", "2"], "give -n for ring"),
        (["ring", "-n", "65", "--matrix"], "--matrix prints up to 64 ranks, not 65"),
        (["ring", "-n", "4", "--plot", "/no/such/folder/t.png"], "/no/such/folder/t.png"),
    ],
)
def test_bad_arguments_say_the_way_out(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("count", ["many", "-1", "0", "nan", "inf", "2.5"])
def test_bad_model_sizes(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["topology", "ring", "-n", "4", f"--params={count}"])
    assert stopped.value.code == 2 and "is not a number of parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "topology",
    [
        ft.one_peer_exponential(16),
        ft.star(7),
        ft.equi_dynamic(9, 1),
        ft.one_peer(ft.grid(12)),
        ft.ring(1),
        ft.one_peer(ft.ring(100)),
        ft.from_matrix(np.eye(3)),
    ],
    ids=repr,
)
def test_plot_draws_a_picture(topology: ft.Topology, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    topology.plot(tmp_path / "t.png")
    pixels = image.imread(tmp_path / "t.png")
    assert min(pixels.shape[:2]) > 400
    assert (pixels[..., :3].min(axis=2) < 0.5).mean() > 0.002


def test_plot_is_reachable_and_leaves_no_backend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "t.png"
    command = [sys.executable, "-m", "fusedfog", "topology", "one_peer_exponential", "-n", "16", "--plot", str(target)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert target.read_bytes().startswith(b"\x89PNG") and str(target) in output


def test_topologies_lists_every_constructor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topologies"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    not_by_name = {"Round", "Topology", "named", "one_peer", "sequence", "from_matrix", "from_networkx", "from_rounds"}
    assert sorted(listed) == sorted(set(ft.__all__) - not_by_name)


def test_table_tells_which_graph_to_pick() -> None:
    head, rule, *rows = [
        line.strip("| ").split(" | ") for line in guide_table(sizes=(8, 16), exact_at=(8, 12)).splitlines()
    ]
    assert {len(head), len(rule)} == {len(row) for row in rows} | {8}
    cells = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    assert cells["exponential"]["gap n=8"] == "0.5" and cells["exponential"]["messages"] == "4"
    assert cells["exponential"]["algorithms"] == "all but decentlam, exact_diffusion, extra"
    assert cells["ring"]["algorithms"] == "all" and cells["ring"]["exact, n=8"] == "-"
    assert cells["one_peer_exponential"]["exact, n=8"] == "3" and cells["one_peer_exponential"]["exact, n=12"] == "-"
    assert cells["base_graph"]["exact, n=12"] == "5" and cells["base_graph"]["symmetric"] == "yes"
    assert cells["hypercube"]["exact, n=12"] == "-"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fusedfog {fusedfog.__version__}\n"
