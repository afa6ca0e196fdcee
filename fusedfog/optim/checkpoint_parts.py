"""What of a rank goes into its file of a checkpoint, and how the parts of saved ranks become a rank's again.

Below `checkpoint`; nothing here knows of other ranks but those that wrote. A *part* is one replica of the model with its states:
that of a rank, or of all ranks that hold its shards. Its tensors have the names `model/...` and `state/KEY/...`; what is no
tensor is JSON in each of its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from fusedfog.errors import CheckpointError
from fusedfog.gossip.compression import is_wire_state
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint_file import Box, TensorFile, check_writable
from fusedfog.optim.checkpoint_folder import MANIFEST, Manifest, read_manifest
from fusedfog.optim.plain_data import Plain, decode, encode
from fusedfog.params.precision import COMPENSATION

Slices: TypeAlias = tuple[slice, ...]
_OF_REPLICA = ("model/", "state/")


class Content:
    """A rank's model and states: tensors by their names in a part, and the rest. Waits for messages, and sends none.

    Attributes:
        tensors: by name; also those that `prepare` has found elsewhere.
        data: the rest, as a file can hold it.
        steps: of the optimizer.
    """

    def __init__(self, model: nn.Module, opt: DecentralizedOptimizer) -> None:
        saved = opt.state_dict()
        self.steps = int(saved["fusedfog"]["steps"])
        self.tensors: dict[str, Tensor] = {}
        self.data: dict[str, Plain] = {}
        self._others: dict[str, Any] = {"model": {}, "state": {}, "optimizer": saved}
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                self.tensors[f"model/{name}"] = value
            else:  # get_extra_state()
                self._others["model"][name] = value
        for key, state in saved.pop("state").items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    self.tensors[f"state/{key}/{name}"] = value
                else:
                    self._others["state"].setdefault(key, {})[name] = value

    def prepare(self, extra: Mapping[str, Any]) -> None:
        """Make of all this and what users add what a file can hold.

        Raises:
            TypeError, ValueError: a value that it cannot hold; the text has its path.
        """
        self.data = {name: encode(value, f"rest/{name}", self.tensors) for name, value in self._others.items()}
        self.data["extra"] = encode(dict(extra), "extra", self.tensors)
        for name, value in self.tensors.items():
            check_writable(name, value)

    def share(self, *, first: bool) -> dict[str, Tensor]:
        """The tensors that this rank writes; `first` among those of its replica, or not.

        A shard is written once, by the first of the ranks that FSDP keeps equal; what is no shard by the replica's first rank;
        and what a user gave by each rank.
        """
        return {name: value for name, value in self.tensors.items() if _is_ours(name, value, first)}


def _is_ours(name: str, value: Tensor, first: bool) -> bool:
    if not isinstance(value, DTensor):
        return first or not name.startswith(_OF_REPLICA)
    place = value.device_mesh.get_coordinate()
    return place is not None and not any(
        at and isinstance(how, Replicate) for at, how in zip(place, value.placements, strict=True)
    )


def shards_of(model: nn.Module, opt: DecentralizedOptimizer) -> dict[str, DTensor]:
    """What is sharded of a rank's part, by its name there."""
    if opt._engine.sharding is None:
        return {}
    return {name: value for name, value in Content(model, opt).tensors.items() if isinstance(value, DTensor)}


