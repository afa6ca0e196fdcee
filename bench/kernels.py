"""One fused pass against the same work in torch calls: GB/s, share of copy bandwidth, ratios; CPU, or GPU where there is one.

    python bench/kernels.py [--numel N] [--rounds R] [--threads T]

Columns: bytes an element that the pass must move (each tensor read or written once); GB/s of those bytes; that as a share
of a same-size `copy_` in the same rounds; and how many times longer torch's fused optimizer plus `lerp_` mixing, and the
operations of Decent-DP's step (scale, add, optimizer, copy, scale; re-enacted with torch calls), take.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import measure, ratio, save
from fusedfog.kernels import BLOCK, Gradients, Region, adam_hyper, run_pass, sgd_hyper

SGD = {"lr": 1e-3, "momentum": 0.9, "dampening": 0, "weight_decay": 0.01, "nesterov": False, "maximize": False}
ADAMW = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
}
RULES: dict[str, tuple[str, tuple[float, ...], int]] = {
    "SGD": ("sgd", sgd_hyper({**SGD, "momentum": 0.0}), 0),
    "SGD momentum": ("sgd", sgd_hyper(SGD), 1),
    "AdamW": ("adam", adam_hyper(ADAMW), 2),
}


class Buffers:
    """Flat tensors of one segment that holds a single parameter."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, states: int, neighbours: int) -> None:
        self.param = torch.randn(numel, device=device).to(dtype)
        self.grad = torch.randn(numel, device=device).to(dtype)
        self.states = tuple(torch.zeros(numel, device=device) for _ in range(states))
        self.inbox = tuple(torch.randn(numel, device=device).to(dtype) for _ in range(neighbours))
        self.steps = torch.full((1,), 10.0, device=device)
        blocks, addresses = None, None
        if device.type == "cuda":
            starts = torch.arange(0, numel, BLOCK)
            lengths = (numel - starts).clamp(max=BLOCK)
            blocks = torch.stack([torch.zeros_like(starts), starts, lengths, starts], dim=1).to(device)
            addresses = torch.tensor([self.grad.data_ptr()], device=device)
        self.region = Region(0, ((0, numel),), blocks)
        self.grads = Gradients([self.grad], addresses, dtype)

    def bytes_per_element(self) -> int:
        """Parameter read and written, gradient and inbox read, states read and written."""
        width = self.param.element_size()
        return 2 * width + width * (1 + len(self.inbox)) + 8 * len(self.states)

    def fused(self, rule: str, hyper: tuple[float, ...]) -> Callable[[], None]:
        """The pass under test."""
        weights = (1.0 / (len(self.inbox) + 1),) * len(self.inbox)

        def run() -> None:
            run_pass(
                rule, self.param, self.states, hyper, region=self.region, grads=self.grads, steps=self.steps,
                inbox=(self.inbox,) if self.inbox else (), weights=weights,
            )  # fmt: skip

        return run


def torch_runs(kind: str, numel: int, dtype: torch.dtype, device: torch.device, neighbours: int) -> dict[str, Any]:
    """torch's fused optimizer after `lerp_` mixing, and Decent-DP's sequence of calls around the same optimizer."""
    param = torch.nn.Parameter(torch.randn(numel, device=device).to(dtype))
    param.grad = torch.randn(numel, device=device).to(dtype)
    inbox = [torch.randn(numel, device=device).to(dtype) for _ in range(neighbours)]
    outbox = torch.empty(numel, device=device, dtype=dtype)
    if kind == "AdamW":
        opt: torch.optim.Optimizer = torch.optim.AdamW([param], lr=1e-3, fused=True)
    else:
        opt = torch.optim.SGD(
            [param], lr=1e-3, momentum=0.9 if "momentum" in kind else 0, weight_decay=0.01, fused=True
        )

    @torch.no_grad()
    def mix_and_step() -> None:
        for k, received in enumerate(inbox):
            param.lerp_(received, 1.0 / (k + 2))
        opt.step()

    @torch.no_grad()
    def decent_dp() -> None:
        param.mul_(0.5)
        for received in inbox:
            param.add_(received)
        opt.step()
        outbox.copy_(param)
        outbox.mul_(0.5)

    return {"torch": mix_and_step, "decent-dp": decent_dp}


def main() -> None:
    """Measure every rule x number of neighbours x dtype and print, then save, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, help="elements; default 4M on a CPU, 128M on a GPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numel = args.numel or (1 << 27 if device.type == "cuda" else 1 << 22)
    dtypes = [torch.float32, torch.bfloat16]
    rows = [row(name, k, dtype, numel, device, args.rounds) for dtype in dtypes for name in RULES for k in (0, 1, 2, 4)]
    save(f"kernels-{device.type}", rows, numel=numel, rounds=args.rounds)


def row(
    name: str, neighbours: int, dtype: torch.dtype, numel: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """One line of the table."""
    rule, hyper, states = RULES[name]
    buffers = Buffers(numel, dtype, device, states, neighbours)
    moved = buffers.bytes_per_element() * numel
    source = torch.randn(math.ceil(moved / 8), device=device)
    target = torch.empty_like(source)
    runs = {"fused": buffers.fused(rule, hyper), "copy": lambda: target.copy_(source)}
    times = measure(runs | torch_runs(name, numel, dtype, device, neighbours), rounds, device)
    against_copy, against_torch = ratio(times, "copy", "fused"), ratio(times, "torch", "fused")
    decent = ratio(times, "decent-dp", "fused")
    return {
        "rule": name,
        "K": neighbours,
        "dtype": str(dtype).removeprefix("torch."),
        "B/element": buffers.bytes_per_element(),
        "GB/s": moved / statistics.median(times["fused"]) / 1e9,
        "of copy": f"{against_copy[0]:.0%}",
        "torch / fused": f"{against_torch[0]:.2f} ({against_torch[1]:.2f}..{against_torch[2]:.2f})",
        "decent-dp / fused": f"{decent[0]:.2f} ({decent[1]:.2f}..{decent[2]:.2f})" if neighbours == 1 else "",
    }


if __name__ == "__main__":
    main()
