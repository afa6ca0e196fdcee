"""Trainer, accelerate, Lightning and plain torchrun train decentralized, resume and evaluate the average.

Two real ranks run each of `framework_scripts/` under torchrun. They record what the framework fed them, and train on that
once more with torch.optim.AdamW and an average written by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pool import Pool

import fusedfog

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "framework_scripts"
NEEDS = {
    "plain_loop": (),
    "hf_trainer": ("transformers", "accelerate"),
    "hf_accelerate": ("transformers", "accelerate"),
    "lightning_fit": ("lightning",),
}
OF_ALL_RANKS = {
    "hf_trainer": "run/checkpoint-4/ranks",
    "hf_accelerate": "checkpoint/ranks",
    "lightning_fit": "run/step=4.ckpt.ranks",
}
Records = list[dict[str, Any]]


def need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"NOT TESTED: {' and '.join(missing)} not installed; pip install -e '.[frameworks]'")


def launch(name: str, mode: str, folder: Path) -> Records:
    """Run a script on two ranks in `folder`; returns what they recorded."""
    for record in folder.glob("record-*.pt"):
        record.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, str(SCRIPTS / f"{name}.py"), mode],
        cwd=folder,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "averages gradients" not in done.stderr
    return [torch.load(folder / f"record-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=list(NEEDS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Records]:
    """A script's name, the folder that an uninterrupted run of it left, and what its ranks recorded."""
    need(*NEEDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, launch(request.param, "train", folder)


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def check_by_hand(records: Records, steps: int) -> None:
    for record in records:
        assert len(record["gradients"]) == steps
        assert distance(record["parameters"], record["parameters_by_hand"]) < 2e-5
        assert record["evaluated"] == pytest.approx(record["evaluated_by_hand"], rel=1e-5)
    one, other = records
    for mine, yours in zip(one["gradients"], other["gradients"], strict=True):
        assert distance(mine, yours) > 1e-2
    # Far more than the tolerance: averaged gradients would have kept ranks equal.
    assert distance(one["parameters"], other["parameters"]) > 2e-4


def test_gradients_stay_local_and_parameters_are_mixed(trained: tuple[str, Path, Records]) -> None:
    _, _, records = trained
    check_by_hand(records, steps=8)
    one, other = records
    assert distance(one["start"], other["start"]) == 0
    assert not any(torch.equal(mine, yours) for mine, yours in zip(one["fed"], other["fed"], strict=True))
    assert distance(one["start"], one["parameters"]) > 1e-2


def test_every_rank_resumes_bit_for_bit(trained: tuple[str, Path, Records], tmp_path: Path) -> None:
    name, folder, whole = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    resumed = launch(name, "resume", tmp_path)
    check_by_hand(resumed, steps=4)
    for before, after in zip(whole, resumed, strict=True):
        assert all(map(torch.equal, before["parameters"], after["parameters"]))
        assert all(map(torch.equal, before["fed"][-len(after["fed"]) :], after["fed"]))


def test_the_frameworks_own_checkpoint_resumes_from_rank_0(trained: tuple[str, Path, Records], tmp_path: Path) -> None:
    name, folder, whole = trained
    if name not in OF_ALL_RANKS:
        pytest.skip("plain torchrun has no checkpoint of its own")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / OF_ALL_RANKS[name])
    resumed = launch(name, "resume", tmp_path)
    check_by_hand(resumed, steps=4)
    assert distance(resumed[0]["start"], resumed[1]["start"]) == 0
    assert distance(resumed[0]["start"], whole[0]["start"]) > 1e-3


def scaled_steps() -> tuple[list[float], list[bool]]:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    rank = torch.distributed.get_rank()
    param = torch.nn.Parameter(torch.zeros(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = AcceleratedOptimizer(fusedfog.SGD([param], lr=1.0, topology="ring"), scaler=scaler)
    values, finite = [], []
    for gradient in (1.0 + rank, float("inf") if rank else 8.0):
        opt.zero_grad()
        scaler.scale(param * gradient).sum().backward()
        opt.step()
        values.append(param.item())
        finite.append(not opt.step_was_skipped)
    return values, finite


def test_accelerates_scaler_skips_an_update_but_no_exchange(ranks: Pool) -> None:
    need("accelerate")
    (zero, _), (one, _) = ranks.run(2, scaled_steps)
    assert zero == [-1.0, -1.5 - 8.0]
    assert one == [-2.0, -1.5]


def fit_in_bf16(clip: float | None, max_grad_norm: float | None, folder: str) -> float:
    """How far one step of SGD moves the parameters: the norm of the clipped gradient."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return 100 * self.layer(batch[0]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fusedfog.SGD(self.parameters(), lr=1.0, max_grad_norm=max_grad_norm)

    module = Module()
    before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 4)), batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        precision="bf16-mixed",
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader)
    return (torch.nn.utils.parameters_to_vector(module.parameters()) - before).norm().item()


def test_lightning_refuses_to_clip_in_mixed_precision_and_max_grad_norm_does_it(tmp_path: Path) -> None:
    need("lightning")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit_in_bf16(0.5, None, str(tmp_path))
    assert fit_in_bf16(None, 0.5, str(tmp_path)) == pytest.approx(0.5, rel=1e-4)
