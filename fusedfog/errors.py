"""What can go wrong between ranks, one exception for each way out; and what to say of a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class MismatchError(ValueError):
    """Ranks were built with different models, hyper-parameters, topologies or algorithms; names the rank and the field."""


class UnsupportedEnvironment(ValueError):
    """The software or GPU of this machine cannot do what was asked; names what is missing and the way out."""


class LaunchError(RuntimeError, ValueError):
    """The launcher's variables do not say which rank this is, or where the ranks meet; names what is missing or wrong."""


class PeerTimeout(TimeoutError, RuntimeError):
    """A peer did not arrive, or its message did not, within the process group's timeout; names the peer, and who is where.

    Attributes:
        explained: the text says which call each rank is in.
        origin: the rank of the group where it began; None if that is not known.
        origin_rank: the same as a global rank, which a rank of another group may be.
        origin_words: what became of that rank, as "has ended".
    """

    explained = False
    origin: int | None = None
    origin_rank: int | None = None
    origin_words = ""


class ExchangeError(RuntimeError):
    """A message was lost because its peer exited or the connection broke; names the peer, the step and the bucket.

    Attributes:
        explained: the text says which call each rank is in.
        origin: the rank of the group where it began; None if that is not known.
        origin_rank: the same as a global rank, which a rank of another group may be.
        origin_words: what became of that rank, as "has ended".
    """

    explained = False
    origin: int | None = None
    origin_rank: int | None = None
    origin_words = ""


class RankLeft(ExchangeError):
    """A rank ended its part with `opt.leave()`, so an exchange with it cannot be; names it and its last step.

    Attributes:
        ranks: the group ranks that have left, as far as they are known yet.
    """

    def __init__(self, text: str, ranks: tuple[int, ...]) -> None:
        super().__init__(text, ranks)
        self.ranks = ranks

    def __str__(self) -> str:
        return str(self.args[0])


class StoreLost(RuntimeError):
    """No store of an elastic run answers, and members are to change: training goes on, but nobody can leave or come."""


class Minority(RuntimeError):
    """This process is on the smaller side of a broken network, or is none of the members any more; the others train on.

    It is raised where it cannot come back by itself: it reaches no member, another process has its place, or it is in a call that
    the others have made without it. Its parameters and states are what they were. Restarted, it joins the others again.
    """


class StorageReplacedError(RuntimeError):
    """A parameter was given another shape, dtype or device than it had when the optimizer was built; names the parameter."""


class NonFiniteError(RuntimeError):
    """Values that are not finite, where leaving them out is no way on; names the rank that they come from.

    Compressed messages (`wire_dtype`) cannot carry them, and methods whose sums over ranks must be conserved have lost a part.
    """


class DivergedError(RuntimeError):
    """Ranks that average gradients no longer have the same parameters; names them."""


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint was not written, or is not one, or is damaged; names the file, and the rank that noticed it.

    It is raised on all ranks alike. After `save_checkpoint` the earlier checkpoints are as they were, after `load_checkpoint`
    model and optimizer are.
    """


class ForeignCheckpointWarning(UserWarning):
    """A `state_dict()` of another rank, number of ranks, topology or weights, or a part of one, was loaded; says which.

    Or a folder of checkpoints has some of another run.
    """


class NonFiniteWarning(UserWarning):
    """A rank's values were not finite, and others went on without them; names the rank."""


class MismatchWarning(UserWarning):
    """Ranks train with different numbers in their param groups, as learning rates; names group and entry, ranks and values."""


class TornMessageWarning(UserWarning):
    """A parameter was edited in place while its value was being sent; wrap such edits in `with opt.paused():`."""


def did_you_mean(given: object, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """ "; did you mean 'ring'?" if one of the known names resembles what was given, or is its alias; otherwise nothing."""
    if not isinstance(given, str):
        return ""
    word, by_case = given.lower(), {name.lower(): name for name in known}
    alias = (aliases or {}).get(word)
    begins = [name for name in by_case if len(word) > 2 and name.startswith(word)]
    close = [*begins, *difflib.get_close_matches(word, by_case, n=1, cutoff=0.6)]
    found = alias if alias in by_case.values() else by_case[close[0]] if close else None
    return f"; did you mean {found!r}?" if found is not None else ""
