"""A damaged, foreign or hostile checkpoint is a named error on every rank; nothing is changed, and nothing in it is executed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.optim.checkpoint_file import DTYPES, TensorFile, Written, write

RANKS = 3


def build(**keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    return model, fusedfog.AdamW(model.parameters(), lr=0.02, **keywords)


def save(path: str, times: int) -> None:
    model, opt = build()
    for step in range(times):
        opt.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        opt.step()
        fusedfog.save_checkpoint(path, model, opt, step=step, seen=torch.arange(step + 1))


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two checkpoints of three ranks; whoever damages it restores it."""
    path = tmp_path_factory.mktemp("run")
    ranks.run(RANKS, save, str(path), 2)
    return path


def values(model: nn.Module, opt: Any) -> list[torch.Tensor]:
    states = [value for state in opt.state_dict()["state"].values() for value in state.values()]
    return [value.clone() for value in (*model.state_dict().values(), *states)]


def refused(path: Path | str) -> str:
    """What is said of a checkpoint that must not load, once it is certain that nothing has changed."""
    model, opt = build()
    before = values(model, opt)
    with pytest.raises(fusedfog.CheckpointError) as told:
        fusedfog.load_checkpoint(path, model, opt)
    assert all(torch.equal(*pair) for pair in zip(values(model, opt), before, strict=True))
    assert opt.stats()["steps"] == 0
    return str(told.value)


# -- 1,000 damaged files ---------------------------------------------------------------------------------------------

NAMES = ("manifest.json", *(f"rank-{rank:05}.safetensors" for rank in range(RANKS)))
KINDS = ("flip", "truncate", "append", "delete", "swap", "foreign", "folder", "zeros")


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, int, bytes]:
    # Hypothesis likes small numbers: then nothing but headers would be damaged.
    where = random.Random(draw(st.integers(0, 1 << 32))).randrange(1 << 20)
    return draw(st.sampled_from(NAMES)), draw(st.sampled_from(KINDS)), where, draw(st.binary())


