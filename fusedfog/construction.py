"""How an optimizer comes to be: check, lay out, agree with the other ranks, and only then change or send anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.algorithms import Algorithm, Outer, algorithm_for, check_options, resolve_topology
from fusedfog.around import AroundScheduler
from fusedfog.capture import CapturableScheduler, refuse
from fusedfog.comm.agreement import agree, next_agreement
from fusedfog.comm.averaging import broadcast
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import GroupView, check_backend, check_mesh, find_group, group_timeout
from fusedfog.comm.registry import communicator_for
from fusedfog.compilation import Kind, compile_everywhere, kinds_of_passes, numbers_of_neighbours
from fusedfog.environment import check_dtypes, check_kernel
from fusedfog.flat import dense_stride
from fusedfog.gradient_exchange import AllReduceScheduler
from fusedfog.hierarchy import Hierarchy
from fusedfog.kernels import device
from fusedfog.layout import ParamSpec, Segment, plan
from fusedfog.rhythm import Rhythm
from fusedfog.scheduler import Scheduler
from fusedfog.shards import room, segment_of, settle, sharding_of, stand_in
from fusedfog.storage import WAYS, Storage, Way, wire_format
from fusedfog.topology import Topology

Groups = list[dict[str, Any]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WARM_ROUNDS = 64


class Keywords(TypedDict, total=False):
    """The keyword arguments that every optimizer takes; `DecentralizedOptimizer` explains them."""

    topology: Topology | str | None
    algorithm: str
    group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    communicate_every: int
    global_average_every: int | None
    outer: Outer | None
    fused_backward: bool
    bucket_mb: float
    wire_dtype: torch.dtype | str | None
    low_precision: Way | None
    state_dtype: torch.dtype
    max_grad_norm: float | None
    cpu_compile: bool
    capturable: bool
    measure: bool
    sync_init: bool
    comm_sms: int | None
    model: torch.nn.Module | None


@dataclass(frozen=True)
class Options:
    """The checked `Keywords` of one optimizer, and the clock that a copy of it resumes from."""

    topology: Topology | str | None = None
    algorithm: str = "awc"
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    communicate_every: int = 1
    global_average_every: int | None = None
    outer: Outer | None = None
    fused_backward: bool = False
    bucket_mb: float = 25
    wire_dtype: torch.dtype | str | None = None
    low_precision: Way | None = None
    state_dtype: torch.dtype = torch.float32
    max_grad_norm: float | None = None
    cpu_compile: bool = False
    capturable: bool = False
    measure: bool = False
    sync_init: bool = True
    comm_sms: int | None = None
    model: torch.nn.Module | None = None
    clock: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(keywords: Keywords) -> Options:
        """Check what can be checked without looking at parameters or ranks; ValueError says which keyword is wrong."""
        options = Options(**keywords)
        for name in ("communicate_every", "global_average_every"):
            every = getattr(options, name)
            if not (isinstance(every, int) and every >= 1) and (name == "communicate_every" or every is not None):
                raise ValueError(f"{name} must be a whole number of at least 1, got {every!r}")
        if options.outer is not None and (options.communicate_every != 1 or options.global_average_every is not None):
            raise ValueError("outer= has a rhythm of its own: give outer=Outer(every=...) and no other rhythm")
        if options.cpu_compile and options.measure:
            raise ValueError("compiled passes measure nothing: leave out cpu_compile=True or measure=True")
        if not (math.isfinite(options.bucket_mb) and options.bucket_mb > 0):
            raise ValueError(f"bucket_mb must be positive and finite, got {options.bucket_mb!r}; 25 is a good size")
        if options.low_precision not in (None, *WAYS):
            ways = ", ".join(map(repr, WAYS))
            raise ValueError(f"low_precision is one of {ways}, or None, got {options.low_precision!r}")
        if options.state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype is torch.float32 or torch.bfloat16, got {options.state_dtype!r}")
        if options.cpu_compile and (
            options.low_precision or options.wire_dtype or options.state_dtype != torch.float32
        ):
            raise ValueError(
                "compiled passes know no low_precision, state_dtype or wire_dtype: leave out cpu_compile=True"
            )
        if options.capturable and (options.fused_backward or options.cpu_compile):
            what = "fused_backward" if options.fused_backward else "cpu_compile"
            why = (
                "its hooks start messages inside backward"
                if options.fused_backward
                else "compiled passes take numbers as arguments"
            )
            raise ValueError(f"capturable=True does not work with {what}=True: {why}. Leave one of them out")
        sms = options.comm_sms
        if sms is not None and not (isinstance(sms, int) and not isinstance(sms, bool) and 1 <= sms <= 64):
            raise ValueError(f"comm_sms must be a whole number of 1 to 64, or None for NCCL's own choice, got {sms!r}")
        clip = options.max_grad_norm
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"max_grad_norm must be positive and finite, or None for no clipping, got {clip!r}")
        return options

    @property
    def codes(self) -> torch.dtype | None:
        """dtype of compressed messages, or None; ValueError for formats that there are not."""
        return wire_format(self.wire_dtype)

    @property
    def storage(self) -> Storage:
        """How 16-bit parameters and states are kept."""
        return Storage(self.low_precision, self.state_dtype)

    def portable(self, clock: Mapping[str, Any]) -> Options:
        """These options as a pickled or copied optimizer carries them: ranks have diverged, so no broadcast from rank 0."""
        if self.group is not None or self.mesh is not None:
            raise TypeError(
                "an optimizer with a group or mesh of its own cannot be pickled or copied; use state_dict()"
            )
        return dataclasses.replace(self, clock=clock, sync_init=False)


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
    """The layout's view of the parameters of `groups`, checked.

    Raises:
        ValueError: a dtype, memory layout or device that cannot be trained here, or parameters that share memory.
    """
    known = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())} if model is not None else {}
    specs: list[ParamSpec] = []
    seen: list[Tensor] = []
    for offset, group in enumerate(groups):
        names = group.get("param_names") or [f"{len(specs) + i}" for i in range(len(group["params"]))]
        for i, (param, given) in enumerate(zip(group["params"], names, strict=True)):
            depth, name = known.get(id(param), (i / len(group["params"]), given))
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
    places = {param.device: spec.name for param, spec in zip(seen, specs, strict=True)}
    if len(places) > 1:
        found = ", ".join(f"{name} on {place}" for place, name in places.items())
        raise ValueError(
            f"all parameters of an optimizer must be on one device, but there is {found}; move the model first"
        )
    _check_disjoint(seen, specs)
    return specs


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
    if device.on_gpu(param) and param.dtype == torch.float64:
        raise ValueError(
            f"parameter {name} is float64 on {param.device}; the GPU kernel computes in float32: use model.float()"
        )
    if param.device.type == "meta":
        raise ValueError(
            f"parameter {name} is on the meta device; materialise the model first (model.to_empty, then init)"
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


def _fields(kind: str, groups: Groups, specs: Sequence[ParamSpec], options: Options) -> dict[str, str]:
    """What ranks must agree on, in a reader's words."""
    fields = {"optimizer": kind, "number of parameters": str(len(specs))}
    for i, spec in enumerate(specs):
        dtype = str(spec.dtype).removeprefix("torch.")
        fields[f"parameter {i} ({spec.name})"] = f"shape {spec.shape} {dtype} in group {spec.group}"
    for g, group in enumerate(groups):
        for name, value in group.items():
            if name not in ("params", "param_names"):
                plain = value.tolist() if isinstance(value, Tensor) else value
                # Whatever prints its address, as functions do, would differ on every rank.
                known = isinstance(plain, (bool, int, float, str, tuple, list, type(None)))
                fields[f"{name} of group {g}"] = repr(plain) if known else type(plain).__name__
    for entry in dataclasses.fields(options):
        if entry.name not in ("topology", "group", "mesh", "model", "clock"):
            fields[entry.name] = repr(getattr(options, entry.name))
    return fields


