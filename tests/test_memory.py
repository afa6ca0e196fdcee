"""What a step allocates beyond parameters, states and inboxes: scratch that does not grow with the model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fusedfog

SIZE, LAYERS = 512, 8
MODEL = LAYERS * (SIZE * SIZE + SIZE) * 4
"""Bytes of parameters, 8.4 MB in 16 tensors."""


def most_allocated(run) -> int:
    """Largest number of bytes that `run` had allocated at a time, beyond what was there before; frees of older memory count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def step_memory(kind: str, options: dict, setup: dict) -> tuple[int, int]:
    """Bytes allocated by construction and first step, and by a later step."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)))
    params = list(model.parameters())

    def begin():
        opt = getattr(fusedfog, kind)(params, lr=1e-3, bucket_mb=2, **options, **setup)
        opts.append(opt)
        opt.step()
        opt.drain()

    opts: list[torch.optim.Optimizer] = []
    for param in params:
        param.grad = torch.randn_like(param)
    first = most_allocated(begin)

    def go_on():
        opts[0].step()
        # The profiler must not end while gloo's threads hold what it has recorded.
        opts[0].drain()

    later = most_allocated(go_on)
    dist.barrier()
    return first, later


@pytest.mark.parametrize(
    ("kind", "options", "states"),
    [
        ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 1),
        ("AdamW", {}, 2),
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}, 3),
    ],
)
@pytest.mark.parametrize(
    ("setup", "buffers"),
    [
        ({"topology": "one_peer_exponential"}, 1),
        ({"topology": "ring"}, 2),
        ({"topology": "ring", "algorithm": "atc"}, 2),
        ({"algorithm": "local"}, 0),
    ],
    ids=["one peer", "ring", "atc ring", "local"],
)
def test_a_step_holds_parameters_states_inboxes_and_nothing_that_grows(
    ranks: Pool, kind: str, options: dict, states: int, setup: dict, buffers: int
) -> None:
    for first, later in ranks.run(4, step_memory, kind, options, setup):
        # Scratch: gradients with decay (4 MB), one chunk's temporaries. Construction: one parameter more while it moves.
        assert first < (1 + states + buffers) * MODEL * 1.01 + 6e6
        assert later < 5e6
