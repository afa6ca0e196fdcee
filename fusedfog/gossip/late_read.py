"""A device's flag as the host comes to know it on a GPU: a step or so later, and without a wait."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _Answer:
    """A copy on its way to the host: its home in pinned memory, seen as numpy sees it, and its arrival."""

    home: Tensor
    seen: np.ndarray[Any, Any]
    event: torch.cuda.Event

    @staticmethod
    def of(flag: Tensor) -> _Answer:
        """Room for one."""
        home = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=flag.is_cuda)
        return _Answer(home, home.numpy(), torch.cuda.Event())


class LateRead:
    """Copies of a small tensor on their way from a GPU, in the order they were asked for: one copy and one event each."""

    def __init__(self) -> None:
        self._pending: list[tuple[_Answer, Any]] = []
        self._spare: list[_Answer] = []

    def ask(self, flag: Tensor, about: object = None) -> None:
        """Have the host see `flag`, as it is now on the current stream, once it has come."""
        answer = self._spare.pop() if self._spare else _Answer.of(flag)
        if answer.home.shape != flag.shape:
            answer = _Answer.of(flag)
        answer.home.copy_(flag, non_blocking=True)
        answer.event.record(torch.cuda.current_stream(flag.device))
        self._pending.append((answer, about))

    def answers(self) -> Iterable[tuple[np.ndarray[Any, Any], Any]]:
        """What has come by now, and what it is about."""
        return self._take() if self._pending else ()

    def _take(self) -> Iterator[tuple[np.ndarray[Any, Any], Any]]:
        while self._pending and self._pending[0][0].event.query():
            answer, about = self._pending.pop(0)
            self._spare.append(answer)
            yield answer.seen, about

    def forget(self) -> None:
        """Whatever is on its way is not wanted any more."""
        self._pending.clear()
