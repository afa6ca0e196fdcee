"""The GPT example: its text, its model, accumulation, and that it goes on after kill -9 as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool, RankFailure
from support.processes import ranks_of, wait_for_step

import fusedfog
from fusedfog.examples import gpt, text
from fusedfog.examples.checkpoints import Checkpoints
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss, parameter_groups

TINY = ["--width=16", "--heads=2", "--layers=1", "--context=16", "--batch=4", "--windows=12", "--warm-up=5"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 100 small Python files that are alike."""
    root = tmp_path / "sources"
    root.mkdir()
    for number in range(100):
        (root / f"module_{number}.py").write_text(
            "".join(f"def module_{number}_{i}(x): return x + {i}\n" for i in range(30))
        )
    return root


# -- text ------------------------------------------------------------------------------------------------------------


def test_files_train_or_validate_by_their_name_alone(folder: Path) -> None:
    train, validation = text.split(folder)
    assert sorted(train + validation) == sorted(path.name for path in folder.iterdir())
    assert 1 <= len(validation) <= 10
    (folder / "new.py").write_text("another = 1\n")
    assert set(validation) <= set(text.split(folder)[1]) <= {*validation, "new.py"}
    assert text.split(folder) == text.split(folder)


def test_ranks_share_out_the_training_files_and_see_nothing_of_the_validation_files(folder: Path) -> None:
    train, validation = text.split(folder)
    pieces = [text.load(folder, rank, 3) for rank in range(3)]
    whole = bytes(torch.cat([piece.train for piece in pieces]).tolist())
    for names, content in ((train, whole), (validation, bytes(pieces[0].validation.tolist()))):
        assert content == b"".join((folder / name).read_bytes() + b"\0" for name in names)
    assert not any(f"def {Path(name).stem}_".encode() in whole for name in validation)
    assert max(len(piece.train) for piece in pieces) - min(len(piece.train) for piece in pieces) <= 1
    assert all(torch.equal(piece.validation, pieces[0].validation) for piece in pieces)


def test_the_standard_library_is_large_enough_and_has_no_packages_or_tests() -> None:
    train, validation = text.split(text.standard_library())
    assert {"os.py", "json/decoder.py"} <= {*train, *validation}
    assert not any(part in name.split("/") for name in train + validation for part in ("site-packages", "test"))
    assert 0.03 < len(validation) / len(train + validation) < 0.07


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(FileNotFoundError, match=r"1 Python files under .* --text"):
        text.load(tmp_path, 0, 1)


def test_windows_are_pieces_of_the_text_and_go_on_from_a_saved_place() -> None:
    numbers = torch.arange(200, dtype=torch.uint8)
    windows = text.RandomWindows(numbers, 5, seed=1)
    first = windows.draw(300)
    assert torch.equal(first - first[:, :1], torch.arange(5).expand(300, 5))
    assert first[:, 0].min() == 0 and first[:, -1].max() == 199  # both ends are reached
    place = windows.state_dict()
    again = text.RandomWindows(numbers, 5, seed=2)
    again.load_state_dict(place)
    assert torch.equal(windows.draw(7), again.draw(7))
    assert text.evenly_spaced(numbers, 3, 50)[:, 0].tolist() == [0, 75, 150]


# -- model -----------------------------------------------------------------------------------------------------------


def test_the_model_cannot_see_ahead_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    model = GPT(Shape())
    assert sum(p.numel() for p in model.parameters()) == 256 * 128 + 128 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128
    tokens = torch.randint(256, (2, 129))
    changed = tokens.clone()
    changed[:, 70] = (changed[:, 70] + 1) % 256
    one, other = model(tokens[:, :-1]), model(changed[:, :-1])
    assert torch.equal(one[:, :70], other[:, :70])
    assert not torch.allclose(one[:, 70:], other[:, 70:])
    assert abs(next_token_loss(model, tokens).item() - math.log(256)) < 0.1


def test_matrices_decay_and_gains_do_not() -> None:
    model = GPT(Shape(layers=2))
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) == 2 + 2 * 4 and len(kept["params"]) == 2 * 2 + 1  # the tied matrix is there once


# -- training --------------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> str:
    torch.set_num_threads(1)
    gpt.main(["--text", str(folder), *TINY, *arguments])
    return "done"


@pytest.mark.parametrize("algorithm", ["awc", "ddp"])
def test_two_ranks_learn(ranks: Pool, folder: Path, tmp_path: Path, algorithm: str) -> None:
    out = tmp_path / "out.json"
    run_options = ("--steps=60", "--lr=1e-2", "--evaluate-every=20", "--out", str(out), "--algorithm", algorithm)
    ranks.run(2, run, folder, *run_options, init=False)
    report = json.loads(out.read_text())
    history = report["history"]
    assert history["steps"] == [20, 40, 60]
    assert math.log(256) > history["validation_loss"][0] > history["validation_loss"][1] > history["validation_loss"][2]
    assert history["validation_loss"][2] < math.log(256) - 2
    assert all((distance > 1e-4) == (algorithm == "awc") for distance in history["consensus_distance"][:2])
    # One neighbour: the parameters once, with the padding of their segments; or a ring all-reduce of two ranks.
    padding = 4 * 64 * 20
    assert 4 * report["parameters"] <= report["bytes_per_step"] <= (4 * report["parameters"] + padding) * 61 / 60
    assert report["ranks"] == 2 and report["tokens_per_s"] > 0