def name_topology(topology: Topology | None) -> str:
    """A topology as ranks compare it, and errors call it."""
    return "none" if topology is None else f"{topology.name} ({topology.fingerprint()[:12]})"


def build(kind: str, groups: Groups, family: str, options: Options) -> Scheduler:
    """Check everything, agree with the other ranks, then adopt the parameters and start from rank 0's values."""
    algorithm = algorithm_for(options.algorithm, family, options.outer)
    for group in groups:
        check_options(algorithm, {**group, **vars(options)})
    alone = algorithm.exchanges == "nothing"
    given = options.mesh
    sharding, options, everyone = settle(groups, options, alone=alone)
    world = GroupView(0, 1, None) if alone else find_group(options.group)
    mesh = options.mesh
    if mesh is not None:
        _check_by_machine(mesh, world, algorithm, options)
    size = world.size if mesh is None else mesh.size(0)
    topology = resolve_topology(algorithm, options.topology, size, static=options.codes is not None)
    if world.size == 1:
        algorithm = algorithm_for("local", family)
    if options.capturable:
        pauses = options.communicate_every > 1 or options.global_average_every is not None
        refuse(algorithm, topology if world.size > 1 else None, lossy=options.codes is not None, pauses=pauses)
    specs = describe(groups, 0, options.model)
    place = groups[0]["params"][0].device
    check_kernel(place)
    check_backend(world, place)
    _check_precision(algorithm, specs, topology, place, options)
    layouts = plan(specs, int(options.bucket_mb * 2**20))
    link, channel, hierarchy = None, 0, None
    passes = (
        _passes_to_compile(algorithm, groups, layouts, topology, world, options) if not device.on_gpu(place) else []
    )
    if world.size > 1:
        fields = _fields(kind, groups, specs, options) | {"topology": name_topology(topology)}
        fields["mesh"] = "none" if mesh is None else str(mesh.mesh.tolist())
        if sharding is not None and everyone is not None:
            fields |= sharding.fields(groups, specs, given)
        agree(everyone or world, next_agreement(everyone or world), fields, group_timeout(world, place), kind)
        link = communicator_for(world, place, options.comm_sms)
        channel = link.open_channel()
        hierarchy = Hierarchy(mesh, place, options.comm_sms) if mesh is not None and topology is not None else None
        _warm_up(link, hierarchy, topology)
    compiled = bool(passes) and compile_everywhere(world, passes, link.timeout if link is not None else None, kind)
    params = [param for group in groups for param in group["params"]]
    segments = [
        segment_of(layout, [params[slot.index] for slot in layout.slots], compiled=compiled, storage=options.storage)
        for layout in layouts
    ]
    if options.sync_init:
        broadcast([segment.param for segment in segments], link)
        broadcast([b.detach() for b in options.model.buffers()] if options.model is not None else [], link)
    make = _scheduler_for(algorithm, family, options)
    return make(
        groups,
        segments,
        algorithm,
        topology,
        link,
        channel,
        _rhythm(options),
        hierarchy,
        options.codes,
        sharding,
    )


