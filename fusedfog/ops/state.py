"""Whole models and optimizers: global averages and broadcasts, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.agreement import agree, next_agreement
from fusedfog.comm.averaging import average_in_place, broadcast
from fusedfog.comm.calls import collective
from fusedfog.comm.group import GroupView, check_backend, find_group, group_timeout
from fusedfog.ops.control import gather
from fusedfog.ops.edges import read_rank
from fusedfog.ops.neighbors import open_communicator

Tensors: TypeAlias = torch.nn.Module | Mapping[str, Any] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_PACK = 1 << 22
"""Elements that travel together: many small tensors would cost a round trip each."""

_SMALL = 1024
"""Optimizer states of up to this many elements travel with the structure they are in."""


@collective("allreduce_parameters()")
@torch.no_grad()
def allreduce_parameters(module_or_params: Tensors, group: dist.ProcessGroup | None = None) -> None:
    """Replace every floating-point (or complex) tensor by its mean over all ranks, in place. Collective.

    Integer tensors, such as BatchNorm's `num_batches_tracked`, are left alone. 16-bit tensors are summed in float32.
    Parameters of a fusedfog optimizer: call it inside `with opt.paused():`.

    Args:
        module_or_params: a module (its parameters and buffers), a state_dict, or tensors or (name, tensor) pairs.
        group: process group, None for the default one.

    Raises:
        TypeError: for something else.
        MismatchError: names, shapes or dtypes differ between ranks; nothing has been changed.
    """
    named, view = _named_tensors(module_or_params), find_group(group)
    chosen = {name: t for name, t in named.items() if t.is_floating_point() or t.is_complex()}
    _agree_on_tensors(view, chosen, "allreduce_parameters")
    if view.size == 1:
        return
    for members, flat in _packed(chosen.values()):
        real = torch.view_as_real(flat) if flat.is_complex() else flat
        average_in_place([real.reshape(-1)], open_communicator(view, flat.device))
        _unpack(members, flat)


@collective("broadcast_parameters()")
@torch.no_grad()
def broadcast_parameters(module_or_state_dict: Tensors, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Replace every tensor, of whatever dtype, by group rank `src`'s, in place. Collective.

    Parameters of a fusedfog optimizer: call it inside `with opt.paused():`.

    Args:
        module_or_state_dict: as in `allreduce_parameters`; entries of a state_dict that are no tensors are left alone.
        src: rank in the group.
        group: process group, None for the default one.

    Raises:
        TypeError, MismatchError: as in `allreduce_parameters`.
        ValueError: `src` is no rank of the group.
    """
    named, view = _named_tensors(module_or_state_dict), find_group(group)
    src = read_rank(src, "src", view.size)
    _agree_on_tensors(view, named, "broadcast_parameters", src)
    if view.size == 1:
        return
    for members, flat in _packed(named.values()):
        broadcast([flat.view(torch.uint8)], open_communicator(view, flat.device), src)
        _unpack(members, flat)


