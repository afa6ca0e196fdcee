"""Ways that exchanges can go, and what each costs on known links. Between `compatibility` and `automatic`, which chooses one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusedfog.cost.loss import Way as LossWay
from fusedfog.cost.network import Network
from fusedfog.cost.prices import Price, best, data_parallel_seconds, price
from fusedfog.cost.ratio import messages_alone
from fusedfog.cost.timeline import ENCODING, ENCODING_ON_CPU, Scheme, predict, wire_bytes
from fusedfog.cost.units import show_bytes, show_time
from fusedfog.cost.workload import OPTIMIZER_TENSORS, PROFILES, Workload
from fusedfog.kernels import device
from fusedfog.optim.compatibility import first_refusal
from fusedfog.optim.features import Setup
from fusedfog.optim.options import Options
from fusedfog.params.layout import is_trained
from fusedfog.topology import Topology, exponential

_WIRES = (None, "int8")
"""Formats among which messages are chosen: int8 is the one whose loss was measured beside that of exact messages."""

_MOST_ROUNDS = 2
"""Of graphs with smaller messages: replicas then take at most 16 bytes an element, as much as parameters and Adam's moments."""

_TENSORS = {"SGD": OPTIMIZER_TENSORS["momentum"]}


@dataclass(frozen=True)
class Way:
    """Where exchanges go, and what they send.

    Attributes:
        topology: between ranks, or between machines; None where nothing goes to neighbours.
        reason: why, for people; "given" for what the user has chosen.
        machines: the ranks of each machine, where auto has made them nodes.
        wire: the format of messages that auto has chosen; None for the one that the options have.
    """

    topology: Topology | None
    reason: str = ""
    machines: tuple[tuple[int, ...], ...] | None = None
    wire: str | None = None

    @property
    def name(self) -> str:
        """Such as "one_peer_exponential over 4 machines, int8 messages"."""
        assert self.topology is not None
        over = f" over {len(self.machines)} machines" if self.machines is not None else ""
        return f"{self.topology.name}{over}{f', {self.wire} messages' if self.wire else ''}"


def alternatives(setup: Setup, options: Options, plain: Way, flat: Topology) -> list[Way]:
    """The ways that auto weighs where links are known, `plain` first: what it takes where they are not.

    With machines or ranks as nodes, on the default or the static exponential graph, with exact messages or smaller ones. What the
    table of `compatibility` refuses is left out, and smaller messages on graphs of many rounds: each takes 8 bytes an element.

    Args:
        flat: the default graph where ranks are nodes.
    """
    found = []
    wires = _WIRES if options.wire_dtype is None else (None,)
    static_too = setup.algorithm.graph == "doubly_stochastic" and not setup.algorithm.wants_static
    for nodes in [plain] + [Way(flat)] * (plain.machines is not None):
        assert nodes.topology is not None
        graphs = [nodes.topology]
        if static_too and nodes.topology.size > 2 and nodes.topology.name != "exponential":
            graphs.append(exponential(nodes.topology.size))
        for graph in graphs:
            for wire in wires:
                way = replace(nodes, topology=graph, wire=wire)
                if way == plain or ((wire is None or _rounds(graph) <= _MOST_ROUNDS) and _allowed(setup, way)):
                    found.append(way)
    return found


def _rounds(graph: Topology) -> float:
    return graph.period if graph.period is not None else math.inf


def _allowed(setup: Setup, way: Way) -> bool:
    given = dict(setup.options)
    if way.machines is not None:
        given["mesh"] = way.machines
    if way.wire is not None:
        given["wire_dtype"] = way.wire
    return first_refusal(replace(setup, options=given, topology=way.topology)) is None


