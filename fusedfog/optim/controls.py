"""What a running decentralized optimizer offers beside torch.optim: averages, pauses, figures, another topology."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from fusedfog.comm.calls import Call
from fusedfog.comm.elastic.again import together
from fusedfog.comm.registry import leave
from fusedfog.engine.async_gossip import finish, of_windows, settle
from fusedfog.engine.capture import CapturableScheduler
from fusedfog.engine.gradient_scale import measured_norms
from fusedfog.engine.rhythm import Rhythm
from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim.averaged import averaged, distance_of
from fusedfog.optim.calls import announced, ranks_of
from fusedfog.optim.description import brief, graph_of, without_clock
from fusedfog.optim.export import save_averaged
from fusedfog.optim.members import of_members
from fusedfog.optim.options import Keywords
from fusedfog.optim.swapped import Values, pairs_of, swapped
from fusedfog.optim.switching import change_topology, switch, switched
from fusedfog.optim.uneven import UnevenSteps
from fusedfog.params.owners import Claim
from fusedfog.topology import Topology


class Controls(UnevenSteps):
    """The decentralized methods of `DecentralizedOptimizer`; not built by itself."""

    _family: str
    _claim: Claim | None
    _released: str | None = None
    _rank_steps: tuple[int, ...] | list[int] = ()

    @property
    def _kind(self) -> str:
        """What ranks must agree on, and errors call it."""
        return type(self).__name__

    @abstractmethod
    def _show_states(self) -> None:
        """Let `self.state[p]` show the states of every parameter that has had a gradient."""

    def __repr__(self) -> str:
        # As it is: a copied or unpickled optimizer builds its scheduler together with the other ranks.
        engine: Scheduler | None = getattr(self, "_scheduler", None)
        _, _, groups = super().__repr__().partition("(")
        return brief(self._kind, engine, self._options) + without_clock(groups)

    def averaged(self, model: torch.nn.Module | None = None) -> AbstractContextManager[None]:
        """Inside, parameters are the average over all ranks; afterwards they are exactly what they were. Collective.

        Args:
            model: its floating-point buffers are averaged and restored too; None takes the optimizer's own `model`.
        """
        return averaged(self._engine, self._options, model)

    @announced("save_averaged()")
    def save_averaged(self, path: str | Path, model: torch.nn.Module | None = None) -> None:
        """Write the `state_dict()` of the average model over all ranks into one file. Collective; changes nothing.

        Parameters and floating-point buffers are averages, as in `averaged`; integer buffers, and what this optimizer does
        not mix, are rank 0's. Rank 0 writes, into another file first that is renamed when it is whole, so that a file of
        this name is always complete. `torch.load(path, weights_only=True)` reads it, on any device.

        Args:
            path: of the file; its folder exists.
            model: the one whose parameters this optimizer trains, bare or in DistributedDataParallel or `torch.compile`, of
                which the bare one's names are written; None takes the optimizer's own `model`.

        Raises:
            ValueError: the model has not this optimizer's parameters, or there is none. Nothing has been sent.
            OSError: on rank 0, the file could not be written. RuntimeError on the other ranks then.
        """
        save_averaged(self._kind, self._engine, self._options, Path(path), model)

    @announced("consensus_distance()")
    def consensus_distance(self) -> float:
        """Root mean square over ranks of ||x_i - mean||, over all mixed parameters, measured now. Collective."""
        return distance_of(self._engine, self._options)

    @property
    def steps(self) -> int:
        """How many steps were made, those before the checkpoint that was loaded included: what an elastic run goes by.

        There, data, schedules and the end of training are functions of it: a member that was behind comes out of a change of
        members with the clock of the one ahead, and a newcomer begins with that of the others. (Asynchronous members keep their
        own, and a newcomer begins with that of the member whose state it got.) A program whose clock has moved
        in this way, and that makes 100 steps without having read this since its first one, is warned once (RuntimeWarning).
        """
        engine = self._engine
        if engine.members is not None:
            engine.members.clock_is_read()
        return engine.clock.steps

    def stats(self) -> dict[str, Any]:
        """Running totals of this rank since construction. Local, no synchronization.

        topology, and topology_reason: "given", or "auto: " and why; both empty where nothing goes to neighbours.
        With `adapt`, intervals: for each round of the topology, in every how many periods it is used.
        steps, exchanges; bytes_sent, bytes_received (an all-reduce counts as the ring's 2 (n-1)/n buffers); bytes_across,
        the part of bytes_sent that left for other machines of a mesh; blocked_s, the seconds the host waited for messages;
        torn_messages, buckets edited by the user while they were being sent (as version counters tell, and a sample of the
        parameters that `.data` and numpy write unseen; GPUs tell the latter some steps later); refused, the neighbours'
        messages of which something was not finite and was left out (with mesh= and global averages: contributions to
        averages), and once there are some refused_from, {rank: how many}; healed, how often this rank's own values were
        replaced (`nonfinite="heal"`). On a GPU these begin to count some steps after the first such message. With ranks of
        different `weight`, share: this rank's over the sum of all.

        In an elastic run also epoch, the number of the period that this is; members, by rank, each "slot.incarnation"; reforms
        and reform_s, how many changes of members this process has lived through, and the seconds that it waited in them.

        With `measure=True` also, for the last step (this waits for the device): gradient_norm, of this rank's gradient as it
        was used, after unscaling, clipping and `weight`, not finite if a gradient is not; disagreement, ||(W X)_i - x_i|| over
        all mixed parameters, how far the neighbours pull this rank, 0 without an exchange. Both of this rank's shards alone.

        Of an asynchronous optimizer also neighbor_exchanges, {in-neighbour: the newest exchange that has come from it}; with
        push_sum mass, what this rank holds of it (the mean over segments); and after `finish` rank_steps, how many steps each
        rank had made (-1 of one that died), and total_steps.
        """
        engine = self._engine
        halves, weights = engine.algorithm.before is not None, engine.phases.last.weights
        measured = measured_norms(engine.segments, halves) if engine.schedule.measure else {}
        return {
            "topology": graph_of(engine),
            "topology_reason": engine.phases.last.reason if engine.communicator is not None else "",
            "steps": engine.clock.steps,
            "exchanges": engine.clock.exchanges,
            **({} if engine.adaptation is None else {"intervals": engine.adaptation.intervals}),
            **({} if weights is None else {"share": weights[engine.rank] / sum(weights)}),
            **engine.stats.plain(),
            **measured,
            **of_windows(engine),
            **of_members(engine),
            **({"rank_steps": self._rank_steps, "total_steps": sum(self._rank_steps)} if self._rank_steps else {}),
        }

    @announced("drain()")
    def drain(self) -> None:
        """Wait for all messages in flight; what arrived is kept for the next step. Local.

        Of an asynchronous optimizer it is collective: all that was sent arrives, and push-sum's deposits are taken in, so that
        the ranks' masses sum to their number.

        Raises:
            PeerTimeout, ExchangeError: a message did not come or could not be delivered.
        """
        self._engine.drain()
        settle(self._engine, "drain()")

    @announced("finish()")
    def finish(self) -> None:
        """End a rank's part in asynchronous training: it has no more data. Returns once all ranks have called this. Collective.

        Until then this rank goes on mixing, without updates, so that the others do not average with values that stand still.
        Afterwards everything has arrived, `stats()` has `rank_steps`, and training may go on. A rank that has died is not
        waited for, as far as a neighbour of it is alive. In an elastic run it serves on while members come and go.
        `with opt.uneven():` calls it on leaving.

        Raises:
            ValueError: the optimizer is not asynchronous.
        """
        engine = self._engine
        if not self._options.asynchronous:
            raise ValueError(f"{self._kind}.finish: only asynchronous optimizers finish; see uneven() for uneven data")
        if engine.communicator is None:
            return
        self._rank_steps = finish(engine, self._mix_only)
        if -1 not in self._rank_steps:
            together(engine.discard)

    def leave(self) -> None:
        """End this rank's part in training: it makes no further step, and the others are told. Local; at most 5 seconds.

        What it has sent is delivered, and used by the neighbours' next step. Whoever needs more of it raises `RankLeft` at
        once instead of waiting for the timeout, and then in turn those who wait for that rank. All ranks may leave, in any
        order. Afterwards `state_dict()` works and `step()` raises RuntimeError; whatever else exchanges among the same
        ranks has ended too. On NCCL the others see it, within seconds, when they next call `step()`; a stream that waits
        already is only freed by torch's own timeout, and the log says who left.

        Ranks stop at different steps, so those that go on together without the clock of the saved state:

            except fusedfog.RankLeft as left:
                rest = [rank for rank in range(n) if rank not in left.ranks]
                group = fusedfog.new_group(rest)
                saved = opt.state_dict(); del saved["fusedfog"]
                opt = fusedfog.AdamW(model.parameters(), group=group, sync_init=False, ...); opt.load_state_dict(saved)
        """
        engine = self._engine
        if engine.members is not None:
            engine.members.leave()
        if engine.communicator is not None:
            if engine.exchanges.windows is not None:
                engine.exchanges.windows.close()
            leave(engine.communicator, engine.clock.steps)
            engine.discard()

    @property
    def ended(self) -> bool:
        """Whether this optimizer can make no more steps: it was released, or the ranks it exchanges with have left."""
        communicator = self._scheduler.communicator if self._scheduler is not None else None
        return self._released is not None or (communicator is not None and communicator.ended is not None)

    def release(self) -> None:
        """Let go of all parameters, so that another optimizer may train them. Local; waits for messages in flight.

        They keep their values and get ordinary storages of their own; hooks are removed. Afterwards `state` and `state_dict()`
        work, and whatever else needs the parameters, `step()` first of all, raises RuntimeError. All ranks release theirs, or
        the others wait for messages that do not come.
        """
        if self._released is not None:
            return
        self._released = (
            f"this {self._kind} was released and trains no parameters any more: step with the optimizer that was built "
            f"after it"
        )
        if self._scheduler is not None and self._claim is not None:
            if self._scheduler.exchanges.windows is not None:
                self._scheduler.exchanges.windows.close()
            self._scheduler.discard()
            self._scheduler.hooks.detach()
            self._claim.drop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is in flight and parameters may be edited freely. Collective; discards messages.

        The next step starts its own exchange, with the edited values, and waits for it.
        """
        engine = self._engine
        with Call("paused()", ranks_of(engine)):
            engine.meet("paused()")
            engine.discard()
        with engine.block_steps("paused()"):
            yield

    def swapped(self, values: Values) -> AbstractContextManager[None]:
        """Inside, the parameters have other values, an EMA's say; afterwards they are what they were, to the last bit. Local.

            with opt.swapped(ema.shadow_params), torch.no_grad():
                evaluate(model)

        Messages are not disturbed, and nothing is torn; they are waited for on entry. `step()` inside raises. Changes made
        to the parameters inside are lost.

        Args:
            values: tensors in the order of the parameters in `param_groups`, frozen ones too; or a mapping from some of these
                parameters to tensors; or a module such as `torch.optim.swa_utils.AveragedModel`, whose parameters are taken by
                name where this optimizer knows names (`model=`, or it was given `named_parameters()`) and else in order. With
                `model=`, an AveragedModel that was built with `use_buffers=True` gives its buffers too.

        Raises (at the call, before anything changes):
            ValueError: a wrong number of values, unknown parameters, another shape or dtype, or DTensors sharded otherwise.
            TypeError: they are no tensors.
        """
        engine = self._engine
        return swapped(engine, pairs_of(self._kind, engine, self._options, values))

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around each replay of a CUDA graph in which a `step()` was captured; needs `capturable=True`.

            side = torch.cuda.Stream()                                   # a few eager steps first
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    opt.zero_grad(); loss_of(static_input).backward(); opt.step()
            torch.cuda.current_stream().wait_stream(side)
            opt.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss = loss_of(static_input); loss.backward(); opt.step()       # recorded, not made: this is no step
            for batch in data:
                static_input.copy_(batch)
                with opt.replaying():
                    graph.replay()
                schedule.step()

        On entry the current stream waits for the neighbours' messages, and this step's learning rate, mixing weights and
        seeds are written to the device; on exit the new parameters are sent and the clock ticks. So a replay equals an eager
        `step()`, and the two may alternate. `replaying` is collective in effect, as `step` is. To keep in mind:

        - One `step()` a capture, one replay a block, on the stream that is current on entry. Ranks need not replay at the same
          steps, nor all of them capture.
        - Gradients are read where they were at the capture. Those that the captured backward made belong to the graph: set
          them to None before the capture. If backward is not captured, keep them where they are
          (`zero_grad(set_to_none=False)`).
        - What else `step()` sees is as it was at the capture: which parameters have gradients; clipping by `max_grad_norm`; a
          GradScaler, whose step and update belong inside the capture (and into the eager steps before it), where its flag and
          scale have fixed addresses. Step hooks and closures run at the capture alone.
        - After `add_param_group`, other momentum or amsgrad switches, or a `set_topology` to rounds of more neighbours than
          ever, make an eager step and capture again. Loading a checkpoint keeps graphs valid.

        Raises:
            RuntimeError: built without `capturable=True`, nothing was captured, or what was is out of date.
            PeerTimeout, ExchangeError, RankLeft, StorageReplacedError: as `step`.
        """
        engine = self._engine
        if not isinstance(engine, CapturableScheduler):
            raise RuntimeError("replaying() needs an optimizer that was built with capturable=True")
        with Call("step()", ranks_of(engine), engine.clock.steps):
            self._announce_step(engine)
            with engine.replaying():
                yield
        self._show_states()

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients: a backward inside leaves them in `p.grad`; use for all but the last of a step.

        For `fused_backward`, and where backward averages gradients over ranks (`data_parallel_steps`, `algorithm="allreduce"`).
        """
        return self._engine.accumulate()

    @announced("switch()")
    def switch(
        self,
        *,
        algorithm: str | None = None,
        topology: Topology | str | None = None,
        communicate_every: Rhythm | None = None,
        weight: float | torch.Tensor | None = None,
    ) -> None:
        """Go on with another algorithm, topology, rhythm or weight from the next step on. Collective, discards messages.

            opt = fusedfog.AdamW(model.parameters(), algorithm="allreduce")
            ...                                          # a fast phase as DistributedDataParallel makes it
            opt.switch(algorithm="awc")                  # what data_parallel_steps=N does before step N
            ...
            opt.switch(algorithm="allreduce")            # from the mean of all ranks' parameters and states on

        Parameters, torch.optim's states and the clock go on. What only the old algorithm kept (trackers, duals) ends, and what
        only the new one keeps begins with zero, but after data-parallel steps momentum goes on, and second moments are
        scaled as `data_parallel_steps` says. Into "allreduce", parameters and states become their means over all ranks. Of
        `data_parallel_steps` none are left. Buckets remain as they were cut at construction, 256 MB for awc and kin by
        default: give a smaller one there, as `bucket_mb=1`, if atc is to follow.

        Args:
            algorithm, topology, communicate_every: as at construction; what is left out stays. A topology that was left out at
                construction too is the new algorithm's default.
            weight: this rank's, where all ranks have one; other ranks may keep theirs.

        Raises:
            ValueError: as at construction; or the optimizer was built with algorithm="local", which knows no other rank.
            MismatchError: ranks were given different things; nothing has changed then.
        """
        if self._options.asynchronous:
            raise ValueError(f"{self._kind}.switch: an asynchronous optimizer stays what it is: build another one")
        given = {"algorithm": algorithm, "topology": topology, "communicate_every": communicate_every, "weight": weight}
        changes = cast(Keywords, {name: value for name, value in given.items() if value is not None})
        options = switched(self._options, changes)
        switch(self._kind, self._family, self._engine, options)
        self._options = options
        self._show_states()

    @announced("set_topology()")
    def set_topology(self, topology: Topology | str | None) -> None:
        """Use another topology from the next step on. Collective, discards messages in flight.

        One that is given is between ranks, with `mesh` between machines. Machines that "auto" has made nodes are so no longer
        then; with "auto" or None the nodes stay what they are, and have the default graph.

        Raises:
            ValueError: as at construction.
            MismatchError: ranks were given different topologies; the old one stays.
        """
        options = dataclasses.replace(self._options, topology=topology)
        change_topology(self._kind, self._family, self._engine, options)
        self._options = options
