"""A running optimizer's figures in torch's debug server, where torch has one: handler "fusedfog" of each rank's worker server.

`torch.distributed.debug.start_debug_server()` starts the server; its ranks answer `/handler/fusedfog` with JSON.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from typing import Any

from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.watch.records import plain

try:
    from torch._C._distributed_c10d import _register_handler
except ImportError:  # torch was built without it.
    _register_handler = None  # type: ignore[assignment]

_shown: weakref.WeakValueDictionary[int, DecentralizedOptimizer] = weakref.WeakValueDictionary()
_registered: list[bool] = []


def show(rank: int, optimizer: DecentralizedOptimizer) -> None:
    """Answer for this optimizer from now on."""
    _shown[rank] = optimizer
    if _register_handler is not None and not _registered:
        # There is no way to take a handler back, so it is registered once and looks up what there is. torch lets go of it after
        # Python has ended; as the last reference that aborts the process (torch 2.13), so one is never given back.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_answer))
        _register_handler("fusedfog", _answer)
        _registered.append(True)


def hide(rank: int) -> None:
    """Answer for it no longer."""
    _shown.pop(rank, None)


def figures() -> dict[str, Any]:
    """Of each optimizer of this process that is being watched, by rank."""
    return {str(rank): plain({"optimizer": repr(one).splitlines()[0], **one.stats()}) for rank, one in _shown.items()}


def _answer(request: Any, response: Any) -> None:
    response.set_content(json.dumps(figures()), "application/json")
    response.set_status(200)
