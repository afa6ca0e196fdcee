"""Which graph to pick: what each costs, how fast it averages, and which algorithms accept it."""

from __future__ import annotations

from collections.abc import Sequence

from fusedfog.topology.base import Topology
from fusedfog.topology.names import BY_MACHINES, BY_SIZE, named

LOCAL_RANKS = 4

SUMMARIES: dict[str, str] = {
    "ring": "neighbours on a circle: cheap, slow on many ranks",
    "star": "everyone talks to one rank: only for comparison",
    "grid": "a rectangle, neighbours beside, above and below",
    "fully_connected": "everyone to everyone: exact in one round, n-1 messages",
    "exponential": "hops 1, 2, 4, ...: log2 n messages, mixes fast at any size",
    "symmetric_exponential": "hops 1, 4, 16, ... both ways: the symmetric graph to take for many ranks",
    "hypercube": "ranks that differ in one bit: symmetric, powers of two only",
    "one_peer_exponential": "one message per round, exact every log2 n rounds for powers of two",
    "one_peer_hypercube": "one exchange in pairs per round, exact every log2 n rounds, powers of two only",
    "base_graph": "one exchange per round, exact after finitely many rounds for every n",
    "equi_dynamic": "one message over a random hop per round, rate independent of n",
    "random_matching": "a random pairing per round, rate independent of n",
    "inner_outer_ring": "one rank of each machine goes outside per round, rings within and between",
    "inner_outer_exponential": "one rank of each machine goes outside per round, exponential hops",
    "alternating_exponential_ring": "averages within and between machines in turn, exact every 2 log2 rounds",
}


def accepted_by(topology: Topology) -> str:
    """The algorithms whose theory covers this topology, in words."""
    if not topology.is_doubly_stochastic():
        return "push_sum"
    if topology.is_static and topology.is_symmetric():
        return "all"
    return "all but decentlam, exact_diffusion, extra"


def of_size(name: str, n: int) -> Topology:
    """The named topology on ``n`` ranks; those of machines get machines of 4.

    Raises:
        ValueError: if it does not exist for ``n``.
    """
    if name not in BY_MACHINES:
        return named(name, n)
    if n % LOCAL_RANKS:
        raise ValueError(f"{n} ranks are not machines of {LOCAL_RANKS}")
    return BY_MACHINES[name](n // LOCAL_RANKS, LOCAL_RANKS)


def guide_table(sizes: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024), exact_at: Sequence[int] = (8, 12)) -> str:
    """A markdown table of every named topology: messages per round, spectral gap, exactness, algorithms.

    Messages are the most that any rank sends or receives in a round, at the largest of ``sizes``. A gap of 1 is an
    exact average, for a sequence after one period. "exact, n=8" is the number of rounds to it. A dash stands for a
    graph that does not exist for the size, or for never. Topologies of machines are given machines of 4 ranks.
    """
    head = [
        "topology",
        "messages",
        *(f"gap n={n}" for n in sizes),
        *(f"exact, n={n}" for n in exact_at),
        "symmetric",
        "algorithms",
    ]
    lines = [head, ["---"] * len(head)]
    for name in (*BY_SIZE, *BY_MACHINES):
        largest = of_size(name, max(sizes))
        gaps = [f"{of_size(name, n).spectral_gap():.2g}" for n in sizes]
        exact = [_rounds_to_exact(name, n) for n in exact_at]
        symmetric = "yes" if largest.is_symmetric() else "no"
        lines.append([f"`{name}`", str(largest.max_degree), *gaps, *exact, symmetric, accepted_by(largest)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounds_to_exact(name: str, n: int) -> str:
    try:
        rounds = of_size(name, n).rounds_to_exact()
    except ValueError:
        return "-"
    return "-" if rounds is None else str(rounds)