def accumulated(folder: Path, algorithm: str, batch: int, micro_batches: int) -> torch.Tensor:
    settings = gpt.Settings(
        algorithm, precision="fp32", steps=8, batch=batch, accumulate=micro_batches, context=16, width=16, warm_up=2
    )
    torch.manual_seed(0)
    model = GPT(settings.shape).double()
    rank, size = gpt.place()
    trainer = gpt.Trainer(model, text.load(folder, rank, size), settings, torch.device("cpu"))
    losses = [trainer.update().item() for _ in range(settings.steps)]
    return torch.cat([torch.tensor(losses), *(p.detach().flatten() for p in model.parameters())])


@pytest.mark.parametrize("algorithm", ["awc", "ddp"])
def test_micro_batches_make_the_step_of_one_large_batch(ranks: Pool, folder: Path, algorithm: str) -> None:
    whole = ranks.run(2, accumulated, folder, algorithm, 12, 1)
    parts = ranks.run(2, accumulated, folder, algorithm, 3, 4)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert torch.equal(*(run[8:] for run in whole)) == (algorithm == "ddp")


def evaluate(folder: Path, algorithm: str) -> tuple[list[float], list[float]]:
    """What the trainer measured, and the same by hand: distance and loss of the mean of all ranks' parameters."""
    settings = gpt.Settings(algorithm, precision="fp32", batch=3, context=16, width=16, layers=1, windows=11, lr=0.05)
    torch.manual_seed(0)
    trainer = gpt.Trainer(GPT(settings.shape), text.load(folder, *gpt.place()), settings, torch.device("cpu"))
    for _ in range(3):
        trainer.update()
    trainer.evaluate(train_loss=0.0)
    mine = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    rows = torch.stack(everyone).double()
    average = GPT(settings.shape).double()
    torch.nn.utils.vector_to_parameters(rows.mean(0), average.parameters())
    windows = text.evenly_spaced(text.load(folder, 0, 1).validation, 11, 17)
    by_hand = [(rows - rows.mean(0)).square().sum(1).mean().sqrt().item(), next_token_loss(average, windows).item()]
    return [trainer.history.consensus_distance[-1], trainer.history.validation_loss[-1]], by_hand


@pytest.mark.parametrize("algorithm", ["awc", "ddp"])
def test_the_average_of_all_ranks_is_what_is_evaluated(ranks: Pool, folder: Path, algorithm: str) -> None:
    for measured, by_hand in ranks.run(3, evaluate, folder, algorithm):
        assert measured == pytest.approx(by_hand, rel=1e-5)
        assert (measured[0] > 0.01) == (algorithm == "awc")


