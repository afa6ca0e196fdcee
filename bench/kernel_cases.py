"""What the kernel benches time: every rule's pass on buffers of its own, and the same work by others."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from common import measure, ratio
from support.kernel_rules import ROWS, SHAPES
from support.passes import make_pass
from torch import Tensor

from fusedfog.kernels import BLOCK, Gradients, Region, run_pass
from fusedfog.kernels import device as place
from fusedfog.params.pages import zeros

TORCH: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer] | None] = {
    "mix": None,
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, fused=True),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "adamw-amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True, fused=True),
}
"""The uses of rules that torch can do too, and its optimizer for them."""

OPPONENTS = ("torch", "decent-dp", "decent-dp package")

USES = [*TORCH, *(name for name in SHAPES if ROWS[name].rule not in ("mix", "sgd") and name not in (*TORCH, "adam"))]
"""One use, by its name in the tests' table, of every rule and number of states; adamw stands for adam."""


def neighbours_of(name: str, counts: Sequence[int]) -> list[int]:
    """Those of `counts` that a rule is used with: passes before an exchange have no neighbours."""
    row = ROWS[name]
    return [k for k in counts if k == 0 or ("x" in row.writes and not row.rule.endswith("before"))]


class Pass:
    """One use of a rule as the engine makes it, on a flat segment of one parameter."""

    def __init__(self, name: str, neighbours: int, dtype: torch.dtype, numel: int, device: torch.device) -> None:
        row = self.row = ROWS[name]

        def flat(of: torch.dtype) -> Tensor:
            return zeros(numel, of, device).copy_(torch.rand(numel, device=device))

        self.param, self.grad = flat(dtype), torch.rand(numel, device=device).to(dtype)
        self.states = tuple(flat(torch.float32) for _ in range(row.states))
        makes_message = "x" not in row.writes
        self.message = flat(dtype) if makes_message or "message" in row.sent else None
        self.sent = tuple(self._named(part) for part in row.sent)
        bases = self.sent or (self.param,)
        self.inbox = tuple(tuple(flat(base.dtype) for _ in range(neighbours)) for base in bases) if neighbours else ()
        blocks, addresses = None, None
        if place.on_gpu(device):
            starts = torch.arange(0, numel, BLOCK)
            blocks = torch.stack([0 * starts, starts, (numel - starts).clamp(max=BLOCK), starts], dim=1).to(device)
            addresses = torch.tensor([self.grad.data_ptr()], device=device)
        self.arguments: dict[str, Any] = {
            "region": Region(0, ((0, numel),), blocks),
            "grads": Gradients([self.grad], addresses, dtype) if row.grads else None,
            "steps": torch.full((1,), 10.0, device=device),
            "sent": self.sent,
            "inbox": self.inbox,
            "weights": (1.0 / (neighbours + 1),) * neighbours,
            "row_sum": 0.0 if row.rule in ("exact_diffusion", "extra") else 1.0,
            "messages": (self.message,) if makes_message else (),
            "extra": None if row.extra is None else torch.tensor(row.extra, device=device),
        }

    def _named(self, part: str) -> Tensor:
        tensor = {"x": self.param, "g": self.grad, "message": self.message}.get(part)
        return self.states[int(part)] if part.isdigit() else tensor

    def traffic(self) -> int:
        """Bytes that must move: every tensor the rule reads and every tensor it writes, once each."""
        averaged = (self.sent or (self.param,)) if "x" in self.row.writes else ()
        read = [*map(self._named, self.row.reads), *averaged, *(tensor for message in self.inbox for tensor in message)]
        written = [*map(self._named, self.row.writes), *self.arguments["messages"]]
        return sum(
            sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) for tensors in (read, written)
        )

    def __call__(self, **options: Any) -> None:
        run_pass(make_pass(self.row.rule, self.param, self.states, self.row.hyper, **{**self.arguments, **options}))


