"""Mixing across machines at the cost of one model per machine: W_machine (x) J_local on a two-dimensional mesh.

Each bucket goes through three phases. Inside the machine every local rank collects one shard from the others and takes its
mean; it exchanges that shard with its counterparts (same local rank) in the neighbour machines and mixes; inside the
machine the mixed shards are handed round. So a machine sends its model once to each neighbour machine, in as many parallel
streams as it has local ranks, and no rank is a leader. gloo's own reduce-scatter moves all-reduce bytes, so phases are
plain point-to-point messages: (L-1)/L of a bucket each way inside.

The phases of one exchange depend on each other. On gloo a single thread per optimizer chains them, bucket after bucket in
the order that all ranks share, so the training thread never waits. On NCCL they are queued at once, on two side streams in
turn and on a communicator for each phase: while one bucket is between machines, the next is collected inside. (A
communicator keeps the order in which its operations were queued, so one for both phases inside would make the next
bucket's first wait for this one's last.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, pairwise

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.exchange import Link, Message, link_for
from fusedfog.kernels import device
from fusedfog.kernels.reference import mix_messages
from fusedfog.topology import Round
from fusedfog.world import World, find_world


def mean_of(shards: Sequence[Tensor]) -> Tensor:
    """Mean in the given order, summed in fp32 (fp64 for fp64)."""
    wide = torch.float64 if shards[0].dtype == torch.float64 else torch.float32
    total = shards[0].to(wide, copy=True)
    for shard in shards[1:]:
        total += shard
    return (total / len(shards)).to(shards[0].dtype)


class Chain(Message):
    """An exchange of several phases, carried out by a thread (gloo) or queued on a side stream (NCCL)."""

    def __init__(
        self, link: Link, label: str, phases: Iterator[Message], on: ThreadPoolExecutor | torch.cuda.Stream
    ) -> None:
        super().__init__(link, label)
        self._task: Future[None] | None = None
        self._event: torch.cuda.Event | None = None
        if isinstance(on, ThreadPoolExecutor):
            self._task = on.submit(_finish, phases)
        else:
            on.wait_stream(torch.cuda.current_stream(link.device))
            with torch.cuda.stream(on):
                try:
                    _finish(phases)
                except RuntimeError as error:
                    # Only a step that needs this message may complain.
                    self.failure = error
                self._event = on.record_event()

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        if self._task is not None:
            return self._task.done()
        return self.failure is not None or self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait for the last phase; raises what failed in any. On a GPU it is the current stream that waits."""
        if self._task is not None:
            self._task.result()
        elif self.failure is not None:
            raise self.failure
        elif self._event is not None:
            torch.cuda.current_stream(self.link.device).wait_event(self._event)


@torch.no_grad()
def _finish(phases: Iterator[Message]) -> None:
    for message in phases:
        message.wait()


