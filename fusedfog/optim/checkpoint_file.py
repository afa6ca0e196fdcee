"""One file of a checkpoint: tensors and JSON, every byte under a checksum, and nothing that could be executed.

Below `checkpoint`. The format is that of safetensors, whose readers can open these files: 8 bytes with the length of the header,
the header in JSON with the dtype, shape and place of each tensor, then the tensors' bytes. `__metadata__` has one more string
in JSON: "data", and for each tensor the CRC-32 of its bytes, and where in a larger tensor it lies if it is a shard. The
header has a checksum too, which the checkpoint's manifest keeps.

A CRC is against damage, not against forgery: who can write into a checkpoint can make it say anything, but not do anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fusedfog.errors import CheckpointError
from fusedfog.optim.plain_data import Plain

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""By the names of safetensors, and C128, which it lacks."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KEY = "fusedfog"
_PIECE = 1 << 22
"""Bytes that are summed up and written at a time, so that they are still in the cache when they are written."""


@dataclass(frozen=True)
class Box:
    """What a file holds of a tensor.

    Attributes:
        dtype, shape: of the part in this file.
        whole: the shape of the tensor that it is a part of, or of itself.
        offset: its first element there.
        begin, end: its bytes, counted from the end of the header.
        crc32: of these.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    begin: int
    end: int
    crc32: int


@dataclass(frozen=True)
class Written:
    """What a manifest keeps of a file: its size in bytes, and the CRC-32 of its header."""

    size: int
    crc32: int


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, as one of a full disk, is raised as one of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a tensor that a file cannot hold: sparse, quantized, nested, without values."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in _NAMES:
        kind = "meta" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        layout = "" if tensor.layout == torch.strided else f" and {str(tensor.layout).removeprefix('torch.')}"
        raise TypeError(f"{name} is a tensor that is {kind}{layout}, and a checkpoint takes dense ones")


