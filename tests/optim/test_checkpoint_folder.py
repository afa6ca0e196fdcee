"""A run's folder: complete checkpoints or none, the newest is taken, old ones go, and other runs' stay."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.optim import checkpoint, checkpoint_file, checkpoint_folder

NUMBERED = re.compile(r"\d{6}-step-\d{8}")


def build(width: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(7)
    model = nn.Linear(4, width)
    return model, fusedfog.SGD(model.parameters(), lr=0.1)


def iterate(model: nn.Module, opt: Any, times: int = 1) -> None:
    for _ in range(times):
        opt.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward()
        opt.step()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def another_process() -> None:
    """What this process knows of runs, another would not."""
    checkpoint._Runs.names.clear()
    checkpoint._Runs.warned.clear()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    another_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_each_save_makes_a_folder_and_the_newest_is_loaded(tmp_path: Path) -> None:
    model, opt = build()
    saved = []
    for step in range(3):
        iterate(model, opt)
        saved.append(fusedfog.save_checkpoint(tmp_path / "run", model, opt, step=step))
    assert [path.name for path in saved] == [f"00000{n}-step-0000000{n}" for n in (1, 2, 3)]
    assert names(tmp_path / "run") == [path.name for path in saved]
    assert fusedfog.load_checkpoint(str(tmp_path / "run"), model, opt) == {"step": 2}
    assert fusedfog.load_checkpoint(saved[0], model, opt) == {"step": 0}
    assert opt.stats()["steps"] == 1


def test_the_newest_is_the_one_that_was_written_last_also_after_going_back(tmp_path: Path) -> None:
    model, opt = build()
    for step in range(3):
        iterate(model, opt)
        fusedfog.save_checkpoint(tmp_path, model, opt, keep=2, step=step)
    fusedfog.load_checkpoint(tmp_path / "000002-step-00000002", model, opt)
    os.utime(tmp_path / "000003-step-00000003", (2**31, 2**31))  # clocks say nothing
    assert fusedfog.save_checkpoint(tmp_path, model, opt, keep=2, step="again").name == "000004-step-00000002"
    assert names(tmp_path) == ["000003-step-00000003", "000004-step-00000002"]
    assert fusedfog.load_checkpoint(tmp_path, model, opt) == {"step": "again"}


def test_keep_counts_the_runs_own_checkpoints_also_after_a_resume(tmp_path: Path) -> None:
    model, opt = build()
    for _ in range(4):
        fusedfog.save_checkpoint(tmp_path, model, opt, keep=3)
    assert [name[:6] for name in names(tmp_path)] == ["000002", "000003", "000004"]
    another_process()
    fusedfog.load_checkpoint(tmp_path, model, opt)
    fusedfog.save_checkpoint(tmp_path, model, opt, keep=1)
    assert [name[:6] for name in names(tmp_path)] == ["000005"]


def test_checkpoints_of_another_run_stay_and_are_told_of_once(tmp_path: Path) -> None:
    model, opt = build()
    fusedfog.save_checkpoint(tmp_path, model, opt, whose="first")
    another_process()
    with pytest.warns(
        fusedfog.ForeignCheckpointWarning, match="has checkpoints of another run too, 000001-step-00000000 the"
    ):
        fusedfog.save_checkpoint(tmp_path, model, opt, keep=1, whose="second")
    fusedfog.save_checkpoint(tmp_path, model, opt, keep=1, whose="second")
    assert [name[:6] for name in names(tmp_path)] == ["000001", "000003"]
    assert fusedfog.load_checkpoint(tmp_path, model, opt) == {"whose": "second"}


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "all"])
def test_keep_is_a_number_from_1_or_none(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match="keep is how many checkpoints stay"):
        fusedfog.save_checkpoint(tmp_path / "run", *build(), keep=keep)
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_an_error_that_names_the_one_before(tmp_path: Path) -> None:
    model, opt = build()
    first, second = (fusedfog.save_checkpoint(tmp_path, model, opt, number=number) for number in range(2))
    (second / "manifest.json").unlink()
    with pytest.raises(
        fusedfog.CheckpointError, match=f"manifest.json cannot be read: .*; the checkpoint before it is {first}"
    ):
        fusedfog.load_checkpoint(tmp_path, model, opt)
    shutil.rmtree(second)
    assert fusedfog.load_checkpoint(tmp_path, model, opt) == {"number": 0}


def test_folders_without_a_checkpoint_say_so(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "holds no checkpoint written by"), (tmp_path / "none", "is no folder")):
        with pytest.raises(fusedfog.CheckpointError, match=words):
            fusedfog.load_checkpoint(path, *build())


def test_a_checkpoint_is_no_runs_folder(tmp_path: Path) -> None:
    model, opt = build()
    saved = fusedfog.save_checkpoint(tmp_path, model, opt)
    with pytest.raises(fusedfog.CheckpointError, match="is a checkpoint itself: give the folder of the run"):
        fusedfog.save_checkpoint(saved, model, opt)


def test_what_else_is_in_the_folder_stays_and_is_in_nobodys_way(tmp_path: Path) -> None:
    model, opt = build()
    (tmp_path / "log.txt").write_text("x")
    (tmp_path / "000009-step-00000009").write_text("a file")
    (tmp_path / "step-7").mkdir()
    for _ in range(3):
        fusedfog.save_checkpoint(tmp_path, model, opt, keep=1)
    assert [name for name in names(tmp_path) if "-step-0000000" not in name or name.endswith("9")] == [
        "000009-step-00000009",
        "log.txt",
        "step-7",
    ]
    fusedfog.load_checkpoint(tmp_path, model, opt)


def test_odd_paths_and_links_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = build()
    odd = tmp_path / "zwei Läufe\n✓" / "run %s {0}"
    fusedfog.save_checkpoint(odd, model, opt, here=True)
    (tmp_path / "link").symlink_to(odd)
    assert fusedfog.load_checkpoint(tmp_path / "link", model, opt) == {"here": True}
    another_process()
    fusedfog.load_checkpoint(tmp_path / "link", model, opt)  # the run goes on by whichever way
    # A checkpoint that was moved to another disk: the link goes, what it points to stays.
    moved = tmp_path / "moved"
    (odd / "000001-step-00000000").rename(moved)
    (odd / "000001-step-00000000").symlink_to(moved)
    assert fusedfog.load_checkpoint(odd, model, opt) == {"here": True}
    monkeypatch.chdir(odd.parent)
    fusedfog.save_checkpoint("run %s {0}", model, opt, keep=1, here=2)
    assert names(odd) == ["000002-step-00000000"]
    assert fusedfog.load_checkpoint(moved, model, opt) == {"here": True}


def leave_unfinished(run: Path, age: float) -> Path:
    """What a killed run leaves behind."""
    left = run / f".unfinished-{age:.0f}"
    left.mkdir(parents=True)
    for name in ("manifest.json", "rank-00000.safetensors"):
        (left / name).write_bytes(b"x")
    then = time.time() - age
    for path in (*left.iterdir(), left):
        os.utime(path, (then, then))
    return left


def test_leftovers_of_killed_runs_go_and_live_ones_stay(tmp_path: Path) -> None:
    model, opt = build()
    old, locked, young = (leave_unfinished(tmp_path, age) for age in (3600, 3601, 5))
    with (locked / "manifest.json").open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        fusedfog.save_checkpoint(tmp_path, model, opt)
        assert not old.exists() and locked.exists() and young.exists()
    fusedfog.save_checkpoint(tmp_path, model, opt)
    assert not locked.exists() and young.exists()
    linked = tmp_path / ".unfinished-link"
    linked.symlink_to(shutil.copytree(young, tmp_path.parent / "elsewhere"))
    fusedfog.save_checkpoint(tmp_path, model, opt)
    assert linked.exists()


def test_a_live_save_is_locked(tmp_path: Path) -> None:
    unfinished = checkpoint_folder.Unfinished()
    path = unfinished.begin(tmp_path)
    for file in (*path.iterdir(), path):
        os.utime(file, (1, 1))
    fusedfog.save_checkpoint(tmp_path, *build())
    assert path.exists()
    unfinished.close()
    assert not path.exists()


def test_two_runs_that_finish_at_once_both_have_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = build()
    fusedfog.save_checkpoint(tmp_path, model, opt, run=1)
    # The other run has come between this one's look at the folder and its rename.
    monkeypatch.setattr(checkpoint_folder, "complete", lambda run: [])
    assert fusedfog.save_checkpoint(tmp_path, model, opt, run=2).name == "000002-step-00000000"


def save_beside_another(run: str) -> list[Any]:
    """A run of one rank, while another one saves into the same folder."""
    rank = fusedfog.rank()
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    model, opt = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            last = fusedfog.save_checkpoint(run, model, opt, keep=2, whose=[rank, number])
    told = [one for one in caught if issubclass(one.category, fusedfog.ForeignCheckpointWarning)]
    assert fusedfog.load_checkpoint(last, model, opt) == {"whose": [rank, 19]}
    return [len(told), last.name]


def test_two_runs_in_one_folder_lose_nothing_and_are_warned(ranks: Pool, tmp_path: Path) -> None:
    (_, one), (_, other) = outcomes = ranks.run(2, save_beside_another, str(tmp_path), init=False)
    assert one != other and len(names(tmp_path)) == 4 and {one, other} <= set(names(tmp_path))
    assert sum(told for told, _ in outcomes) >= 1 and max(told for told, _ in outcomes) <= 1


# -- what cannot be written ------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, words in (
        (tmp_path / "file", f"{tmp_path}/file.*(Not a directory|File exists)"),
        (tmp_path / "file" / "run", "Not a directory"),
        (Path("/proc/nothing"), "/proc/nothing: No such file or directory"),
    ):
        with pytest.raises(fusedfog.CheckpointError, match=words):
            fusedfog.save_checkpoint(path, *build())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_disk_is_named_and_can_be_loaded_from(small_disk: Path) -> None:
    model, opt = build()
    fusedfog.save_checkpoint(small_disk, model, opt, x=1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(fusedfog.CheckpointError, match=f"{small_disk}/.unfinished-.*: Read-only file system"):
        fusedfog.save_checkpoint(small_disk, model, opt)
    assert fusedfog.load_checkpoint(small_disk, model, opt) == {"x": 1}


def fill(disk: str, widths: tuple[int, ...]) -> list[str]:
    """Save models of these widths, and say what was said."""
    told = []
    for number, width in enumerate(widths):
        model, opt = build(width)
        try:
            told.append(fusedfog.save_checkpoint(disk, model, opt, keep=1, number=number).name)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        opt.release()
    return told


def resume(run: str, width: int) -> Any:
    model, opt = build(width)
    return fusedfog.load_checkpoint(run, model, opt)


def test_a_full_disk_is_an_error_on_every_rank_and_the_last_checkpoint_stays(ranks: Pool, small_disk: Path) -> None:
    for rank, (first, second, third) in enumerate(ranks.run(2, fill, str(small_disk), (1000, 10000, 1001))):
        assert (first, third) == ("000001-step-00000000", "000002-step-00000000")
        assert second.startswith(f"CheckpointError: rank {rank}: save_checkpoint() failed on rank ")
        assert re.search(rf"{small_disk}/\.unfinished-\w+/rank-0000[01]\.safetensors: No space left on device", second)
    assert names(small_disk) == ["000002-step-00000000"]  # and no leftover holds the space
    assert ranks.run(2, resume, str(small_disk), 1001) == [{"number": 2}] * 2


def fail(run: str, who: int, where: str) -> tuple[str, list[str]]:
    """Save, and save again with a disk that is full for one rank, from one call on."""
    model, opt = build()
    fusedfog.save_checkpoint(run, model, opt, number=0)
    real = getattr(os, where)

    def full(*args: Any) -> Any:
        if fusedfog.rank() == who:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *args[:-1])
        return real(*args)

    setattr(os, where, full)
    try:
        fusedfog.save_checkpoint(run, model, opt, number=1)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    finally:
        setattr(os, where, real)
    found = names(Path(run))
    assert fusedfog.load_checkpoint(run, model, opt) == {"number": 0}
    fusedfog.save_checkpoint(run, model, opt, number=2)
    assert fusedfog.load_checkpoint(run, model, opt) == {"number": 2}
    return text, found


@pytest.mark.parametrize(("who", "where"), [(1, "fsync"), (0, "fsync"), (0, "rename")])
def test_one_rank_that_cannot_write_is_named_on_all(ranks: Pool, tmp_path: Path, who: int, where: str) -> None:
    for rank, (text, found) in enumerate(ranks.run(2, fail, str(tmp_path), who, where)):
        assert text.startswith(
            f"CheckpointError: rank {rank}: save_checkpoint() failed on rank {who}: {tmp_path}/.unfinished-"
        )
        assert text.endswith("No space left on device")
        assert rank or found == ["000001-step-00000000"]


# -- ranks that do not mean the same ---------------------------------------------------------------------------------


def save_apart(run: str) -> tuple[list[str], Any]:
    rank = dist.get_rank()
    model, opt = build()
    told = []

    def say(*args: Any, **keywords: Any) -> None:
        try:
            fusedfog.save_checkpoint(*args, **keywords)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")

    say(f"{run}/{rank}", model, opt)
    say(run, model, opt, keep=1 + rank)
    say(run, model, opt, x=rank if rank < 1 else object())
    assert not list(Path(run).rglob("*-step-*")) and not list(Path(run).glob(".*"))
    # A relative path is of rank 0's working directory.
    os.makedirs(f"{run}/at-{rank}", exist_ok=True)
    os.chdir(f"{run}/at-{rank}")
    fusedfog.save_checkpoint("there", model, opt, mine=rank)
    return told, fusedfog.load_checkpoint("there", model, opt)


def test_ranks_that_do_not_mean_the_same_are_told_so(ranks: Pool, tmp_path: Path) -> None:
    for rank, (told, loaded) in enumerate(ranks.run(2, save_apart, str(tmp_path))):
        paths, keep, extra = told
        told_by = f"MismatchError: rank {rank}: save_checkpoint(): "
        assert paths == f"{told_by}path is '{tmp_path}/1' on rank 1 but '{tmp_path}/0' on rank 0"
        assert keep == f"{told_by}keep is 2 on rank 1 but 1 on rank 0"
        assert extra.startswith(
            f"TypeError: rank {rank}: save_checkpoint() failed on rank 1: extra/x is of type object"
        )
        assert loaded == {"mine": rank}
    assert names(tmp_path / "at-0") == ["there"] and names(tmp_path / "at-1") == []


def see_nothing(run: str) -> str:
    """On rank 1 the folder is not there, as on a machine with a disk of its own."""
    model, opt = build()
    if dist.get_rank():
        there = Path.exists
        Path.exists = lambda path: there(path) and ".unfinished" not in str(path)  # type: ignore[method-assign]
    try:
        fusedfog.save_checkpoint(run, model, opt)
    except fusedfog.CheckpointError as error:
        return str(error)
    finally:
        if dist.get_rank():
            Path.exists = there  # type: ignore[method-assign]
    return ""


def test_a_machine_with_a_disk_of_its_own_is_named(ranks: Pool, tmp_path: Path) -> None:
    for text in ranks.run(2, see_nothing, str(tmp_path)):
        assert "failed on rank 1: " in text and "all ranks write to one file system" in text
    assert names(tmp_path) == []


def test_nothing_is_written_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is flushed before the rename that makes the checkpoint one, and the run's folder after it."""
    done: list[str] = []

    def of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0]

    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (real_sync(descriptor), done.append(of(descriptor)))[0])
    monkeypatch.setattr(os, "rename", lambda *args: (real_rename(*args), done.append("rename"))[0])
    fusedfog.save_checkpoint(tmp_path / "run", *build())
    assert done == [tmp_path.name.split("-")[0], "rank", "manifest.json", ".unfinished", "rename", "run"]
    assert checkpoint_file.os is os
