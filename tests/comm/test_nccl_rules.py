"""What NCCL asks of whoever uses it, on the backend that keeps its rules on CPU memory (`support.ordered_backend`)."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import ordered_backend
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm import batches as batches_module
from fusedfog.comm import communicator as communicator_module
from fusedfog.comm import group, subgroup, watchdog
from fusedfog.comm.batches import batches
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import GroupView, find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.comm.transfer import Transfer
from fusedfog.gossip import by_machine as hierarchy
from fusedfog.kernels import device
from fusedfog.optim import build as construction
from fusedfog.topology import Topology

CPU = torch.device("cpu")
SECOND_GPU = torch.device("cuda", 1)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


@contextlib.contextmanager
def gpu_world(*, bound: bool = False) -> Iterator[None]:
    """A world over the stand-in for NCCL, in which tensors on the CPU count as a GPU's."""
    ordered_backend.open_world(bound=bound)
    with mock.patch.object(device, "on_gpu", lambda where: True):
        yield


def wait_for_all(name: str) -> None:
    """Over the store, and so without an operation that NCCL would order."""
    store = dist.distributed_c10d._get_default_store()
    if store.add(f"{name}/came", 1) == dist.get_world_size():
        store.set(f"{name}/all", "")
    store.wait([f"{name}/all"])


class Seen:
    """Counts what was waited for, and keeps what was issued."""

    def __init__(self) -> None:
        self.waits = 0
        self.batches: list[list[str]] = []

    def issued(self, communicator: int, number: int, parts: list[tuple[str, bool, int, int]]) -> None:
        self.batches.append([what for what, _, _, _ in parts])

    def waited(self, communicator: int, number: int) -> None:
        self.waits += 1


# ----------------------------------------------------------------------------------------------------------- groups


def link_of_two(own_group: bool) -> Any:
    with gpu_world(bound=True):
        default = dist.distributed_c10d._get_default_group()
        # A user's own group: all ranks make it, as torch asks for in a bound world.
        theirs = None if own_group else dist.new_group([0, 1])
        found = None
        if dist.get_rank() < 2:
            if own_group:
                # Other numbers of groups must not matter either.
                if dist.get_rank():
                    with group.unbound():
                        dist.new_group([1], use_local_synchronization=True)
                theirs = fusedfog.new_group([0, 1])
            communicator = communicator_for(find_group(theirs), CPU)
            total = torch.ones(1)
            dist.all_reduce(total, group=communicator.group)
            found = total.item(), str(default.bound_device_id)
        wait_for_all("done")
        return found


@pytest.mark.parametrize("own_group", [False, True])
def test_a_link_on_a_part_of_a_bound_world_needs_no_other_rank(ranks: Pool, own_group: bool) -> None:
    assert ranks.run(3, link_of_two, own_group, init=False) == [(2.0, "cuda:0"), (2.0, "cuda:0"), None]


def bad_new_group(members: list[int]) -> None:
    fusedfog.new_group(members)


@pytest.mark.parametrize(
    ("members", "says"), [([], "at least one"), ([0, 0], "different"), ([0, 9], r"0\.\.1"), ([0], "rank 1 is none of")]
)
def test_new_group_says_what_is_wrong_with_its_ranks(ranks: Pool, members: list[int], says: str) -> None:
    outcome = ranks.outcomes(2, bad_new_group, members)[1]
    assert outcome.error_type == "ValueError"
    assert re.search(says, outcome.message)


def two_on_one_gpu() -> str:
    ordered_backend.open_world()
    names = ["GPU-a", "GPU-b", "GPU-a"]
    with (
        mock.patch.object(device, "on_gpu", lambda where: True),
        mock.patch.object(subgroup, "gpu_identity", lambda place: names[dist.get_rank()]),
        pytest.raises(ValueError, match="are both on GPU GPU-a, and NCCL needs a GPU for each rank") as error,
    ):
        communicator_for(find_group(), CPU)
    return str(error.value)


def test_two_ranks_on_one_gpu_are_named_on_every_rank(ranks: Pool) -> None:
    for rank, text in enumerate(ranks.run(3, two_on_one_gpu, init=False)):
        assert text.startswith(f"rank {rank}: ranks ")
        assert "set_device(LOCAL_RANK)" in text
        assert "ranks 0 and 2 " in text or "ranks 2 and 0 " in text


