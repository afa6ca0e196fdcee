"""The mutex of an edge, kept by its receiver: who holds it, and who waits for it, first come first served."""

from __future__ import annotations

import threading
from collections import deque
from typing import TypeAlias

Claim: TypeAlias = tuple[str, int]
"""A side of the edge, "own" or "peer", and a number of its choice."""


class Gate:
    """Claims in the order in which they came; the first one holds the mutex."""

    def __init__(self) -> None:
        self._claims: deque[Claim] = deque()
        self._lock = threading.Lock()

    def take(self, claim: Claim) -> bool:
        """Ask for the mutex; whether it is held at once."""
        with self._lock:
            self._claims.append(claim)
            return self._claims[0] == claim

    def holds(self, claim: Claim) -> bool:
        """Whether this claim is the first."""
        with self._lock:
            return bool(self._claims) and self._claims[0] == claim

    def leave(self, claim: Claim) -> Claim | None:
        """Give the mutex back, or ask no more; returns who holds it in consequence."""
        with self._lock:
            if claim not in self._claims:
                return None
            first = self._claims[0] == claim
            self._claims.remove(claim)
            return self._claims[0] if first and self._claims else None

    def drop(self, side: str) -> Claim | None:
        """One side has gone: forget its claims; returns who holds the mutex in consequence."""
        with self._lock:
            before = self._claims[0] if self._claims else None
            self._claims = deque(claim for claim in self._claims if claim[0] != side)
            first = self._claims[0] if self._claims else None
            return first if first != before else None
