"""`monitor`: figures of a run from all ranks, without a collective and without waiting in a step.

A step hook takes a sample every so many steps: totals that `stats()` knows anyway. A thread does the rest. On rank 0 it writes
records to their sinks, on other ranks it leaves them in the store for rank 0 (`relay`).
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedfog.comm.group import GroupView
from fusedfog.kernels import device
from fusedfog.log import log
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.watch import debug
from fusedfog.watch.records import Record, graph_record, plain, rank_record, stamped
from fusedfog.watch.relay import Relay
from fusedfog.watch.server import Server
from fusedfog.watch.sinks import Function, Sink, check, sink_for

_STEPS, _APART = 10, 0.25
"""Steps between samples where the user names none, and the seconds that at least lie between them: a sample costs 3 ms of CPU,
mostly of the thread, which is 0.3 ms a step where a step takes 1.6."""
_GLANCE = 0.25
"""Seconds between rank 0's looks for the others' records."""
_LAST_WORDS = 3.0
"""Seconds that rank 0 waits at the end for those of the others that have not ended."""


def monitor(optimizer: DecentralizedOptimizer, *targets: Any, every: int | None = None, port: int | None = None) -> Monitor:
    """Record how training goes, on all ranks, until the returned context is left or closed.

        with fusedfog.monitor(opt, "run.jsonl") as run:
            for batch in data:
                loss = model(batch); loss.backward()
                run.log(loss=loss)
                opt.step(); opt.zero_grad()

    Every rank calls it, and rank 0 writes for all. It is not collective: no rank waits for another, and a step does not wait
    for the file. `fusedfog watch run.jsonl` shows the file in a browser, while training goes on or afterwards.

    Args:
        optimizer: any of fusedfog's. With `measure=True`, its disagreement with the neighbours and gradient norms are recorded.
        targets: where rank 0 writes: the path of a file of JSON lines (`watch.records` says what is in it; a file that exists
            is appended to), a `torch.utils.tensorboard.SummaryWriter`, a run of W&B, or a function that is called with each
            record, a dictionary, in a thread. Other ranks may give None for what only rank 0 has.
        every: steps between samples. None for ten, or for as many as take a quarter of a second where steps are short, so that
            the cost is about a hundredth at most, and for one more sample at the end.
        port: rank 0 serves the live page there, to this machine only; 0 takes any free one (`Monitor.port`).

    Raises:
        ValueError: every is no positive number of steps.
        TypeError: a target is nothing to write to.
        OSError: on rank 0, the file cannot be written, or the port is taken.
    """
    return Monitor(optimizer, targets, every, port)


class Monitor:
    """A run that is being watched; made by `monitor`.

    Attributes:
        port: where rank 0 serves the live page; None where it does not.
    """

    def __init__(
        self, optimizer: DecentralizedOptimizer, targets: tuple[Any, ...], every: int | None, port: int | None
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every= is a positive number of steps between samples, and is {every!r}")
        engine = optimizer._engine
        view = engine.communicator.view if engine.communicator is not None else GroupView(0, 1, None)
        for target in targets:
            if target is not None or view.rank == 0:
                check(target)
        self._optimizer, self._rank, self._size = optimizer, view.rank, view.size
        self._every, self._apart = (_STEPS, _APART) if every is None else (every, 0.0)
        self._sinks: list[Sink] = [sink_for(target) for target in targets] if self._rank == 0 else []
        self._server = Server.live(port) if port is not None and self._rank == 0 else None
        self.port = self._server.port if self._server is not None else None
        if self._server is not None:
            self._sinks.append(Function(self._server.add))
        self._relay = Relay(view) if view.size > 1 else None
        self._values: dict[str, Any] = {}
        self._topology: Any = self  # None is one of the answers.
        self._last = (time.perf_counter(), engine.clock.steps)
        self._due = 0.0
        self._pending: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._ended: set[int] = set()
        self._begin()
        self._hook: RemovableHandle | None = optimizer.register_step_post_hook(self._after_step)
        self._thread = threading.Thread(target=self._work, daemon=True, name="fusedfog-monitor")
        self._thread.start()
        debug.show(self._rank, optimizer)
        atexit.register(self.close)

    def _begin(self) -> None:
        if self._rank == 0:
            from fusedfog import __version__

            self._pending.put(stamped("run", 0, ranks=self._size, version=__version__))
        self._look_at_graph()

    # -- in the training thread --------------------------------------------------------------------------------------

    def log(self, **values: float | Tensor) -> None:
        """Figures of this rank for the next sample, such as `loss=loss`; call it before `step()`.

        Tensors of one element are not waited for here.

        Raises:
            TypeError: a value is no number.
        """
        for name, value in values.items():
            one = isinstance(value, Tensor) and value.numel() == 1
            if not one and not isinstance(value, (int, float)):
                raise TypeError(f"log() takes numbers and tensors of one element, and {name} is {value!r}")
        self._values.update(values)

    def _after_step(self, *_: Any) -> None:
        engine = self._optimizer._engine
        steps = engine.clock.steps
        before = self._last[1]
        if steps - before < self._every:
            if steps < before:  # A checkpoint was loaded.
                self._last = (time.perf_counter(), steps)
            return
        now = time.perf_counter()
        if now >= self._due:
            self._sample(now, steps)

    def _sample(self, now: float, steps: int) -> None:
        engine, (begin, before) = self._optimizer._engine, self._last
        self._look_at_graph()
        values = {name: one.detach().clone() if isinstance(one, Tensor) else one for name, one in self._values.items()}
        sample = stamped(
            "sample", self._rank, step=steps, exchange=engine.clock.exchanges, step_s=(now - begin) / (steps - before)
        )
        # Norms that are on a GPU are waited for in the thread.
        stats = None if device.on_gpu(engine.place) else self._optimizer.stats()
        waited_for = dict(engine.stats.waited_for)
        self._pending.put({**sample, "values": values, "stats": stats, "waited_for": waited_for})
        self._last, self._due = (now, steps), now + self._apart

    def _look_at_graph(self) -> None:
        topology = self._optimizer._engine.exchanges.topology
        if topology is not self._topology:
            self._topology = topology
            self._pending.put(rank_record(self._rank, self._optimizer._engine))
            if self._rank == 0:
                self._pending.put(graph_record(self._rank, self._optimizer, topology))

    def close(self, how: str = "finished") -> None:
        """Take no more samples, and write what there is. Local: rank 0 gives the others a few seconds for their last words."""
        atexit.unregister(self.close)
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        steps = self._optimizer._engine.clock.steps
        if self._apart and how == "finished" and steps > self._last[1]:
            self._sample(time.perf_counter(), steps)
        debug.hide(self._rank)
        self._pending.put(stamped("end", self._rank, how=how))
        self._pending.put(None)
        self._thread.join(2 * _LAST_WORDS)
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else f"{type(error).__name__}: {error}")

    # -- in its own thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        more = True
        while more:
            try:
                record = self._pending.get(timeout=_GLANCE if self._rank == 0 else None)
            except queue.Empty:
                record = {}
            more = record is not None
            if record:
                self._hand_on(record)
            if self._rank == 0:
                self._collect()
        deadline = time.monotonic() + _LAST_WORDS
        while self._relay is not None and self._rank == 0 and len(self._ended) < self._size - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(_GLANCE / 5)
            self._collect()
        for sink in self._sinks:
            sink.close()

    def _hand_on(self, record: Record) -> None:
        if record["kind"] == "sample" and record["stats"] is None:
            record["stats"] = self._optimizer.stats()
        record = plain(record)
        if self._rank == 0:
            self._write(record)
        elif self._relay is not None:
            try:
                self._relay.send(record)
            except RuntimeError as error:
                self._lose(error)

    def _collect(self) -> None:
        if self._relay is None:
            return
        try:
            for record in self._relay.receive():
                if record["kind"] == "end":
                    self._ended.add(record["rank"])
                self._write(record)
        except RuntimeError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        # Training goes on without being watched: the store may have gone with its host.
        self._relay = None
        log.warning("rank %d: monitor: no more records from other ranks, as the store is lost: %s", self._rank, error)

    def _write(self, record: Record) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._sinks.remove(sink)
                log.warning("monitor: nothing more is written to %s: %s", type(sink).__name__, error)
