"""Ranges for `torch.profiler` that show where a step's communication went; `fusedfog trace` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C._autograd import _profiler_enabled

_NOTHING: AbstractContextManager[object] = nullcontext()


def span(
    what: str, buckets: Iterable[int], detail: str = "", *, to: Iterable[object] = (), sources: Iterable[object] = ()
) -> AbstractContextManager[object]:
    """A profiler range `fusedfog::{what} bucket 3 {detail} to 1,2 from 5`; no more than a call without a profiler."""
    # An idle record_function costs 6 us, and building the name one; this costs 0.2.
    if not _profiler_enabled():
        return _NOTHING
    numbers = list(buckets)
    words = [f"fusedfog::{what} bucket{'s' if len(numbers) > 1 else ''} {','.join(map(str, numbers))}", detail]
    words += [
        f"{word} {','.join(map(str, peers))}" for word, peers in (("to", list(to)), ("from", list(sources))) if peers
    ]
    return torch.profiler.record_function(" ".join(filter(None, words)))
