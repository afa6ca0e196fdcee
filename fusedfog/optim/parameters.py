"""The parameters that an optimizer is given: what the layout needs to know of them, and which ones cannot be trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedfog.comm.group import check_backend, find_group
from fusedfog.engine.rhythm import described
from fusedfog.optim.options import Options
from fusedfog.params.homes import dense_stride
from fusedfog.params.layout import ParamSpec, is_trained
from fusedfog.params.shards import room, stand_in

Groups: TypeAlias = list[dict[str, Any]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_NOT_AGREED = ("params", "param_names", "foreach", "fused", "differentiable", "fusedfog")
"""Of param groups: parameters have entries of their own, and hints change nothing."""


@contextmanager
def unchanged_if_refused(groups: Iterable[Any]) -> Iterator[None]:
    """If the with-block raises, the caller's group dicts among `groups` have the entries that they had before."""
    before = [(group, dict(group)) for group in groups if isinstance(group, dict)]
    try:
        yield
    except BaseException:
        for group, entries in before:
            if not isinstance(entries.get("params"), Tensor | Sequence):
                entries["params"] = group.get("params")  # An iterator, which has been read.
            group.clear()
            group.update(entries)
        raise


def check_finite(group: Mapping[str, Any], non_negative: Iterable[str], finite: Iterable[str] = ()) -> None:
    """Raise ValueError unless the named hyper-parameters are finite numbers, and the first ones not negative."""
    bounded = list(non_negative)
    for name in [*bounded, *finite]:
        value = float(group[name])
        if not math.isfinite(value) or (name in bounded and value < 0):
            raise ValueError(
                f"{name} must be finite{' and not negative' if name in bounded else ''}, got {group[name]}"
            )


def describe(groups: Sequence[Mapping[str, Any]], first_group: int, model: torch.nn.Module | None) -> list[ParamSpec]:
    """The layout's view of the parameters of `groups`, checked as far as they are trained.

    Raises:
        ValueError: a dtype, memory layout or device that cannot be trained here, or parameters that share memory.
    """
    known = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())} if model is not None else {}
    specs: list[ParamSpec] = []
    seen: list[Tensor] = []
    # Beside others, parameters that cannot be trained may be frozen (a quantised base). Alone they are a mistake.
    trainable = any(is_trained(param) or param.dtype in _DTYPES for param in parameters_of(groups))
    for offset, group in enumerate(groups):
        params = parameters_of([group])
        names = _numbered(len(params), specs, bool(group["mix"]))
        if group.get("param_names"):
            given_names = dict(zip(group["params"], group["param_names"], strict=True))
            names = [given_names[param] for param in params]
        for i, (param, given) in enumerate(zip(params, names, strict=True)):
            depth, name = known.get(id(param), (i / len(params), given))
            if not is_trained(param) and trainable:
                specs.append(_frozen_spec(param, name, first_group + offset, bool(group["mix"]), depth))
                continue
            local = stand_in(param)
            _check_parameter(local, name)
            specs.append(
                ParamSpec(
                    name=name,
                    shape=tuple(local.shape),
                    stride=dense_stride(local),
                    dtype=param.dtype,
                    group=first_group + offset,
                    mix=bool(group["mix"]),
                    depth=depth,
                    room=room(param),
                )
            )
            seen.append(local)
    trained = [spec for spec in specs if spec.trained]
    places = {param.device: spec.name for param, spec in zip(seen, trained, strict=True)}
    if len(places) > 1:
        found = ", ".join(f"{name} on {place}" for place, name in places.items())
        raise ValueError(
            f"all parameters of an optimizer must be on one device, but there is {found}; move the model first"
        )
    _check_disjoint(seen, trained)
    return specs


def _numbered(count: int, before: Sequence[ParamSpec], mix: bool) -> list[str]:
    """Names for parameters without: their places among the mixed ones, which ranks compare, or among the others."""
    first = sum(spec.mix == mix for spec in before)
    return [f"{first + i}{'' if mix else ' (mix=False)'}" for i in range(count)]


def _frozen_spec(param: Tensor, name: str, group: int, mix: bool, depth: float) -> ParamSpec:
    """What ranks agree on of a parameter that has no place yet; it may be of a kind that cannot be trained."""
    shape = () if is_lazy(param) else tuple(param.shape)
    return ParamSpec(name, shape, (), param.dtype, group, mix, depth, trained=False)


