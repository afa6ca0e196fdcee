"""Checkpoints of all ranks in one folder, to be resumed on as many ranks or on others; the last one survives whatever happens.

    fusedfog.save_checkpoint("run", model, opt, keep=3, epoch=3)      # run/000001-step-00001000/
    extra = fusedfog.load_checkpoint("run", model, opt)               # the newest in it

Ranks of a decentralized run differ, so every rank writes its own model and states, with param groups, clock and what the user
adds, into a file of its own (`checkpoint_file`). On the same number of ranks a run goes on bit for bit. On another number every
rank starts from the average of the saved ranks.

Of parameters that FSDP2 shards (`shards`), the ranks of a machine write one replica together, a file each; "rank" then means
that, here and below. They may be other numbers of ranks on resume: DTensors are read as they are cut.

All ranks come to the same end. What one of them cannot do, it says to rank 0 through the store instead of to its user, and then
every rank raises the same error. So nothing is changed by a load, and no checkpoint has its name, before all have agreed.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from fusedfog.comm.calls import collective
from fusedfog.comm.elastic.again import made_again
from fusedfog.comm.elastic.run import Run
from fusedfog.comm.group import GroupView, find_group
from fusedfog.comm.guard import guarded
from fusedfog.comm.outcome import Outcome
from fusedfog.errors import CheckpointError, ForeignCheckpointWarning, MismatchError
from fusedfog.log import log, warn_user
from fusedfog.optim import checkpoint_folder as folders
from fusedfog.optim import state_dict as origin
from fusedfog.optim.averaged import measuring_communicator
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint_file import Written, write
from fusedfog.optim.checkpoint_folder import Manifest, Unfinished
from fusedfog.optim.checkpoint_of_torch import OfTorch, is_of_torch, refuse
from fusedfog.optim.checkpoint_parts import Content, Saved, Sums, adopt, check_model, shards_of


class _Runs:
    """Which run's checkpoints are being written into a folder, by this process: that of the one that was loaded, or a new one."""

    names: ClassVar[dict[Path, str]] = {}
    warned: ClassVar[set[Path]] = set()


@made_again
@collective("save_checkpoint()")
def save_checkpoint(
    path: str | Path, model: nn.Module, opt: DecentralizedOptimizer, *, keep: int | None = None, **extra: Any
) -> Path:
    """Write this rank's model, optimizer states and clock into a new folder. Collective over the default process group.

    The folder appears under its name, `000007-step-00001000` for the seventh checkpoint and 1000 steps, when all ranks' files
    are on the disk. Until then, and if any rank fails or is killed, those before it are the run's checkpoints. Messages in
    flight are waited for and kept; training goes on undisturbed.

    Args:
        path: the run's folder, on a file system that all ranks see; made if it is not there. The same on all ranks; a relative
            one is of rank 0's working directory. One run at a time writes into it.
        keep: how many of the run's checkpoints stay: the last ones, this one included; None for all. The disk needs room for
            one more.
        extra: what `load_checkpoint` shall return: numbers, strings, bytes, None, tensors, numpy arrays, and lists, tuples,
            sets and dicts of these, as a scheduler's state_dict() or the states of random number generators.

    Returns:
        The checkpoint's own folder, which `load_checkpoint` takes too.

    Raises, on all ranks alike:
        TypeError: something in `extra` is of another kind; names it.
        ValueError: `keep` is less than 1.
        MismatchError: `path` or `keep` differ between ranks; names rank and values.
        CheckpointError: a rank could not write; names rank, file and cause. The earlier checkpoints are as they were.
        PeerTimeout: a rank did not come, or needed longer to write than the process group's timeout.

    Warns:
        ForeignCheckpointWarning: the folder has checkpoints of another run. They stay, and `keep` does not count them.
    """
    world = find_group()
    ranks = Outcome(world, "save_checkpoint()")
    content, replica = Content(model, opt), _replicas(opt).rank

    def describe() -> list[Any]:
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ValueError(f"keep is how many checkpoints stay, at least 1, or None for all; got {keep!r}")
        content.prepare(extra)
        return [os.fspath(path), keep, replica]

    described = ranks.each(describe)
    paths, keeps, replicas = ([one[place] for one in described] for place in range(3))
    _check_same("path", paths, world.rank, "save_checkpoint()")
    _check_same("keep", keeps, world.rank, "save_checkpoint()")
    run = Path(ranks.first(lambda: os.path.realpath(path)))
    with closing(Unfinished()) as unfinished:
        folder = Path(ranks.first(lambda: str(unfinished.begin(run))))

        def write_own() -> list[int]:
            if not (folder / folders.MANIFEST).exists():
                raise CheckpointError(
                    f"{folder} cannot be seen on {socket.gethostname()}: all ranks write to one file system. Where they have "
                    f"none, each can torch.save() the state_dict() of its model and optimizer on its own"
                )
            share = content.share(first=replicas.index(replica) == world.rank)
            written = write(folder / folders.file_name(world.rank), share, content.data)
            return [written.size, written.crc32]

        files = {folders.file_name(rank): Written(*one) for rank, one in enumerate(ranks.each(write_own))}
        name = _Runs.names.setdefault(run, folder.name.rpartition("-")[2])
        manifest = Manifest(name, content.steps, files, _parts(replicas))
        final = Path(ranks.first(lambda: str(unfinished.finish(manifest))))
    if world.rank == 0:
        _tidy(final, name, keep)
    return final


