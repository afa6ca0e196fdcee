"""A run goes on from a folder of torch.distributed.checkpoint that others wrote, on the user's word only."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pool import Pool
from support.sharded import build as build_sharded
from support.sharded import furthest, whole
from support.sharded import iterate as iterate_sharded
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import fusedfog


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.BatchNorm1d(9), nn.Linear(9, 3)).double()


def iterate(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        opt.zero_grad()
        model(
            torch.randn(8, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        ).square().mean().backward()
        opt.step()


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, list[torch.Tensor]]:
    """A folder that torch wrote, of a run of torch.optim, and what that run came to two steps later."""
    model = network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    iterate(model, opt, 0, 3)
    states, optimizer = get_state_dict(model, opt)
    dcp.save({"model": states, "optimizer": optimizer}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    iterate(model, opt, 3, 5)
    return tmp_path / "theirs", [value.clone() for value in model.state_dict().values()]


def resume(path: str, trusted: bool) -> list[torch.Tensor]:
    model = network()
    opt = fusedfog.AdamW(model.parameters(), lr=0.05)
    assert fusedfog.load_checkpoint(path, model, opt, trusted=trusted) == {}
    iterate(model, opt, 3, 5)
    return [value.clone() for value in model.state_dict().values()]


def test_every_rank_goes_on_from_it(ranks: Pool, theirs: tuple[Path, list[torch.Tensor]]) -> None:
    path, later = theirs
    for found in ranks.run(2, resume, str(path), True):
        for one, other in zip(found, later, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_the_users_word_it_is_refused_on_every_rank(
    ranks: Pool, theirs: tuple[Path, list[torch.Tensor]]
) -> None:
    for rank, outcome in enumerate(ranks.outcomes(2, resume, str(theirs[0]), False)):
        assert outcome.error_type == "CheckpointError"
        assert outcome.message.startswith(
            f"rank {rank}: load_checkpoint() failed on rank 0: {theirs[0]} is a folder of torch"
        )
        assert outcome.message.endswith("pass trusted=True")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.mark,)


def test_a_hostile_one_is_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    model = network()
    opt = fusedfog.AdamW(model.parameters(), lr=0.05)
    with pytest.raises(fusedfog.CheckpointError, match="trusted=True"):
        fusedfog.load_checkpoint(tmp_path, model, opt)
    assert not mark.exists()
    # So this is what the word is for.
    with pytest.raises(fusedfog.CheckpointError):
        fusedfog.load_checkpoint(tmp_path, model, opt, trusted=True)
    assert mark.exists()


def test_what_does_not_fit_is_an_exception_that_changes_nothing(
    tmp_path: Path, theirs: tuple[Path, list[torch.Tensor]]
) -> None:
    model = network()
    opt = fusedfog.AdamW(model.parameters(), lr=0.05)
    before = [value.clone() for value in model.state_dict().values()]
    dcp.save({"something": torch.ones(2)}, checkpoint_id=tmp_path / "else", no_dist=True)
    next(theirs[0].glob("*.distcp")).write_bytes(b"")
    for path in (tmp_path / "else", theirs[0]):
        with pytest.raises(fusedfog.CheckpointError, match=f"{path} has no 'model' and 'optimizer'"):
            fusedfog.load_checkpoint(path, model, opt, trusted=True)
    assert all(map(torch.equal, before, model.state_dict().values()))


def save_sharded(path: str) -> Any:
    """Of one machine of two, all of whose shards are in the folder."""
    model, opt = build_sharded("AdamW")
    iterate_sharded(model, opt, 0, 3)
    mesh = opt.param_groups[0]["params"][0].device_mesh
    states, optimizer = get_state_dict(model, opt)
    folder = f"{path}/{torch.distributed.get_rank() // 2}"
    dcp.save({"model": states, "optimizer": optimizer}, checkpoint_id=folder, process_group=mesh.get_group())
    return whole(model)


def load_sharded(path: str) -> Any:
    model, opt = build_sharded("AdamW")
    fusedfog.load_checkpoint(f"{path}/0", model, opt, trusted=True)
    return whole(model)


def test_shards_are_read_as_they_are_cut(ranks: Pool, tmp_path: Path) -> None:
    saved = ranks.run(4, save_sharded, str(tmp_path))
    for loaded in ranks.run(4, load_sharded, str(tmp_path)):
        assert furthest([loaded], [saved[0]]) == 0
