"""The logger "fusedfog", and warnings that point to the user's own line.

As a library should, fusedfog prints nothing below a warning by itself: its lines go wherever the program's logging sends
them. `FUSEDFOG_LOG` (debug, info, warning, error, critical) sets the logger's level, and writes to stderr what no handler of
the program takes.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from fusedfog.errors import did_you_mean

log = logging.getLogger("fusedfog")

_LEVELS = ("debug", "info", "warning", "error", "critical")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes what no handler of the program takes: one that configures logging, now or later, sees no line twice."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("fusedfog: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        theirs = [*(logging.getLogger().handlers if log.propagate else ()), *log.handlers]
        if all(handler is self for handler in theirs):
            self.stream = sys.stderr
            super().emit(record)


def configure() -> None:
    """Follow FUSEDFOG_LOG, if it is set; called once, when fusedfog is imported.

    Warns:
        RuntimeWarning: it is no level.
    """
    given = os.environ.get("FUSEDFOG_LOG", "").strip()
    if not given:
        return
    if given.lower() not in _LEVELS:
        levels = ", ".join(_LEVELS)
        warn_user(f"FUSEDFOG_LOG is one of {levels}, and is {given!r}{did_you_mean(given, _LEVELS)}", RuntimeWarning)
        return
    log.setLevel(given.upper())
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())


def warn_user(text: str, category: type[Warning]) -> None:
    """`warnings.warn` at the line outside of fusedfog and torch that led here."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fusedfog", "torch"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, category, stacklevel=depth + 1)


configure()
