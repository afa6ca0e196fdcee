"""How an optimizer comes to be: check, lay out, agree with the other ranks, and only then change or send anything."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.algorithm import Algorithm
from fusedfog.algorithms import algorithm_for, asynchronous
from fusedfog.comm.agreement import agree, next_agreement
from fusedfog.comm.averaging import broadcast
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.elastic.run import Run
from fusedfog.comm.group import GroupView, Members, check_backend, check_mesh, find_group, group_timeout, members_of
from fusedfog.comm.registry import communicator_for
from fusedfog.engine.capture import CapturableScheduler
from fusedfog.engine.compile import compile_everywhere
from fusedfog.engine.scheduler import Scheduler
from fusedfog.engine.wrapped import AroundScheduler
from fusedfog.environment import check_kernel, missing_instructions
from fusedfog.errors import ExchangeError, PeerTimeout
from fusedfog.kernels import device
from fusedfog.optim.automatic import Calling, agree_on_way, hierarchy_of, is_automatic
from fusedfog.optim.compatibility import check, choose_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.members import topology_of_members
from fusedfog.optim.options import Options
from fusedfog.optim.parameters import Groups, describe, fields_of, parameters_of, place_of
from fusedfog.optim.phases import phases_of, weights_of
from fusedfog.optim.shared import fields_of_shared, make_equal, shared_with_model
from fusedfog.optim.ways import Way
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import ParamSpec, Segment, build_layout, is_trained
from fusedfog.params.owners import Claim
from fusedfog.params.shards import Sharding, segment_of, sharding_of
from fusedfog.topology import Topology

_CALL = "the construction of an optimizer"
"""What all ranks must be in; that they construct the same kind is one of the fields they agree on."""

_WHOLE_MB = 256
"""Large enough that a call of NCCL or gloo costs nothing beside it, small enough for their own chunks to overlap."""


def name_topology(topology: Topology | None) -> str:
    """A topology as ranks compare it, and errors call it."""
    return "none" if topology is None else f"{topology.name} ({topology.fingerprint()[:12]})"


def setup_of(family: str, groups: Groups, options: Options, specs: Sequence[ParamSpec], *, sharded: bool) -> Setup:
    """What `compatibility` is asked about, as far as one rank knows it by itself."""
    place = place_of(groups, options.group)
    trained = [spec for spec in specs if spec.trained]
    used: dict[str, torch.dtype | None] = {f"parameters ({spec.name})": spec.dtype for spec in trained}
    # Frozen 16-bit parameters are a reason for low_precision, as they may be trained later.
    later = [spec for spec in specs if not spec.trained and spec.dtype in (torch.bfloat16, torch.float16)]
    return Setup(
        family,
        algorithm_for(options.algorithm, family, options.outer),
        vars(options),
        groups,
        sharded=sharded,
        dtypes={spec.name: spec.dtype for spec in [*trained, *later]},
        place=place,
        lacking=missing_instructions(place, {**used, "states": options.state_dtype, "messages": options.codes}),
        elastic=Run.current() is not None,
    )


def who_builds(options: Options) -> Members | None:
    """The ranks without which `build` cannot end; None where there are no others yet."""
    return members_of(options.group if options.mesh is None else options.mesh)


def build(kind: str, groups: Groups, family: str, options: Options, claim: Claim) -> Scheduler:
    """Check everything, agree with the other ranks, then adopt the parameters and start from rank 0's values."""
    sharding = sharding_of(groups, options.model)
    specs = describe(groups, 0, options.model)
    setup = setup_of(family, groups, options, specs, sharded=sharding is not None)
    check(setup)
    claim.check(_named(groups, specs))
    place, given, isolated = setup.place, options.mesh, setup.algorithm.exchanges == "nothing"
    options, everyone = ranks_to_mix_with(sharding, options, alone=isolated)
    view = GroupView(0, 1, None) if isolated else find_group(options.group)
    if options.mesh is not None:
        check_mesh(options.mesh, view)
    setup = dataclasses.replace(setup, options=vars(options), ranks=view.size)
    if setup.elastic:
        topology = topology_of_members(setup, options.topology)
    else:
        topology = choose_topology(setup, options.topology, view.size if options.mesh is None else options.mesh.size(0))
    algorithm = asynchronous(setup.running) if options.asynchronous else setup.running
    way = Way(topology)
    check_kernel(place)
    check_backend(view, place)
    communicator, channel, hierarchy, weights = None, 0, None, None
    beside = shared_with_model(options.model, groups) if options.model is not None and options.sync_init else {}
    if view.size > 1:
        sharded = _fields_of_shards(sharding, groups, specs, given) if everyone is not None else {}
        fields = fields_of(kind, groups, specs, options, sharded) | fields_of_shared(beside)
        fields |= _fields_of_ranks(options, topology, place)
        fields |= {name: value for name, value in sharded.items() if name not in fields}
        together, timeout = everyone or view, group_timeout(view, place)
        calling, apart = Calling(kind, _CALL, together, view, timeout), not (options.sync_init or options.equal_inside)
        way = agree_on_way(calling, fields, setup, options, topology, apart=apart)
        weights = weights_of(view, options, timeout, kind, _CALL)
        communicator = communicator_for(view, place, options.comm_sms)
        channel = communicator.open_channel()
        hierarchy = hierarchy_of(way, options, view, place)
    layouts = _lay_out(specs, options, algorithm, over_machines=hierarchy is not None)
    patience = None if communicator is None else communicator.timeout
    compiled = options.cpu_compile and not device.on_gpu(place) and compile_everywhere(view, patience, kind)
    segments = _adopt(groups, layouts, options, communicator, claim, compiled=compiled)
    frozen = _frozen(groups, specs)
    if options.sync_init:
        make_equal([*_mixed_of(groups, frozen), *beside.values()], communicator)
    engine = _scheduler_for(family, options)(
        groups,
        segments,
        phases_of(family, algorithm, way, options, hierarchy, weights, alone=communicator is None and not setup.elastic),
        communicator,
        channel,
        int(options.bucket_mb * 2**20),
        sharding,
        frozen,
        place,
    )
    engine.exchanges.open_connections()
    return engine


