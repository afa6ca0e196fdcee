"""What a training step computes: layers with their forward and backward times, and the buckets they fall into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fusedfog.params.layout import graded_bytes

EVEN_LAYERS = 64

BACKWARD_SHARE = 2 / 3
"""Of forward and backward together: backward multiplies with weights and with activations, forward once."""

OPTIMIZER_TENSORS = {"sgd": 3, "momentum": 5, "adam": 7}
"""Tensors of the model's size that one pass reads or writes: parameter in and out, gradient, each state in and out."""

DEFAULT_BUCKET_MB = 25

DDP_FIRST_BUCKET = 2**20
"""Bytes (torch.distributed._DEFAULT_FIRST_BUCKET_BYTES); with a bucket_cap_mb of one's own the first is as large as all."""


@dataclass(frozen=True)
class Layer:
    """A layer's parameters in bytes, and the seconds of its forward and of its backward.

    Raises:
        ValueError: a number is negative or not finite.
    """

    size: float
    forward_s: float
    backward_s: float

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.size, self.forward_s, self.backward_s)):
            raise ValueError(f"a layer has bytes and seconds of zero or more, got {self}")


@dataclass(frozen=True)
class Bucket:
    """Bytes that travel together, and the backward seconds after which their last gradient is there."""

    size: float
    ready_s: float


@dataclass(frozen=True)
class Workload:
    """One rank's work per step.

    Attributes:
        layers: in the order of forward.
        optimizer_tensors: tensors of the model's size that the optimizer's pass moves, see `OPTIMIZER_TENSORS`.
        memory_bandwidth: bytes per second, reads and writes together; infinity leaves passes out of account.

    Raises:
        ValueError: no parameters, no compute time, or a memory bandwidth that is not positive.
    """

    layers: tuple[Layer, ...]
    optimizer_tensors: int = OPTIMIZER_TENSORS["momentum"]
    memory_bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if self.size <= 0 or self.forward_s + self.backward_s <= 0:
            raise ValueError("a workload needs layers with parameters and with compute time")
        if not self.memory_bandwidth > 0:
            raise ValueError(f"memory bandwidth must be positive, got {self.memory_bandwidth!r} B/s")

    @classmethod
    def profiled(
        cls,
        shares: Sequence[tuple[float, float]],
        size: float,
        step_s: float,
        *,
        optimizer_tensors: int = OPTIMIZER_TENSORS["momentum"],
        memory_bandwidth: float = math.inf,
    ) -> Workload:
        """A model of `size` bytes whose step, optimizer included, takes `step_s`; layers have (parameters, work) shares.

        Raises:
            ValueError: the optimizer's pass alone would take longer than the step.
        """
        compute = step_s - size * optimizer_tensors / memory_bandwidth
        if not 0 < compute < math.inf:
            raise ValueError(
                f"a step of {step_s * 1e3:g} ms leaves no time to compute: the optimizer alone takes "
                f"{(step_s - compute) * 1e3:.3g} ms at {memory_bandwidth:.3g} B/s"
            )
        parameters, work = (sum(column) for column in zip(*shares, strict=True))
        layers = tuple(
            Layer(size * p / parameters, compute * w / work * (1 - BACKWARD_SHARE), compute * w / work * BACKWARD_SHARE)
            for p, w in shares
        )
        return cls(layers, optimizer_tensors, memory_bandwidth)

    @classmethod
    def even(cls, params: float, step_s: float) -> Workload:
        """`params` fp32 parameters and `step_s` seconds of a step in 64 equal layers; passes are not counted apart."""
        return cls.profiled(PROFILES["even"](), 4 * params, step_s)

    @property
    def size(self) -> float:
        """Bytes of all parameters."""
        return math.fsum(layer.size for layer in self.layers)

    @property
    def forward_s(self) -> float:
        """Seconds of the forward."""
        return math.fsum(layer.forward_s for layer in self.layers)

    @property
    def backward_s(self) -> float:
        """Seconds of the backward."""
        return math.fsum(layer.backward_s for layer in self.layers)

    def pass_seconds(self, size: float, tensors: float) -> float:
        """Seconds of a pass that moves `tensors` tensors of `size` bytes."""
        return size * tensors / self.memory_bandwidth

    def buckets(self, cap_mb: float = DEFAULT_BUCKET_MB, *, graded: bool = False) -> list[Bucket]:
        """Buckets in the order in which backward completes them, as `fusedfog.params.layout.cut` cuts them.

        Raises:
            ValueError: `cap_mb` (of 2^20 bytes) is not positive.
        """
        cap, total = _bytes_of(cap_mb), self.size
        return self._cut(lambda done: graded_bytes(done, total, cap) if graded else cap)

    def ddp_buckets(self, cap_mb: float = DEFAULT_BUCKET_MB) -> list[Bucket]:
        """DistributedDataParallel's; by default the first is small, to start early.

        Raises:
            ValueError: `cap_mb` (of 2^20 bytes) is not positive.
        """
        cap = _bytes_of(cap_mb)
        first = DDP_FIRST_BUCKET if cap_mb == DEFAULT_BUCKET_MB else cap
        return self._cut(lambda done: cap if done else first)

    def _cut(self, limit: Callable[[float], float]) -> list[Bucket]:
        """Buckets in the order of gradients; each is closed once it holds its limit, which depends on the bytes before it."""
        found: list[Bucket] = []
        done = held = ready_s = 0.0
        for layer in reversed(self.layers):
            held += layer.size
            ready_s += layer.backward_s
            if held >= limit(done):
                found.append(Bucket(held, ready_s))
                done, held = done + held, 0.0
        if held > 0:
            found.append(Bucket(held, ready_s))
        elif found[-1].ready_s < ready_s:  # Layers without parameters at the end belong to the bucket before them.
            found[-1] = Bucket(found[-1].size, ready_s)
        return found