def over_gloo() -> list[str]:
    x = torch.ones(3, dtype=torch.float64)
    said = []
    with mock.patch.object(device, "on_gpu", lambda where: True):
        for call in (
            lambda: fusedfog.neighbor_allreduce(x),
            lambda: fusedfog.allreduce_parameters([x]),
            lambda: communicator_for(find_group(), CPU),
        ):
            with pytest.raises(ValueError, match=r"travel by NCCL, but .* is gloo") as error:
                call()
            said.append(str(error.value))
        # Before anything is sent to another rank.
        with (
            mock.patch.object(construction, "agree", side_effect=AssertionError),
            pytest.raises(ValueError, match=r"travel by NCCL, but .* is gloo") as error,
        ):
            fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
        said.append(str(error.value))
    return said


def test_gpu_tensors_over_gloo_are_refused_with_the_way_out(ranks: Pool) -> None:
    for texts in ranks.run(2, over_gloo):
        assert all("fusedfog.init()" in text and "to the CPU" in text for text in texts)


def options_of(comm_sms: int | None) -> Any:
    made = SimpleNamespace(config=SimpleNamespace(max_ctas=None), is_high_priority_stream=None, _timeout=None)

    def make(is_high_priority_stream: bool) -> Any:
        made.is_high_priority_stream = is_high_priority_stream
        return made

    group = SimpleNamespace(_get_backend=lambda place: SimpleNamespace(name=lambda: "nccl"))
    with (
        mock.patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=make), create=True),
        mock.patch.object(dist, "is_nccl_available", lambda: True),
    ):
        return subgroup.nccl_options(GroupView(0, 2, group), CPU, timedelta(seconds=7), comm_sms)  # type: ignore[arg-type]


@pytest.mark.parametrize("comm_sms", [None, 4])
def test_messages_have_a_stream_of_high_priority_and_as_many_sms_as_they_may(comm_sms: int | None) -> None:
    options = options_of(comm_sms)
    assert options.is_high_priority_stream is True
    assert options.config.max_ctas == comm_sms
    assert options._timeout == timedelta(seconds=7)


def links_by_limit() -> bool:
    given: list[Any] = []
    new = dist.new_group

    def without_options(*args: Any, pg_options: Any, **keywords: Any) -> Any:
        given.append(pg_options)
        return new(*args, **keywords)

    with (
        gpu_world(),
        mock.patch.object(communicator_module, "nccl_options", lambda world, place, timeout, comm_sms: comm_sms),
        mock.patch.object(dist, "new_group", without_options),
    ):
        first, second = (fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, comm_sms=n) for n in (4, None))
        return given == [4, None] and first._engine.communicator is not second._engine.communicator


def test_comm_sms_reaches_the_group_and_gives_a_link_of_its_own(ranks: Pool) -> None:
    assert ranks.run(2, links_by_limit, init=False) == [True, True]


@pytest.mark.parametrize("value", [0, 65, 1.5, True, "4"])
def test_comm_sms_must_be_a_number_of_sms(value: Any) -> None:
    with pytest.raises(ValueError, match="comm_sms must be a whole number of 1 to 64"):
        fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, comm_sms=value)


# ---------------------------------------------------------------------------------------------------------- batches


def link_stub(rank: int, size: int, place: torch.device = CPU) -> Any:
    communicator = Communicator.__new__(Communicator)
    communicator.view, communicator.device, communicator.on_gpu = GroupView(rank, size, None), place, True
    communicator._group, communicator._started, communicator._abandoned = object(), set(), []  # type: ignore[assignment]
    communicator._ended = communicator.told = None
    communicator._watchdog = mock.Mock()
    return communicator


