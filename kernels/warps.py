"""How many warps a block of the GPU pass takes."""

from __future__ import annotations

import torch


def num_warps(param: torch.dtype, grad: torch.dtype, others: tuple[torch.dtype, ...], states: int) -> int:
    """Warps per block of 1,024 elements: 4, eight elements a thread, where that is safe; else 8, four a thread.

    Eight a thread needs one width throughout: where 2-byte and 4-byte elements meet, the compiler would exchange them
    through shared memory. It also needs registers, which a block keeps for every tensor loaded and above all for
    Adam's square root and division: measured with ptxas for sm_80, sm_90 and sm_100, it takes at most 60 with one state
    at most, one tensor beside it and parameter and gradient, and at most 8 bytes an element in these (66 with 12 bytes, Adam
    72 to 126, one state beside compensated parameters 80). What is not finite takes a predicate for each element, of which
    there are seven: Triton 3.5 spills them with two inboxes of bf16.

    Args:
        param: dtype of the parameters.
        grad: dtype of the gradients.
        others: dtypes of every state, sent message, inbox tensor and message, of the remainder and of compressed channels.
        states: how many of them are states or a remainder.
    """
    widths = {dtype.itemsize for dtype in (param, grad, *others)}
    light = len(others) - states <= 1 and sum(dtype.itemsize for dtype in others) <= 8
    return 4 if len(widths) == 1 and states <= 1 and light else 8
