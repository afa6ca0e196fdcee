"""`cpu_compile=True`: compile an optimizer's passes at construction, on every rank or on none.

Sits between `optim.build` and `kernels.compiled`. Rank 0 compiles first, so that ranks on its machine find the code in
Inductor's cache instead of all compiling it at once. Compiled passes round differently from the default ones, so ranks
must not mix the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fusedfog.algorithm import Algorithm
from fusedfog.algorithms import MIX
from fusedfog.comm.agreement import agree, next_agreement
from fusedfog.comm.group import GroupView
from fusedfog.errors import PeerTimeout
from fusedfog.kernels import COMPILED_RULES, compile_now
from fusedfog.log import warn_user
from fusedfog.params.layout import Segment
from fusedfog.topology import Topology

_ROUNDS = 64
_PATIENCE = timedelta(minutes=10)
"""How long other ranks wait for rank 0 to compile; ten seconds for each kind of pass is usual."""

Kind = tuple[str, torch.dtype, int, int]
"""Rule, dtype of the parameters, number of states, number of neighbours."""


def kinds_of_passes(
    algorithm: Algorithm,
    groups: Sequence[Mapping[str, Any]],
    layouts: Iterable[Segment],
    neighbours: Iterable[int],
) -> list[Kind]:
    """The passes that can be compiled and that steps of this optimizer will make; `algorithm.compiled` says there are some."""
    before, after = algorithm.before, algorithm.after
    kinds: dict[Kind, None] = {}
    for layout in layouts:
        group = groups[layout.group]
        if before is not None:
            kinds[before.rule, layout.dtype, len(before.states(group)), 0] = None
        for k in neighbours if layout.mix else (0,):
            if after.rule in COMPILED_RULES and (k or after is not MIX):
                kinds[after.rule, layout.dtype, len(after.states(group)), k] = None
    return list(kinds)


def numbers_of_neighbours(topology: Topology | None, rank: int, averaging: bool, pausing: bool) -> set[int]:
    """How many neighbours' messages this rank's passes mix: by rounds, full averages, steps without exchange."""
    if topology is None:
        return {0}
    rounds = [topology.round(rank, step) for step in range(min(topology.period or _ROUNDS, _ROUNDS))]
    found = {sum(weight != 0 for weight in round_.recv.values()) for round_ in rounds}
    return found | ({1} if averaging else set()) | ({0} if pausing else set())


def compile_everywhere(view: GroupView, kinds: Sequence[Kind], timeout: timedelta | None, what: str) -> bool:
    """Compile `kinds` of passes on every rank; False, with a warning, if no rank can.

    Args:
        timeout: how long to wait for the other ranks' outcome; None for a rank that is alone.
        what: who asks, for errors ("AdamW").

    Raises:
        MismatchError: some ranks could compile and others could not; names one and the reason.
        PeerTimeout: rank 0 did not finish compiling.
    """
    if view.size == 1:
        outcome = _compile(kinds)
    else:
        store, key = dist.distributed_c10d._get_default_store(), f"{next_agreement(view)}/compiled"
        if view.rank:
            try:
                store.wait([key], _PATIENCE)
            except RuntimeError as error:
                raise PeerTimeout(f"rank {view.rank}: {what}: rank 0 did not compile within {_PATIENCE}") from error
        outcome = _compile(kinds)
        if not view.rank:
            store.set(key, outcome or "yes")
        # Ranks that found the code in the cache are early, those on other machines may still be compiling.
        patience = max(_PATIENCE, timeout or _PATIENCE)
        agree(view, next_agreement(view), {"compiled passes": outcome or "yes"}, patience, f"{what}(cpu_compile=True)")
    if outcome:
        warn_user(
            f"rank {view.rank}: cpu_compile=True found no way to compile ({outcome}), so passes run as without it. "
            f"It needs a C++ compiler such as g++ (or set CXX)",
            RuntimeWarning,
        )
    return not outcome


def _compile(kinds: Iterable[Kind]) -> str:
    """Nothing if all went well, else why it did not."""
    try:
        for kind in kinds:
            compile_now(*kind)
    except Exception as error:  # Inductor's failures share no class: no compiler, a broken one, a missing header.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""