def meets(rounds: list[list[tuple[set[int], set[int]]]]) -> bool:
    """Whether batches, (targets, sources) by rank and number, all end if one begins when the one before it has ended.

    An operation ends when both its ends are posted. A batch is posted at once and ends with all of its operations.
    """
    done = [0] * len(rounds)
    posted_out: set[tuple[int, int]] = set()
    posted_in: set[tuple[int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(rounds):
            if done[rank] < len(mine):
                out, come = mine[done[rank]]
                posted_out |= {(rank, peer) for peer in out}
                posted_in |= {(peer, rank) for peer in come}
        for rank, mine in enumerate(rounds):
            if done[rank] < len(mine):
                out, come = mine[done[rank]]
                if all((rank, p) in posted_in for p in out) and all((p, rank) in posted_out for p in come):
                    done[rank] += 1
                    moved = True
    return all(count == len(batches) for count, batches in zip(done, rounds, strict=True))


def edges_of(kind: str, size: int) -> set[tuple[int, int]]:
    everything = {(i, j) for i in range(size) for j in range(size) if i != j}
    if kind == "all":
        return everything
    if kind == "star":
        return {edge for edge in everything if 0 in edge}
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(size, size, generator=generator) < torch.rand(size, 1, generator=generator)
    return {(i, j) for i, j in everything if keep[i, j]}


@pytest.mark.parametrize("kind", ["all", "star", "random"])
@pytest.mark.parametrize("parcels", [1, 2])
def test_many_operations_go_in_batches_that_cannot_wait_in_a_circle(kind: str, parcels: int) -> None:
    size, token = 300, torch.zeros(1)
    edges, rounds, most = edges_of(kind, size), [], 0
    out: dict[int, list[int]] = {rank: [] for rank in range(size)}
    into: dict[int, list[int]] = {rank: [] for rank in range(size)}
    for sender, receiver in sorted(edges):
        out[sender].append(receiver)
        into[receiver].append(sender)
    for rank in range(size):
        sends = [(peer, token) for peer in out[rank] for _ in range(parcels)]
        recvs = [(peer, token) for peer in into[rank] for _ in range(parcels)]
        found = list(batches(GroupView(rank, size, None), sends, recvs))
        assert all(len(a) + len(b) <= 256 for a, b in found)
        assert sum(len(a) for a, _ in found) == len(sends)
        assert sum(len(b) for _, b in found) == len(recvs)
        most = max(most, len(found))
        rounds.append([({peer for peer, _ in a}, {peer for peer, _ in b}) for a, b in found])
    assert most > 1
    assert meets(rounds)


def talk_in_small_batches() -> tuple[list[float], int]:
    with gpu_world(), mock.patch.object(batches_module, "LARGEST", 4):
        communicator = communicator_for(find_group(), CPU)
        me, size = communicator.view.rank, communicator.view.size
        seen = Seen()
        ordered_backend.observe(seen)
        others = [rank for rank in range(size) if rank != me]
        room = [(peer, torch.empty(1)) for peer in others]
        message = communicator.start([(peer, torch.tensor([float(me)])) for peer in others], room, tag=0, label="all")
        message.wait()
        ordered_backend.observe(None)
        return [tensor.item() for _, tensor in room], len(seen.batches)


def test_batches_of_many_operations_arrive(ranks: Pool) -> None:
    for rank, (got, count) in enumerate(ranks.run(5, talk_in_small_batches, init=False)):
        assert got == [float(peer) for peer in range(5) if peer != rank]
        assert count == 3


# ------------------------------------------------------------------------------------------------- waits and streams


def wait_twice() -> tuple[int, float]:
    with gpu_world():
        communicator = communicator_for(find_group(), CPU)
        peer, room = 1 - communicator.view.rank, torch.empty(1)
        message = communicator.start(
            [(peer, torch.tensor([float(communicator.view.rank)]))], [(peer, room)], tag=0, label="bucket 0"
        )
        seen = Seen()
        ordered_backend.observe(seen)
        message.wait()
        once = seen.waits
        message.wait()
        ordered_backend.observe(None)
        assert message.done()
        return seen.waits - once, room.item()


def test_every_stream_that_uses_a_message_waits_for_it(ranks: Pool) -> None:
    """`drain()` on one stream must not take the order from the stream that makes the step."""
    assert ranks.run(2, wait_twice, init=False) == [(1, 1.0), (1, 0.0)]


class Counted:
    """A work, with what the program's thread asks of it."""

    def __init__(self, work: Any, asked: list[str]) -> None:
        self._work, self._asked = work, asked

    def wait(self) -> Any:
        self._asked.append("wait")
        return self._work.wait()

    def is_completed(self) -> bool:
        if threading.current_thread().name != "fusedfog-watchdog":
            self._asked.append("is_completed")
        return bool(self._work.is_completed())


def asked_in_steps(follows: bool) -> list[str]:
    """What four steps ask of works, in a plain run, or as an elastic one does."""
    asked: list[str] = []
    batch = dist.batch_isend_irecv
    with gpu_world():
        opt = fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, topology="ring")
        opt._engine.communicator.follows = follows
        with mock.patch.object(dist, "batch_isend_irecv", lambda ops: [Counted(one, asked) for one in batch(ops)]):
            for _ in range(4):
                opt.param_groups[0]["params"][0].grad = torch.ones(3)
                opt.step()
            opt.drain()
        opt._engine.communicator.follows = False
        return asked


@pytest.mark.parametrize("follows", [False, True])
def test_the_host_asks_whether_a_message_has_come_in_elastic_runs_alone(ranks: Pool, follows: bool) -> None:
    for asked in ranks.run(2, asked_in_steps, follows, init=False):
        assert asked.count("wait") == 5
        assert ("is_completed" in asked) == follows


def wait_for_what_was_aborted() -> float:
    with gpu_world():
        communicator = communicator_for(find_group(), CPU)
        came, wanted = torch.zeros(3), communicator.view.rank == 0
        wait_for_all("opened")
        if wanted:
            communicator.follows = True
            transfer = communicator.start([], [(1, came)], tag=0, label="step 3")
            communicator._ended = fusedfog.ExchangeError("rank 1 has ended")
            communicator._group._get_backend(CPU).abort()  # type: ignore[union-attr]
            with pytest.raises(fusedfog.ExchangeError, match="rank 1 has ended"):
                transfer.wait()
            communicator.follows = False
        wait_for_all("aborted")
        return came[0].item()


def test_what_an_abort_has_completed_has_not_come(ranks: Pool) -> None:
    value = ranks.run(2, wait_for_what_was_aborted, init=False)[0]
    assert value != value, "else this test would prove nothing"


def test_batches_are_started_on_the_device_of_their_tensors() -> None:
    """`cuda:1` parameters with `cuda:0` current."""
    current: list[Any] = [0]

    @contextlib.contextmanager
    def on(place: torch.device) -> Iterator[None]:
        current.append(place.index)
        yield
        current.pop()

    def batch(ops: Any) -> list[Any]:
        assert current[-1] == 1
        return [object()]

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: current[-1]),
        mock.patch.object(torch.cuda, "device", on),
        mock.patch.object(dist, "P2POp", lambda *args, **keywords: args),
        mock.patch.object(dist, "batch_isend_irecv", batch),
    ):
        communicator = link_stub(0, 2, SECOND_GPU)
        message = communicator.start([(1, torch.zeros(1))], [], tag=0, label="")
    assert len(message.pending) == 1
    assert current == [0]


