"""FSDP2 parameters: shards stay where they are, and each is mixed with the same shard on other machines.

    mesh = init_device_mesh("cuda", (machines, local), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])  # the shard dimension alone
    opt = fusedfog.AdamW(model.parameters(), lr=1e-3, topology="one_peer_exponential", mesh=mesh)

A machine is one node of the topology. FSDP gathers parameters and averages gradients inside it; each of its ranks holds a
shard of one replica and sends that to the rank in the same place of a neighbour machine. W acts element by element, so
mixing shard by shard is mixing replicas, `X+ = W X`, and nothing is sent twice: `mesh=` means what it means for plain
parameters, dim 0 by gossip and dim 1 by collectives, only that these are FSDP's now. `group=mesh.get_group("replicate")`
does the same, with a weaker check: ranks in other places of the machines are not compared.

`fully_shard` over the whole mesh (HSDP) is refused: it all-reduces gradients across machines in every backward, so gossip
would save nothing. FSDP2 cannot be asked to leave that out: `set_requires_all_reduce(False)` keeps reduce-scattered
gradients to itself instead of putting them into `p.grad`. With algorithm="local", HSDP is the data-parallel baseline.

The local tensor of each DTensor becomes a window of the flat buffer. FSDP2 gathers from a reference of its own to that
memory, padded to the size of the first shard where dim 0 does not divide evenly; so each slot has room for the padding, and
the reference is moved along. Ranks whose shard is empty have one zero in its place, so that their step counts are those of
the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.dlpack import from_dlpack

from fusedfog.comm.group import GroupView, check_mesh, find_group
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.params.homes import window
from fusedfog.params.instances import instances
from fusedfog.params.layout import Bucket, ParamSpec, Segment
from fusedfog.params.precision import EXACT, Storage

_HOW = 'fully_shard(model, mesh=mesh["shard"]) and mesh=mesh, whose dimensions are ("replicate", "shard")'


@dataclass(frozen=True)
class Sharding:
    """How all parameters of one optimizer are sharded: along dimension `dim` of `mesh`."""

    mesh: DeviceMesh
    dim: int

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the shards of this rank's replica."""
        return self.mesh.get_group(self.dim)

    @property
    def ranks(self) -> list[int]:
        """Their global ranks, in the order of shards."""
        return dist.get_process_group_ranks(self.group)

    def keeps_equal(self, view: GroupView) -> bool:
        """Whether FSDP itself keeps these ranks' replicas equal, or they hold parts of a single one: all are on its mesh."""
        return set(view.ranks) <= set(self.mesh.mesh.flatten().tolist())

    def norm(self, own: Tensor) -> Tensor:
        """sqrt(sum of squares over the shards) of each shard's norm. Collective inside the replica."""
        square = own.double().square()
        if self.mesh.size(self.dim) > 1:
            dist.all_reduce(square, group=self.group)
        return square.sqrt().to(own.dtype)

    def across(self, group: dist.ProcessGroup | None, mesh: DeviceMesh | None) -> tuple[dist.ProcessGroup, GroupView]:
        """The ranks to mix with, and all that have to agree: those of `mesh`, or else of `group`.

        Raises:
            ValueError: gradients are averaged over ranks to mix with, some of these hold other shards of this rank's
                replica, there is no other replica, or `mesh` and the shards do not lie the same.
        """
        everyone = find_group(group)
        if mesh is not None:
            check_mesh(mesh, everyone)
        chosen = everyone.group if mesh is None else mesh.get_group(0)
        assert chosen is not None
        peers = set(dist.get_process_group_ranks(chosen)) - {dist.get_rank()}
        for d in range(self.mesh.ndim):
            if d != self.dim and peers & set(dist.get_process_group_ranks(self.mesh.get_group(d))):
                raise ValueError(
                    f"the parameters are sharded by fully_shard over {self.mesh} (HSDP), which averages gradients over the "
                    f"ranks to mix with in every backward; shard inside machines only: {_HOW}. For data-parallel training "
                    f"as it is, use algorithm='local'"
                )
        if peers & set(self.ranks):
            raise ValueError(
                f"ranks {self.ranks} hold the shards of one replica, and some of them are among those to mix with, "
                f"{sorted(peers)}; only equal shards of different replicas can be mixed: {_HOW}"
            )
        if not peers:
            raise ValueError(
                f"the parameters are sharded over ranks {self.ranks} and there is no other replica to mix with; with one "
                f"machine use algorithm='local'"
            )
        if mesh is not None:
            row = _row(mesh)
            if sorted(row) != sorted(self.ranks):
                raise ValueError(
                    f"dimension 1 of mesh has ranks {row} on this machine but the parameters are sharded over ranks "
                    f"{self.ranks}: {_HOW}"
                )
        return chosen, everyone

    def fields(
        self, groups: Sequence[Mapping[str, Any]], specs: Sequence[ParamSpec], mesh: DeviceMesh | None
    ) -> dict[str, str]:
        """What the ranks of `mesh`, or those that this one mixes with, must agree on beside `construction`'s fields."""
        params = list(dict.fromkeys(param for group in groups for param in group["params"]))
        fields = {"place": f"shard {self.mesh.get_local_rank(self.dim)} of {self.mesh.size(self.dim)}"}
        if mesh is not None:
            order = [self.ranks.index(rank) for rank in _row(mesh)]
            fields = {"mesh": str(mesh.mesh.tolist()), "order of shards along mesh": str(order)}
        for i, (spec, param) in enumerate(zip(specs, params, strict=True)):
            dtype = str(spec.dtype).removeprefix("torch.")
            about = f"shape {tuple(param.shape)} {dtype} in group {spec.group}, sharded on dim {_shard_dim(param)}"
            fields[f"parameter {i} ({spec.name})"] = about
        return fields


