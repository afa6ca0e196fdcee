"""What ranks share beside the flat parameters: frozen parameters, and what a model has that its optimizer does not hold.

Nothing of it is ever sent by a step. It is made equal once, at construction, so that all ranks train the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedfog.comm.averaging import broadcast
from fusedfog.comm.communicator import Communicator


def shared_with_model(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The parameters that an optimizer does not hold, and the buffers, of its model, by name.

    Left out is what belongs to parameters with `mix=False`: that of modules which hold no others, a rank's own experts say.
    """
    mixed = {id(param): bool(group["mix"]) for group in groups for param in group["params"]}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in _walk(model, mixed, "", own=False):
        if id(tensor) not in mixed:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _walk(module: nn.Module, mixed: Mapping[int, bool], prefix: str, *, own: bool) -> Iterator[tuple[str, Tensor]]:
    held = {mixed[id(param)] for param in module.parameters() if id(param) in mixed}
    if held:
        own = True not in held
    if own:
        return
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and not is_lazy(tensor) and tensor.device.type != "meta":
                yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, mixed, f"{prefix}{name}.", own=own)


def fields_of_shared(shared: Mapping[str, Tensor]) -> dict[str, str]:
    """What ranks must agree on before any of it is sent, in a reader's words."""
    return {
        f"{name} of the model, which this optimizer does not train": (
            f"shape {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        )
        for name, tensor in shared.items()
    }


@torch.no_grad()
def make_equal(tensors: Sequence[Tensor], communicator: Communicator | None) -> None:
    """Replace tensors of any kind and place by rank 0's. Collective."""
    if communicator is None:
        return
    for tensor in (part for one in tensors for part in plain_parts(one.detach())):
        here = tensor if tensor.device == communicator.device and tensor.is_contiguous() else None
        sent = here if here is not None else tensor.to(communicator.device, copy=True).contiguous()
        # As bytes: neither gloo nor NCCL knows every dtype that frozen parameters have.
        broadcast([sent.view(-1).view(torch.uint8)], communicator)
        if here is None:
            tensor.copy_(sent)


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or a wrapper's inner tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for inner in (getattr(tensor, name) for name in names):
        if isinstance(inner, Tensor):  # A DTensor has its mesh among them.
            yield from plain_parts(inner)