class Hierarchy:
    """One rank's place on the mesh: its link inside the machine, and its link to its counterparts across machines.

    Attributes:
        machine, machines, local, locals: this rank's coordinates on the mesh and the mesh's shape.
        bytes_inside, bytes_across: sent so far.
    """

    def __init__(self, mesh: DeviceMesh, place: torch.device, comm_sms: int | None = None) -> None:
        across, inside = find_world(mesh.get_group(0)), find_world(mesh.get_group(1))
        self.machine, self.machines = across.rank, across.size
        self.local, self.locals = inside.rank, inside.size
        on_gpu = device.on_gpu(place)
        self._inside = _open(inside, place, comm_sms)
        self._across = _open(across, place, comm_sms)
        self._back = _open(inside, place, comm_sms, number=1) if on_gpu else self._inside
        self._pump = None if on_gpu else ThreadPoolExecutor(1, "fusedfog-hierarchy")
        self._streams = cycle([torch.cuda.Stream(place) for _ in range(2)] if on_gpu else [])
        self.bytes_inside = self.bytes_across = 0

    def warm_up(self, rounds: Iterable[Round]) -> None:
        """Open NCCL's connections inside the machine, and across for these of the machine's rounds."""
        others = [rank for rank in range(self.locals) if rank != self.local]
        for end in (self._inside, self._back):
            if end is not None:
                end[0].warm_up([(others, others)])
        if self._across is not None:
            self._across[0].warm_up((turn.send, turn.recv) for turn in rounds)

    def start(self, link: Link, pairs: Sequence[tuple[Tensor, Tensor]], turn: Round, number: int, label: str) -> Chain:
        """Start mixing each (sent, inbox) pair of flat tensors: inbox will hold sum_b W[a, b] mean_b. See `Message`.

        Args:
            turn: the machine's round of the topology.
            number: tells this exchange's tags from those in flight beside it; the pairs take as many numbers.
        """
        for sent, _ in pairs:
            own = self._cut(sent)[self.local].nbytes
            self.bytes_inside += 2 * (sent.nbytes - own) if self._inside is not None else 0
            self.bytes_across += len(turn.send) * own
        on = self._pump if self._pump is not None else next(self._streams)
        return Chain(link, label, self._all_phases(pairs, turn, number, label), on)

    def _all_phases(
        self, pairs: Sequence[tuple[Tensor, Tensor]], turn: Round, number: int, label: str
    ) -> Iterator[Message]:
        for i, (sent, inbox) in enumerate(pairs):
            yield from self._phases(sent, inbox, turn, number + i, label)

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """The shards of a flat tensor, one for each local rank, as even as they can be."""
        cuts = [i * len(flat) // self.locals for i in range(self.locals + 1)]
        return [flat[a:b] for a, b in pairwise(cuts)]

    def _phases(self, sent: Tensor, inbox: Tensor, turn: Round, number: int, label: str) -> Iterator[Message]:
        me, shards, places = self.local, self._cut(sent), self._cut(inbox)
        others = [i for i in range(self.locals) if i != me]
        own = shards[me]
        if self._inside is not None:
            link, channel = self._inside
            got = {i: torch.empty_like(own) for i in others}
            tag = link.tag(channel, 2 * number)
            yield link.start(
                [(i, shards[i]) for i in others], list(got.items()), tag=tag, label=f"{label}, to owners inside"
            )
            own = mean_of([got.get(i, own) for i in range(self.locals)])
        if self._across is not None:
            link, channel = self._across
            came = [(machine, torch.empty_like(own)) for machine in turn.recv]
            tag = link.tag(channel, number)
            yield link.start(
                [(machine, own) for machine in turn.send], came, tag=tag, label=f"{label}, across machines"
            )
            wide = torch.float64 if own.dtype == torch.float64 else torch.float32
            mixed = mix_messages(own.to(wide), [tensor.to(wide) for _, tensor in came], list(turn.recv.values()))
            own = mixed.to(own.dtype)
        places[me].copy_(own)
        if self._back is not None:
            link, channel = self._back
            tag = link.tag(channel, 2 * number + 1)
            yield link.start(
                [(i, own) for i in others], [(i, places[i]) for i in others], tag=tag, label=f"{label}, handed round"
            )


def _open(world: World, place: torch.device, comm_sms: int | None, number: int = 0) -> tuple[Link, int] | None:
    if world.size == 1:
        return None
    link = link_for(world, place, comm_sms, number)
    return link, link.open_channel()


def check_mesh(mesh: DeviceMesh, world: World) -> None:
    """Raise ValueError unless the mesh is machines x local ranks over all ranks of the world."""
    if mesh.ndim != 2:
        raise ValueError(f"mesh must have two dimensions (machines, local ranks), got {mesh.ndim}")
    if sorted(mesh.mesh.flatten().tolist()) != sorted(world.ranks):
        raise ValueError(
            f"mesh covers ranks {mesh.mesh.tolist()} but the optimizer's group has ranks {list(world.ranks)}"
        )