def _row(mesh: DeviceMesh) -> list[int]:
    """The ranks of this machine."""
    row: list[int] = mesh.mesh[mesh.get_local_rank(0)].tolist()
    return row


def sharding_of(groups: Sequence[Mapping[str, Any]], model: torch.nn.Module | None) -> Sharding | None:
    """How the parameters of `groups` are sharded; None if they are plain tensors.

    Raises:
        ValueError: FSDP2 holds them gathered; they do not all lie on one mesh with one sharded dimension; they are kept
            elsewhere or otherwise than they compute (CPU offloading, tensor subclasses).
    """
    params = [param for group in groups for param in group["params"]]
    if not any(isinstance(param, DTensor) for param in params):
        _check_not_gathered(params)
        return None
    names = {id(param): name for name, param in model.named_parameters()} if model is not None else {}
    found: dict[Sharding, str] = {}
    for number, param in enumerate(params):
        name = names.get(id(param), str(number))
        if not isinstance(param, DTensor):
            raise ValueError(
                f"parameter {name} is a plain tensor and others are DTensors. If FSDP holds it gathered, call "
                f"model.reshard() first; if FSDP ignores it, give it an optimizer of its own"
            )
        sharded = [d for d, placement in enumerate(param.placements) if not placement.is_replicate()]
        if len(sharded) != 1 or type(param.placements[sharded[0]]) is not Shard:
            raise ValueError(
                f"parameter {name} has placements {param.placements} on {param.device_mesh}; supported are DTensors that "
                f"are sharded along one dimension of their mesh, as by fully_shard, without tensor parallelism"
            )
        if param.device.type != param.device_mesh.device_type or type(param._local_tensor) is not Tensor:
            raise ValueError(
                f"parameter {name} is kept as {type(param._local_tensor).__name__} on {param.device} and computes on "
                f"{param.device_mesh.device_type}; offload_policy and quantized parameters are not supported"
            )
        found.setdefault(Sharding(param.device_mesh, sharded[0]), name)
    if len(found) > 1:
        places = ", ".join(f"{name} over dim {one.dim} of {one.mesh}" for one, name in found.items())
        raise ValueError(f"all parameters of an optimizer must be sharded over the same ranks, but there is {places}")
    return next(iter(found))