def _check_same(name: str, values: list[Any], rank: int, call: str) -> None:
    """Raise MismatchError unless all ranks gave the same."""
    for place, value in enumerate(values):
        if value != values[0]:
            raise MismatchError(f"rank {rank}: {call}: {name} is {value!r} on rank {place} but {values[0]!r} on rank 0")


def _parts(replicas: list[int]) -> tuple[tuple[str, ...], ...]:
    """The files of each replica, of the numbers of all ranks' replicas."""
    members: dict[int, list[str]] = {}
    for rank, replica in enumerate(replicas):
        members.setdefault(replica, []).append(folders.file_name(rank))
    return tuple(tuple(members[replica]) for replica in sorted(members))


def _tidy(final: Path, run: str, keep: int | None) -> None:
    """Remove the run's older checkpoints, and tell of other runs' ones. On rank 0, once the new one is complete."""
    try:
        found = folders.runs_of(final.parent)
        if keep is not None:
            folders.remove_old([path for path, owner in found.items() if owner == run], keep)
    except OSError as error:
        log.warning("save_checkpoint(): an older checkpoint cannot be removed: %s", error)
        return
    foreign = [path.name for path, owner in found.items() if owner != run]
    if foreign and final.parent not in _Runs.warned:
        _Runs.warned.add(final.parent)
        warn_user(
            f"rank 0: save_checkpoint(): {final.parent} has checkpoints of another run too, {foreign[-1]} the newest: they stay, "
            f"and keep= does not count them. load_checkpoint takes whichever was written last; to go on with a run, load its "
            f"checkpoint before the first save, and give each run a folder of its own",
            ForeignCheckpointWarning,
        )