@collective("broadcast_optimizer_state()")
@torch.no_grad()
def broadcast_optimizer_state(opt: torch.optim.Optimizer, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank group rank `src`'s optimizer state and hyper-parameters. Collective; no step is taken.

    Goes through `state_dict` and `load_state_dict`, so it serves every torch optimizer and fusedfog's own, and ranks
    that have no state yet. Parameters themselves are `broadcast_parameters`' business.

    Args:
        opt: the same kind of optimizer, over parameters of the same shapes, on every rank.
        src: rank in the group.
        group: process group, None for the default one.

    Raises:
        MismatchError: kinds of optimizer, param groups or shapes differ between ranks; nothing has been changed.
        ValueError: `src` is no rank of the group.
    """
    view = find_group(group)
    src = read_rank(src, "src", view.size)
    shapes = {
        f"group {g}, parameter {i}": p for g, each in enumerate(opt.param_groups) for i, p in enumerate(each["params"])
    }
    extra = {"optimizer": type(opt).__name__, "number of param groups": str(len(opt.param_groups))}
    _agree_on_tensors(view, shapes, "broadcast_optimizer_state", src, extra)
    if view.size == 1:
        return
    device = next(iter(shapes.values())).device
    communicator = open_communicator(view, device)
    big: list[Tensor] = []
    # Local. On ranks other than `src` it only waits for what may be in flight.
    state = opt.state_dict()
    box: list[Any] = [_without_tensors(state, big) if view.rank == src else None]
    what = f"taking rank {src}'s state, with all ranks"
    if communicator.follows:
        box = [gather(communicator, box[0], what)[src]]
    else:
        communicator.run(
            lambda: dist.broadcast_object_list(box, group=communicator.group, group_src=src, device=device), what
        )
    if view.rank != src:
        big = [torch.empty(hole.shape, dtype=hole.dtype, device=device) for hole in _holes(box[0])]
    for tensor in big:
        # What the state has elsewhere than its parameters (a state kept on the CPU) still travels on their communicator.
        part = tensor.to(device).contiguous()
        broadcast([part.reshape(-1).view(torch.uint8)], communicator, src)
        tensor.copy_(part)
    opt.load_state_dict(state if view.rank == src else _with_tensors(box[0], iter(big)))


@dataclass(frozen=True)
class _Hole:
    """Where a tensor that travels by itself was."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _without_tensors(value: Any, taken: list[Tensor]) -> Any:
    """A copy of a state_dict with its large tensors in `taken` and small ones on the CPU, ready to be pickled."""
    if isinstance(value, Tensor):
        if value.numel() <= _SMALL:
            return value.detach().cpu().clone()
        taken.append(value.detach())
        return _Hole(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _without_tensors(entry, taken) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(entry, taken) for entry in value)
    return value


def _holes(value: Any) -> Iterator[_Hole]:
    if isinstance(value, _Hole):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _holes(entry)
    elif type(value) in (list, tuple):
        for entry in value:
            yield from _holes(entry)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, _Hole):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(entry, tensors) for entry in value)
    return value


def _named_tensors(given: Tensors) -> dict[str, Tensor]:
    if isinstance(given, torch.nn.Module):
        return {name: t.detach() for name, t in (*given.named_parameters(), *given.named_buffers())}
    if isinstance(given, Mapping):
        return {name: t.detach() for name, t in given.items() if isinstance(t, Tensor)}
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise TypeError(
            f"expected a module, a state_dict, or a list of tensors or (name, tensor) pairs, not {type(given).__name__}; "
            f"one tensor is [tensor]"
        )
    named: dict[str, Tensor] = {}
    for number, entry in enumerate(given):
        name, tensor = entry if isinstance(entry, tuple) else (str(number), entry)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"entry {number} is {type(tensor).__name__}, not a tensor or (name, tensor)")
        named[name] = tensor.detach()
    return named


def _agree_on_tensors(
    view: GroupView, named: Mapping[str, Tensor], what: str, src: int = 0, extra: Mapping[str, str] | None = None
) -> None:
    if view.group is None or view.size == 1:
        return
    fields = {"src": str(src), "number of tensors": str(len(named)), **(extra or {})}
    for name, tensor in named.items():
        fields[name] = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device.type}"
    place = next((tensor.device for tensor in named.values()), torch.device("cpu"))
    check_backend(view, place)
    agree(view, next_agreement(view), fields, group_timeout(view, place), what, f"{what}()")


def _packed(tensors: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tensors of one dtype and device copied together into flat ones of about `_PACK` elements."""
    families: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            families.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for family in families.values():
        members: list[Tensor] = []
        count = 0
        for tensor in family:
            members.append(tensor)
            count += tensor.numel()
            if count >= _PACK or tensor is family[-1]:
                yield members, torch.cat([t.resolve_conj().resolve_neg().reshape(-1) for t in members])
                members, count = [], 0


def _unpack(members: list[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
        tensor.copy_(part.view(tensor.shape))
