"""A run's folder: which checkpoints are in it, how one comes into it complete or not at all, and which ones go.

    run/000007-step-00001000/manifest.json              what the others are: written last
                             rank-00000.safetensors     one a rank
    run/.unfinished-5f3a.../                            one that is being written, or whose writer was killed

Below `checkpoint`; this is what its rank 0 does. A folder gets its name by one rename when all that is in it is on the disk, so
one with a name is complete. The number in front counts the checkpoints of the folder, so that the newest is known without
clocks, also after a run that went back to an earlier step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fusedfog.errors import CheckpointError
from fusedfog.optim.checkpoint_file import Written, named

MANIFEST = "manifest.json"
_FORMAT = "fusedfog checkpoint"
_VERSION = 1
_NAME = re.compile(r"(\d{6,})-step-\d{8,}")
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_UNFINISHED = ".unfinished-"
_QUIET = 600.0
"""Seconds without a write after which an unfinished checkpoint may be one of a killed run. A live one is locked as well, but
some file systems keep locks within a host."""


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank-{rank:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        run: which run wrote it, a random text.
        steps: of the optimizer.
        files: by name: what is known of it.
        parts: the files of each replica, in the order of ranks; without FSDP2 a file each.
    """

    run: str
    steps: int
    files: dict[str, Written]
    parts: tuple[tuple[str, ...], ...]

    def render(self) -> bytes:
        """As it is written, with its own checksum."""
        body: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "run": self.run,
            "steps": self.steps,
            "parts": self.parts,
            "files": {
                name: {"bytes": one.size, "header_crc32": f"{one.crc32:08x}"} for name, one in self.files.items()
            },
        }
        body["crc32"] = f"{zlib.crc32(json.dumps(body).encode()):08x}"
        return (json.dumps(body, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> tuple[Manifest, int]:
    """A checkpoint's manifest, and a checksum by which ranks see that they read the same one.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a later version; names it.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        found = json.loads(raw)
        if found["format"] == _FORMAT and found["version"] > _VERSION:
            raise CheckpointError(f"{path} is of version {found['version']}; this fusedfog reads up to {_VERSION}")
        files = {
            name: Written(int(about["bytes"]), int(about["header_crc32"], 16)) for name, about in found["files"].items()
        }
        manifest = Manifest(
            str(found["run"]), int(found["steps"]), files, tuple(tuple(map(str, part)) for part in found["parts"])
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, or no manifest of fusedfog ({type(error).__name__})") from error
    listed = [name for part in manifest.parts for name in part]
    names = all(_FILE.fullmatch(name) for name in files)
    if manifest.render() != raw or not names or not all(manifest.parts) or sorted(listed) != sorted(files):
        raise CheckpointError(f"{path} is damaged, or no manifest of fusedfog: it has another checksum than it says")
    return manifest, zlib.crc32(raw)


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest last; damaged ones among them.

    Raises:
        OSError: the folder cannot be read.
    """
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (int(path.name.split("-")[0]), path.name))


def find(path: Path) -> Path | None:
    """The checkpoint that is meant by a path: itself, or the newest one of a run's folder; None if there is none.

    Raises:
        CheckpointError: it is no folder.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return path
    return next(reversed(complete(path)), None)


@contextlib.contextmanager
def advising(folder: Path) -> Iterator[None]:
    """A CheckpointError inside says which checkpoint is the one before this one, if there is one."""
    try:
        yield
    except CheckpointError as error:
        siblings = []
        with contextlib.suppress(OSError):
            siblings = complete(folder.parent)
        before = siblings[: siblings.index(folder)] if folder in siblings else []
        raise CheckpointError(f"{error}; the checkpoint before it is {before[-1]}" if before else str(error)) from error


class Unfinished:
    """A checkpoint while it is written, which `finish` makes a complete one. For rank 0.

    Attributes:
        path: where ranks write; None before `begin`.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._lock: BinaryIO | None = None

    def begin(self, run: Path) -> Path:
        """Make the folder in a run's one, which is made too if it is not there, and remove what killed runs left behind.

        Raises:
            OSError: it cannot be made.
            CheckpointError: the run's folder is a checkpoint itself.
        """
        if (run / MANIFEST).exists():
            raise CheckpointError(f"{run} is a checkpoint itself: give the folder of the run, {run.parent}")
        if not run.is_dir():
            run.mkdir(parents=True, exist_ok=True)
            sync_folder(run.parent)
        path = run / f"{_UNFINISHED}{secrets.token_hex(8)}"
        path.mkdir()
        self.path = path
        self._lock = (path / MANIFEST).open("wb")
        # Where there are no locks, nobody can have one, and so nobody removes this folder.
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_leftovers(run, path)
        return path

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest, and give the folder its name. It is complete from then on, whatever happens.

        Raises:
            OSError: the disk is full, for instance.
        """
        assert self.path is not None and self._lock is not None
        run = self.path.parent
        with named(self.path / MANIFEST):
            self._lock.write(manifest.render())
            self._lock.flush()
            os.fsync(self._lock.fileno())
        sync_folder(self.path)
        number = 1 + max((int(one.name.split("-")[0]) for one in complete(run)), default=0)
        while True:
            final = run / f"{number:06}-step-{manifest.steps:08}"
            try:
                os.rename(self.path, final)
                break
            except OSError as error:
                # Another run has taken it in the meantime.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            number += 1
        sync_folder(run)
        return final

    def close(self) -> None:
        """Let go of it, and remove it unless it was finished."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # A full disk may object again to what it could not write.
                self._lock.close()
        if self.path is not None and self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)


def _remove_leftovers(run: Path, own: Path) -> None:
    """Remove what killed runs left unfinished; never what somebody may be writing still.

    Args:
        own: what was made a moment ago: the file system's clock.
    """
    now = own.stat().st_mtime
    for path in run.glob(f"{_UNFINISHED}*"):
        if path == own or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            if now - max(one.stat().st_mtime for one in (path, *path.iterdir())) > _QUIET and _is_free(path):
                shutil.rmtree(path)


def _is_free(path: Path) -> bool:
    """Whether nobody has the lock of an unfinished checkpoint; raises OSError where there are none."""
    try:
        with (path / MANIFEST).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def runs_of(run: Path) -> dict[Path, str]:
    """The checkpoints of a run's folder, the newest last, and which run wrote each; without those that are damaged."""
    found = {}
    for path in complete(run):
        with contextlib.suppress(CheckpointError):
            found[path] = read_manifest(path)[0].run
    return found


def remove_old(found: Sequence[Path], keep: int) -> None:
    """Remove all but the last `keep` of these checkpoints, each by a rename first, so that none is seen half removed.

    Raises:
        OSError: one cannot be removed.
    """
    for path in found[:-keep]:
        if path.is_symlink():
            path.unlink()  # What it points to is not ours.
            continue
        away = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
        path.rename(away)
        shutil.rmtree(away)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(folder)
    finally:
        os.close(folder)