def _rhythm(options: Options) -> Rhythm:
    return Rhythm(
        communicate_every=options.outer.every if options.outer is not None else options.communicate_every,
        global_average_every=options.global_average_every,
        fused_backward=options.fused_backward,
        max_grad_norm=options.max_grad_norm,
        measure=options.measure,
    )


def _scheduler_for(algorithm: Algorithm, family: str, options: Options) -> type[Scheduler]:
    if family == "wrapped":
        return AroundScheduler
    if algorithm.exchanges == "gradients":
        return AllReduceScheduler
    return CapturableScheduler if options.capturable else Scheduler


def _check_by_machine(mesh: DeviceMesh, world: GroupView, algorithm: Algorithm, options: Options) -> None:
    """Raise ValueError for what does not go by machines."""
    check_mesh(mesh, world)
    if algorithm.graph == "any":
        raise ValueError(f"{algorithm.name} works on the ranks' own edges and not on a mesh; use awc or atc")
    if options.codes is not None:
        raise ValueError("machines of a mesh exchange exact means: use wire_dtype without mesh, or mesh without it")


def _check_precision(
    algorithm: Algorithm, specs: Sequence[ParamSpec], topology: Topology | None, place: torch.device, options: Options
) -> None:
    """Raise ValueError for ways of storing and sending that these parameters, this device or this algorithm do not allow."""
    if options.low_precision is not None and not any(spec.dtype.itemsize == 2 for spec in specs):
        dtypes = ", ".join(sorted({str(spec.dtype) for spec in specs}))
        raise ValueError(
            f"low_precision={options.low_precision!r} is for bf16 and fp16 parameters, and these are {dtypes}: convert the "
            f"model first (model.bfloat16()), or leave it out"
        )
    if options.state_dtype != torch.float32 and not algorithm.plain:
        raise ValueError(
            f"the states of {algorithm.name} carry sums over ranks that must be exact: state_dtype is for awc, atc, "
            f"allreduce, local and push_sum"
        )
    wanted: dict[str, torch.dtype | None] = {f"parameters ({spec.name})": spec.dtype for spec in specs}
    check_dtypes(place, {**wanted, "states": options.state_dtype, "messages": options.codes})
    if options.codes is None:
        return
    if topology is not None and topology.period is None:
        raise ValueError(
            f"wire_dtype keeps replicas for each round of the topology's period, and {topology.name} has none: use a static "
            f"graph, 'one_peer_exponential' or another periodic sequence"
        )


