"""`cpu_compile=True`: compile the loop of passes at construction, on every rank or on none.

Sits between `optim.build` and `kernels.compiled`. Rank 0 compiles first, so that ranks on its machine find the code in
torch's cache instead of all compiling it at once. Compiled passes round differently from the default ones, so ranks must
not mix the two.
"""

from __future__ import annotations

from datetime import timedelta

from fusedfog.comm.agreement import absent, agree, next_agreement
from fusedfog.comm.group import GroupView
from fusedfog.comm.store import own_store
from fusedfog.errors import PeerTimeout
from fusedfog.kernels import compile_now
from fusedfog.log import warn_user

_PATIENCE = timedelta(minutes=10)
"""How long other ranks wait for rank 0 to compile; a few seconds are usual."""


def compile_everywhere(view: GroupView, timeout: timedelta | None, what: str) -> bool:
    """Compile the loop on every rank; False, with a warning, if no rank can.

    Args:
        timeout: how long to wait for the other ranks' outcome; None for a rank that is alone.
        what: who asks, for errors ("AdamW").

    Raises:
        MismatchError: some ranks could compile and others could not; names one and the reason.
        PeerTimeout: rank 0 did not finish compiling.
        ExchangeError: a rank has ended meanwhile; names it.
    """
    if view.size == 1:
        outcome = _compile()
    else:
        store, key = own_store(), f"{next_agreement(view)}/compiled"
        if view.rank and absent(store, [key], _PATIENCE, view, f"{what}(cpu_compile=True)"):
            raise PeerTimeout(f"rank {view.rank}: {what}: rank 0 did not compile within {_PATIENCE}")
        outcome = _compile()
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


def _compile() -> str:
    """Nothing if all went well, else why it did not."""
    try:
        compile_now()
    except Exception as error:  # torch's failures share no class: no compiler, a broken one, a missing header.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""
