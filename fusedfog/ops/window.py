"""`Window`: a tensor that neighbours write into and read from while this rank's program does something else."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.calls import Call
from fusedfog.comm.group import find_group
from fusedfog.comm.mixing import ROUNDING, mix, room_for
from fusedfog.comm.window.edge import SLOTS, Inbox, Kind, Message, factor
from fusedfog.comm.window.endpoint import Endpoint
from fusedfog.comm.window.opening import Plan, check_descriptors, open_endpoint
from fusedfog.comm.window.region import Layout
from fusedfog.comm.window.staging import staging_of
from fusedfog.kernels import device
from fusedfog.ops.edges import SendWeights
from fusedfog.ops.tensors import check_dense, deliver, describe, flat_view
from fusedfog.ops.window_edges import ExplicitEdges, WindowArguments, WindowEdges, read_window_edges
from fusedfog.topology import Topology

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex64, torch.complex128, torch.complex32)


@dataclass
class _Own:
    """The rank's own tensor and its p."""

    tensor: Tensor
    p: float = 1.0

    def read(self) -> tuple[Tensor, float]:
        """Values, flat and real, and p; what peers get."""
        return flat_view(self.tensor), self.p

    def write(self, flat: Tensor) -> None:
        """Make these the values, unless they are already, as `read` returned a view."""
        if flat.untyped_storage().data_ptr() != self.tensor.untyped_storage().data_ptr():
            deliver(flat, self.tensor, self.tensor)


