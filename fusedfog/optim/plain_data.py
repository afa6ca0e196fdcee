"""What a checkpoint holds beside tensors, as JSON: reading it back makes values and calls nothing.

Below `checkpoint`. JSON has no tuples, bytes or keys that are numbers: such a value is written as `{"!": kind, "of": ...}`, and
a dict that could be taken for one, or has a key that is no string, as its items. Tensors are left to the caller, who keeps them
under the name that is written in their place.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

_KIND, _OF = "!", "of"
_AS_THEY_ARE = (type(None), bool, int, float, str)
_DICTS = (dict, OrderedDict, defaultdict)
_TAKEN = "numbers, strings, bytes, None, tensors, numpy arrays, and lists, tuples, sets and dicts of these"


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Plain:
    """A value as JSON can write it.

    A subclass of dict comes back as a dict (a Counter as a Counter), one of tuple as a tuple, and numpy's scalars as Python's.

    Args:
        where: what the value is, for errors and as the name of its tensors: "extra/schedule".
        tensors: those that are met on the way are added, by name; numpy's arrays too.

    Raises:
        TypeError: there is something else in it, or a tensor that is quantized, sparse, or one of a DTensor's shards; the
            text has its path.
        ValueError: it contains itself.
    """
    return _encode(value, where, tensors, ())


def _encode(value: Any, where: str, tensors: dict[str, Tensor], above: tuple[int, ...]) -> Plain:
    if type(value) in _AS_THEY_ARE:
        plain: Plain = value
        return plain
    if isinstance(value, Tensor):
        return {_KIND: "tensor", _OF: _keep(value, where, tensors)}
    if isinstance(value, np.ndarray):
        return {_KIND: "array", _OF: _keep(_as_tensor(value, where), where, tensors)}
    if isinstance(value, (bool, int, float, np.number, np.bool_)) and isinstance(value, np.generic):
        return _encode(value.item(), where, tensors, above)
    if isinstance(value, bytes):
        return {_KIND: "bytes", _OF: base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {_KIND: "dtype", _OF: str(value).removeprefix("torch.")}
    if id(value) in above:
        raise ValueError(f"{where} contains itself, and cannot be written into a checkpoint")
    above = (*above, id(value))
    if isinstance(value, (tuple, list, set, frozenset)):
        items = [_encode(one, f"{where}/{place}", tensors, above) for place, one in enumerate(value)]
        if type(value) is list:
            return items
        return {_KIND: "tuple" if isinstance(value, tuple) else type(value).__name__, _OF: items}
    if type(value) in _DICTS or isinstance(value, Counter):
        return _encode_dict(value, where, tensors, above)
    raise TypeError(
        f"{where} is of type {type(value).__qualname__}, which only code could make again. A checkpoint takes {_TAKEN}: give its "
        f"state_dict(), dataclasses.asdict(...), vars(...) or str(...)"
    )


def _encode_dict(value: dict[Any, Any], where: str, tensors: dict[str, Tensor], above: tuple[int, ...]) -> Plain:
    for key in value:
        if not isinstance(key, (*_AS_THEY_ARE, tuple)):
            raise TypeError(
                f"{where} has a key of type {type(key).__qualname__}; in a checkpoint keys are strings, numbers, None or tuples"
            )
    if type(value) in _DICTS and all(type(key) is str for key in value) and _KIND not in value:
        return {key: _encode(one, f"{where}/{key}", tensors, above) for key, one in value.items()}
    pairs: list[Plain] = [
        [_encode(key, where, tensors, above), _encode(one, f"{where}/{key}", tensors, above)]
        for key, one in value.items()
    ]
    return {_KIND: "Counter" if isinstance(value, Counter) else "dict", _OF: pairs}


def _keep(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    if isinstance(tensor, DTensor):
        raise TypeError(f"{where} is a DTensor, of which each rank has a shard: give its full_tensor()")
    name = where
    while name in tensors:  # {"a/b": x, "a": {"b": y}}
        name += "'"
    tensors[name] = tensor
    return name


def _as_tensor(array: np.ndarray, where: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where} is a numpy array of {array.dtype}, which no tensor can hold") from error


def decode(plain: Plain, tensors: Callable[[str], Tensor]) -> Any:
    """What was given to `encode`; `tensors` has the tensors by name.

    Raises:
        ValueError: `encode` has not made this.
    """
    if isinstance(plain, list):
        return [decode(one, tensors) for one in plain]
    if not isinstance(plain, dict):
        return plain
    if _KIND not in plain:
        return {key: decode(one, tensors) for key, one in plain.items()}
    kind, of = plain[_KIND], plain.get(_OF)
    if isinstance(kind, str) and isinstance(of, str):
        return _decode_text(kind, of, tensors)
    if not isinstance(of, list):
        raise ValueError(f"a checkpoint has no {kind!r} like this")
    if kind in ("dict", "Counter"):
        pairs = [decode(one, tensors) for one in of]
        return (dict if kind == "dict" else Counter)(dict(pairs))
    made = {"tuple": tuple, "set": set, "frozenset": frozenset}.get(kind if isinstance(kind, str) else "")
    if made is None:
        raise ValueError(f"a checkpoint has no {kind!r}")
    return made(decode(one, tensors) for one in of)


def _decode_text(kind: str, of: str, tensors: Callable[[str], Tensor]) -> Any:
    if kind == "tensor":
        return tensors(of)
    if kind == "array":
        return tensors(of).numpy()
    if kind == "bytes":
        return base64.b64decode(of, validate=True)
    if kind == "dtype" and isinstance(dtype := getattr(torch, of, None), torch.dtype):
        return dtype
    raise ValueError(f"a checkpoint has no {kind!r} like this")