def damage(run: Path, name: str, kind: str, where: int, other: bytes) -> bool:
    """Damage a file of the newest checkpoint; False if that leaves it as it was."""
    older, newer = sorted(run.iterdir())
    file = newer / name
    raw = file.read_bytes()
    if kind == "flip":
        changed = bytearray(raw)
        changed[where // 8 % len(raw)] ^= 1 << where % 8
        file.write_bytes(changed)
    elif kind == "truncate":
        file.write_bytes(raw[: where % len(raw)])
    elif kind == "append":
        file.write_bytes(raw + (other or b"\n"))
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":  # the same file of the other checkpoint, or another rank's
        theirs = (older / name if where % 2 or name == NAMES[0] else newer / NAMES[1 + where // 2 % RANKS]).read_bytes()
        file.write_bytes(theirs)
    elif kind == "foreign":
        file.write_bytes(other)
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        begin = where % len(raw)
        file.write_bytes(raw[:begin] + bytes(len(raw) - begin))
    return not file.is_file() or file.read_bytes() != raw


def restore(run: Path, backup: Path) -> None:
    newer = sorted(run.iterdir())[-1]
    shutil.rmtree(newer)
    shutil.copytree(backup, newer)


def check_damaged(saved: Path, backup: Path, what: tuple[str, str, int, bytes]) -> bool:
    """Whether this was damage; then it has to be told."""
    try:
        changed = damage(saved, *what)
        if changed:
            text = refused(saved)
            # An older manifest is whole: it is the files that it does not fit.
            assert what[0] in text or (what[:2] == (NAMES[0], "swap") and NAMES[1] in text)
            assert text.startswith(f"rank 0: load_checkpoint(): {saved}")
            assert "; the checkpoint before it is " in text
        return changed
    finally:
        restore(saved, backup)


@pytest.fixture(scope="module")
def backup(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(sorted(saved.iterdir())[-1], tmp_path_factory.mktemp("backup") / "newest"))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damaged_file_is_named_and_none_loads(saved: Path, backup: Path, count: int) -> None:
    told = 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damages())
    def check(what: tuple[str, str, int, bytes]) -> None:
        nonlocal told
        changed = check_damaged(saved, backup, what)
        told += changed
        assume(changed)

    check()
    print(f"{told} files were damaged, and named")
    assert told >= count
    model, opt = build()
    assert fusedfog.load_checkpoint(saved, model, opt)["step"] == 1


def load(path: str, damaged: str) -> list[torch.Tensor]:
    model, opt = build()
    before = values(model, opt)
    try:
        fusedfog.load_checkpoint(path, model, opt)
    finally:
        assert all(torch.equal(*pair) for pair in zip(values(model, opt), before, strict=True))
    return before


@pytest.mark.parametrize("size", [RANKS, 2])
@pytest.mark.parametrize(
    "what", [(NAMES[2], "flip", 40000, b""), (NAMES[3], "delete", 0, b""), (NAMES[0], "truncate", 99, b"")]
)
def test_every_rank_says_which_rank_found_which_file(
    ranks: Pool, saved: Path, backup: Path, size: int, what: tuple[str, str, int, bytes]
) -> None:
    finder = 0 if what[0] == NAMES[0] or (size == 2 and what[0] != NAMES[2]) else int(what[0][5:10]) % size
    try:
        assert damage(saved, *what)
        for rank, outcome in enumerate(ranks.outcomes(size, load, str(saved), what[0])):
            assert outcome.error_type == "CheckpointError", outcome
            assert outcome.message.startswith(f"rank {rank}: load_checkpoint() failed on rank {finder}: {saved}")
            assert what[0] in outcome.message
    finally:
        restore(saved, backup)


# -- nothing is executed ---------------------------------------------------------------------------------------------


class Hostile:
    """What makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def hostile_forms(mark: Path) -> Iterator[bytes]:
    evil = Hostile(mark)
    yield pickle.dumps(evil)
    yield pickle.dumps({"state_dict_metadata": evil}, protocol=2)
    for kind in (True, False):
        file = io.BytesIO()
        torch.save({"model": evil}, file, _use_new_zipfile_serialization=kind)
        yield file.getvalue()


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What must not be made; it is, by whoever unpickles."""
    mark = tmp_path / "executed"
    for form in hostile_forms(mark):
        with pytest.raises(Exception, match=r".*"):
            torch.load(io.BytesIO(form), weights_only=True)
        assert not mark.exists()
        with contextlib.suppress(Exception):
            pickle.loads(form)
        if not mark.exists():
            torch.load(io.BytesIO(form), weights_only=False)
        mark.rmdir()
    return mark


def test_hostile_pickles_are_executed_by_no_loader(saved: Path, backup: Path, mark: Path, tmp_path: Path) -> None:
    for form in hostile_forms(mark):
        for name in NAMES:
            try:
                (sorted(saved.iterdir())[-1] / name).write_bytes(form)
                assert name in refused(saved)
            finally:
                restore(saved, backup)
        # Where torch.distributed.checkpoint would look.
        folder = tmp_path / "theirs"
        folder.mkdir()
        (folder / ".metadata").write_bytes(form)
        refused(folder)
        shutil.rmtree(folder)
        assert not mark.exists()


def forge(file: Path, change: Any) -> None:
    """Change what a file says beside its tensors, with all checksums as they have to be."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    own = json.loads(header["__metadata__"]["fusedfog"])
    change(own["data"], header)
    header["__metadata__"]["fusedfog"] = json.dumps(own)
    text = json.dumps(header).encode()
    head = struct.pack("<Q", len(text)) + text
    file.write_bytes(head + raw[8 + length :])
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest.pop("crc32")
    manifest["files"][file.name] = {
        "bytes": file.stat().st_size,
        "header_crc32": f"{zlib.crc32(head):08x}",
    }
    manifest["crc32"] = f"{zlib.crc32(json.dumps(manifest).encode()):08x}"
    (file.parent / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


FORGED: dict[str, Any] = {
    "an unknown kind": lambda data, header: data.update(extra={"!": "pickle", "of": "gASV"}),
    "a name of torch": lambda data, header: data.update(extra={"!": "dtype", "of": "load"}),
    "a name of builtins": lambda data, header: data.update(extra={"!": "eval", "of": ["1"]}),
    "no dict": lambda data, header: data.update(extra=[1]),
    "a missing tensor": lambda data, header: data.update(extra={"x": {"!": "tensor", "of": "none"}}),
    "nothing": lambda data, header: data.clear(),
    "a longer tensor": lambda data, header: header["model/0.weight"].update(shape=[1 << 40, 5]),
    "a tensor elsewhere": lambda data, header: header["model/0.weight"].update(data_offsets=[1 << 40, (1 << 40) + 180]),
    "a negative place": lambda data, header: header["model/0.weight"].update(data_offsets=[-180, 0]),
    "an unknown dtype": lambda data, header: header["model/0.weight"].update(dtype="O"),
    "a missing parameter": lambda data, header: header.pop("model/0.weight"),
}


@pytest.mark.parametrize("form", FORGED)
def test_forged_files_with_checksums_that_fit_are_refused(saved: Path, backup: Path, form: str) -> None:
    try:
        file = sorted(saved.iterdir())[-1] / NAMES[1]
        forge(file, lambda data, header: None)
        fusedfog.load_checkpoint(saved, *build())
        forge(file, FORGED[form])
        if form == "a missing parameter":
            with pytest.raises(ValueError, match=r"0\.weight has shape none there"):
                fusedfog.load_checkpoint(saved, *build())
        else:
            assert NAMES[1] in refused(saved)
    finally:
        restore(saved, backup)


def test_files_outside_of_the_folder_are_not_read(saved: Path, backup: Path) -> None:
    newest = sorted(saved.iterdir())[-1]
    try:
        text = (newest / "manifest.json").read_text()
        manifest = json.loads(text.replace(NAMES[1], f"../{sorted(saved.iterdir())[0].name}/{NAMES[1]}"))
        manifest.pop("crc32")
        manifest["crc32"] = f"{zlib.crc32(json.dumps(manifest).encode()):08x}"
        (newest / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        assert "manifest.json is damaged, or no manifest of fusedfog" in refused(saved)
    finally:
        restore(saved, backup)


def test_a_version_of_the_future_says_so(saved: Path, backup: Path) -> None:
    newest = sorted(saved.iterdir())[-1]
    try:
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
        assert "is of version 2; this fusedfog reads up to 1" in refused(saved)
    finally:
        restore(saved, backup)


# -- the file format -------------------------------------------------------------------------------------------------


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


SHAPES = [(), (1,), (7,), (3, 5), (0, 4), (2, 1, 3)]


def test_all_dtypes_and_shapes_come_back_bit_for_bit_and_lie_as_safetensors_wants_them(tmp_path: Path) -> None:
    tensors = {f"{name}{shape}": random_tensor(dtype, shape) for name, dtype in DTYPES.items() for shape in SHAPES}
    tensors["strided"] = torch.arange(12.0).view(3, 4).t()[1:]
    tensors["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    tensors["large"] = random_tensor(torch.float32, (1 << 21,))
    path = tmp_path / "file"
    written = write(path, tensors, {"a": 1})
    file = TensorFile(path, written)
    assert file.data == {"a": 1}
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        same = tensor.resolve_conj().contiguous().reshape(-1)
        assert torch.equal(found.reshape(-1).view(torch.uint8), same.view(torch.uint8)) or not same.numel()
    file.check_rest()
    file.close()
    # The format's own words: a header of 8 n bytes, no holes, no overlaps, the buffer used up; every tensor aligned.
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert length % 8 == 0 and raw[8:9] == b"{" and all(isinstance(value, str) for value in metadata.values())
    place = 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin == place and begin % DTYPES[entry["dtype"]].itemsize == 0, name
        place = end
    assert place == len(raw) - 8 - length == written.size - 8 - length


def test_a_file_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"theirs")
    with pytest.raises(FileExistsError, match="file"):
        write(tmp_path / "file", {}, None)
    assert (tmp_path / "file").read_bytes() == b"theirs"


def test_a_file_of_another_size_or_header_is_named(tmp_path: Path) -> None:
    written = write(tmp_path / "file", {"x": torch.ones(3)}, None)
    for expected in (Written(written.size + 1, written.crc32), Written(written.size, written.crc32 ^ 1)):
        with pytest.raises(fusedfog.CheckpointError, match=re.escape(str(tmp_path / "file"))):
            TensorFile(tmp_path / "file", expected)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "extra/x is a tensor that is float32 and sparse_coo"),
        (torch.empty(3, device="meta"), "extra/x is a tensor that is meta"),
        (torch.ones(2, 2).to_mkldnn(), "extra/x is a tensor that is float32 and _mkldnn"),
    ],
)
def test_tensors_that_no_file_can_hold_are_refused_when_saved(tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fusedfog.save_checkpoint(tmp_path / "run", *build(), x=tensor)
    assert not (tmp_path / "run").exists()