@made_again
@collective("load_checkpoint()")
def load_checkpoint(
    path: str | Path, model: nn.Module, opt: DecentralizedOptimizer, *, trusted: bool = False
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into a model and its optimizer. Collective; discards messages in flight.

    With as many ranks as were saved, each takes up its own part, bit for bit. With another number, all ranks start from
    the mean over the saved ranks of parameters, float buffers and states (of push_sum weighed by its scalars, which then
    start anew at 1), with rank 0's counters and param groups; every saved rank is read by one rank.

    Every byte is compared with its checksum before anything is changed, and nothing that was read is executed.

    Args:
        path: a checkpoint, or a run's folder, of which it takes the newest one: that which was written last, whatever its step.
        trusted: read a folder of `torch.distributed.checkpoint` too, in which somebody saved `{"model": ..., "optimizer": ...}`
            of `torch.distributed.checkpoint.state_dict.get_state_dict`: every rank starts from that. torch *executes* what is
            pickled in it, and compares no checksums.

    Returns:
        `extra` as it was saved by this rank, or by rank 0 where numbers differ (of a sharded replica: by its first rank).
        Tensors are on the CPU. Of a folder of torch: nothing.

    Raises, on all ranks alike, before anything is changed:
        CheckpointError: there is no checkpoint, or a file of it is missing, damaged or foreign; names it, and a rank that
            noticed it.
        ValueError: it is one of another model or algorithm.
        MismatchError: `path` or `trusted` differ between ranks.
        PeerTimeout: a rank did not come.
    """
    world, view = find_group(), _replicas(opt)
    ranks = Outcome(world, "load_checkpoint()")
    described = ranks.each(lambda: [os.fspath(path), trusted, view.rank])
    paths, words, replicas = ([one[place] for one in described] for place in range(3))
    _check_same("path", paths, world.rank, "load_checkpoint()")
    _check_same("trusted", words, world.rank, "load_checkpoint()")
    place = replicas[: world.rank].count(view.rank)
    chosen, checksum = ranks.first(lambda: _choose(Path(os.path.realpath(path)), trusted))
    if checksum is None:
        theirs = OfTorch(Path(chosen))
        ranks.own(lambda: theirs.read(model, opt))
        theirs.adopt(model, opt)
        return {}
    with Saved(Path(chosen)) as saved:

        def read() -> tuple[dict[str, Tensor], dict[str, Any], Sums | None]:
            with folders.advising(saved.folder):
                saved.open(checksum)
                found = _read(saved, model, opt, view, place)
                # Between them ranks look at every byte.
                saved.check_rest(sorted(saved.manifest.files)[world.rank :: world.size])
            return found

        tensors, others, sums = ranks.own(read)
        if sums is not None:
            tensors = _means(sums, model, view)
    _Runs.names[saved.folder.parent] = saved.manifest.run
    adopt(tensors, others, model, opt)
    extra: dict[str, Any] = others["extra"]
    return extra


def _choose(path: Path, trusted: bool) -> tuple[str, int | None]:
    """The checkpoint that is meant, and the checksum of its manifest; None if it is one of torch."""
    folder = folders.find(path)
    if folder is None and is_of_torch(path):
        if not trusted:
            refuse(path)
        return str(path), None
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint written by fusedfog.save_checkpoint")
    with folders.advising(folder):
        return str(folder), folders.read_manifest(folder)[1]


def _read(
    saved: Saved, model: nn.Module, opt: DecentralizedOptimizer, view: GroupView, place: int
) -> tuple[dict[str, Tensor], dict[str, Any], Sums | None]:
    """A rank's tensors and the rest; or, of another number of replicas, no tensors yet but sums over some of the parts.

    Args:
        view: this rank's replica among all replicas.
        place: its place among the ranks that have shards of it.
    """
    like = shards_of(model, opt)
    part = saved.part(view.rank if len(saved) == view.size else 0)
    others = part.others(place if len(saved) == view.size and place < len(part.files) else 0)
    check_model(saved.folder, model, part, others)
    if len(saved) == view.size:
        return {name: part.read(name, like.get(name)) for name in part.names()}, others, None
    sums = Sums(saved, like)
    # A rank of a sharded replica holds a part that no other reads, so it reads all of them by itself.
    for number in range(0, len(saved)) if like else range(view.rank, len(saved), view.size):
        sums.add(number)
    return {}, sums.others, sums


def _means(sums: Sums, model: nn.Module, view: GroupView) -> dict[str, Tensor]:
    """The means over all parts; collective, unless each rank has read all of them."""
    if not sums.sharded and view.size > 1:
        device = next(model.parameters()).device
        for name, total in sums.totals.items():
            # By gloo in an elastic run, where nobody ends a wait on a GPU for one that has died.
            moved = total if Run.current() is not None else total.to(device)
            guarded(view, partial(dist.all_reduce, moved))
            sums.totals[name] = moved.cpu()
    clock = sums.others["optimizer"]["fusedfog"]
    clock |= {"push_sum": None, "masses": None, "encoded": False, "intervals": None}
    for key in origin.KEYS:
        clock.pop(key, None)
    return sums.means()


def _replicas(opt: DecentralizedOptimizer) -> GroupView:
    """This rank's replica among all replicas of the model: itself among all ranks, unless parameters are sharded."""
    engine = opt._engine
    if engine.sharding is None:
        return find_group()
    communicator = measuring_communicator(engine, opt._options)
    return communicator.view if communicator is not None else GroupView(0, 1, None)