def cheapest(
    ways: Sequence[Way], setup: Setup, options: Options, network: Network, workload: Workload | None = None
) -> tuple[int, str]:
    """The place of the way with the least price (`cost.prices.best`), and its three prices in words.

    Args:
        workload: what a step computes; None for the step that the links tell of, or, if they tell of none, for one in which
            computing takes as long as the messages of the first way.
    """
    size, known, note = bytes_of(setup), options.known_links, ""
    if workload is None and known is not None and known.step_s is not None:
        workload = _workload(setup, size, known.step_s, known.memory_bandwidth)
    if workload is None:
        compute = messages_alone(scheme_of(ways[0], setup, options), network, size)
        workload = Workload.profiled(PROFILES["even"](), size, compute)
        note = ", if computing takes as long as these messages"
    base = data_parallel_seconds(workload, network)
    found = [
        price(
            predict(workload, network, scheme_of(way, setup, options), way.name),
            _loss_way(way, setup, options),
            base,
        )
        for way in ways
    ]
    chosen = best(found)
    return found.index(chosen), _in_words(chosen, len(ways)) + note


def _in_words(chosen: Price, count: int) -> str:
    one = chosen.prediction
    if chosen.time is not None:
        first = f"the least time to DDP's loss of {count} ways, {chosen.shown_time()} of DDP's"
    else:
        first = f"the shortest step of {count} ways, none of which is known to reach DDP's loss"
    return f"{first}: {show_time(one.step_s)} and {show_bytes(one.sent)} a step, loss {chosen.shown_loss()}"


def _workload(setup: Setup, size: float, step_s: float, memory_bandwidth: float) -> Workload:
    tensors = _TENSORS.get(setup.family, OPTIMIZER_TENSORS["adam"])
    if size * tensors / memory_bandwidth >= step_s:
        memory_bandwidth = math.inf  # The step was measured elsewhere than the memory.
    return Workload.profiled(
        PROFILES["even"](), size, step_s, optimizer_tensors=tensors, memory_bandwidth=memory_bandwidth
    )


def _loss_way(way: Way, setup: Setup, options: Options) -> LossWay | None:
    """What the loss depends on, if the table of losses knows such options."""
    others = options.communicate_every != 1 or options.global_average_every or options.mix_strength != 1.0
    if others or setup.family == "wrapped" or (way.machines is not None and options.inside == "parameters"):
        return None
    assert way.topology is not None
    return LossWay(
        "SGD" if setup.family == "SGD" else "AdamW",
        setup.algorithm.name,
        way.topology.name,
        way.machines is not None,
        _wire_of(way, options),
        options.data_parallel_steps > 0,
    )


def scheme_of(way: Way, setup: Setup, options: Options) -> Scheme:
    """What is simulated of a way."""
    every = options.outer.every if options.outer is not None else options.communicate_every
    itemsize = min((dtype.itemsize for dtype in setup.dtypes.values()), default=4)
    # Schemes count in fp32 elements, of which there are half as many as 16-bit parameters have.
    sent = wire_bytes(_wire_of(way, options))
    encodes_fast = device.on_gpu(setup.place) or options.cpu_compile
    return Scheme(
        setup.algorithm,
        way.topology,
        fused_backward=options.fused_backward,
        communicate_every=every if isinstance(every, int) else 1,
        inside=options.inside if way.machines is not None else None,
        bucket_mb=options.bucket_mb,
        wire_bytes=min(4.0, sent * max(1.0, 4 / itemsize)) if sent < 4 else 4.0,
        encoding=ENCODING if encodes_fast else ENCODING_ON_CPU,
    )


def _wire_of(way: Way, options: Options) -> str | None:
    codes = options.codes
    names = {"torch.bfloat16": "bf16", "torch.float8_e4m3fn": "fp8", "torch.int8": "int8"}
    return way.wire or (names[str(codes)] if codes is not None else None)


def bytes_of(setup: Setup) -> float:
    """Bytes of all parameters that are mixed; at least 1."""
    mixed = [group for group in setup.groups if group.get("mix", True)]
    params = [param for group in mixed for param in group["params"] if is_trained(param)]
    return max(1.0, float(sum(param.numel() * param.element_size() for param in params)))
