"""The average model over all ranks, to look at or to evaluate, and how far ranks are from it. Collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusedfog.comm.averaging import average_in_place, consensus_distance
from fusedfog.comm.calls import Call
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.elastic.again import together
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.engine.scheduler import Scheduler
from fusedfog.log import warn_user
from fusedfog.optim.build import ranks_to_mix_with
from fusedfog.optim.calls import ranks_of
from fusedfog.optim.options import Options
from fusedfog.optim.shared import shared_with_model
from fusedfog.params.instances import instances
from fusedfog.params.shards import sharding_of


def measuring_communicator(engine: Scheduler, options: Options) -> Communicator | None:
    """The communicator over which averages are taken; `local` optimizers have none of their own and meet here first.

    None where there is nothing to average: for a rank that is alone, and where FSDP keeps all replicas equal.
    """
    if engine.communicator is not None or (options.group is None and not dist.is_initialized()):
        return engine.communicator
    if engine.sharding is not None and engine.sharding.keeps_equal(find_group(options.group)):
        return None
    options, _ = ranks_to_mix_with(sharding_of(engine.groups, options.model), options, alone=False)
    view = find_group(options.group)
    return communicator_for(view, engine.place) if view.size > 1 else None


@contextmanager
def averaged(engine: Scheduler, options: Options, model: torch.nn.Module | None) -> Iterator[None]:
    """Inside, parameters and `model`'s floating-point buffers are averages; afterwards they are exactly what they were."""
    model = model if model is not None else options.model
    buffers = _float_buffers(model, engine) if model is not None else []
    if model is None and not engine.warned_of_buffers:
        _warn_of_buffers(engine)
    tensors = [*_mixed(engine), *buffers]  # Parameters elsewhere would not be the average inside.

    def average() -> ExitStack:
        """Put the average in the place of the tensors; closing what is returned puts them back."""
        with Call("averaged()", ranks_of(engine)):
            communicator = _meet(engine, options, "averaged()")
            engine.drain(keep_failures=True)
        with ExitStack() as undo:
            undo.callback(_put_back, engine, tensors, [tensor.clone() for tensor in tensors], engine.buckets.count_edits())
            with torch.no_grad(), Call("averaged()", ranks_of(engine)):
                average_in_place(tensors, communicator, finite=options.nonfinite != "propagate")
            return undo.pop_all()

    with together(average, ExitStack.close):
        engine.buckets.bump_versions()
        with engine.block_steps("averaged()"):
            yield


def _put_back(engine: Scheduler, tensors: list[Tensor], before: list[Tensor], edits: list[int]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    engine.buckets.bump_versions()
    engine.buckets.forget_edits(edits)


def distance_of(engine: Scheduler, options: Options) -> float:
    """Root mean square over ranks of ||x_i - mean||, over all mixed parameters, measured now."""
    flats = _mixed(engine)

    def measure() -> float:
        communicator = _meet(engine, options, "consensus_distance()")
        return consensus_distance(flats, communicator, finite=options.nonfinite != "propagate")

    distance = together(measure)
    if engine.sharding is not None:
        own = torch.tensor(distance, dtype=torch.float64, device=engine.place)
        distance = engine.sharding.norm(own).item()
    return distance


def _float_buffers(model: nn.Module, engine: Scheduler) -> list[torch.Tensor]:
    """The floating-point buffers of a model but those of modules that only this rank trains."""
    own = set(map(id, model.buffers()))
    beside = shared_with_model(model, engine.groups).values()
    return [tensor for tensor in beside if id(tensor) in own and tensor.is_floating_point()]


def _warn_of_buffers(engine: Scheduler) -> None:
    """Warn, once, if the parameters are in a module with buffers that the average will not have."""
    engine.warned_of_buffers = True
    params = {id(param) for segment in engine.segments if segment.layout.mix for param in segment.owners}
    for module in _roots_of(params):
        constant = {
            f"{path}.{name}" for path, one in module.named_modules() for name in one._non_persistent_buffers_set
        }
        names = [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]
        names = [name for name in names if name not in constant and f".{name}" not in constant]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warn_user(
                f"rank {engine.rank}: averaged() averages the parameters, but not {names[0]}{more}: {type(module).__name__} has "
                f"floating-point buffers (running statistics), which stay this rank's own beside averaged weights. Pass the "
                f"model, averaged(model), or build the optimizer with model=",
                UserWarning,
            )
            return


def _roots_of(params: set[int]) -> list[nn.Module]:
    """The modules that hold any of these parameters and are in no other module; one look through all objects."""
    modules = instances(nn.Module)
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module.__dict__.get("_modules", {}).values():
            parents.setdefault(id(child), []).append(module)
    reached = [one for one in modules if any(id(p) in params for p in one.__dict__.get("_parameters", {}).values())]
    seen, roots = set(map(id, reached)), []
    while reached:
        module = reached.pop()
        above = parents.get(id(module), [])
        if not above:
            roots.append(module)
        reached += [one for one in above if id(one) not in seen]
        seen.update(map(id, above))
    return roots


def _meet(engine: Scheduler, options: Options, call: str) -> Communicator | None:
    """`measuring_communicator`, once all of its ranks are in this call."""
    communicator = measuring_communicator(engine, options)
    if communicator is not None:
        communicator.meet(call)
    return communicator


def _mixed(engine: Scheduler) -> list[torch.Tensor]:
    """The flat parameters that are mixed; raises `StorageReplacedError` if any parameter cannot lie there."""
    engine.take_back_moved()
    return [segment.param for segment in engine.segments if segment.layout.mix]