def parameters_of(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, in their order, each once: torch warns of one that is listed twice, and updates it twice."""
    return list(dict.fromkeys(param for group in groups for param in group["params"]))


def place_of(groups: Sequence[Mapping[str, Any]], group: dist.ProcessGroup | None) -> torch.device:
    """Where the first trained parameter is, or the first one that there is; without any, where ranks exchange."""
    params = parameters_of(groups)
    found = [param.device for param in [*filter(is_trained, params), *params] if param.device.type != "meta"]
    if found:
        return found[0]
    try:
        # Other ranks may have some: all must meet on one kind of device.
        here = torch.device("cuda", torch.cuda.current_device())
        check_backend(find_group(group), here)
    except (ValueError, RuntimeError, AssertionError):
        return torch.device("cpu")
    return here


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in memory of its own; they do not where a subclass is made of other tensors."""
    if is_traceable_wrapper_subclass(tensor):
        return False
    try:
        return not tensor.numel() or tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _check_parameter(param: Tensor, name: str) -> None:
    if isinstance(param, torch.nn.parameter.UninitializedParameter):
        raise ValueError(
            f"parameter {name} is lazy and has no shape yet; run one forward pass before the optimizer is built"
        )
    if param.layout != torch.strided:
        raise ValueError(f"parameter {name} is sparse ({param.layout}); only dense parameters are supported")
    if param.dtype not in _DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(
            f"parameter {name} is {param.dtype}; supported are {kinds}. Give others a torch.optim optimizer"
        )
    if param.device.type == "meta":
        raise ValueError(
            f"parameter {name} is on the meta device; materialise the model first (model.to_empty, then init)"
        )
    if not _has_memory(param):
        raise ValueError(
            f"parameter {name} is a {type(param).__name__}, whose values lie in other tensors, or nowhere, so that updates "
            f"would not reach them; give it a torch.optim optimizer of its own, or train a plain tensor and convert it after "
            f"training"
        )
    if param.device.type not in ("cpu", "cuda"):
        raise ValueError(f"parameter {name} is on {param.device}; supported devices are cpu and cuda")


def _check_disjoint(params: Sequence[Tensor], specs: Sequence[ParamSpec]) -> None:
    def extent(tensor: Tensor) -> int:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return int(tensor.data_ptr() + (reach + 1) * tensor.element_size())

    spans = sorted((p.data_ptr(), extent(p), spec.name) for p, spec in zip(params, specs, strict=True) if p.numel())
    for (_, stop, one), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(
                f"parameters {one} and {other} share memory but are different Parameter objects, so flat storage would part "
                f"them; tie them by assigning the same object (model.b.weight = model.a.weight)"
            )


def pair_parameters(groups: Groups, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Any]]:
    """Each parameter with its key in a state_dict's "state", in order; as many as both have."""
    params = [param for group in groups for param in group["params"]]
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return list(zip(params, keys, strict=False))


def check_states(groups: Groups, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the parameter, if a saved state does not have its parameter's shape."""
    for number, (param, key) in enumerate(pair_parameters(groups, state_dict)):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != param.shape:
                raise ValueError(
                    f"{name} of parameter {number} has shape {tuple(value.shape)}, not {tuple(param.shape)}: "
                    f"this checkpoint is of another model, or its parameters were in another order"
                )


def fields_of(
    kind: str, groups: Groups, specs: Sequence[ParamSpec], options: Options, sharded: Mapping[str, str] = {}
) -> dict[str, str]:
    """What ranks must agree on, in a reader's words. Groups that are not mixed are each rank's own, and are not counted.

    Args:
        groups: whose hyper-parameters are compared; `specs` are of the parameters of these, or of some.
        sharded: what `Sharding.fields` says of the mixed ones.
    """
    mixed = [spec for spec in specs if spec.mix]
    places = {g: place for place, g in enumerate(dict.fromkeys(spec.group for spec in mixed))}
    fields = {"optimizer": kind, "number of parameters": str(len(mixed))}
    for i, spec in enumerate(mixed):
        dtype, name = str(spec.dtype).removeprefix("torch."), f"parameter {i} ({spec.name})"
        about = f"shape {spec.shape} {dtype} in group {places[spec.group]}"
        fields[name] = sharded.get(name, about) + ("" if spec.trained else ", frozen")
    for g, group in enumerate(group for group in groups if group["mix"]):
        for name, value in group.items():
            if name not in _NOT_AGREED:
                plain = value.tolist() if isinstance(value, Tensor) else value
                # Whatever prints its address, as functions do, would differ on every rank.
                known = isinstance(plain, (bool, int, float, str, tuple, list, type(None)))
                fields[f"{name} of group {g}"] = repr(plain) if known else type(plain).__name__
    for entry in dataclasses.fields(options):
        if entry.name not in ("topology", "group", "mesh", "model", "clock", "mix_strength", "weight", "communicate_every"):
            fields[entry.name] = repr(getattr(options, entry.name))
    return fields | {
        "communicate_every": described(options.communicate_every),
        "mix_strength": options.strength.described(),
        "weight": "none" if options.weight is None else "given",
    }
