"""Recording a step: a CUDA graph where there is a GPU; elsewhere a stand-in that keeps passes and makes them again.

The stand-in calls recorded passes with the very same tensors and with poisoned host numbers, as a graph would: what
differs from step to step then comes from memory or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusedfog.engine import capture, gradient_scale, scheduler
from fusedfog.kernels import Pass
from support.passes import with_fields


def poisoned(work: Pass) -> Pass:
    """The same pass with host numbers that would show."""
    return with_fields(
        work,
        row_sum=math.nan,
        weights=(math.nan,) * len(work.mixing.weights),
        hyper=(math.nan,) * len(work.hyper),
        seed=None if work.precision.seed is None else 12345,
        strength=math.nan,
    )


class StandInGraph:
    """Passes and gradient multipliers that a step would have computed."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.passes: list[Pass] = []

    def capture(self, step: Callable[[], object]) -> None:
        """Call `step` as if the current stream were being captured."""
        run_pass, multiplier = scheduler.run_pass, gradient_scale.multiplier

        def record_pass(work: Pass) -> None:
            assert work.numbers is not None
            self.passes.append(poisoned(work))
            self.calls.append(partial(run_pass, self.passes[-1]))

        def record_multiplier(*args: Any) -> Tensor | None:
            factor = multiplier(*args)
            if factor is not None:
                self.calls.append(lambda: factor.copy_(multiplier(*args)))
            return factor

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(capture, "recording", lambda: True))
            patches.enter_context(mock.patch.object(scheduler, "run_pass", record_pass))
            patches.enter_context(mock.patch.object(gradient_scale, "multiplier", record_multiplier))
            step()

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call()


def record(device: torch.device, step: Callable[[], object]) -> Callable[[], None]:
    """Capture `step`; returns what replays it."""
    if device.type != "cuda":
        stand_in = StandInGraph()
        stand_in.capture(step)
        return stand_in.replay
    graph = torch.cuda.CUDAGraph()
    # Threads that watch messages ask events whether they are over, which "global" would take for part of the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