def _passes_to_compile(
    algorithm: Algorithm,
    groups: Groups,
    layouts: Sequence[Segment],
    topology: Topology | None,
    world: GroupView,
    options: Options,
) -> list[Kind]:
    if not options.cpu_compile:
        return []
    neighbours = {1}
    if options.mesh is None:
        averaging, pausing = options.global_average_every is not None, options.communicate_every > 1
        neighbours = numbers_of_neighbours(topology if world.size > 1 else None, world.rank, averaging, pausing)
    return kinds_of_passes(algorithm, groups, layouts, neighbours)


def extend(kind: str, engine: Scheduler, groups: Groups, options: Options) -> None:
    """Take the last of `groups` into a running scheduler; all ranks together."""
    group = groups[-1]
    check_options(engine.algorithm, {**group, **vars(options)})
    specs = describe([group], len(groups) - 1, options.model)
    place = engine.segments[0].param.device
    if specs and group["params"][0].device != place:
        raise ValueError(
            f"the new group is on {group['params'][0].device} but the optimizer's parameters are on {place}"
        )
    if sharding_of([group], options.model) != engine.sharding:
        raise ValueError(
            "the new group is not sharded as the optimizer's parameters are: give it an optimizer of its own"
        )
    if engine.link is not None:
        fields = _fields(kind, groups[-1:], specs, options)
        if engine.sharding is not None:
            fields |= engine.sharding.fields(groups[-1:], specs, None)
        agree(
            engine.link.world, next_agreement(engine.link.world), fields, engine.link.timeout, f"{kind}.add_param_group"
        )
    layouts = plan(specs, int(options.bucket_mb * 2**20))
    compiled = any(region.compiled for region in engine.segments[0].regions)
    segments = [
        segment_of(
            layout, [group["params"][slot.index] for slot in layout.slots], compiled=compiled, storage=options.storage
        )
        for layout in layouts
    ]
    if options.sync_init:
        broadcast([segment.param for segment in segments], engine.link)
    engine.discard()
    engine.segments.extend(segments)
    engine.lay_lanes()


def measuring_link(engine: Scheduler, options: Options) -> Communicator | None:
    """The link over which averages are taken; `local` optimizers have none of their own and meet here first.

    None where there is nothing to average: for a rank that is alone, and where FSDP keeps all replicas equal.
    """
    if engine.link is not None or (options.group is None and not dist.is_initialized()):
        return engine.link
    if engine.sharding is not None and engine.sharding.keeps_equal(find_group(options.group)):
        return None
    _, options, _ = settle(engine.groups, options, alone=False)
    world = find_group(options.group)
    return communicator_for(world, engine.segments[0].param.device) if world.size > 1 else None


def change_topology(kind: str, engine: Scheduler, topology: Topology | str | None) -> None:
    """Give a running scheduler another topology; all ranks together."""
    size = engine.topology.size if engine.topology is not None else 1
    chosen = resolve_topology(engine.algorithm, topology, size, static=engine.wires is not None)
    if engine.wires is not None and chosen is not None:
        chosen.finite_period("wire_dtype")
    if isinstance(engine, CapturableScheduler):
        refuse(engine.algorithm, chosen, lossy=engine.wires is not None)
    if engine.link is not None:
        world = engine.link.world
        fields = {"topology": name_topology(chosen)}
        agree(world, next_agreement(world), fields, engine.link.timeout, f"{kind}.set_topology")
    engine.discard()
    engine.follow_topology(chosen)
    if engine.link is not None:
        mailbox = engine._mailbox
        _warm_up(engine.link, None if mailbox is None else mailbox.hierarchy, chosen)


def _warm_up(link: Communicator, hierarchy: Hierarchy | None, topology: Topology | None) -> None:
    """Open the connections of every round, the first ones of an endless topology, so that no step has to."""
    if topology is None or not link.on_gpu:
        return
    place = link.world.rank if hierarchy is None else hierarchy.machine
    rounds = [topology.round(place, step) for step in range(topology.period or _WARM_ROUNDS)]
    if hierarchy is None:
        link.warm_up((turn.send, turn.recv) for turn in rounds)
    else:
        hierarchy.warm_up(rounds)