class Part:
    """One saved replica, in the files that its ranks wrote; closes them as a context manager.

    Attributes:
        pieces: of each tensor: the files that have some of it, and what they have.

    Raises:
        CheckpointError: a file is not what the manifest says; names it.
    """

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.folder = folder
        self.files: list[TensorFile] = []
        self.pieces: dict[str, list[tuple[TensorFile, Box]]] = {}
        try:
            for name in manifest.parts[number]:
                self.files.append(TensorFile(folder / name, manifest.files[name]))
        except BaseException:
            self.close()
            raise
        for file in self.files:
            for name, box in file.boxes.items():
                self.pieces.setdefault(name, []).append((file, box))

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()

    def about(self, name: str) -> Box:
        """Dtype and whole shape of a tensor."""
        return self.pieces[name][0][1]

    def names(self) -> list[str]:
        """The tensors of model and states; not those that a user gave, which each rank has its own of."""
        return [name for name in self.pieces if name.startswith(_OF_REPLICA)]

    def read(self, name: str, like: DTensor | None = None) -> Tensor:
        """A tensor on the CPU, or sharded as `like` is if it has its shape, on its device.

        Raises:
            CheckpointError: damaged, or not all of it is there.
        """
        result = empty(self.about(name), like)
        if isinstance(result, DTensor):
            boxes = result.__create_chunk_list__()  # type: ignore[attr-defined]
            local, offset = result.to_local(), tuple(boxes[0].offsets)
        else:
            local, offset = result, (0,) * result.ndim
        filled = 0
        for file, box in self.pieces[name]:
            if box.shape == tuple(local.shape) and box.offset == offset and result is local:
                return file.read(name)
            there, here = _overlap(box.offset, box.shape, offset, tuple(local.shape))
            if there is not None:
                part = file.read(name)[there]
                local[here].copy_(part)
                filled += part.numel()
        if filled < local.numel():
            raise CheckpointError(
                f"{self.folder} is not complete: {local.numel() - filled} elements of {name} are missing"
            )
        return result

    def others(self, place: int = 0) -> dict[str, Any]:
        """What is no tensor, and what a user gave: of the part's rank in this place."""
        file = self.files[place]
        data = cast("dict[str, Plain]", file.data)
        try:
            found = {name: decode(data[name], file.read) for name in ("model", "state", "optimizer", "extra")}
            if not all(isinstance(one, dict) for one in found.values()):
                raise TypeError("not a dict")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file.path} holds other data than fusedfog writes ({error})") from error
        return found


def empty(about: Box, like: DTensor | None) -> Tensor:
    """Room for a tensor that is saved, on the CPU; sharded as `like`, if it has its shape."""
    if like is not None and tuple(like.shape) == about.whole:
        return torch.empty_like(like, dtype=about.dtype)
    return torch.empty(about.whole, dtype=about.dtype)


def _overlap(
    offset: Sequence[int], shape: Sequence[int], own_offset: Sequence[int], own_shape: Sequence[int]
) -> tuple[Slices | None, Slices]:
    """Where two boxes in one tensor overlap: in the first, or None if they do not, and in the second."""
    there, here = [], []
    for first, length, own, own_length in zip(offset, shape, own_offset, own_shape, strict=True):
        begin, end = max(first, own), min(first + length, own + own_length)
        if begin >= end:
            return None, ()
        there.append(slice(begin - first, end - first))
        here.append(slice(begin - own, end - own))
    return tuple(there), tuple(here)


class Saved:
    """A checkpoint that is read; closes its files as a context manager.

    Attributes:
        manifest: what is in it, once `open` has read it.
    """

    manifest: Manifest

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[int, Part] = {}
        self._stack = ExitStack()

    def open(self, checksum: int) -> None:
        """Read the manifest; raises CheckpointError if it is damaged, or another one than rank 0 read, by its checksum."""
        self.manifest, own = read_manifest(self.folder)
        if own != checksum:
            raise CheckpointError(f"{self.folder / MANIFEST} is another one than rank 0 reads")

    def __len__(self) -> int:
        return len(self.manifest.parts)

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def part(self, number: int) -> Part:
        """A part; raises CheckpointError if the header of one of its files is damaged."""
        if number not in self._opened:
            self._opened[number] = self._stack.enter_context(Part(self.folder, self.manifest, number))
        return self._opened[number]

    def check_rest(self, names: Sequence[str]) -> None:
        """Check whatever was not read of these files; raises CheckpointError."""
        opened = {file.path.name: file for part in self._opened.values() for file in part.files}
        for name in names:
            if name in opened:
                opened[name].check_rest()
            else:
                with closing(TensorFile(self.folder / name, self.manifest.files[name])) as file:
                    file.check_rest()


