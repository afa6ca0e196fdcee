"""One outcome for all ranks: what one of them cannot do, all of them raise.

    ranks = Outcome(find_group(), "save_checkpoint()")
    sizes = ranks.each(lambda: write(file))             # of all ranks; or the same error on all

For calls in which each rank does something that may fail by itself, as writing a file. It says so to rank 0 through the store
instead of to its user (`agreement`), and nobody waits for a rank that has left the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.group import GroupView, store_timeout
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.errors import CheckpointError

T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (CheckpointError, TypeError, ValueError)}


class Outcome:
    """Some ranks in one call, which do its parts together.

    Args:
        view: the ranks.
        call: what all must be in: "save_checkpoint()".
    """

    def __init__(self, view: GroupView, call: str) -> None:
        self._view, self._call = view, call

    def each(self, do: Callable[[], Any]) -> list[Any]:
        """What `do` returns on every rank, by rank; whatever JSON can write.

        Raises:
            TypeError, ValueError, CheckpointError: on all ranks, what any raised; another error is a `CheckpointError`.
            PeerTimeout: a rank did not come.
            MismatchError: one is in another call.
        """
        values: list[Any] = self._do(do, True)[1]
        return values

    def own(self, do: Callable[[], T]) -> T:
        """What `do` returns here, once it has returned everywhere; raises as `each`."""
        result: T = self._do(do, False)[0]
        return result

    def first(self, do: Callable[[], Any]) -> Any:
        """What `do` returns on the first rank, which alone does it; raises as `each`."""
        return self._do(do if self._view.rank == 0 else lambda: None, True)[1][0]

    def _do(self, do: Callable[[], Any], shared: bool) -> tuple[Any, list[Any]]:
        view, own, failure = self._view, None, None
        try:
            own = do()
        except Exception as error:  # Whatever it is, the others have to know.
            failure = error
        value = {"failed": _words(failure)} if failure is not None else {"done": own if shared else None}
        verdict = _judge([value])
        if view.size > 1:
            verdict = confer(view, next_agreement(view), value, _judge, store_timeout(view), self._call, self._call)
        if "failed" in verdict:
            kind, place, text = verdict["failed"]
            on = f" failed on rank {place}" if view.size > 1 else ""
            raise _KINDS[kind](f"rank {view.rank}: {self._call}{on}: {text}") from failure
        return own, verdict["done"]


def _judge(values: Any) -> dict[str, Any]:
    """All values, or the first rank's failure, with how many more there are."""
    failed = [(rank, *value["failed"]) for rank, value in enumerate(values) if "failed" in value]
    if not failed:
        return {"done": [value["done"] for value in values]}
    rank, kind, text = failed[0]
    more = f" (and {name_ranks([one for one, *_ in failed[1:]])} failed)" if len(failed) > 1 else ""
    return {"failed": (kind, rank, f"{text}{more}")}


def _words(error: Exception) -> tuple[str, str]:
    """An error as others are told of it: the kind to raise, and the text."""
    if isinstance(error, CheckpointError):
        return "CheckpointError", str(error)
    if isinstance(error, (TypeError, ValueError)):
        return ("TypeError" if isinstance(error, TypeError) else "ValueError"), str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return "CheckpointError", f"{where}{error.strerror}"
    return "CheckpointError", f"{type(error).__name__}: {error}"
