"""Where records go: a file of JSON lines, TensorBoard, Weights & Biases, or a function of the user's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fusedfog.watch.records import Record


class Sink(Protocol):
    """Takes records, on rank 0, in a thread of its own."""

    def write(self, record: Record) -> None:
        """Take one."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class JsonLines:
    """A file with a record a line, whole lines only; a resumed run goes on behind what is there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Opened now, so that a wrong path is an error at once and in the user's own line.
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: Record) -> None:
        """See `Sink`. Flushed, since the page reads the file while it grows."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


class TensorBoard:
    """A `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar`; the user closes it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: Record) -> None:
        """See `Sink`. One chart a figure, a line a rank."""
        for name, value in scalars(record):
            self._writer.add_scalar(f"{name}/rank {record['rank']}", value, record["step"], walltime=record["time"])

    def close(self) -> None:
        """See `Sink`."""
        flush = getattr(self._writer, "flush", None)
        if flush is not None:
            flush()


class Wandb:
    """A run of Weights & Biases; the user finishes it."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, record: Record) -> None:
        """See `Sink`. The step is a figure of its own, as W&B's own counter takes no ranks at different steps."""
        found = {f"{name}/rank {record['rank']}": value for name, value in scalars(record)}
        if found:
            self._run.log({**found, f"step/rank {record['rank']}": record["step"]})

    def close(self) -> None:
        """See `Sink`."""


class Function:
    """Calls a function with every record."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self._function = function

    def write(self, record: Record) -> None:
        """See `Sink`."""
        self._function(record)

    def close(self) -> None:
        """See `Sink`."""


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The figures of a sample that a chart can show."""
    if record["kind"] != "sample":
        return
    figures = {**record["stats"], "step_s": record["step_s"], **record["values"]}
    for name, value in figures.items():
        if isinstance(value, (bool, int, float)) or value in ("nan", "inf", "-inf"):
            yield name, float(value)


def sink_for(target: Any) -> Sink:
    """The sink for what a user gave.

    Raises:
        TypeError: it is none of these.
        OSError: the file cannot be written.
    """
    if isinstance(target, (str, os.PathLike)):
        return JsonLines(target)
    check(target)
    if hasattr(target, "add_scalar"):
        return TensorBoard(target)
    return Wandb(target) if hasattr(target, "log") else Function(target)


def check(target: Any) -> None:
    """Raise TypeError if there is no sink for a target; opens nothing, so that all ranks can ask."""
    known = isinstance(target, (str, os.PathLike)) or callable(target)
    if not (known or callable(getattr(target, "add_scalar", None)) or callable(getattr(target, "log", None))):
        raise TypeError(
            f"records go to the path of a file, a SummaryWriter of TensorBoard, a run of W&B or a function of a record, "
            f"and not to {target!r}"
        )
