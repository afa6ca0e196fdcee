"""Checkpoints of a run in which every rank has its own state: one file per rank and step."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fusedfog

KEPT = 2


class Checkpoints:
    """A folder of files `step-0000100-rank-0-of-4.pt`: on a disk that all ranks share, or on each machine's own.

    A kill -9 at any moment leaves, for every rank, a whole file of one common step: files appear under their name when
    they are complete, and an older one goes when all ranks have the newer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """This rank's file of a step."""
        return self.folder / f"step-{step:07}-rank-{self.rank}-of-{self.size}.pt"

    def newest(self) -> int | None:
        """The newest step of which every rank has its file, or None. Collective.

        Raises:
            ValueError: there are checkpoints, of another number of ranks.
        """
        steps = self._gather(self._own_steps())
        others = sorted({path.stem.rpartition("-of-")[2] for path in self.folder.glob("step-*-of-*.pt")})
        counts = {count for found in self._gather(others) for count in found}
        if counts - {str(self.size)}:
            raise ValueError(
                f"rank {self.rank}: {self.folder} has checkpoints of {', '.join(sorted(counts))} ranks, but this run has "
                f"{self.size}; resume with as many ranks, or use another folder"
            )
        return max(set.intersection(*map(set, steps)), default=None)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save this rank's state, and drop all but the last two steps. Collective."""
        unfinished = self.path(step).with_suffix(".part")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path(step))
        self._gather(step)  # a rank that went ahead must not drop the last step that a slower one has completed
        for old in self._own_steps()[:-KEPT]:
            self.path(old).unlink()

    def load(self, step: int) -> dict[str, Any]:
        """This rank's state of a step; what only some ranks had saved after it is dropped. Collective.

        Nothing in a file is executed, and every byte of it is compared with its checksum.

        Raises:
            CheckpointError: on all ranks, if any rank's file is damaged; names it.
        """
        state: dict[str, Any] = {}
        failure = None
        try:
            with zipfile.ZipFile(self.path(step)) as file:
                damaged = file.testzip()  # torch writes checksums, and compares none
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} has another checksum than was written")
            state = torch.load(self.path(step), map_location="cpu", weights_only=True)
        except Exception as error:  # Whatever it is, the others have to know.
            failure = f"{self.path(step)} cannot be loaded ({type(error).__name__}: {error})"
        found = [one for one in self._gather(failure) if one]
        if found:
            raise fusedfog.CheckpointError(
                f"rank {self.rank}: {'; '.join(found)}. Remove the files of step {step} to go on from an earlier one"
            )
        for newer in self._own_steps():
            if newer > step:
                self.path(newer).unlink()
        return state

    def _own_steps(self) -> list[int]:
        found = self.folder.glob(f"step-*-rank-{self.rank}-of-{self.size}.pt")
        return sorted(int(path.name.split("-")[1]) for path in found)

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