def _check_not_gathered(params: Sequence[Tensor]) -> None:
    # fully_shard makes a class for each kind of module; without any there is nothing to look for.
    if not FSDPModule.__subclasses__():
        return
    gathered = {id(getattr(one, "_unsharded_param", None)) for group in _fsdp_groups() for one in group.fsdp_params}
    if any(id(param) in gathered for param in params):
        raise ValueError(
            "FSDP holds the parameters gathered, as it does after a forward without backward, and would drop what is "
            "written to them: call model.reshard() and take model.parameters() anew"
        )


def stand_in(param: Tensor) -> Tensor:
    """The plain tensor to train in a parameter's place: itself, or its local shard, or a zero where that is empty."""
    if not isinstance(param, DTensor):
        return param
    local = param._local_tensor
    return local.data if local.numel() else local.new_zeros(1)


def room(param: Tensor) -> int:
    """Elements that FSDP gathers from each rank for a DTensor: as many as the first shard has; 0 for plain tensors."""
    if not isinstance(param, DTensor):
        return 0
    dim = _shard_dim(param)
    shards = max(param.device_mesh.size(d) for d, one in enumerate(param.placements) if one.is_shard())
    return math.prod(-(-size // shards) if d == dim else size for d, size in enumerate(param.shape))


def _shard_dim(param: DTensor) -> int:
    return next(one.dim for one in param.placements if isinstance(one, Shard)) % max(param.ndim, 1)


def segment_of(
    layout: Segment, params: Sequence[torch.nn.Parameter], *, compiled: bool = False, storage: Storage = EXACT
) -> FlatSegment:
    """The `FlatSegment` of these parameters, sharded or not."""
    kind = ShardSegment if isinstance(params[0], DTensor) else FlatSegment
    return kind(layout, params, compiled=compiled, storage=storage)


class ShardSegment(FlatSegment):
    """A `FlatSegment` of DTensors' local shards: `params` are their stand-ins, `owners` the DTensors themselves.

    States are shown as DTensors, of all parameters that are trained and from the beginning: `get_optimizer_state_dict`
    would make a step to have them, and with it an exchange.
    """

    sharded = True

    def __init__(
        self,
        layout: Segment,
        params: Sequence[torch.nn.Parameter],
        *,
        compiled: bool = False,
        storage: Storage = EXACT,
    ) -> None:
        super().__init__(layout, [stand_in(param) for param in params], compiled=compiled, storage=storage)  # type: ignore[misc]
        self.owners: list[Any] = list(params)
        own = set(map(id, params))
        groups = {id(one.sharded_param): (group, one) for group in _fsdp_groups() for one in group.fsdp_params}
        self._fsdp = list({id(group): group for name, (group, _) in groups.items() if name in own}.values())
        self._held = [groups.get(id(owner), (None, None))[1] for owner in self.owners]
        for position, owner in enumerate(self.owners):
            if owner._local_tensor.numel():
                self._move(position)
        self._touch_trained()

    def _move(self, position: int) -> None:
        """Make a parameter's local tensor, and what FSDP gathers, a window of the flat buffer, which has its values."""
        owner, slot, fsdp = self.owners[position], self.layout.slots[position], self._held[position]
        home = from_dlpack(self.param[slot.start : slot.start + slot.spec.room])
        owner._local_tensor = home.as_strided(slot.spec.shape, slot.spec.stride)
        if fsdp is not None:
            # FSDP leaves the local tensor alone if it finds it in the storage that it gathers from.
            assert fsdp._sharded_param_data.numel() == home.numel()
            fsdp._sharded_param_data = home

    def _touch_trained(self) -> None:
        self.touched = [
            touched or owner.requires_grad for touched, owner in zip(self.touched, self.owners, strict=True)
        ]

    def state_view(self, name: str, position: int) -> Tensor:
        """The part of a state that belongs to parameter number `position`, as a DTensor like that parameter."""
        owner, local = self.owners[position], super().state_view(name, position)
        if not owner._local_tensor.numel():
            local = local.new_empty(owner._local_tensor.shape)
        return DTensor.from_local(
            local, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )

    def load_states(self, names: tuple[str, ...], saved: Sequence[Mapping[str, Any]]) -> None:
        """As `FlatSegment.load_states`; of states that are whole tensors each rank takes its shard."""
        super().load_states(names, saved)
        self._touch_trained()

    def shows(self, name: str, position: int, views: Mapping[str, Tensor]) -> bool:
        """As `FlatSegment.shows`, of a DTensor's local tensor."""
        if name == "step":
            return super().shows(name, position, views)
        local: Any = views[name]
        empty = not self.owners[position]._local_tensor.numel()
        return empty or super().shows(name, position, {name: local._local_tensor})

    def write_state(self, name: str, position: int, value: Tensor | None) -> None:
        """As `FlatSegment.write_state`; of a whole tensor each rank takes its shard."""
        super().write_state(name, position, _as_shard(value, self.owners[position]))

    def keeps_touched(self, position: int) -> bool:
        """States are shown of all parameters that are trained."""
        return bool(self.owners[position].requires_grad)

    def located(self, first: int, last: int) -> list[Tensor]:
        """The DTensors' local tensors; stand-ins of empty ones."""
        pairs = zip(self.owners[first:last], self.params[first:last], strict=True)
        return [owner._local_tensor if owner._local_tensor.numel() else param for owner, param in pairs]

    def _move_home(self, position: int) -> bool:
        """As `FlatSegment._move_home`, with what FSDP gathers.

        In torch 2.9 FSDP pads what is sharded unevenly anew at the first forward and in `load_state_dict`; in 2.13 it does not.
        """
        view, local = window(self.param, self.layout.slots[position]), self.owners[position]._local_tensor
        with torch.no_grad():
            changed = device.on_gpu(view) or not torch.equal(view, local)
            if changed:
                view.copy_(local)
        self._move(position)
        return changed

    def give_back(self) -> None:
        """Leave the shards where they are: FSDP gathers from there, and windows keep their memory alive."""

    def versions(self, bucket: Bucket, part: int = 0, parts: int = 1) -> int:
        """As `FlatSegment.versions`; operations on a DTensor count there, not on its local tensor."""
        return sum(owner._version for owner in self.owners[bucket.first + part : bucket.last : parts])

    def bump_versions(self, first: int, last: int) -> None:
        """Tell autograd that parameters `[first, last)` were written, and FSDP that what it has gathered of them is stale."""
        torch.autograd.graph.increment_version(self.owners[first:last])
        for group in self._fsdp:
            # After a forward without backward, as in evaluation, FSDP keeps the root's parameters for the next forward.
            if not group.is_sharded:
                group.reshard()

    def own_gradients(self, first: int, last: int) -> list[Tensor | None]:
        """The local shards of the gradients of parameters `[first, last)`; a zero where they are empty."""
        return [
            _local_gradient(self.owners[p], self.params[p], self.layout.slots[p].spec.name) for p in range(first, last)
        ]

    def holds_gradient(self, position: int, found: Tensor) -> bool:
        """See `FlatSegment`."""
        grad = self.owners[position].grad
        return grad is not None and grad._local_tensor is found

    def set_gradient(self, position: int, value: Tensor) -> None:
        """See `FlatSegment`; `value` is this rank's shard."""
        owner = self.owners[position]
        if owner._local_tensor.numel():
            local = value.to(owner.grad.dtype if owner.grad is not None else owner.dtype, copy=True)
            owner.grad = DTensor.from_local(
                local, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
            )


def _local_gradient(owner: Any, param: Tensor, name: str) -> Tensor | None:
    grad = owner.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor):
        raise RuntimeError(f"parameter {name} is a DTensor but its gradient is a {type(grad).__name__}")
    if grad.placements != owner.placements:
        grad = grad.redistribute(placements=owner.placements)
    return grad._local_tensor if grad._local_tensor.numel() else torch.zeros_like(param)


def _as_shard(value: Any, owner: DTensor) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != owner.shape or not value.ndim:
        return value
    return distribute_tensor(value, owner.device_mesh, owner.placements, src_data_rank=None)


def _fsdp_groups() -> list[Any]:
    """All of FSDP2's groups of parameters."""
    # A parameter does not know who shards it, and the module need not be given.
    return instances(FSDPParamGroup)