def ranks_to_mix_with(sharding: Sharding | None, options: Options, *, alone: bool) -> tuple[Options, GroupView | None]:
    """The options with `group` being the ranks to mix with, and all ranks that have to agree.

    Plain parameters' options stay as they are. Raises ValueError as `Sharding.across`.
    """
    if sharding is None:
        return options, None
    if alone:
        return dataclasses.replace(options, mesh=None), None
    group, everyone = sharding.across(options.group, options.mesh)
    return dataclasses.replace(options, group=group, mesh=None), everyone


def _fields_of_ranks(options: Options, topology: Topology | None, place: torch.device) -> dict[str, str]:
    named = name_topology(topology)
    return {
        "topology": f"auto: {named}, or one of machines" if is_automatic(options.topology) else named,
        "mesh": "none" if options.mesh is None else str(options.mesh.mesh.tolist()),
        "device": place.type,
    }


def _fields_of_shards(
    sharding: Sharding | None, groups: Groups, specs: Sequence[ParamSpec], mesh: DeviceMesh | None
) -> dict[str, str]:
    """What ranks must agree on of mixed shards; nothing for plain parameters."""
    if sharding is None:
        return {}
    return sharding.fields([group for group in groups if group["mix"]], [spec for spec in specs if spec.mix], mesh)


def _frozen(groups: Groups, specs: Sequence[ParamSpec]) -> list[Tensor]:
    return [param for param, spec in zip(parameters_of(groups), specs, strict=True) if not spec.trained]


def _mixed_of(groups: Groups, params: Sequence[Tensor]) -> list[Tensor]:
    """Those of `params` that are in groups which are mixed, in the groups' order."""
    own = set(map(id, params))
    return [param for param in parameters_of([group for group in groups if group["mix"]]) if id(param) in own]


def _lay_out(
    specs: Sequence[ParamSpec], options: Options, algorithm: Algorithm, *, over_machines: bool
) -> tuple[Segment, ...]:
    """The layout: in graded buckets where a step passes and sends one while others compute or travel, in large ones elsewhere.

    Awc and kin in step mode wait for all messages, make one pass and send all again: more messages are only more calls.
    """
    pipelined = options.fused_backward or algorithm.before is not None
    by_default = options.bucket_mb == Options.bucket_mb and not over_machines and not pipelined
    size = int((_WHOLE_MB if by_default else options.bucket_mb) * 2**20)
    return build_layout(specs, size, graded=pipelined)


def _named(groups: Groups, specs: Sequence[ParamSpec]) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {spec.name: param for spec, param in zip(specs, parameters_of(groups), strict=True) if spec.trained}


def _adopt(
    groups: Groups,
    layouts: Sequence[Segment],
    options: Options,
    communicator: Communicator | None,
    claim: Claim,
    *,
    compiled: bool,
) -> list[FlatSegment]:
    """Move parameters of `groups` into flat segments, and start those that are mixed from rank 0's values."""
    params = parameters_of(groups)
    claim.take([params[slot.index] for layout in layouts for slot in layout.slots])
    segments = [
        segment_of(
            layout,
            [cast(nn.Parameter, params[slot.index]) for slot in layout.slots],
            compiled=compiled,
            storage=options.storage,
        )
        for layout in layouts
    ]
    claim.segments += segments
    times = Counter(id(param) for group in groups for param in group["params"])
    for segment in segments if len(params) < times.total() else ():
        segment.listed = [times[id(param)] for param in segment.owners]
    if options.sync_init:
        broadcast([segment.param for segment in segments if segment.layout.mix], communicator)
    return segments


def _scheduler_for(family: str, options: Options) -> type[Scheduler]:
    if family == "wrapped":
        return AroundScheduler
    return CapturableScheduler if options.capturable else Scheduler


def running_setup(family: str, engine: Scheduler, options: Options) -> Setup:
    """The setup of a running scheduler, with its ranks."""
    specs = [slot.spec for segment in engine.segments for slot in segment.layout.slots]
    setup = setup_of(family, engine.groups, options, specs, sharded=engine.sharding is not None)
    return dataclasses.replace(setup, ranks=engine.communicator.view.size if engine.communicator is not None else 1)


