"""The store of the default process group, over a connection that is this package's own.

It stands below all that ranks tell each other through the store. torch's own client serves one call at a time: a thread that
waits in it for a rank that has died, as in the making of a group, keeps all others from it until the timeout. Nothing waits in
this one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.distributed as dist


class _Own:
    group: ClassVar[dist.ProcessGroup | None] = None
    store: ClassVar[Any] = None


def own_store() -> Any:
    """The default group's store; the same one until there is another default group."""
    group = dist.distributed_c10d._get_default_group()
    if _Own.group is not group:
        store: Any = dist.distributed_c10d._get_default_store()
        try:
            _Own.store = store.clone()
        except NotImplementedError:  # Stores of others' making.
            _Own.store = store
        _Own.group = group
    return _Own.store


def keep_store(store: Any) -> None:
    """Have `own_store` be this one, as long as there is the current default group.

    For epochs of an elastic run, which keep a connection: torch's server looks up the name of whoever connects, and answers
    nobody meanwhile.
    """
    _Own.group, _Own.store = dist.distributed_c10d._get_default_group(), store
