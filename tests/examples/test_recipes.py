"""The recipes run, and do what their page says."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.launches import srun
from support.pool import Pool
from torch import Tensor

import fusedfog
from fusedfog.cost.links import Links
from fusedfog.examples import text
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss
from fusedfog.examples.recipes import low_bandwidth, machines, muon, resize, resnet
from fusedfog.plan import Link, Method, Network, Workload, predict

ROOT = Path(__file__).parents[2]
FOLDER = Path(fusedfog.__file__).parent / "examples" / "recipes"
PAGE = (FOLDER / "README.md").read_text()


def run(name: str, folder: str, *arguments: str) -> None:
    """A recipe's `main` on this rank."""
    torch.set_num_threads(1)
    os.chdir(folder)
    import_module(f"fusedfog.examples.recipes.{name}").main(arguments)


def vector(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# -- side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_the_page_shows_what_a_port_changes(name: str) -> None:
    """Everything but the docstrings, which the page leaves out."""
    old, new = ((FOLDER / f"{one}.py").read_text().split('"""', 2)[2].splitlines() for one in (f"ddp_{name}", name))
    lines = [line for line in difflib.unified_diff(old, new, n=1, lineterm="") if not line.startswith(("---", "+++"))]
    shown = "\n".join("..." if line.startswith("@@") else line for line in lines)
    assert f"```diff\n{shown}\n```" in PAGE, shown


@pytest.mark.parametrize("name", ["ddp_cnn", "cnn"])
def test_a_residual_network_learns_on_two_ranks(ranks: Pool, tmp_path: Path, name: str) -> None:
    ranks.run(2, run, name, str(tmp_path), "--epochs", "3", init=False)
    model = resnet.network()
    model.load_state_dict(torch.load(tmp_path / "cnn.pt", weights_only=True))
    _, images, labels = resnet.digits()
    assert resnet.accuracy(model, images, labels) > 0.85


@pytest.mark.parametrize("name", ["ddp_gpt", "gpt"])
def test_a_gpt_learns_on_two_ranks(ranks: Pool, tmp_path: Path, name: str) -> None:
    ranks.run(2, run, name, str(tmp_path), "--steps", "50", "--accumulate", "1", init=False)
    model = GPT(Shape(context=64, width=64, heads=2, layers=2))
    model.load_state_dict(torch.load(tmp_path / "gpt.pt", weights_only=True))
    validation = text.evenly_spaced(text.load(text.standard_library(), 0, 1).validation, 64, 65)
    with torch.no_grad():
        assert next_token_loss(model, validation).item() < 4.0


# -- machines --------------------------------------------------------------------------------------------------------


def trained_as_two_machines(mesh: bool) -> tuple[Tensor, str, float, int]:
    """The model, why its graph is what it is, bytes that crossed between machines in a step, and different models."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    name = "one" if mesh else f"node{rank // 2}"
    with mock.patch("fusedfog.optim.automatic.this_machine", lambda: name):
        model, optimizer = machines.train(1, mesh, fusedfog.init())
    optimizer.drain()
    stats = optimizer.stats()
    return (
        vector(model),
        stats["topology_reason"],
        stats["bytes_across"] / stats["steps"],
        machines.distinct_models(model),
    )


def test_two_machines_are_two_nodes_whether_they_are_found_or_told(ranks: Pool) -> None:
    found = ranks.run(4, trained_as_two_machines, False, init=False)
    told = ranks.run(4, trained_as_two_machines, True, init=False)
    size = sum(p.nbytes for p in resnet.network().parameters())
    for (model, reason, across, models), (same, given, *_) in zip(found, told, strict=True):
        assert "share its link" in reason and "mesh" in given
        assert torch.equal(model, same)
        assert models == 2
        # Both ranks of a machine send a half of the model; the first step sends twice.
        assert 0.5 * size <= across <= 0.6 * size
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])


SRUN = """#!{python}
import os, subprocess, sys
sys.path[:0] = {path!r}
from support.launches import srun
command = [one for one in sys.argv[1:] if not one.startswith("--kill-on-bad-exit")]
processes = []
for rank in range(4):
    place = srun(rank, 4, 2) | {{"SLURM_JOB_ID": "{job}", "SLURM_STEP_NODELIST": "localhost,elsewhere"}}
    processes.append(subprocess.Popen(command, env=os.environ | place))
sys.exit(max(one.wait() for one in processes))
"""


def test_the_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    assert set(re.findall(r"^#SBATCH --([a-z-]+)=", (FOLDER / "slurm.sh").read_text(), re.MULTILINE)) == {
        "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time",
    }  # fmt: skip
    assert "SLURM_STEP_NODELIST" in srun(0, 4, 2)


@pytest.mark.slow
def test_the_slurm_script_trains_with_the_variables_that_srun_sets(tmp_path: Path) -> None:
    fake = tmp_path / "srun"
    fake.write_text(SRUN.format(python=sys.executable, path=sys.path, job=os.getpid()))
    fake.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), "--mesh", "--epochs", "1"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks have 2 different models" in done.stdout


# -- another number of ranks -----------------------------------------------------------------------------------------


def loaded(folder: str) -> tuple[Tensor, Tensor, float, int]:
    """This rank's parameters and momentum as the newest checkpoint leaves them, the learning rate and the step."""
    torch.set_num_threads(1)
    fusedfog.init()
    torch.manual_seed(1)
    model = resnet.network()
    optimizer = fusedfog.SGD(model.parameters(), lr=0.3, momentum=0.9, model=model)
    saved = fusedfog.load_checkpoint(folder, model, optimizer)
    momentum = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in model.parameters()])
    return vector(model), momentum.clone(), optimizer.param_groups[0]["lr"], saved["step"]