def check_groups(family: str, engine: Scheduler, groups: Groups, options: Options) -> None:
    """Raise ValueError if a running scheduler's algorithm refuses hyper-parameters of these groups, as loaded ones."""
    options = dataclasses.replace(options, wire_dtype=options.wire_dtype or engine.phases.last.codes)  # Auto's, perhaps.
    setup = running_setup(family, engine, options)
    check(dataclasses.replace(setup, groups=groups, topology=engine.phases.last.topology))


def extend(kind: str, family: str, engine: Scheduler, groups: Groups, options: Options, claim: Claim) -> None:
    """Take the last of `groups` into a running scheduler; all ranks together, unless it is not mixed."""
    group = groups[-1]
    check_groups(family, engine, groups, options)
    specs = describe([group], len(groups) - 1, options.model)
    claim.check(_named([group], specs))
    own = next((param.device for param in filter(is_trained, group["params"])), engine.place)
    if own != engine.place:
        raise ValueError(f"the new group is on {own} but the optimizer's parameters are on {engine.place}")
    if group["params"] and sharding_of([group], options.model) != engine.sharding:
        raise ValueError(
            "the new group is not sharded as the optimizer's parameters are: give it an optimizer of its own"
        )
    if engine.communicator is not None and group["mix"]:
        sharded = _fields_of_shards(engine.sharding, groups[-1:], specs, None)
        fields = fields_of(kind, groups[-1:], specs, options, sharded)
        fields |= {name: value for name, value in sharded.items() if name not in fields}
        view = engine.communicator.view
        what = f"{kind}.add_param_group"
        agree(view, next_agreement(view), fields, engine.communicator.timeout, what, "add_param_group()")
    _grow(engine, [group], specs, options, claim, sync=options.sync_init)
    frozen = _frozen([group], specs)
    engine.frozen.extend(frozen)
    if options.sync_init:
        make_equal(_mixed_of([group], frozen), engine.communicator)


def train_unfrozen(kind: str, engine: Scheduler, options: Options, claim: Claim) -> list[FlatSegment]:
    """Give those parameters a place that were frozen and are to be trained now; all ranks together, for those that are mixed.

    Returns:
        The new segments.

    Raises:
        MismatchError, PeerTimeout: not every rank unfreezes the same ones before the same step.
        ValueError: as at construction, for what nobody trained until now.
    """
    wanted = {id(param) for param in engine.frozen if is_trained(param)}
    given, groups = parameters_of(engine.groups), engine.groups
    try:
        specs = [
            dataclasses.replace(spec, trained=id(param) in wanted)
            for param, spec in zip(given, describe(groups, 0, options.model), strict=True)
        ]
        claim.check(_named(groups, specs))
        mixed = [spec for spec in specs if spec.mix and spec.trained]
        if mixed and engine.communicator is not None:
            _agree_to_unfreeze(kind, engine.communicator, groups, mixed)
    finally:
        engine.hooks.unfrozen = None
    segments = _grow(engine, groups, specs, options, claim, sync=False)
    engine.frozen = [param for param in engine.frozen if id(param) not in wanted]
    return segments


def _agree_to_unfreeze(kind: str, communicator: Communicator, groups: Groups, mixed: Sequence[ParamSpec]) -> None:
    numbers = {g: place for place, g in enumerate(g for g, group in enumerate(groups) if group["mix"])}
    what = f"{kind}: unfreezing parameters"
    own = mixed[0].name + (f" and {len(mixed) - 1} more" if len(mixed) > 1 else "")
    fields = {
        f"parameter {spec.name} of group {numbers[spec.group]}": f"trained from now on, shape {spec.shape}"
        for spec in mixed
    }
    try:
        agree(communicator.view, next_agreement(communicator.view), fields, communicator.timeout, what)
    except (PeerTimeout, ExchangeError) as error:  # The other kind, where another rank was the first to give up.
        advice = (
            f"This rank unfreezes {own}. Every rank has to unfreeze the same parameters (requires_grad_(True), or a gradient) "
            f"before the same step, or none; those of a group with mix=False each rank may unfreeze as it likes"
        )
        error.args = (f"{error}. {advice}", *error.args[1:])
        raise


def _grow(
    engine: Scheduler, groups: Groups, specs: Sequence[ParamSpec], options: Options, claim: Claim, *, sync: bool
) -> list[FlatSegment]:
    """Give the trained ones of `specs`, those of all parameters of `groups`, a place in a running scheduler."""
    last = engine.phases.last
    layouts = _lay_out(specs, options, last.algorithm, over_machines=last.hierarchy is not None)
    compiled = any(region.compiled for segment in engine.segments for region in segment.regions)
    options = dataclasses.replace(options, sync_init=sync)
    segments = _adopt(groups, layouts, options, engine.communicator, claim, compiled=compiled)
    if segments:
        local = not any(segment.layout.mix for segment in segments)
        if not local:
            engine.discard()
        engine.segments.extend(segments)
        engine.rebuild_buckets(local=local)
        engine.warm_up()
    return segments
