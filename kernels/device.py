"""Where work is done: the one question that decides between streams and the host, and between tables and lists.

Tests answer it for CPU tensors, and so take every GPU branch without a GPU; callers therefore ask `device.on_gpu(...)`
through the module.
"""

from __future__ import annotations

import torch


def on_gpu(where: torch.Tensor | torch.device) -> bool:
    """Whether work on this tensor, or on tensors of this device, is queued on a GPU's streams."""
    return (where.device if isinstance(where, torch.Tensor) else where).type == "cuda"


def upload(values: list[int] | list[float], target: torch.Tensor) -> None:
    """Copy host numbers to `target` [len(values)] on the current stream, without a wait of the host.

    From a fresh piece of pinned memory each time: the copy is still to be made when this returns, and torch's allocator
    hands the piece out again only when it is over.
    """
    target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda), non_blocking=True)