def test_the_learning_rate_rises_linearly_and_falls_to_zero(folder: Path) -> None:
    settings = gpt.Settings(steps=30, warm_up=10, lr=0.5, width=16, layers=1, context=16, precision="fp32")
    trainer = gpt.Trainer(GPT(settings.shape), text.load(folder, 0, 1), settings, torch.device("cpu"))
    rates = []
    for _ in range(settings.steps):
        rates.append(trainer.schedule.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.schedule.step()
    assert rates[:10] == pytest.approx([0.05 * k for k in range(1, 11)])
    assert rates[10] == 0.5 and rates[20] == pytest.approx(0.25) and trainer.schedule.get_last_lr()[0] == 0.0


# -- checkpoints -----------------------------------------------------------------------------------------------------

RESUMABLE = [
    "--steps=13",
    "--checkpoint-every=5",
    "--evaluate-every=4",
    "--dropout=0.1",
    "--accumulate=2",
    "--precision=bf16",
]


def final_state(folder: Path, step: int, size: int) -> list[dict[str, Any]]:
    states = [torch.load(folder / f"step-{step:07}-rank-{rank}-of-{size}.pt") for rank in range(size)]
    for state in states:
        for group in state["optimizer"]["param_groups"]:
            group.pop("differentiable", None)  # torch adds it to the groups of optimizers that have loaded a state
    return states


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal bit for bit, however nested."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("chosen", ["--moment-steps=1", "--moment-steps=3", "--algorithm=gradient_tracking"])
def test_a_run_goes_on_from_the_newest_step_that_all_ranks_have(
    ranks: Pool, folder: Path, tmp_path: Path, chosen: str
) -> None:
    saved = tmp_path / "saved"
    options = (*RESUMABLE, chosen, "--checkpoint", str(saved), "--resume")
    ranks.run(2, run, folder, *options, init=False)
    assert {int(path.name[5:12]) for path in saved.iterdir()} == {10, 13}  # the last two
    undisturbed = final_state(saved, 13, 2)
    assert not torch.equal(undisturbed[0]["rng"], undisturbed[1]["rng"])
    (saved / "step-0000013-rank-1-of-2.pt").unlink()
    ranks.run(2, run, folder, *options, init=False)
    assert_same(final_state(saved, 13, 2), undisturbed)


def save_states(folder: Path) -> list[int | None]:
    """What rank 0 finds after each save, the last one failing on rank 1 alone."""
    checkpoints = Checkpoints(folder)
    found: list[int | None] = [checkpoints.newest()]
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
        found.append(checkpoints.newest())
    if dist.get_rank() == 1:
        with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
            checkpoints.save(4, {"step": lambda: 4})
    else:
        checkpoints._gather = lambda value: [value]  # type: ignore[method-assign]  # nobody answers
        checkpoints.save(4, {"step": 4})
        del checkpoints._gather
    found.append(checkpoints.newest())
    assert checkpoints.load(3) == {"step": 3}
    return found


def test_an_unfinished_file_is_no_checkpoint(ranks: Pool, tmp_path: Path) -> None:
    assert ranks.run(2, save_states, tmp_path) == [[None, 1, 2, 3, 3]] * 2
    assert not (tmp_path / "step-0000004-rank-0-of-2.pt").exists()  # dropped: the run goes on from step 3


class Hostile:
    """What makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.mark,)


def load_damaged(folder: Path, damage: str) -> str:
    """Rank 1's file is damaged; what each rank is told."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"weight": torch.arange(1000.0)})
    assert torch.equal(checkpoints.load(1)["weight"], torch.arange(1000.0))
    if dist.get_rank() == 1:
        path = checkpoints.path(1)
        raw = bytearray(path.read_bytes())
        raw[raw.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
        path.write_bytes(raw if damage == "flipped" else raw[:1000])
        if damage == "hostile":
            torch.save({"weight": Hostile(folder / "executed")}, path)
    try:
        checkpoints.load(1)
    except fusedfog.CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("damage", "words"),
    [("flipped", "another checksum"), ("cut", "not a zip file"), ("hostile", "Weights only load failed")],
)
def test_a_damaged_or_hostile_file_is_named_on_every_rank(ranks: Pool, tmp_path: Path, damage: str, words: str) -> None:
    for rank, told in enumerate(ranks.run(2, load_damaged, tmp_path, damage)):
        assert told.startswith(f"rank {rank}: {tmp_path}/step-0000001-rank-1-of-2.pt cannot be loaded (")
        assert words in told
    assert not (tmp_path / "executed").exists()


def test_checkpoints_of_another_run_are_refused(ranks: Pool, folder: Path, tmp_path: Path) -> None:
    saved = ("--checkpoint", str(tmp_path / "saved"))
    run(folder, "--steps=2", *saved)
    with pytest.raises(ValueError, match="holds a checkpoint of step 2: add --resume"):
        run(folder, "--steps=2", *saved)
    with pytest.raises(ValueError, match=r"a run with lr 0\.004 \(now 0\.005\);"):
        run(folder, "--steps=2", *saved, "--resume", "--lr=0.005")
    with pytest.raises(RankFailure, match="checkpoints of 1 ranks, but this run has 2"):
        ranks.run(2, run, folder, "--steps=2", *saved, "--resume", init=False)


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--steps=0"], "at least 1"),
        (["--precision=fp8"], "fp32 or bf16"),
        (["--width=50", "--heads=4"], "4 heads"),
        (["--resume"], "needs --checkpoint"),
    ):
        with pytest.raises(SystemExit):
            gpt.main(arguments)
        assert complaint in capsys.readouterr().err


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def launch(folder: Path, saved: Path, restarts: int) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    example = [f"--max-restarts={restarts}", "-m", "fusedfog.examples.gpt", "--text", str(folder), *TINY]
    options = ["--steps=200", "--checkpoint-every=20", "--dropout=0.1", "--checkpoint", str(saved), "--resume"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # Else torchrun hands restarted ranks the old store, with the addresses of the dead (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.Popen(
        [*launcher, *example, *options], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")
def test_after_kill_9_the_result_is_that_of_an_undisturbed_run(folder: Path, tmp_path: Path) -> None:
    undisturbed, all_killed, one_killed = (tmp_path / name for name in ("undisturbed", "all", "one"))
    assert launch(folder, undisturbed, restarts=0).wait(300) == 0
    expected = final_state(undisturbed, 200, 2)

    first = launch(folder, all_killed, restarts=0)
    wait_for_step(all_killed, 60, first)
    for pid in [first.pid, *(pid for pid, _ in ranks_of(first))]:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    assert not list(all_killed.glob("step-0000200*"))
    assert launch(folder, all_killed, restarts=0).wait(300) == 0
    assert_same(final_state(all_killed, 200, 2), expected)

    launcher = launch(folder, one_killed, restarts=1)
    wait_for_step(one_killed, 60, launcher)
    os.kill(next(pid for pid, rank in ranks_of(launcher) if rank == 1), signal.SIGKILL)
    assert launcher.wait(300) == 0
    assert_same(final_state(one_killed, 200, 2), expected)
