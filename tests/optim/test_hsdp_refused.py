"""FSDP2 inside machines, gossip across them: what is refused, and in which words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.sharded import Network, loss_of, make, mesh_of, shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fusedfog


def refused(mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    rank, inside = dist.get_rank(), mesh["shard"]
    one = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    grid = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("replicate", "shard"))
    crossed = [dist.new_group(members) for members in ([0, 3], [1, 2])]

    def of(where: DeviceMesh, change: Callable[[nn.Module], Any] | None = None, **keywords: Any) -> Callable[[], Any]:
        def attempt() -> Any:
            model = Network()
            if change is not None:
                change(model)
            return make("AdamW", shard(model, where), **keywords)

        return attempt

    def gathered() -> Any:
        model = fully_shard(Network(), mesh=inside)
        with torch.no_grad():
            loss_of(model, 0, 0)
        return make("AdamW", model, mesh=mesh)

    def cut(dim: int) -> Any:
        model = fully_shard(nn.Linear(6, 6), mesh=inside, shard_placement_fn=lambda p: Shard(dim if p.ndim == 2 else 0))
        return make("AdamW", model, group=mesh.get_group("replicate"))

    def tensors(*placed: tuple[DeviceMesh, Any]) -> Any:
        params = [nn.Parameter(distribute_tensor(torch.zeros(4, 4), where, [how])) for where, how in placed]
        return fusedfog.SGD(params, mesh=mesh)

    def mixed() -> Any:
        sharded = shard(Network(), inside).parameters()
        return fusedfog.SGD([*sharded, nn.Parameter(torch.zeros(2, dtype=torch.float64))], mesh=mesh)

    def narrower(model: nn.Module) -> None:
        # Both shards of 10 rows are as large as those of 9 rows in place 0.
        model.first = nn.Linear(6, 10 if rank >= 2 else 9).double()

    return {
        "hsdp": of(mesh, mesh=mesh),
        "hsdp by group": of(mesh, group=mesh.get_group("replicate")),
        "no mesh": of(inside),
        "group of shards": of(inside, group=mesh.get_group("shard")),
        "sharded over all": of(one["shard"], mesh=mesh),
        "one machine": of(one["shard"], mesh=one),
        "one machine by group": of(one["shard"], group=one.get_group("replicate")),
        "averages without a mesh": lambda: of(inside, algorithm="local")().consensus_distance(),
        "fused_backward": of(inside, mesh=mesh, fused_backward=True),
        "capturable": of(inside, mesh=mesh, capturable=True),
        "three dimensions": of(inside, mesh=init_device_mesh("cpu", (2, 2, 1))),
        "topology of ranks": of(inside, mesh=mesh, topology=fusedfog.topology.ring(4)),
        "plain among them": mixed,
        "gathered": gathered,
        "replicated": lambda: tensors((inside, Replicate())),
        "two meshes": lambda: tensors((inside, Shard(0)), (one["shard"], Shard(0))),
        "other order": of(inside, mesh=grid),
        "crossed": of(inside, group=crossed[rank in (1, 2)]),
        "other shapes": of(inside, narrower, mesh=mesh),
        "other shapes by group": of(inside, narrower, group=mesh.get_group("replicate")),
        "other dim": lambda: cut(1 if rank >= 2 else 0),
        "other rate": of(inside, mesh=mesh, lr=0.1 if rank == 1 else 0.2),
        "copy": lambda: copy.deepcopy(of(inside, mesh=mesh)()),
    }


WORDS = {
    "hsdp": "ValueError.*HSDP.*averages gradients.*algorithm='local'",
    "hsdp by group": "ValueError.*HSDP",
    "no mesh": r"ValueError.*hold the shards of one replica.*fully_shard\(model, mesh=mesh\[.shard.\]\) and mesh=mesh",
    "group of shards": "ValueError.*hold the shards of one replica",
    "sharded over all": "ValueError.*hold the shards of one replica",
    "one machine": "ValueError.*no other replica.*algorithm='local'",
    "one machine by group": "ValueError.*no other replica",
    "averages without a mesh": "ValueError.*hold the shards of one replica",
    "fused_backward": "ValueError.*fused_backward=True does not work with FSDP2",
    "capturable": "ValueError.*capturable=True does not work with FSDP2",
    "three dimensions": "ValueError.*mesh must have two dimensions",
    "topology of ranks": "ValueError.*is for 4 ranks but the group has 2",
    "plain among them": "ValueError.*parameter 8 is a plain tensor",
    "gathered": r"ValueError.*call model.reshard\(\)",
    "replicated": "ValueError.*sharded along one dimension",
    "two meshes": "ValueError.*sharded over the same ranks",
    "other order": r"MismatchError.*order of shards along mesh is \[1, 0\] on rank 2",
    "crossed": "MismatchError.*place is shard",
    "other shapes": r"MismatchError.*\(10, 6\).* on rank 2 but shape \(9, 6\)",
    "other shapes by group": r"MismatchError.*\(10, 6\).* on rank 1 but shape \(9, 6\)",
    "other dim": "MismatchError.*sharded on dim 1 on rank 1 but .* sharded on dim 0",
    "other rate": "MismatchError.*lr of group 0 is 0.1 on rank 1",
    "copy": "TypeError.*cannot be pickled",
}


def attempt_all() -> dict[str, str]:
    said = {}
    for name, attempt in refused(mesh_of(2, 2)).items():
        try:
            attempt()
            said[name] = "nothing"
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


@pytest.fixture(scope="module")
def said(ranks: Pool) -> list[dict[str, str]]:
    return ranks.run(4, attempt_all)


@pytest.mark.parametrize("name", WORDS)
def test_bad_input_is_named_on_every_rank(said: list[dict[str, str]], name: str) -> None:
    assert set(said[0]) == set(WORDS)
    for texts in said:
        assert re.match(WORDS[name], texts[name]), texts[name]
