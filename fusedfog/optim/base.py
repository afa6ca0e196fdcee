"""What all optimizers share: torch.optim's methods, and the decentralized ones, over one `Scheduler`.

A `DecentralizedOptimizer` is a `torch.optim.Optimizer` with torch's param groups, hooks and checkpoint format. Its parameters
become views of flat buffers; `step()` makes the local update and the averaging with neighbours in one pass, and the
messages travel under the next forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias
from weakref import WeakMethod

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedfog.comm.calls import Call
from fusedfog.engine.capture import CapturableScheduler, recording
from fusedfog.engine.scheduler import Scheduler
from fusedfog.optim import build as construction
from fusedfog.optim import ddp as data_parallel
from fusedfog.optim import parameters
from fusedfog.optim.arguments import check_group_parameters, given_parameters, warn_of_unknown_keys
from fusedfog.optim.calls import announced, ranks_of
from fusedfog.optim.controls import Controls
from fusedfog.optim.description import announce
from fusedfog.optim.lazy_states import make_states, wants_states_only
from fusedfog.optim.options import Options
from fusedfog.optim.recovery import build_scheduler
from fusedfog.optim.state_dict import (
    carry_clock,
    clone_state,
    load_states,
    load_states_of,
    loaded_clock,
    make_room_for_clock,
    original_states,
    saved_clock,
    state_names,
)
from fusedfog.optim.states import States, plain, show_states, take_edits
from fusedfog.params.owners import Claim

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class DecentralizedOptimizer(Controls):
    """What `SGD`, `Adam` and `AdamW` share; not built by itself.

    Keyword arguments of every optimizer, beside torch's own:
        topology: a `Topology`, a name sized to the group ("exponential", "ring", ...), or "auto" (None means the same). Auto's
            nodes are machines, as with `mesh`, where several have as many ranks each, and else ranks (`optim.automatic`). Its
            graph is one-peer exponential for a power of two of nodes, base_graph for others, and symmetric exponential for
            methods that need a static one and for dag.
        algorithm: "awc" (adapt while combining, X+ = W X + (inner(X) - X); the messages overlap the whole iteration),
            "atc" (adapt then combine, X+ = W inner(X)), "allreduce" (backward averages gradients, as DistributedDataParallel),
            "local", or one of the methods in `fusedfog.algorithms`.
        group: process group; None is the default one. Ranks in topologies are group ranks.
        mesh: machines as nodes, on a 2-D DeviceMesh over the whole group: dim 0 across machines along `topology` (of as many
            nodes), dim 1 the ranks inside, or the shards of FSDP2 parameters (`fusedfog.params.shards`).
        inside: what the ranks of a machine average. "gradients": a machine is data-parallel and has one model; backward leaves
            the machine's mean in `.grad`, every rank makes the same step, and exchanges its share of the model across
            machines. Looked at every 64 steps: a rank whose parameters are no longer its machine's raises `DivergedError`.
            "parameters": W_machine (x) J_local as in BlueFog; each rank steps by its own gradient.
        mix_strength: s from 0 to 1: every exchange, of whatever kind, mixes with W_t = I + s (W - I). A number, or a function of
            the step that mixes (from 0), or of that and the rate, lr over the largest lr so far of the first mixed param group:
            `lambda step, rate: rate` keeps ranks apart while lr falls (DSGD-AC, Wang and Johansson 2026).
        communicate_every: exchange in steps with (t + 1) % communicate_every == 0, or in those of which a function, the same
            on all ranks, says so: `lambda step: step < 1000 or step % 4 == 3`.
        global_average_every: average over all ranks, not neighbours, in steps with (t + 1) % global_average_every == 0
            (Gossip-PGA, Chen et al. 2021).
        outer: an `Outer` optimizer over local steps (DiLoCo, NoLoCo); needs algorithm="local".
        fused_backward: update each bucket inside backward as soon as its gradients are there, and free them.
        bucket_mb: size of the largest exchanged bucket in MB (2^20 bytes). The default is 256 instead of 25 where a step has
            nothing to do between one bucket and the next: awc and kin without `fused_backward` and `mesh`. Others have graded
            ones, from 0.5 MB to `bucket_mb` or a 16th of the model and back: the first leaves early, the last takes little time.
        wire_dtype: send "bf16", "fp8" (e4m3) or "int8" messages (or the torch dtypes): 2 or 1.06 bytes an element. What is sent
            are differences from replicas, so that nothing is lost but delayed and the limit is that of exact messages (CHOCO,
            Koloskova et al. 2019; see `kernels.wire`). Takes 8 bytes an element more for every round of the topology's
            period, 4 for checkpoints of awc and kin, and reads and writes 16; the default topology then is the symmetric
            exponential graph, of one round. "exact": as they are, also where auto would choose int8 by `links`.
        low_precision: how bf16 and fp16 parameters keep what they cannot hold: "master" (an fp32 copy: training is fp32's),
            "kahan" (a compensation of 16 bits) or "stochastic" (random rounding, right on average). Bytes an element and step,
            AdamW, K neighbours: 30+2K, 26+2K, 22+2K; None rounds to nearest, and loses updates below half of bf16's spacing.
        state_dtype: torch.float32, or torch.bfloat16 for moments of half the size, rounded stochastically.
        max_grad_norm: clip this rank's gradient over all its parameters, as `clip_grad_norm_`; no communication, but one
            all-reduce of one number among the ranks of a machine that share a replica (FSDP2).
        nonfinite: what becomes of values that are not finite. "contain": a neighbour's counts as this rank's own, so that they
            stay where they arise; `stats()` tells from whom, and a warning names the rank once. "skip": a step whose own
            gradients are not finite also makes no update, as with a GradScaler, and only mixes. "heal": own parameters that
            are not finite also become the neighbours' finite mean, and own states zero. "propagate": they spread, as in torch.
            push_sum, exact_diffusion, extra and tracking raise `NonFiniteError` where they would have to leave values out.
        cpu_compile: on CPUs, compile the passes of SGD and Adam(W) with awc, atc, allreduce and local into one sweep over
            memory each (some seconds at the first construction), compressed messages included; without a C++ compiler it warns
            and does without. Results differ in rounding. Ignored on GPUs, where every pass is one sweep.
        capturable: let a CUDA graph record `step()` with forward and backward; see `replaying`. The learning rate and other
            hyper-parameters, mixing weights and seeds then lie in device memory (fp32), and every pass goes over an inbox
            tensor for each neighbour of the round that has the most; on CPUs the results are the same to the last bit. Not
            for algorithms with an exchange in the middle of a step (atc and kin, allreduce, outer=), fused_backward,
            cpu_compile, or wire_dtype without a static topology and an exchange in every step.
        adapt: N, for links that change: every N exchanges ranks agree, by how long each was blocked, how often each round of the
            topology comes; one whose steps take k times the fastest's comes in every k-th period, k up to 8. Matrices stay
            doubly stochastic, checkpoints keep the plan, ranks are nodes. See "Links that change" in the docs.
        comm_sms: how many blocks, and so SMs of the GPU, one NCCL kernel of this optimizer's messages may hold, 1 to 64; None
            is NCCL's own choice. A block keeps its SM while its peer is late. 2 to 4 fill a network card, 8 to 16 NVLink.
        links: measured ones: the file of `fusedfog calibrate`, a `fusedfog.plan.Links` or `Network`. Auto then takes the nodes,
            graph and, unless `wire_dtype` is given, format of messages with the least time to DistributedDataParallel's loss, by
            step time, bytes and measured losses; `Links.step_s` tells how long a step computes. A given topology that is much
            slower than auto's is named in the log; without links only where machines share links.
        measure: let the passes sum up, on their way, what `stats()` tells of the last step: gradient_norm and disagreement.
        data_parallel_steps: the first so many steps are data-parallel training, exactly as DistributedDataParallel with the
            namesake: backward averages gradients over all ranks, so that `.grad` is the mean when it returns, and all ranks
            have the same parameters, to the last bit. Then the algorithm takes over. Momentum goes on, and second moments are
            multiplied by E_i ||g_i||^2 / ||mean g||^2, measured parameter by parameter in these steps: so much larger is the
            squared gradient that one rank sees. More than one backward in a step: `no_sync()` around all but the last.
        lr_scale: a factor on learning rates once gossip has begun, which param groups do not show.
        weight: this rank's, positive, such as the samples in its batch: ranks then minimise sum_i p_i f_i, p_i being weight_i
            over the sum of all. Means of gradients are weighted. Elsewhere a rank's gradients are multiplied by n p_i, after
            clipping; with Adam, whose steps do not grow with gradients, and in `Decentralized` its lr is, but for
            gradient_tracking and dag. Coupled weight decay stays as it is, decoupled goes with lr. The plain mean, as in
            `averaged()`, follows the weighted gradient. None: all are equal. See `engine.rank_weights`.
        asynchronous: `step()` waits for nobody (awc and push_sum, a static topology): it mixes the newest that each
            neighbour has sent, so a slow rank slows no other; see `finish`. Averages reuse a neighbour's value until a newer one
            comes, so that the limit depends on no rank's speed; push-sum deposits estimates with a mass, and its learning rate is
            divided by this rank's share of it in the long run. A rank that has died counts as the rank's own value.
        max_lag: a rank more than so many of its asynchronous steps (of its exchanges, where `communicate_every` is a function)
            ahead of its slowest in-neighbour waits for that one.
        sync_init: broadcast rank 0's parameters, frozen ones too, and the rest of `model`, at construction.
        model: the module being trained: names parameters in errors, orders buckets, and is broadcast as a whole, with buffers
            and what this optimizer does not hold.

    A param group may set `mix=False`: updated, never communicated, each rank's own in number and shape. Frozen parameters have
    no states and are not sent until they require gradients, or have one, on all ranks before the same step.

    Raises (at construction, before anything is sent or changed):
        ValueError: no parameters; sparse, complex, integer or meta parameters, or several devices; non-finite or negative
            hyper-parameters; a topology of the wrong size or outside the algorithm's theory; a wire_dtype that the device
            cannot make, or with an endless topology; CUDA parameters in a process group without NCCL, two ranks on one GPU,
            bf16 before sm_80; low_precision without 16-bit parameters; DTensors not sharded inside machines alone.
        UnsupportedEnvironment (a ValueError): CUDA parameters without Triton, or with one before 3.5.
        TypeError: `mix_strength` is neither a number nor a function of one or two arguments; a `communicate_every` that is a
            function is neither True nor False (in the step, then).
        RuntimeError: no process group although WORLD_SIZE is larger than one.
        MismatchError: ranks disagree on the model, hyper-parameters, topology or algorithm; names rank and field.
        PeerTimeout: another rank never came to build its optimizer.
    """

    _data_parallel_checked = False
    _claim: Claim | None = None
    # torch.amp.GradScaler then hands over its scale and flag instead of skipping step(), and the exchange with it.
    _step_supports_amp_scaling = True

    def __init__(self, params: Params, defaults: dict[str, Any], options: Options) -> None:
        self._scheduler: Scheduler | None = None
        self._options = options
        given = given_parameters(self._kind, params)
        with parameters.unchanged_if_refused([] if isinstance(given, Tensor) else given):
            super().__init__(given, {**defaults, "mix": True})
            engine = self._build()
        announce(self._kind, engine, self._options)
        make_room_for_clock(self.param_groups)
        if engine.sharding is not None:
            self._show_states()

    def _build(self) -> Scheduler:
        for group in self.param_groups:
            self._check_group(group)
        self._claim = claim = Claim(self._kind, self)
        try:
            with Call(f"{self._kind}()", construction.who_builds(self._options)):
                self._scheduler = build_scheduler(self, claim)
        except BaseException:
            claim.drop()
            raise
        self._scheduler.adopt_edits = WeakMethod(self._take_edits)
        self._scheduler.announce = WeakMethod(self._announce_average)
        return self._scheduler

    @property
    def _engine(self) -> Scheduler:
        """The scheduler; a copied or unpickled optimizer builds its own at first use, together with the other ranks.

        Raises:
            RuntimeError: the optimizer was released.
        """
        if self._released is not None:
            raise RuntimeError(self._released)
        if self._scheduler is None:
            saved, clock = dict(self.state), self._options.clock
            engine = self._build()
            engine.set_clock(dict(clock))
            self._adopt_states(saved)
        assert self._scheduler is not None
        return self._scheduler

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for hyper-parameters that torch's namesake would refuse, or that are not finite."""
        raise NotImplementedError(f"{type(self).__name__} does not say which hyper-parameters it takes")

    @property
    def state(self) -> States:  # type: ignore[override]  # an attribute there
        """Each parameter's states, as torch.optim has them; the user may clear, remove and replace what is there."""
        self._states.notice.pending = True
        return self._states

    @state.setter
    def state(self, given: Mapping[Any, Any]) -> None:
        self._states = States(dict, given)

    def _take_edits(self) -> None:
        """Have the flat states be what `state` shows."""
        if self._scheduler is not None:
            take_edits(self._kind, self._scheduler, self._states)

    # Not for a compiler to look into, as torch's own methods that change an optimizer: a graph would hold this step's inbox.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update and mix all parameters; collective in effect: every rank steps equally often.

        Args:
            closure: reevaluates the model and returns the loss, once, before the update.

        Returns:
            What `closure` returned, or None.

        Raises:
            PeerTimeout, ExchangeError: a neighbour's message did not come.
            RankLeft: another rank has called `leave()`.
            NonFiniteError: this rank's parameters are not finite, and messages are compressed; a GPU reports it later.
            MismatchError, PeerTimeout: parameters were unfrozen, but not the same on every rank before the same step.
            StorageReplacedError: a parameter was given another shape, dtype or device.
            ValueError: the value of `mix_strength` in this step is not from 0 to 1.
            RuntimeError: the optimizer was released; a CUDA graph's capture without `capturable=True`, or eager steps before it.
        """
        with torch.set_grad_enabled(False):  # As no_grad(), in half its time.
            return self._make_step(closure)

    def _make_step(self, closure: Callable[[], Any] | None) -> Any:
        engine = self._engine
        if not self._has_states() and wants_states_only():
            return self._make_states(engine)
        if not isinstance(engine, CapturableScheduler) and recording():
            raise RuntimeError("step() in a CUDA graph's capture: build the optimizer with capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._data_parallel_checked:
            self._check_data_parallel(engine)
        with Call("step()", ranks_of(engine), engine.clock.steps):
            self._announce_step(engine)
            if engine.has_unfrozen():
                self._train_unfrozen(engine)
            # A GradScaler sets these two for the duration of a step.
            self._update(engine, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _has_states(self) -> bool:
        return bool(self._states)

    def _make_states(self, engine: Scheduler) -> None:
        make_states(engine, self._states)

    def _update(self, engine: Scheduler, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        engine.step(grad_scale, found_inf)
        self._show_states()

    def _train_unfrozen(self, engine: Scheduler) -> None:
        if engine.may_step():
            loaded, claim = plain(self.state), self._claim
            assert claim is not None
            for segment in construction.train_unfrozen(self._kind, engine, self._options, claim):
                load_states_of(engine, segment, loaded)
                self._states.forget({"step", *state_names(engine, segment)}, segment.owners)

    def _check_data_parallel(self, engine: Scheduler) -> None:
        data_parallel.check(self._kind, engine, construction.running_setup(self._family, engine, self._options))
        self._data_parallel_checked = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; collective, discards messages in flight."""
        if self._scheduler is None:
            self._add_group(param_group)  # in the constructor, which is a call of its own
            return
        with Call("add_param_group()", ranks_of(self._scheduler)):
            self._add_group(param_group)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        number = len(self.param_groups)
        if isinstance(param_group, dict):
            check_group_parameters(self._kind, param_group, number)
        with parameters.unchanged_if_refused([param_group]):
            self._append_group(param_group)
            if self._scheduler is not None:
                self._take_group()
        self._warn_of_unknown_keys(self.param_groups[-1], number)

    def _take_group(self) -> None:
        """Take the last param group into the running scheduler, or remove it."""
        claim = self._claim
        assert claim is not None
        owned = len(claim.segments)
        try:
            self._check_group(self.param_groups[-1])
            construction.extend(self._kind, self._family, self._engine, self.param_groups, self._options, claim)
        except BaseException:
            self.param_groups.pop()
            claim.drop(owned)
            raise

    def _warn_of_unknown_keys(self, group: dict[str, Any], number: int) -> None:
        warn_of_unknown_keys(self._kind, group, number, self.defaults)

    def _append_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    @announced("state_dict()")
    def state_dict(self) -> dict[str, Any]:
        """torch's format (loads into the torch.optim namesake) plus `"fusedfog"`: the clock. Local; waits for messages.

        Messages are not saved: they are a pure function of the parameters and are sent again on resume. With `low_precision`
        the state has `master_param` or `compensation`, with `wire_dtype` the replicas and the codes that were made last.
        """
        engine = self._engine if self._released is None or self._scheduler is None else self._scheduler
        engine.drain(keep_failures=True)
        self._states.notice.pending = True
        self._take_edits()
        clock = saved_clock(engine, self._options.algorithm)
        saved = super().state_dict()
        saved["state"] = {key: dict(state) if isinstance(state, dict) else state for key, state in saved["state"].items()}
        for state in saved["state"].values():
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cpu()
        saved["fusedfog"] = clock
        carry_clock(saved)
        return saved

    @announced("load_state_dict()")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`, or one of the torch.optim namesake. Collective, discards messages in flight.

        Raises:
            ValueError: groups, parameters or shapes differ from this optimizer's, or it was saved by another algorithm; with
                push_sum also by another number of ranks.

        Warns:
            ForeignCheckpointWarning: another rank saved it, or it was one of another number of ranks, or on another topology.
                Compressed messages then begin anew from rank 0's values, as they do if any rank's replicas are missing. Also,
                without that, where ranks had other weights.
        """
        engine = self._engine
        engine.meet("load_state_dict()")
        clock, own = loaded_clock(self._kind, engine, self._options.algorithm, state_dict)
        parameters.check_states(self.param_groups, state_dict)
        construction.check_groups(self._family, engine, state_dict["param_groups"], self._options)
        with original_states(self) as originals:
            super().load_state_dict(state_dict)
        # torch made a new list of groups; schedules act on that one from now on.
        engine.groups = self.param_groups
        make_room_for_clock(self.param_groups)
        engine.discard()
        pairs = parameters.pair_parameters(self.param_groups, state_dict)
        engine.set_clock(clock)
        self._adopt_states({param: originals[key] for param, key in pairs if key in originals}, own)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "state"})
        if "state" in state:
            self.state = state["state"]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        engine = self._scheduler
        clock = engine.read_clock() if engine else self._options.clock
        equal = engine.phases.last.hierarchy is not None if engine else self._options.equal_inside
        options = self._options.portable(clock, equal_inside=equal)
        own = {"state": plain(self.state), "_options": options, "_scheduler": None, "_claim": None}
        return {**super().__getstate__(), **own}

    def _show_states(self) -> None:
        """Let `self.state[p]` show, as torch.optim does, the states of every parameter that has had a gradient."""
        show_states(self._engine, self._states)

    def _adopt_states(self, saved: dict[Any, Any], own: bool = True) -> None:
        """Copy states in torch's format into the flat ones; parameters without a saved state start anew.

        `own` says that this rank saved them, on the topology that it has.
        """
        saved = plain(saved)
        names = {"step"}.union(*(state_names(self._engine, one) for one in self._engine.segments))
        self._states.forget(names, list(self._states))
        load_states(self._kind, self._engine, saved, own)
        # As torch does, for the day they are trained again.
        kept = {param: saved[param] for param in self._engine.frozen if param in saved}
        self.state.update({param: clone_state(state) for param, state in kept.items()})
        self._show_states()
        self._states.notice.pending = False
