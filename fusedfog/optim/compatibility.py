"""The one table of what does not go with what: algorithm x option x topology x storage x device.

    check(Setup(family, algorithm, vars(options), groups, topology=topology, ...))    raises a row's text, or returns

A row names two features of a setup that do not go together, says why, and what to use instead. Rows about one algorithm stand
with it, in `Algorithm.refuses`. To refuse a combination, add a row; a test builds all pairs of features and finds those that
fail without one. Whether the *value* of an option makes sense by itself is checked where options are (`options.py`), and how
parameters lie on ranks where they are sharded (`shards.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedfog.algorithm import Algorithm
from fusedfog.optim.features import FEATURES, ROWS_OF_ALGORITHMS, Setup
from fusedfog.topology import Topology, base_graph, named, one_peer_exponential, symmetric_exponential


@dataclass(frozen=True)
class Refusal:
    """A row: two features that do not go together, why, and what to use instead.

    In `why` and `instead`, {algorithm} is the setup's, and {lacking} and {replacement} what it says of its GPU.
    """

    what: str
    other: str
    why: str
    instead: str

    def holds(self, setup: Setup) -> bool:
        """Whether the setup has both features."""
        return FEATURES[self.what].present(setup) and FEATURES[self.other].present(setup)

    def text(self, setup: Setup) -> str:
        """The error that the setup raises."""
        return f"{self.reason(setup)}; {_filled(self.instead, setup)}"

    def reason(self, setup: Setup) -> str:
        """What does not go together, and why."""
        one, two = (
            feature.named(setup) if feature.named else feature.words
            for feature in (FEATURES[self.what], FEATURES[self.other])
        )
        return f"{one} does not work with {two}: {_filled(self.why, setup)}"

    @property
    def texts(self) -> tuple[str, str]:
        """Why, and what to use instead."""
        return self.why, self.instead


def _filled(text: str, setup: Setup) -> str:
    _, lacking, replacement = setup.lacking or ("", "", "")
    known = {"algorithm": setup.algorithm.name, "lacking": lacking, "replacement": replacement}
    return text.format_map(known)


_OWN_PASSES = "use fusedfog.SGD or fusedfog.AdamW, or leave it out"
_ONE_OF_THEM = "leave one of them out"

ROWS: tuple[Refusal, ...] = (
    Refusal(
        "Decentralized",
        "fused_backward",
        "the wrapped optimizer makes its step over all parameters at once, not bucket by bucket",
        "leave it out",
    ),
    Refusal(
        "Decentralized",
        "outer",
        "outer= needs the passes of fusedfog's own optimizers",
        "use algorithm='atc' with communicate_every, or a fusedfog optimizer for the inner steps",
    ),
    Refusal("Decentralized", "measure", "only the passes of fusedfog's own optimizers see gradients", _OWN_PASSES),
    Refusal("Decentralized", "low_precision", "the wrapped optimizer writes the parameters itself", _OWN_PASSES),
    Refusal("Decentralized", "state_dtype", "the wrapped optimizer keeps its own states", _OWN_PASSES),
    Refusal(
        "Decentralized",
        "wire_dtype",
        "compressed messages are made by the passes of fusedfog's own optimizers",
        _OWN_PASSES,
    ),
    Refusal("Decentralized", "cpu_compile", "only the passes of fusedfog's own optimizers can be compiled", _OWN_PASSES),
    Refusal(
        "Decentralized",
        "capturable",
        "the wrapped optimizer's step takes its numbers, and starts its kernels, as it likes",
        _OWN_PASSES,
    ),
    *(
        Refusal(name, option, why, instead)
        for name, _, row in ROWS_OF_ALGORITHMS
        for option, (why, instead) in row.refuses.items()
    ),
    Refusal("outer", "exchanging steps", "outer= runs over local steps", "use algorithm='local'"),
    *(
        Refusal("outer", every, "outer= has a rhythm of its own", "give outer=Outer(every=...) and no other rhythm")
        for every in ("communicate_every", "global_average_every")
    ),
    Refusal(
        "machines that average parameters",
        "wire_dtype",
        "what a machine sends is a mean of its ranks that none of their passes has made",
        "use inside='gradients', the default, or exact messages",
    ),
    Refusal(
        "fused_backward",
        "FSDP2",
        "gradients come out of FSDP's reduce-scatter, module by module, on a stream of its own",
        "leave it out (awc overlaps the whole iteration without it)",
    ),
    Refusal(
        "capturable",
        "FSDP2",
        "forward and backward wait for collectives between ranks, and nobody has recorded those with a step",
        "leave it out",
    ),
    Refusal(
        "low_precision",
        "no 16-bit parameters",
        "it is for bf16 and fp16 parameters, which these are not",
        "convert the model first (model.bfloat16()), or leave it out",
    ),
    Refusal(
        "state_dtype",
        "exact sums",
        "its states carry sums over ranks that must be exact",
        "leave it out, or use awc, atc, allreduce, local without outer=, or push_sum",
    ),
    Refusal(
        "wire_dtype",
        "heals",
        "compressed messages bring differences from what a rank knows, and one that is to heal knows nothing",
        "use exact messages, or nonfinite='skip'",
    ),
    *(
        Refusal(
            "listed twice", other, "its second update would need a pass of its own there", "list each parameter once"
        )
        for other in ("exchange in mid-step", "wire_dtype", "capturable", "measure", "FSDP2")
    ),
    Refusal(
        "weight",
        "FSDP2",
        "FSDP averages the gradients of a replica's ranks itself, all alike",
        "leave it out; with SGD, multiply each rank's loss by its weight over the mean weight",
    ),
    Refusal(
        "weight",
        "no learning rate",
        "around another optimizer it multiplies lr, and there is none",
        "leave it out, or use fusedfog.SGD or fusedfog.AdamW",
    ),
    Refusal("listed twice", "momentum", "torch begins its buffer anew for each time", "list each parameter once"),
    Refusal("cpu_compile", "measure", "compiled passes measure nothing", _ONE_OF_THEM),
    *(
        Refusal("cpu_compile", option, f"compiled passes know no {option}", _ONE_OF_THEM)
        for option in ("low_precision", "state_dtype")
    ),
    Refusal(
        "cpu_compile",
        "other passes",
        "cpu_compile=True compiles the passes of SGD and Adam(W) with awc, atc, allreduce and local",
        "leave it out",
    ),
    Refusal(
        "fused_backward",
        "DistributedDataParallel",
        "it puts gradients back after they were used and freed",
        "train the bare module (ddp.module), or leave out fused_backward=True",
    ),
    Refusal("capturable", "fused_backward", "its hooks start messages inside backward", _ONE_OF_THEM),
    Refusal(
        "capturable",
        "data_parallel_steps",
        "backward waits for other ranks in these steps, and the passes that follow are others",
        "leave out capturable=True, or begin with data-parallel steps in a run of their own",
    ),
    Refusal(
        "capturable",
        "machines that average gradients",
        "backward waits for other ranks there",
        "use inside='parameters', or leave out capturable=True",
    ),
    Refusal("capturable", "cpu_compile", "compiled passes take numbers as arguments", _ONE_OF_THEM),
    Refusal(
        "capturable",
        "exchange in mid-step",
        "a step that has its exchange in its middle needs the host there, so it cannot be recorded as a whole",
        "use algorithm='awc', 'gradient_tracking', 'momentum_tracking', 'extra' or 'local' without outer=, or leave out "
        "capturable=True and record forward and backward alone",
    ),
    Refusal(
        "capturable",
        "endless of any degree",
        "it needs to know how many neighbours a rank has at most, and this topology never repeats and does not say",
        "give it a period (from_rounds(n, fn, period=...)), or use 'one_peer_exponential' or 'base_graph'",
    ),
    Refusal(
        "capturable",
        "replicas that change",
        "compressed messages have replicas of their own in each round, and none in steps without an exchange, so passes would "
        "change",
        "use wire_dtype with a static topology, communicate_every=1 and without global_average_every, or exact messages",
    ),
    Refusal(
        "needs double stochasticity",
        "not doubly stochastic",
        "{algorithm} needs a doubly stochastic topology, or the ranks would minimise a sum that weighs some ranks' losses more "
        "than others'",
        "use 'one_peer_exponential', 'base_graph' or 'ring', fusedfog.topology.from_networkx for Metropolis weights on your "
        "own graph, or algorithm='push_sum'",
    ),
    Refusal(
        "needs static symmetry",
        "not static symmetric",
        "{algorithm} needs a static symmetric topology, or it can diverge",
        "use 'symmetric_exponential', 'ring', 'grid' or 'hypercube', or algorithm='quasi_global' or 'gradient_tracking'",
    ),
    Refusal(
        "wire_dtype",
        "endless",
        "it keeps replicas for each round of the topology's period, and this one has none",
        "use a static graph, 'one_peer_exponential' or another periodic sequence",
    ),
    *(
        Refusal("asynchronous", option, why, instead)
        for option, why, instead in (
            (
                "no asynchronous form",
                "only awc and push_sum have a form in which no rank waits for another",
                "use algorithm='awc' or 'push_sum', or leave it out",
            ),
            ("global_average_every", "an average over all ranks waits for all of them", _ONE_OF_THEM),
            ("mesh", "the ranks of a machine wait for each other", "use a topology of ranks, or leave it out"),
            ("FSDP2", "the ranks of a machine wait for each other", "leave it out"),
            ("wire_dtype", "compressed messages are differences, of which none may be skipped", _ONE_OF_THEM),
            ("capturable", "what has arrived is looked up by the host in every step", _ONE_OF_THEM),
            ("cpu_compile", "nobody has compiled passes over other processes' memory", _ONE_OF_THEM),
            (
                "data_parallel_steps",
                "ranks wait for each other in these steps",
                "leave it out, or begin with data-parallel steps in an optimizer of their own",
            ),
            (
                "changing",
                "windows have the same neighbours for as long as they live",
                "use a static topology, as 'ring', 'exponential' or 'symmetric_exponential'",
            ),
        )
    ),
    Refusal(
        "asynchronous push_sum",
        "not strongly connected",
        "some ranks would lose all mass to others",
        "use a graph in which every rank reaches every other one",
    ),
    *(
        Refusal("elastic", option, why, instead)
        for option, why, instead in (
            ("mixes nothing", "every rank would need all others, or none", "use awc, atc or another algorithm that mixes"),
            ("mesh", "members are ranks, and no machines yet", "use a topology of ranks"),
            ("FSDP2", "a member needs all shards of its parameters", "leave it out"),
            ("DistributedDataParallel", "its process group ends with an epoch", "train the bare module (ddp.module)"),
            ("group", "the process group is that of the members, and is another one when they change", "leave it out"),
            ("unmixed groups", "a newcomer would take what belongs to another rank", "give them a torch.optim optimizer"),
            ("outer", "what has gathered since the last exchange would have to be cut off", "use communicate_every"),
            ("data_parallel_steps", "every rank needs all others in these steps", "leave it out"),
            ("adapt", "which rounds were slow is known of the ranks that there were", "leave it out"),
            ("weight", "shares would have to be agreed on anew", "leave it out"),
            ("fused_backward", "a step begins in backward, where it cannot wait for other members", "leave it out"),
            ("capturable", "a recorded step knows the neighbours that it was recorded with", "leave it out"),
            ("cpu_compile", "a newcomer may come without a compiler", "leave it out"),
        )
    ),
    *(
        Refusal("adapt", option, why, instead)
        for option, why, instead in (
            ("no free order of rounds", "it changes how often rounds come", "use awc, atc, dag or a tracking method"),
            ("one round", "a static graph has no other round", "use 'one_peer_exponential' or another periodic sequence"),
            ("endless", "its rounds do not come again", "use 'one_peer_exponential' or another periodic sequence"),
            ("asynchronous", "asynchronous ranks wait for no edge", _ONE_OF_THEM),
            ("wire_dtype", "compressed messages have replicas for each round, in its place of the sequence", _ONE_OF_THEM),
            ("global_average_every", "an average over all ranks takes every slow edge", _ONE_OF_THEM),
            ("mesh", "who waited for which machine is not known rank by rank", _ONE_OF_THEM),
            ("FSDP2", "ranks with other shards would choose other rounds", _ONE_OF_THEM),
            ("capturable", "which round comes is looked up by the host in every step", _ONE_OF_THEM),
            ("GPU", "a GPU waits in its streams, where the host does not see it", "leave it out"),
        )
    ),
    Refusal("float64 parameters", "GPU", "the GPU kernel computes in float32", "use model.float()"),
    Refusal("GPU", "instructions that lack", "{lacking}", "use {replacement}"),
)
"""All rows, in the order in which they are looked through."""


def first_refusal(setup: Setup) -> Refusal | None:
    """The first row that holds, if one does."""
    return next((row for row in ROWS if row.holds(setup)), None)


def check(setup: Setup) -> None:
    """Raise ValueError, with the row's text, if two features of the setup do not go together."""
    row = first_refusal(setup)
    if row is not None:
        raise ValueError(row.text(setup))


