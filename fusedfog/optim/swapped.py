"""Other values in the parameters' place for a while, an average over time (EMA) above all, and back to the last bit. Local."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.options import Options
from fusedfog.optim.parameters import parameters_of

Values: TypeAlias = Iterable[Tensor] | Mapping[Tensor, Tensor] | nn.Module
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]


@contextmanager
def swapped(engine: Scheduler, pairs: Pairs) -> Iterator[None]:
    """Inside, the first of each pair has the values of the second; see `DecentralizedOptimizer.swapped`."""
    engine.take_back_moved()
    # What is being sent is read where the parameters lie.
    engine.drain(keep_failures=True)
    edits = engine.buckets.count_edits()
    before = [_local(target).clone() for target, _ in pairs]
    try:
        with torch.no_grad():
            for target, value in pairs:
                target.copy_(value)
        with engine.block_steps("swapped()"):
            yield
    finally:
        with torch.no_grad():
            for (target, _), old in zip(pairs, before, strict=True):
                _local(target).copy_(old)
        engine.buckets.forget_edits(edits)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def pairs_of(kind: str, engine: Scheduler, options: Options, values: Values) -> Pairs:
    """Each tensor that is to have other values, with these.

    Raises:
        TypeError: `values` is neither tensors, nor a mapping, nor a module.
        ValueError: a wrong number, an unknown parameter, or another shape or dtype than the parameter has.
    """
    groups = engine.groups
    params = parameters_of(groups)
    names = _names_of(engine, options)
    if isinstance(values, nn.Module):
        pairs = _of_module(kind, params, names, options.model, values)
    elif isinstance(values, Mapping):
        own = set(map(id, params))
        unknown = next((key for key in values if not isinstance(key, Tensor) or id(key) not in own), None)
        if unknown is not None:
            shape = f"a tensor of shape {tuple(unknown.shape)}" if isinstance(unknown, Tensor) else repr(unknown)
            raise ValueError(f"{kind}.swapped: {shape} is none of this optimizer's parameters")
        pairs = list(values.items())
    else:
        if isinstance(values, (Tensor, str, bytes)) or not isinstance(values, Iterable):
            raise TypeError(
                f"{kind}.swapped takes tensors in the order of the parameters, a mapping from parameters to tensors, or a "
                f"module such as AveragedModel; got {type(values).__name__}"
            )
        given = list(values)
        if len(given) != len(params):
            raise ValueError(f"{kind}.swapped: {len(given)} values for {len(params)} parameters")
        pairs = list(zip(params, given, strict=True))
    for target, value in pairs:
        _check(kind, names.get(id(target), "of the model"), target, value)
    return pairs


def _names_of(engine: Scheduler, options: Options) -> dict[int, str]:
    names = {id(param): str(number) for number, param in enumerate(parameters_of(engine.groups))}
    for group in engine.groups:
        names |= {id(p): name for p, name in zip(group["params"], group.get("param_names") or (), strict=False)}
    if options.model is not None:
        names |= {id(param): name for name, param in options.model.named_parameters()}
    return names


def _of_module(
    kind: str, params: Sequence[Tensor], names: Mapping[int, str], model: nn.Module | None, values: nn.Module
) -> Pairs:
    """By name where the parameters have names; in order where a single sequence was given, so that there is one."""
    inner = values.module if isinstance(values, AveragedModel) else values
    theirs = dict(inner.named_parameters())
    own = {name: param for name, param in model.named_parameters()} if model is not None else {}
    known = {names[id(param)]: param for param in params} | own
    if known.keys() == theirs.keys():
        pairs: Pairs = [(param, theirs[name]) for name, param in known.items()]
    elif model is None and len(params) == len(theirs) and all(name.isdecimal() for name in known):
        pairs = list(zip(params, theirs.values(), strict=True))
    else:
        lacking = ", ".join(sorted(known.keys() ^ theirs.keys())[:4])
        raise ValueError(
            f"{kind}.swapped: {type(values).__name__} has {len(theirs)} parameters and this optimizer's model has {len(known)}; "
            f"not in both: {lacking}. Give the average of the same model, or a mapping from parameters to tensors"
        )
    if model is not None and isinstance(values, AveragedModel) and values.use_buffers:
        buffers = dict(inner.named_buffers())
        pairs += [(buffer, buffers[name]) for name, buffer in model.named_buffers() if name in buffers]
    return pairs


def _check(kind: str, name: str, target: Tensor, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{kind}.swapped: the value for parameter {name} is a {type(value).__name__}, not a tensor")
    if isinstance(target, DTensor) and not (isinstance(value, DTensor) and value.placements == target.placements):
        raise ValueError(
            f"{kind}.swapped: parameter {name} is sharded as {target.placements}; its value must be a DTensor that is, too"
        )
    if value.shape != target.shape or value.dtype != target.dtype:
        raise ValueError(
            f"{kind}.swapped: the value for parameter {name} has shape {tuple(value.shape)} and {value.dtype}, the parameter "
            f"{tuple(target.shape)} and {target.dtype}"
        )