class Sent:
    """What `put` and `accumulate` return with `async_op=True`: says when the messages lie where their receivers find them."""

    def __init__(self, endpoint: Endpoint, peers: tuple[int, ...]) -> None:
        self._endpoint, self._peers = endpoint, peers

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the receivers have confirmed it, `timeout` seconds at most; raises as `Window.fence`."""
        self._endpoint.fence(timeout, self._peers)

    def is_completed(self) -> bool:
        """Whether nothing of it is on its way any more."""
        return all(link.gone or link.delivered for link in map(self._endpoint.out.__getitem__, self._peers))


class Window:
    """One-sided communication: neighbours put, add and get while this rank's program computes, sleeps or is stopped.

        with fusedfog.Window(x, "ring") as window:      # all ranks together
            for step in range(steps):
                window.put()                            # x into the inboxes of the out-neighbours; waits for nobody
                window.update()                         # x <- W x with the newest values that are there

    Every rank keeps, for each in-neighbour j, an inbox B_j like its tensor, and a scalar p beside every tensor (p is 1 in the
    beginning), which takes part in all that is done: with weights that sum to 1 over the receivers, x / p is a push-sum
    estimate of the mean. Inboxes are shared memory where the neighbour is a process of the same machine, and are filled over
    TCP otherwise. No call waits for a neighbour, except `get`, `fence` and `mutex`, which name the one that does not answer.

    Building a window is collective; afterwards nothing is, `close` included. Any thread may use it, one at a time.
    A process that is forked from this one (a DataLoader worker) has no part in it.

    Args:
        tensor: a dense tensor of floating-point, complex or integer dtype, the same shape and dtype on all ranks. It is
            not copied: `update` changes it, and what you write into it is what the next `put` sends. Hold `lock` where
            you change it while others may `get` it. On a GPU (which nobody has tried yet), values go through the CPU's
            memory; what you write, write on the stream on which you called the window last.
        topology: a static topology, a name, or pairs (sender, receiver) of all edges, the same on all ranks.
        group: a process group; the default group if None. Ranks are ranks of this group.
        name: for errors; the same on all ranks.
        zero_init: inboxes begin with zeros and p 0, and not with the receiver's own tensor and p.

    Attributes:
        lock: what the window holds while it reads or changes the tensor; a `threading.RLock`.

    Raises:
        TypeError, ValueError: wrong arguments, or a topology that changes, or more edges than this process may have
            descriptors; on the other ranks a MismatchError that names this one.
        MismatchError: shape, dtype, topology or name differ between ranks; names them.
        PeerTimeout, ExchangeError: a rank did not come, or two cannot reach each other; names them and the address.
    """

    def __init__(
        self,
        tensor: Tensor,
        topology: Topology | str | ExplicitEdges | None,
        group: dist.ProcessGroup | None = None,
        name: str | None = None,
        zero_init: bool = False,
    ) -> None:
        view = find_group(group)
        title = f"Window {name!r}" if name is not None else "Window"
        own, edges, problem = _Own(torch.empty(0)), WindowEdges("", 1.0, {}, ()), None
        try:
            own = _Own(_checked(tensor))
            edges = read_window_edges(topology, view.rank, view.size)
            check_descriptors(len(edges.recv) + len(edges.send))
        except (TypeError, ValueError) as error:
            problem = error
        values = own.read()[0]
        plan = Plan(
            name=title,
            fields={
                "tensor": describe(own.tensor),
                "topology": edges.words,
                "name": repr(name),
                "zero_init": str(bool(zero_init)),
            },
            problem=problem,
            sends=edges.send,
            recvs=tuple(edges.recv),
            layout=Layout(values.dtype, values.numel(), SLOTS),
            initial=None if zero_init else values,
            mass=0.0 if zero_init else own.p,
            source=own.read,
            staging=staging_of(values),
        )
        with Call("Window()", view), torch.no_grad():
            self._endpoint = open_endpoint(view, plan)
        self._own, self._edges = own, edges
        self._arguments = WindowArguments(view.rank, view.size, edges, own.tensor)
        self._consumed = dict.fromkeys(edges.recv, 0)
        self.lock = self._endpoint.lock
        # A dropped window is closed too, and one that is open when the process ends.
        self._finalizer = weakref.finalize(self, self._endpoint.close)

    def __enter__(self) -> Window:
        self._endpoint.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close this rank's end. What it sent arrives, if the receiver takes it within 5 s; what others send later is dropped.

        Not collective: windows are closed in any order, and other ranks go on with what they have.
        """
        self._finalizer()

    @property
    def p(self) -> float:
        """The push-sum scalar of the own tensor."""
        return self._own.p

    @property
    def versions(self) -> dict[int, int]:
        """By in-neighbour, how many puts (and gets) have arrived since the last `update`."""
        self._endpoint.check()
        with self.lock:
            return {
                peer: link.inbox.puts() - self._consumed[peer] for peer, link in sorted(self._endpoint.into.items())
            }

    @property
    def alive(self) -> dict[int, bool]:
        """By neighbour, whether its process lives and has its window open, as far as is known by now."""
        self._endpoint.check()
        return self._endpoint.alive()

    def put(
        self,
        x: Tensor | None = None,
        weights: SendWeights | None = None,
        self_weight: float = 1.0,
        async_op: bool = False,
    ) -> Sent | None:
        """Replace what lies in neighbours' inboxes: B_i <- weights[i] * x, p_i <- weights[i] * p. Waits for nobody.

        A put that its receiver has not looked at yet is replaced by the next one. What is for a dead neighbour is dropped.

        Args:
            x: like the window's tensor, which is meant if None.
            weights: {receiver: weight}, or a list of receivers for weights of 1; all out-neighbours if None.
            self_weight: what the own tensor and p are multiplied by afterwards.
            async_op: return a handle to wait for the arrival.

        Raises:
            TypeError, ValueError: x is not like the tensor, or a weight is for no out-neighbour; nothing has been sent.
            RuntimeError: the window is closed, or this process was forked from the window's.
        """
        return self._send(Kind.PUT, x, weights, self_weight, async_op)

    def accumulate(
        self,
        x: Tensor | None = None,
        weights: SendWeights | None = None,
        self_weight: float = 1.0,
        async_op: bool = False,
    ) -> Sent | None:
        """Add to what lies in neighbours' inboxes: B_i += weights[i] * x, p_i += weights[i] * p. Waits for nobody.

        Nothing is lost or added twice between living ranks, however often anybody collects. Raises no version. Arguments and
        errors are those of `put`.
        """
        return self._send(Kind.ADD, x, weights, self_weight, async_op)

    def _send(
        self, kind: Kind, x: Tensor | None, weights: SendWeights | None, self_weight: float, async_op: bool
    ) -> Sent | None:
        self._endpoint.check()
        receivers = self._arguments.send_weights(weights)
        share = self._arguments.one_weight(self_weight, "self_weight")
        given = None if x is None else flat_view(self._arguments.same_kind(x, "x"))
        with self.lock, torch.no_grad():
            flat, p = self._own.read()
            held = self._endpoint.hold(flat if given is None else given)
            for peer, weight in receivers.items():
                self._endpoint.send(peer, Message(kind, held, weight, weight * p))
            if share != 1:
                flat.mul_(factor(share, flat))
                self._own.write(flat)
                self._own.p *= share
        return Sent(self._endpoint, tuple(receivers)) if async_op else None

    def get(self, weights: SendWeights | None = None) -> None:
        """Fetch what in-neighbours' tensors are now: B_j <- weights[j] * (tensor of j), and p likewise.

        Their programs need not call anything: a thread of theirs answers, once it can have the window's `lock` there.

        Raises:
            PeerTimeout: a neighbour did not answer within the group's timeout; names it.
            ExchangeError: one has ended; names it.
            TypeError, ValueError, RuntimeError: as `put`.
        """
        self._endpoint.check()
        self._endpoint.get(self._arguments.get_weights(weights))

    def update(
        self,
        self_weight: float | None = None,
        recv_weights: Mapping[int, float] | None = None,
        reset: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Mix with what lies in the inboxes: x <- self_weight * x + sum_j recv_weights[j] * B_j, p likewise. Local.

        Args:
            self_weight, recv_weights: both, or neither for the topology's weights (for pairs: all alike). `recv_weights` may
                leave neighbours out.
            reset: the inboxes that were used hold zeros afterwards, and their p is 0.
            out: where to write the result; the own tensor and p stay as they are then.

        Returns:
            The own tensor, or `out`. `versions` are 0 again.
        """
        self._endpoint.check()
        own, recv = self._arguments.update_weights(self_weight, recv_weights)
        target = self._own if out is None else _Own(self._arguments.same_kind(out, "out"))
        with self.lock, torch.no_grad():
            self._endpoint.staging.follow()
            for link in self._endpoint.into.values():
                link.inbox.take()
            if target is not self._own:
                target.tensor.copy_(self._own.tensor)
            flat, p = target.read()
            inboxes = {peer: self._endpoint.into[peer].inbox for peer in recv}
            filled = [peer for peer, inbox in inboxes.items() if not inbox.blank and recv[peer]]
            if device.on_gpu(flat):
                flat = room_for(len(flat), flat).copy_(flat)
            _mix(flat, own, {peer: (recv[peer], _front(inboxes[peer], flat)) for peer in filled}, self._arguments.rank)
            target.write(flat)
            target.p = own * p + sum(recv[peer] * inbox.mass for peer, inbox in inboxes.items())
            for inbox in inboxes.values() if reset else ():
                inbox.clear()
            self._consumed = {peer: link.inbox.seen for peer, link in self._endpoint.into.items()}
        return self._own.tensor if out is None else out

    def collect(self) -> Tensor:
        """Take everything in: x <- x + sum_j B_j, p likewise, and zeros into the inboxes. Local; returns the own tensor."""
        return self.update(1.0, dict.fromkeys(self._edges.recv, 1.0), reset=True)

    def fence(self, timeout: float | None = None) -> None:
        """Wait until all that was sent lies where its receivers' programs find it, and the receivers have confirmed it.

        Their programs need not call anything.

        Args:
            timeout: seconds; the group's timeout if None.

        Raises:
            PeerTimeout: a neighbour did not confirm; names it. All others have what was sent to them.
            ExchangeError: a neighbour died before it confirmed; names it, once for the same messages.
        """
        self._endpoint.check()
        self._endpoint.fence(timeout)

    @contextlib.contextmanager
    def mutex(
        self, ranks: Iterable[int] | None = None, own: bool = False, timeout: float | None = None
    ) -> Iterator[None]:
        """Hold the mutexes of edges inside: those to these out-neighbours, or with `own` those from in-neighbours.

        Every edge has one mutex, for its sender and its receiver to agree by; put, get and update do not look at it.
        A rank that dies gives back what it holds.

        Args:
            ranks: all of these neighbours if None.
            timeout: seconds for each edge; the group's timeout if None.

        Raises:
            PeerTimeout: another rank holds one for too long, or its keeper, the receiver, does not answer; names it.
            ExchangeError: a receiver has ended.
        """
        self._endpoint.check()
        chosen = self._arguments.ranks(ranks, own)
        with self._endpoint.mutex([] if own else chosen, chosen if own else [], timeout):
            yield


def _checked(tensor: Tensor) -> Tensor:
    """The tensor, if a window can be made of it."""
    flat = check_dense(tensor, "Window")
    if flat.dtype not in (*_INTEGERS, *_FLOATS, *_COMPLEX):
        raise TypeError(f"a {flat.dtype} tensor cannot be a window's: convert it to a floating-point or integer dtype")
    return flat


def _front(inbox: Inbox, like: Tensor) -> Tensor:
    """What an inbox holds, on the device of `like`."""
    if not device.on_gpu(like):
        return inbox.front
    room = room_for(len(inbox.front), like)
    inbox.read(room)
    return room


def _mix(flat: Tensor, own: float, terms: Mapping[int, tuple[float, Tensor]], rank: int) -> None:
    """`flat <- own * flat + sum of weight * inbox`, in ascending rank order."""
    weights, inboxes = [weight for weight, _ in terms.values()], [inbox for _, inbox in terms.values()]
    averages = own and abs(own + math.fsum(weights) - 1) <= ROUNDING
    if flat.is_floating_point() and (averages or flat.dtype not in (torch.float32, torch.float64)):
        if terms or own != 1:
            mix(flat, inboxes, own, weights, sum(peer < rank for peer in terms))
        return
    # Integers are exact; and other sums, where the tensor is, take a pass for each term and no memory.
    if own == 0 and terms:
        torch.mul(inboxes[0], factor(weights.pop(0), flat), out=flat)
        del inboxes[0]
    elif own != 1:
        flat.mul_(factor(own, flat))
    for weight, inbox in zip(weights, inboxes, strict=True):
        flat.add_(inbox, alpha=factor(weight, flat))