def test_a_failed_message_is_kept_once() -> None:
    communicator = link_stub(0, 2)
    message = Transfer(communicator, "bucket 0")
    message.pending.append((object(), "rank 1"))  # type: ignore[arg-type]
    communicator.keep(message)
    communicator.keep(message)
    assert communicator._abandoned == [message]


class Stream:
    """Of a device, and what it was told to wait for."""

    def __init__(self, place: Any) -> None:
        self.device, self.waited = place, []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    wait_event = wait_stream

    def record_event(self) -> Any:
        return SimpleNamespace(query=lambda: True, of=self)


def test_exchanges_by_machine_are_queued_on_streams_of_their_own_device() -> None:
    streams = {place: Stream(place) for place in ("current", SECOND_GPU)}
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda place=None: streams[place or "current"]),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    ):
        side = Stream(SECOND_GPU)
        chain = hierarchy.Chain(link_stub(0, 2, SECOND_GPU), "", iter(()), side)  # type: ignore[arg-type]
        chain.wait()
    assert side.waited == [streams[SECOND_GPU]]
    assert [event.of for event in streams[SECOND_GPU].waited] == [side]


def test_the_watchdog_sits_on_its_links_device_and_leaves_captures_alone() -> None:
    devices, modes = [], []

    def exchange_mode(mode: Any) -> int:
        modes.append(mode._obj.value)
        return 0

    driver = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange_mode)
    communicator: Any = SimpleNamespace(
        timeout=timedelta(seconds=8), world=GroupView(0, 2, None), device=SECOND_GPU, ended=None
    )
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog._device = communicator.device
    with (
        mock.patch.object(torch.cuda, "set_device", devices.append),
        mock.patch.object(watchdog.ctypes, "CDLL", lambda name: driver),
    ):
        dog._settle_in()
    assert devices == [SECOND_GPU]
    assert modes == [1]
    # The thread does so before it asks for anything.
    order: list[str] = []
    with (
        mock.patch.object(watchdog.Watchdog, "_settle_in", lambda self: order.append("settled")),
        mock.patch.object(watchdog.Watchdog, "_look_for_notes", lambda self, communicator: order.append("looked")),
    ):
        membership = SimpleNamespace(view=GroupView(0, 2, None))
        kept = mock.Mock(timeout=timedelta(seconds=0.04), membership=membership, device=SECOND_GPU)
        watchdog.Watchdog(kept)
        deadline = time.monotonic() + 60
        while len(order) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        del kept
    assert order[:2] == ["settled", "looked"]