def test_a_run_goes_on_bit_for_bit_on_four_ranks_and_from_the_mean_on_two_or_three(ranks: Pool, tmp_path: Path) -> None:
    def part(number: int, folder: str, until: int) -> None:
        ranks.run(number, run, "resize", str(tmp_path), folder, "--until", str(until), init=False)

    def state(number: int, folder: str) -> list[tuple[Tensor, Tensor, float, int]]:
        return ranks.run(number, loaded, str(tmp_path / folder), init=False)

    part(4, "whole", 6)
    part(4, "run", 3)
    four = state(4, "run")
    for number in (3, 2):
        fewer = state(number, "run")
        for place in (0, 1):
            mean = torch.stack([one[place].double() for one in four]).mean(0)
            torch.testing.assert_close(fewer[0][place].double(), mean, rtol=1e-6, atol=1e-7)
            assert all(torch.equal(one[place], fewer[0][place]) for one in fewer)
            assert not torch.equal(four[0][place], four[1][place])
        assert {one[2:] for one in fewer} == {four[0][2:]}
    part(4, "run", 6)
    for one, other in zip(state(4, "whole"), state(4, "run"), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]
    part(3, "run", 9)
    assert state(3, "run")[0][3] == 9


def test_a_step_sees_the_same_images_on_any_number_of_ranks_and_an_epoch_all_of_them() -> None:
    seen = torch.cat([resize.batch(step, 12, 30) for step in range(5)])
    assert sorted(seen[:30].tolist()) == sorted(seen[30:].tolist()) == list(range(30))
    assert seen[:30].tolist() != seen[30:].tolist()
    for number in (2, 3, 4):
        assert torch.equal(torch.cat(resize.batch(3, 12, 30).tensor_split(number)), resize.batch(3, 12, 30))


# -- low bandwidth ---------------------------------------------------------------------------------------------------

LINKS = Links(1, None, Link(1e-3, 2e6), 1e10)


def compared(folder: str) -> None:
    with mock.patch.object(low_bandwidth, "calibrate", lambda device: (LINKS, [])):
        run("low_bandwidth", folder, "--width=4", "--batch=8", "--rounds=1", "--out=rows.json")