def shard_of(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, and its offset in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    (box,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tensor.to_local().detach(), tuple(box.offsets)


def write(path: Path, tensors: Mapping[str, Tensor], data: Plain) -> Written:
    """Write a new file, and have it on the disk before this returns.

    Of DTensors, what is local here. Tensors are copied to the CPU one after another.

    Raises:
        OSError: it cannot be written, or is there already; names it.
    """
    parts = {name: (*shard_of(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    # Wider elements first: all are aligned then, as safetensors wants them.
    order = sorted(parts, key=lambda name: -parts[name][0].element_size())
    entries: dict[str, Any] = {}
    begin = 0
    for name in order:
        local = parts[name][0]
        end = begin + local.numel() * local.element_size()
        shape = list(local.shape)
        entries[name] = {"dtype": _NAMES[local.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    checksums = dict.fromkeys(order, 0)

    def header() -> bytes:
        about = {name: [f"{checksums[name]:08x}", list(parts[name][1]), list(parts[name][2])] for name in order}
        own = json.dumps({"data": data, "tensors": about})
        text = json.dumps({"__metadata__": {_KEY: own}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with named(path), path.open("xb") as file:
        # The same bytes but for the checksums, which have equally many digits.
        size = file.write(header())
        for name in order:
            checksums[name], count = _write_tensor(file, parts[name][0])
            size += count
        file.seek(0)
        head = header()
        file.write(head)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, zlib.crc32(head))


def _write_tensor(file: BinaryIO, tensor: Tensor) -> tuple[int, int]:
    """Its checksum, and how many bytes it has."""
    checksum = count = 0
    for piece in _bytes_of(tensor.cpu()):
        checksum = zlib.crc32(piece, checksum)
        file.write(piece)
        count += len(piece)
    return checksum, count


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The memory of a tensor on the CPU, piece by piece; a copy of it where that is not contiguous."""
    if tensor.numel():
        plain = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
        view: memoryview = plain.view(torch.uint8).numpy().data
        for first in range(0, len(view), _PIECE):
            yield view[first : first + _PIECE]


class TensorFile:
    """A file that is read: its header is checked here, a tensor's bytes when it is read.

    Attributes:
        path: where it is.
        data: the JSON that was written with the tensors.
        boxes: what it has of each tensor.

    Raises:
        CheckpointError: it is not what the manifest says; names it.
    """

    def __init__(self, path: Path, expected: Written) -> None:
        self.path = path
        with self._reading():
            self._file = path.open("rb")
        try:
            with self._reading():
                size = os.fstat(self._file.fileno()).st_size
                if size != expected.size:
                    raise CheckpointError(
                        f"{path} has {size:,} bytes instead of {expected.size:,}: it was cut off or changed"
                    )
                self.data, self.boxes = self._read_header(size, expected.crc32)
        except CheckpointError:
            self._file.close()
            raise
        self._unread = set(self.boxes)

    def _read_header(self, size: int, crc32: int) -> tuple[Plain, dict[str, Box]]:
        damaged = f"{self.path} is damaged, or of another checkpoint: its header"
        prefix = self._file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size,)
        if length > size - 8:
            raise CheckpointError(f"{damaged} is longer than the file")
        text = self._file.read(length)
        if zlib.crc32(text, zlib.crc32(prefix)) != crc32:
            raise CheckpointError(f"{damaged} has another checksum than the manifest says")
        self._start = 8 + length
        try:
            header = json.loads(text)
            own = json.loads(header.pop("__metadata__")[_KEY])
            boxes = {name: _box(entry, own["tensors"][name], size - self._start) for name, entry in header.items()}
            data: Plain = own["data"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{damaged} is not one of fusedfog ({type(error).__name__}: {error})") from error
        return data, boxes

    def read(self, name: str) -> Tensor:
        """What the file has of a tensor, on the CPU.

        Raises:
            CheckpointError: its bytes are not those that were written.
        """
        box = self.boxes[name]
        value = torch.empty(box.shape, dtype=box.dtype)
        checksum = 0
        with self._reading():
            self._file.seek(self._start + box.begin)
            for piece in _bytes_of(value):
                if self._file.readinto(piece) != len(piece):
                    raise CheckpointError(f"{self.path} ends in the middle of {name}")
                checksum = zlib.crc32(piece, checksum)
        self._compare(name, checksum)
        return value

    def check_rest(self) -> None:
        """Check the tensors that nobody has read; raises as `read`."""
        for name in sorted(self._unread, key=lambda name: self.boxes[name].begin):
            box, checksum = self.boxes[name], 0
            with self._reading():
                self._file.seek(self._start + box.begin)
                for first in range(box.begin, box.end, _PIECE):
                    checksum = zlib.crc32(self._file.read(min(_PIECE, box.end - first)), checksum)
            self._compare(name, checksum)

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def _compare(self, name: str, checksum: int) -> None:
        if checksum != self.boxes[name].crc32:
            raise CheckpointError(f"{self.path} is damaged: the bytes of {name} have another checksum than was written")
        self._unread.discard(name)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error


def _box(entry: Any, about: Any, room: int) -> Box:
    """What a header says of a tensor; raises ValueError, TypeError or KeyError for what no header says."""
    crc32, offset, whole = about
    begin, end = map(_count, entry["data_offsets"])
    box = Box(
        DTYPES[entry["dtype"]],
        tuple(map(_count, entry["shape"])),
        tuple(map(_count, whole)),
        tuple(map(_count, offset)),
        begin,
        end,
        int(crc32, 16),
    )
    if box.end - box.begin != math.prod(box.shape) * box.dtype.itemsize or box.end > room:
        raise ValueError("a tensor with other bytes than its shape has")
    inside = zip(box.offset, box.shape, box.whole, strict=True)
    if not all(first + length <= size for first, length, size in inside):
        raise ValueError("a part that lies outside of its tensor")
    return box


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a size belongs")
    return value
