"""Trainer, accelerate, Lightning and plain torchrun train decentralized, resume and evaluate the average; so does LoRA with peft.

Two real ranks run each of `framework_scripts/` under torchrun. They record what the framework fed them, and train on that
once more: with torch.optim.AdamW and an average written by hand, and with fusedfog.AdamW in a loop of their own.
"""

from __future__ import annotations

import copy
import os
import re
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


def test_it_is_the_loop_of_a_script_of_ones_own_bit_for_bit(trained: tuple[str, Path, Records]) -> None:
    _, _, records = trained
    for record in records:
        assert all(map(torch.equal, record["parameters"], record["parameters_of_plain_loop"]))


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


def adapters_of_rank(folder: str) -> dict[str, Any]:
    """Three steps of the LoRA recipe's model, and the same by hand: X+ = W X + (AdamW(X) - X)."""
    from fusedfog.examples.recipes import lora

    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = lora.gpt2_with_adapters().eval()
    adapters = lora.trained(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    drawn = torch.nn.utils.parameters_to_vector(frozen).clone()
    optimizer = fusedfog.AdamW(adapters, lr=1e-2, model=model)
    base = torch.nn.utils.parameters_to_vector(frozen).clone()
    twin = copy.deepcopy(model)
    by_torch = torch.optim.AdamW(lora.trained(twin), lr=1e-2)
    for step in range(3):
        windows = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(10 * rank + step))
        for one, trainer in ((model, optimizer), (twin, by_torch)):
            trainer.zero_grad()
            lora.loss_of(one, windows).backward()
        optimizer.step()
        before = [p.detach().clone() for p in lora.trained(twin)]
        by_torch.step()
        with torch.no_grad():
            for p, old in zip(lora.trained(twin), before, strict=True):
                mean = old.clone()
                torch.distributed.all_reduce(mean)
                p += mean / 2 - old
    with optimizer.averaged(model):
        if rank == 0:
            model.save_pretrained(folder)
    return {
        "drawn": drawn,
        "base": (base, torch.nn.utils.parameters_to_vector(frozen).clone()),
        "adapters": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "by_hand": [p.detach().clone() for p in lora.trained(twin)],
        "with_moments": len(optimizer.state) == len(adapters) == sum(p in optimizer.state for p in adapters),
        "bytes": (optimizer.stats()["bytes_sent"] / 4, sum(p.nbytes for p in adapters), sum(p.nbytes for p in frozen)),
    }


def test_lora_sends_the_adapters_alone_and_makes_the_base_equal(ranks: Pool, tmp_path: Path) -> None:
    need("transformers", "peft")
    one, other = ranks.run(2, adapters_of_rank, str(tmp_path), timeout=240)
    assert not torch.equal(one["drawn"], other["drawn"])
    for rank in (one, other):
        assert all(torch.equal(base, one["drawn"]) for base in rank["base"])
        assert rank["with_moments"]
        # An exchange before the first step, and one after each: 4 messages, and each adapter is padded to 64 elements.
        sent, adapters, frozen = rank["bytes"]
        assert adapters <= sent <= adapters + 4 * 64 * 4 and frozen > 20 * sent
        assert distance(list(rank["adapters"].values()), rank["by_hand"]) < 2e-5
    assert distance(one["by_hand"], other["by_hand"]) > 1e-3
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in one["adapters"]}
    for name, mine in one["adapters"].items():
        mean = (mine + other["adapters"][name]) / 2
        torch.testing.assert_close(saved[name.replace(".default", "")], mean, rtol=1e-6, atol=1e-7)


def test_the_lora_recipe_runs(tmp_path: Path) -> None:
    need("transformers", "peft")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "fusedfog.examples.recipes.lora", "--steps=20"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    before, after = map(float, re.findall(r"[\d.]+(?= before|\ after)", done.stdout))
    assert after < before
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


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
