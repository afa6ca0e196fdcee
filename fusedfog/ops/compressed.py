"""`neighbor_allreduce` with messages of fewer bits; `kernels.wire` has the formats."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedfog.comm.mixing import ROUNDING
from fusedfog.kernels import device, wire
from fusedfog.kernels.reference import mix_messages
from fusedfog.ops.edges import Edges
from fusedfog.ops.tensors import deliver, describe, flat_view
from fusedfog.ops.work import Phases, Port


def check_compressible(x: Tensor, residual: Tensor | None, edges: Edges) -> None:
    """Raise ValueError for what compressed messages cannot do."""
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {describe(residual)} on {residual.device}, but must be like the input, {describe(x)}"
        )
    factors = sorted({factor for factor in (edges.send or {}).values() if factor != 1})
    if factors:
        raise ValueError(
            f"compressed messages are the same for all receivers: send_weights of {factors} need wire_dtype=None"
        )
    # To look for them on a GPU the host would have to wait for it; there such values are left out, as `kernels.wire` explains.
    bad = 0 if device.on_gpu(x) else int((~flat_view(x).isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} values of {describe(x)} are not finite, which compressed messages cannot say; use wire_dtype=None"
        )


def mixing_compressed(
    operation: str,
    port: Port | None,
    x: Tensor,
    edges: Edges,
    out: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None,
) -> Phases:
    """`out = (x - q) + self_weight*q + sum_j recv[j]*q_j` where q is a rank's decoded message; see `neighbor_allreduce`."""
    flat, recv = flat_view(x), edges.recv or {}
    arithmetic = torch.float64 if flat.dtype == torch.float64 else torch.float32
    value = flat.to(arithmetic)
    wanted = value if residual is None else value + flat_view(residual)
    codes, scales = wire.encode(wanted, dtype)
    parts = [codes.view(torch.uint8), *([] if scales is None else [scales])]
    inbox = [[torch.empty_like(part) for part in parts] for _ in recv]
    if port is not None:
        sends = [(peer, part) for peer in edges.send or {} for part in parts]
        recvs = [(peer, part) for peer, got in zip(recv, inbox, strict=True) for part in got]
        yield port.start(sends, recvs, port.tags(len(parts))[0], operation)
    own = wire.decode(codes, scales, arithmetic)
    heard = [wire.decode(got[0].view(dtype), got[1] if scales is not None else None, arithmetic) for got in inbox]
    weights = list(recv.values())
    result = mix_messages(value, heard, weights, 1.0, own)
    surplus = edges.self_weight + sum(weights) - 1.0
    if abs(surplus) > ROUNDING:
        result = result.add(own, alpha=surplus)
    if residual is not None:
        rest = (wanted - own).to(flat.dtype)
        residual.copy_(torch.view_as_complex(rest.view(-1, 2)).view(x.shape) if x.is_complex() else rest.view(x.shape))
    return deliver(result.to(flat.dtype), x, out)