def torch_runs(name: str, neighbours: int, dtype: torch.dtype, numel: int, device: torch.device) -> dict[str, Any]:
    """The same work by torch's fused optimizer after `lerp_` mixing and, for one neighbour, by Decent-DP.

    "decent-dp" re-enacts its step: scale the parameters, add what came, optimizer, copy to the send buffer, scale that.
    "decent-dp package" is the package's own step function, where it is installed.
    """
    if name not in TORCH:
        return {}
    param = torch.nn.Parameter(torch.rand(numel, device=device).to(dtype))
    param.grad = torch.rand(numel, device=device).to(dtype)
    inbox = [torch.rand(numel, device=device).to(dtype) for _ in range(neighbours)]
    make = TORCH[name]
    step = make([param]).step if make is not None else lambda: None

    @torch.no_grad()
    def mix_and_step() -> None:
        for k, received in enumerate(inbox):
            param.lerp_(received, 1.0 / (k + 2))
        step()

    runs: dict[str, Any] = {"torch": mix_and_step} if make is not None or inbox else {}
    if neighbours != 1 or make is None:
        return runs
    outbox = torch.empty_like(inbox[0])

    @torch.no_grad()
    def decent_dp() -> None:
        param.mul_(0.5)
        param.add_(inbox[0])
        step()
        outbox.copy_(param)
        outbox.mul_(0.5)

    runs["decent-dp"] = decent_dp
    package = package_step(make, dtype, numel, device)
    return runs | ({"decent-dp package": package} if package is not None else {})


def package_step(make: Callable[[list[Tensor]], Any], dtype: torch.dtype, numel: int, device: torch.device) -> Any:
    """The step that Decent-DP's own code makes for one bucket; None where the package or its process group is missing."""
    try:
        from decent_dp.ddp import DecentralizedDataParallel
        from loguru import logger
    except ImportError:
        return None
    if not (dist.is_initialized() and dist.get_backend() == "fake"):
        return None
    logger.disable("decent_dp")
    model = OneParameter(torch.rand(numel, device=device).to(dtype))
    wrapped = DecentralizedDataParallel(
        model,
        lambda named: make([param for _, param in named]),
        bucket_size_in_mb=numel * dtype.itemsize,
        _local_world_size=1,
    )
    for _ in range(2):  # it lays its buckets out in the second forward
        wrapped().backward()
    gradient = torch.rand(numel, device=device).to(dtype)

    def run() -> None:
        model.weight.grad = gradient
        wrapped._ddp_fn(model.weight, 0)

    return run


class OneParameter(torch.nn.Module):
    """A model that is one flat parameter."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.weight.sum()


@contextlib.contextmanager
def silent_world() -> Iterator[None]:
    """A process group of two ranks that moves nothing, which Decent-DP's package needs to be timed without a network."""
    try:
        import decent_dp  # noqa: F401
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Kernels:
    """What the GPU kernels use that were compiled since the last question."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def newest(self) -> dict[str, Any]:
        """Registers, spills, shared memory and warps of the latest one; None where Triton does not show them."""
        from fusedfog.kernels import fused_pass

        found: dict[str, Any] = dict.fromkeys(("registers", "spills", "shared", "warps"))
        for caches in fused_pass.fused_pass.device_caches.values():
            for kernel in caches[0].values():
                if id(kernel) not in self._known:
                    self._known.add(id(kernel))
                    found["registers"], found["spills"] = (
                        getattr(kernel, "n_regs", None),
                        getattr(kernel, "n_spills", None),
                    )
                    found["shared"], found["warps"] = kernel.metadata.shared, kernel.metadata.num_warps
        return found


def row(
    name: str, neighbours: int, dtype: torch.dtype, numel: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """One line of the table."""
    fused = Pass(name, neighbours, dtype, numel, device)
    moved = fused.traffic()
    source = torch.rand(math.ceil(moved / 8), device=device)
    target = torch.empty_like(source)
    others = torch_runs(name, neighbours, dtype, numel, device)
    times = measure({"fused": fused, "copy": lambda: target.copy_(source)} | others, rounds, device)
    line: dict[str, Any] = {
        "rule": name,
        "K": neighbours,
        "dtype": str(dtype).removeprefix("torch."),
        "B/element": moved / numel,
        "ms": 1e3 * statistics.median(times["fused"]),
        "GB/s": moved / statistics.median(times["fused"]) / 1e9,
        "of copy": ratio(times, "copy", "fused"),
    }
    return line | {f"{who} / fused": ratio(times, who, "fused") if who in others else None for who in OPPONENTS}


def rows(
    names: Sequence[str],
    counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    numel: int,
    device: torch.device,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """The lines of the table of these rules, numbers of neighbours and dtypes; on a GPU with the kernels' resources."""
    kernels = Kernels()
    for dtype in dtypes:
        for name in names:
            for neighbours in neighbours_of(name, counts):
                line = row(name, neighbours, dtype, numel, device, rounds)
                yield line | (kernels.newest() if place.on_gpu(device) else {})