class Sums:
    """Means over all parts of a checkpoint, tensor by tensor, in at least float32.

    What has no mean, as counters and param groups, is the first part's.

    Args:
        like: what is sharded here.

    Attributes:
        totals: the sums so far.
        others: what is no tensor.
        sharded: whether anything is.
    """

    def __init__(self, saved: Saved, like: Mapping[str, DTensor]) -> None:
        parts = [saved.part(number) for number in range(len(saved))]
        self._parts, self._like = parts, like
        self.others, self.sharded = parts[0].others(), bool(like)
        # A parameter that had no gradient in the first part may have states in others.
        names = {name: part.about(name) for part in parts for name in part.names() if _has_a_mean(name)}
        self._dtypes = {
            name: about.dtype
            for name, about in sorted(names.items())
            if about.dtype.is_floating_point and not name.endswith("/step")
        }
        self._weights = _weights(self.others, len(parts))
        self.totals = {
            name: torch.zeros_like(empty(names[name], like.get(name)), dtype=_wide(dtype))
            for name, dtype in self._dtypes.items()
        }
        first = parts[0]
        exact = [name for name in first.names() if _has_a_mean(name) and name not in self.totals]
        self._exact = {name: first.read(name, like.get(name)) for name in exact}
        for name in self.totals:
            steps = f"{name.rsplit('/', 1)[0]}/step"
            if name.startswith("state/") and steps not in self._exact:
                # The largest count of a parameter that the first part has none for.
                counts = [part.read(steps) for part in parts if steps in part.pieces]
                self._exact[steps] = torch.stack([*counts, torch.ones(())]).max()

    def add(self, number: int) -> None:
        """Read a part."""
        part = self._parts[number]
        for name in part.names():
            if name in self.totals:
                self.totals[name].add_(part.read(name, self._like.get(name)), alpha=self._weights[number])

    def means(self) -> dict[str, Tensor]:
        """All tensors of a part, once `totals` has the sums over all parts."""
        return self._exact | {name: total.to(self._dtypes[name]) for name, total in self.totals.items()}


def _weights(others: Mapping[str, Any], count: int) -> list[float]:
    """What each part counts: of push-sum its scalar, else as much as any other."""
    scalars = others["optimizer"]["fusedfog"].get("push_sum") or [1.0] * count
    return [scalar / sum(scalars) for scalar in scalars]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_a_mean(name: str) -> bool:
    """Replicas and encoded messages belong to the old ranks' exchanges, a compensation to the parameters before averaging."""
    state = name.rsplit("/", 1)[1] if name.startswith("state/") else ""
    return state != COMPENSATION and not is_wire_state(state)


def check_model(folder: Path, model: nn.Module, part: Part, others: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint's model has the same entries as this one, tensors of the same shapes."""
    own = {name: _shape(value) for name, value in model.state_dict().items()}
    names = [name for name in part.names() if name.startswith("model/")]
    saved = {name.removeprefix("model/"): part.about(name).whole for name in names} | dict.fromkeys(others["model"], ())
    for name in [*own, *saved]:
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"{folder} is a checkpoint of another model: {name} has shape {saved.get(name, 'none')} there and "
                f"{own.get(name, 'none')} here"
            )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def adopt(
    tensors: Mapping[str, Tensor], others: Mapping[str, Any], model: nn.Module, opt: DecentralizedOptimizer
) -> None:
    """Load a part into a model and its optimizer. Collective; what does not fit raises before anything is changed."""
    states: dict[Any, dict[str, Any]] = {key: dict(state) for key, state in others["state"].items()}
    weights = dict(others["model"])
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "model":
            weights[rest] = value
        else:
            key, _, state = rest.partition("/")
            states.setdefault(int(key), {})[state] = value
    # First the optimizer, which checks before it changes anything.
    opt.load_state_dict({**others["optimizer"], "state": states})
    with opt.paused():
        model.load_state_dict(weights)