def choose_topology(setup: Setup, given: Topology | str | None, size: int) -> Topology | None:
    """The topology of `size` nodes along which the setup will exchange, the given or the default one; checks the whole setup.

    Raises:
        ValueError: as `check` and `resolve_topology`.
    """
    chosen = resolve_topology(setup.algorithm, given, size, static=setup.compresses or bool(setup.value("asynchronous")))
    check(replace(setup, topology=chosen))
    return chosen.lazy() if chosen is not None and setup.algorithm.lazy else chosen


def resolve_topology(
    algorithm: Algorithm, topology: Topology | str | None, size: int, *, static: bool = False
) -> Topology | None:
    """The topology that is meant for `size` nodes: the given one, or for None and "auto" the algorithm's default.

    The default is the one-peer exponential graph where `size` is a power of two (one neighbour a step, exact average
    every log2(size) steps), the Base-2 graph otherwise (exact for any size), and the symmetric exponential graph for
    methods that need one static symmetric matrix or do better with it (dag), and if `static` asks for one round.

    Raises:
        ValueError: the topology is of another size, or unknown. Whether the theory covers it, `choose_topology` says.
        TypeError: not a Topology, a name or None.
    """
    if algorithm.exchanges != "parameters":
        return None
    if topology is None or (isinstance(topology, str) and topology == "auto"):
        topology = symmetric_exponential(size) if static else _default(algorithm, size)
    if isinstance(topology, str):
        topology = named(topology, size)
    if not isinstance(topology, Topology):
        raise TypeError(f"topology must be a fusedfog.topology.Topology, a name or None, got {type(topology).__name__}")
    if topology.size != size:
        raise ValueError(
            f"topology {topology.name} is for {topology.size} ranks but the group has {size}; "
            f"build it with n={size}, or pass its name to have it sized to the group"
        )
    return topology


def _default(algorithm: Algorithm, size: int) -> Topology:
    if algorithm.graph == "symmetric" or algorithm.wants_static:
        return symmetric_exponential(size)
    return one_peer_exponential(size) if size & (size - 1) == 0 else base_graph(size)
