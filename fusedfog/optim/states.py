"""`opt.state`, which is the user's: what is cleared, removed or replaced there holds from the next step on, as in torch.optim.

The states live in flat tensors, and `opt.state[p]` shows windows of those. So that a step need not look for changes among
all of them, the dictionaries note that they were written to, and the optimizer that they were asked for; only then the next
step compares what is shown with what was (`take_edits`), copies replaced tensors into the flat ones, and shows these again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from fusedfog.engine.capture import recording
from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.compression import is_wire_state, own_states
from fusedfog.optim.state_dict import state_names
from fusedfog.params.flat import FlatSegment


class Notice:
    """Whether somebody may have changed states since they were compared last."""

    pending = True


def _noticed(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def write(self: StatesOfParameter | States, *args: Any, **kwargs: Any) -> Any:
        self.notice.pending = True
        return method(self, *args, **kwargs)

    write.__name__, write.__doc__ = name, f"As `dict.{name}`, noted."
    return write


class StatesOfParameter(dict[str, Any]):
    """What `opt.state[p]` is: a dict that notes when it is written to; copied and pickled as a plain dict."""

    notice = Notice()
    __setitem__, __delitem__, __ior__ = _noticed("__setitem__"), _noticed("__delitem__"), _noticed("__ior__")
    clear, pop, popitem = _noticed("clear"), _noticed("pop"), _noticed("popitem")
    setdefault, update = _noticed("setdefault"), _noticed("update")

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(defaultdict[Any, Any]):
    """What `opt.state` is: a `defaultdict(dict)` that notes when it, or a dict in it, is written to."""

    def __init__(self, default_factory: object = dict, given: Mapping[Any, Any] | None = None) -> None:
        super().__init__(dict)
        self.notice = Notice()
        for key, value in (given or {}).items():
            self[key] = value

    __delitem__, clear, pop, popitem = (_noticed(name) for name in ("__delitem__", "clear", "pop", "popitem"))

    def __missing__(self, key: Any) -> Any:
        self[key] = {}
        return self[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.notice.pending = True
        if isinstance(value, Mapping):
            value = StatesOfParameter(value)
            value.notice = self.notice
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`, noted."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> States:  # type: ignore[misc, override]
        self.update(other)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As `dict.setdefault`, noted."""
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _plainly, (dict(plain(self)),)

    def forget(self, names: set[str], params: Iterable[Any]) -> None:
        """Remove these parameters' states of these names, and leave what else the user has put there."""
        for param in params:
            shown = self.get(param)
            if isinstance(shown, dict):
                for name in names & shown.keys():
                    del shown[name]
                if not shown:
                    del self[param]

    def show(self, param: Tensor, views: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Add a parameter's states, which is no edit, in place of those that were shown before."""
        if not isinstance(self.get(param), StatesOfParameter):
            pending, self[param] = self.notice.pending, {}
            self.notice.pending = pending
        shown = self[param]
        for name in before.keys() - views.keys():
            if shown.get(name) is before[name]:
                dict.__delitem__(shown, name)
        dict.update(shown, views)


def plain(states: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """The same in torch's own types, for copies."""
    pairs = ((key, dict(value) if isinstance(value, dict) else value) for key, value in states.items())
    return defaultdict(dict, pairs)


def _plainly(states: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, states)


def show_states(engine: Scheduler, states: States) -> None:
    """Add the states of parameters that have had their first gradient, as torch.optim does."""
    for segment in engine.segments:
        names = state_names(engine, segment)
        for position, param in segment.unshown(names):
            _show(engine, segment, position, param, names, states)


def _show(
    engine: Scheduler, segment: FlatSegment, position: int, param: Tensor, names: tuple[str, ...], states: States
) -> None:
    views = {name: segment.state_view(name, position) for name in names}
    if _counts(engine, names):
        views = {"step": segment.step_of(position), **views}
    if views or segment.sharded:  # or get_optimizer_state_dict makes a step to have some
        states.show(param, views, segment.views[position])
        segment.views[position] = views
        segment.view_versions[position] = _versions(engine, views)


def _counts(engine: Scheduler, names: tuple[str, ...]) -> bool:
    """Whether a parameter's count of updates is one of the states that are shown."""
    return "exp_avg" in names or not engine.algorithm.plain


def _versions(engine: Scheduler, views: Mapping[str, Tensor]) -> int:
    """Sum of the version counters of those that are sent; passes do not count there, edits in place do."""
    return sum(views[name]._version for name in _sent(engine) if name in views)


def _sent(engine: Scheduler) -> set[str]:
    return set(engine.algorithm.messages) - {"param", "message"}


def take_edits(kind: str, engine: Scheduler, states: States) -> None:
    """Have the flat states be what `states` shows: fresh for what was removed, the values of what was replaced.

    What 16-bit parameters lack of their values, and what neighbours know of them, is no moment: removing it changes nothing.

    Raises:
        ValueError: a state was replaced by a tensor of another shape, or what neighbours know of this rank was.
        RuntimeError: a state that is being sent to neighbours was changed; or one of any kind inside a CUDA graph's capture.
    """
    if not states.notice.pending:
        return
    edits = list(_edits(engine, states))
    for segment, position, _, changed in edits:
        _check_edit(kind, engine, segment, position, changed)
    for segment, position, names, changed in edits:
        _adopt_edit(engine, segment, position, names, changed)
        if segment.touched[position]:
            _show(engine, segment, position, segment.owners[position], names, states)
    if not recording():
        for segment in engine.segments:
            segment.level_steps()
    states.notice.pending = False


Edit = tuple[FlatSegment, int, tuple[str, ...], dict[str, Any]]
"""Of the parameter at a position of a segment with these states: new values by name, None for those that are gone."""


def _edits(engine: Scheduler, states: States) -> Iterator[Edit]:
    for segment in engine.segments:
        names = state_names(engine, segment)
        all_names = ("step", *names) if _counts(engine, names) else names
        for position, param, views in zip(count(), segment.owners, segment.views):
            entry = states.get(param)
            found: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
            changed = {name: found.get(name) for name in views or all_names if found.get(name) is not views.get(name)}
            moved = [name for name in views if name not in changed and not segment.shows(name, position, views)]
            # What neighbours know lies elsewhere when it begins anew, and is only shown anew.
            changed |= {name: views[name] for name in moved if not is_wire_state(name)}
            if views and _versions(engine, views) != segment.view_versions[position]:
                changed |= {name: views[name] for name in _sent(engine) & views.keys() if name not in changed}
            if changed or moved:
                yield segment, position, names, changed


def _check_edit(kind: str, engine: Scheduler, segment: FlatSegment, position: int, changed: dict[str, Any]) -> None:
    name = segment.layout.slots[position].spec.name
    where = f"rank {engine.rank}: {kind}: opt.state of parameter {name}"
    for state, value in changed.items():
        if value is not None and is_wire_state(state):
            raise ValueError(f"{where}: {state} is what neighbours know of this rank, which only messages change")
        shape = segment.owners[position].shape
        if isinstance(value, Tensor) and value.shape != shape and not (state == "step" and value.numel() == 1):
            raise ValueError(
                f"{where}: {state} was replaced by a tensor of shape {tuple(value.shape)}, not {tuple(shape)}"
            )
        if not isinstance(value, Tensor) and value is not None and state != "step":
            raise ValueError(f"{where}: {state} was replaced by {type(value).__name__}, not by a tensor")
    if recording():
        raise RuntimeError(f"{where} was changed: make an eager step() before the next capture")
    in_flight = any(bucket.transfer is not None for bucket in engine.buckets.all if bucket.segment is segment)
    if in_flight and _sent(engine) & changed.keys():
        raise RuntimeError(
            f"{where}: {', '.join(sorted(_sent(engine) & changed.keys()))} was changed while it is being sent, which would "
            f"break the sum over ranks that {engine.algorithm.name} keeps: change it inside `with opt.paused():`, on all ranks"
        )


def _adopt_edit(
    engine: Scheduler, segment: FlatSegment, position: int, names: tuple[str, ...], changed: dict[str, Any]
) -> None:
    views = segment.views[position]
    kept = {*own_states(segment, engine.channels), "outer_param"}
    for name, value in changed.items():
        if name == "step" or (value is None and name in kept):
            continue
        segment.write_state(name, position, value)
    present = [name for name in names if name not in kept and changed.get(name, views.get(name)) is not None]
    if "step" in changed or not present:
        # torch's SGD stores no count; what matters is whether its momentum buffer has begun.
        given = changed.get("step")
        segment.set_step(
            position, float(given) if given is not None else 1.0 if present and "step" not in views else 0.0
        )
    elif "step" not in views and any(changed.get(name) is not None for name in present):
        segment.set_step(position, max(float(segment.step_of(position)), 1.0))
    begun = bool(present) or changed.get("step") is not None
    segment.touched[position] = begun or bool(kept & set(names)) or segment.keeps_touched(position)
    if not segment.touched[position]:
        segment.forget_shown(position)
