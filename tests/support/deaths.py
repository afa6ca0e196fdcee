"""What the ranks that live on have to be told of one that was killed, and how a rank dies."""

from __future__ import annotations

import os
import signal

from support.pool import Outcome


def die() -> None:
    """End as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def check_named(outcomes: list[Outcome], victim: int) -> None:
    """All others have raised, before the pool's own limit, an error whose origin is the victim.

    A rank's value begins with the error's type, its `origin` and its text.
    """
    assert outcomes[victim].error_type == "Died", outcomes[victim]
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.error_type is None, outcome
            kind, origin, text = outcome.value[:3]
            assert (kind, origin) == ("ExchangeError", victim), text