def test_ways_to_send_less_are_predicted_and_measured_side_by_side(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, compared, str(tmp_path), init=False)
    rows = {row["way"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    alone, ddp, awc, rarely, small, outer = rows.values()
    size = sum(p.nbytes for p in resnet.network(4).parameters())
    # The first step sends twice, and 24 small parameters are padded to 256 bytes.
    assert alone["bytes_per_step"] == 0 and ddp["bytes_per_step"] == size
    assert size <= awc["bytes_per_step"] <= 1.7 * size
    assert rarely["bytes_per_step"] < 0.4 * awc["bytes_per_step"]
    assert small["bytes_per_step"] < 0.5 * awc["bytes_per_step"]
    assert outer["bytes_per_step"] < 0.2 * awc["bytes_per_step"]
    workload, network = Workload.even(size / 4, alone["measured_s"]), Network(2, LINKS.across or Link(0, 1))
    assert alone["predicted_s"] is None
    assert awc["predicted_s"] == predict(workload, network, Method("awc", "ring")).step_s
    assert outer["predicted_s"] == pytest.approx(alone["measured_s"] + (1e-3 + size / 2e6) / 16)
    assert all(row["lowest_s"] <= row["measured_s"] <= row["highest_s"] for row in rows.values())


@pytest.mark.slow
def test_the_recipe_runs_on_shaped_links(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "low_bandwidth.py"), "--hosts=2", "--rate=20", "--"]
    done = subprocess.run(
        [*command, "--width=4", "--rounds=1", f"--out={tmp_path / 'rows.json'}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "is skipped" in done.stdout:
        pytest.skip(f"NOT TESTED: {done.stdout.strip()}")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(low_bandwidth.WAYS)


# -- Muon ------------------------------------------------------------------------------------------------------------

SMALL = Shape(context=16, width=16, heads=2, layers=1)
Pair = Sequence[torch.optim.Optimizer]


def of_torch(model: torch.nn.Module) -> Pair:
    hidden, rest = muon.hidden_and_rest(model)
    return (
        torch.optim.Muon(hidden, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95)),
    )


def wrapped(model: torch.nn.Module) -> Pair:
    muon_, adamw = of_torch(model)
    return fusedfog.Decentralized(muon_), fusedfog.Decentralized(adamw)


def muon_steps(build: Callable[[torch.nn.Module], Pair], seed: int, mix: Callable[[Any, Any], None] | None) -> Tensor:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(SMALL)
    pair = build(model)
    source = torch.Generator().manual_seed(seed)
    for _ in range(5):
        next_token_loss(model, torch.randint(256, (4, 17), generator=source)).backward()
        before = vector(model)
        for one in pair:
            one.step()
            one.zero_grad()
        if mix is not None:
            mix(model, before)
    return vector(model)


@torch.no_grad()
def mixed_by_hand(model: torch.nn.Module, before: Tensor) -> None:
    """X+ = inner(X) + (W X - X); between two ranks W is 1/2 everywhere."""
    both = [torch.empty_like(before) for _ in range(2)]
    torch.distributed.all_gather(both, before)
    other = both[1 - torch.distributed.get_rank()]
    torch.nn.utils.vector_to_parameters(vector(model) + 0.5 * (other - before), model.parameters())


def muon_of_rank() -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    return muon_steps(wrapped, rank, None), muon_steps(of_torch, rank, mixed_by_hand)


def test_muon_alone_is_torchs_muon_bit_for_bit() -> None:
    by_torch = muon_steps(of_torch, 0, None)
    assert torch.equal(muon_steps(wrapped, 0, None), by_torch)
    # fusedfog's AdamW rounds in another order than torch's.
    torch.testing.assert_close(muon_steps(muon.optimizers, 0, None), by_torch, rtol=0, atol=2e-5)


def test_muon_on_two_ranks_is_muon_with_an_average_written_by_hand_bit_for_bit(ranks: Pool) -> None:
    found = ranks.run(2, muon_of_rank)
    for mine, by_hand in found:
        assert torch.equal(mine, by_hand)
    assert (found[0][0] - found[1][0]).abs().max() > 1e-3


def test_muon_has_the_matrices_of_hidden_layers_and_no_others() -> None:
    model = GPT(SMALL)
    hidden, rest = muon.hidden_and_rest(model)
    assert len(hidden) == 4 and {id(p) for p in (*hidden, *rest)} == {id(p) for p in model.parameters()}
    assert not any(p is model.tokens.weight or p is model.positions.weight for p in hidden)


def test_muon_trains_on_two_ranks(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, run, "muon", str(tmp_path), "--steps", "3", init=False)