def test_the_watchdog_names_what_is_overdue(caplog: pytest.LogCaptureFixture) -> None:
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog._watched, dog._lock, dog._patience, dog._rank = [], threading.Lock(), -1.0, 0
    over, stuck = (SimpleNamespace(is_completed=lambda end=end: end) for end in (True, False))
    dog.watch("step 3, bucket 1", [(over, "a")])  # type: ignore[list-item]
    dog.watch("step 3, bucket 2", [(stuck, "receiving from ranks [4]")])  # type: ignore[list-item]
    assert dog._overdue() == [("step 3, bucket 2", "receiving from ranks [4]")]
    assert dog._watched == []


# ------------------------------------------------------------------------------------------------------------ meshes


def mesh_links() -> Any:
    with (
        gpu_world(),
        mock.patch.object(torch.cuda, "Stream", Stream),
    ):
        mesh = init_device_mesh("cpu", (3, 2))
        opt = fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, mesh=mesh, inside="parameters", topology="ring")
        found = opt._engine.exchanges.mailbox.gossip.hierarchy
        inside, across, back = found._inside[0], found._across[0], found._back[0]
        before = {id(communicator.group) for communicator in (inside, across, back)}
        opt.set_topology(fusedfog.topology.ring(3, "left"))
        return (
            [[sorted(side) for side in communicator._warm] for communicator in (inside, across, back)],
            len(before),
            len({id(next(found._streams)) for _ in range(4)}),
        )


def test_links_of_a_mesh_are_warm_and_its_phases_overlap(ranks: Pool) -> None:
    """Inside, across and back are communicators of their own, and buckets take two streams in turn."""
    for rank, (warm, communicators, streams) in enumerate(ranks.run(6, mesh_links, init=False)):
        machine, local = divmod(rank, 2)
        others, machines = [1 - local], [other for other in range(3) if other != machine]
        assert warm == [[others, others], [machines, machines], [others, others]]
        assert communicators == 3
        assert streams == 2


def warm_edges() -> tuple[int, int]:
    with gpu_world():
        seen = Seen()
        communicator = communicator_for(find_group(), CPU)
        ordered_backend.observe(seen)
        me = communicator.view.rank
        graph: Topology = fusedfog.topology.one_peer_exponential(4)
        turns = [graph.round(me, step) for step in range(2)]
        communicator.warm_up((turn.send, turn.recv) for turn in turns)
        first = len(seen.batches)
        communicator.warm_up((turn.send, turn.recv) for turn in turns * 3)
        ordered_backend.observe(None)
        return first, len(seen.batches) - first


def test_every_edge_is_opened_once(ranks: Pool) -> None:
    assert ranks.run(4, warm_edges, init=False) == [(2, 0)] * 4


def test_a_failed_exchange_by_machine_is_for_the_step_that_needs_it() -> None:
    def phases() -> Iterator[Transfer]:
        raise RuntimeError("a rank has left")
        yield

    with (
        mock.patch.object(torch.cuda, "current_stream", lambda place: Stream(place)),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
    ):
        chain = hierarchy.Chain(link_stub(0, 2), "", phases(), Stream(CPU))  # type: ignore[arg-type]
        assert chain.done()
        with pytest.raises(RuntimeError, match="a rank has left"):
            chain.wait()