def _bytes_of(cap_mb: float) -> float:
    if not cap_mb > 0:
        raise ValueError(f"bucket size must be positive, got {cap_mb} MB")
    return cap_mb * 2**20


def _even() -> list[tuple[float, float]]:
    return [(1.0, 1.0)] * EVEN_LAYERS


def _resnet50() -> list[tuple[float, float]]:
    """(parameters, multiply-adds) of ResNet-50's convolutions and classifier at 224 x 224 (He et al. 2016; v1.5 strides)."""
    layers = [_conv(3, 64, 7, 112)]
    channels = 64
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            entry = side * 2 if block == 0 and width > 64 else side
            layers += [_conv(channels, width, 1, entry), _conv(width, width, 3, side), _conv(width, 4 * width, 1, side)]
            if block == 0:
                layers.append(_conv(channels, 4 * width, 1, side))
            channels = 4 * width
    return [*layers, (2048 * 1000 + 1000, 2048 * 1000)]


def _conv(inputs: int, outputs: int, kernel: int, side: int) -> tuple[float, float]:
    weights = inputs * outputs * kernel**2
    return weights + 2 * outputs, weights * side**2  # with the batch norm that follows


def _transformer() -> list[tuple[float, float]]:
    """An embedding with a ninth of the parameters and no work to speak of, then 12 equal blocks of 6 matrices each."""
    return [(9.0, 1e-3)] + [(1.0, 1.0)] * 72


PROFILES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "even": _even,
    "resnet50": _resnet50,
    "transformer": _transformer,
}
"""How parameters and work are shared among layers, in the order of forward."""


def read_layers(path: str | PathLike[str], param_bytes: int = 4) -> tuple[Layer, ...]:
    """Layers from a JSON list of {"params": count, "forward_ms": ms, "backward_ms": ms}, in the order of forward.

    Raises:
        ValueError: the file holds something else; says which entry.
        OSError: it cannot be read.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of layers, in the order of forward")
    return tuple(_layer(entry, f"{path}, layer {i}", param_bytes) for i, entry in enumerate(entries))


def _layer(entry: object, where: str, param_bytes: int) -> Layer:
    keys = ("params", "forward_ms", "backward_ms")
    if not isinstance(entry, Mapping) or set(entry) != set(keys):
        raise ValueError(f"{where} must have {', '.join(keys)}, got {entry!r}")
    try:
        params, forward, backward = (float(entry[key]) for key in keys)
        return Layer(params * param_bytes, forward / 1e3, backward / 1e3)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
