"""What an optimizer says of itself: one line in the log when it is built, and its `repr`."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog import log as logs
from fusedfog.log import log
from fusedfog.optim.description import bytes_of_exchange


def model(width: int = 40) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.name == "fusedfog"
        self.lines.append(record.getMessage())


def lines_of(make: Any) -> list[str]:
    kept, level = Kept(), log.level
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    try:
        make()
    finally:
        log.removeHandler(kept)
        log.setLevel(level)
    return kept.lines


def built(kind: str, keywords: dict[str, Any]) -> tuple[list[str], str, float, float]:
    """What is logged and shown, the bytes that it says, and those of a step over a period of the topology."""
    keywords = dict(keywords)
    if keywords.get("mesh"):
        keywords["mesh"] = init_device_mesh("cpu", (2, 2))
    opts: list[Any] = []
    net = model()

    def make() -> None:
        opts.append(getattr(fusedfog, kind)(net.parameters(), lr=0.01, **keywords))

    lines = lines_of(make)
    (opt,) = opts
    said = bytes_of_exchange(opt._engine)
    for step in range(7):
        if step == 1:
            before = opt.stats()["bytes_sent"]
        net(torch.ones(2, 40)).sum().backward()
        opt.step()
        opt.zero_grad()
    opt.drain()
    return lines, repr(opt), said, (opt.stats()["bytes_sent"] - before) / 6


AUTO = r"one_peer_exponential \(auto: all ranks are on one machine\)"
LINES = {
    "awc": ("AdamW", {}, rf"^4 ranks, gloo, AdamW awc on {AUTO}, 1.68k parameters in 1 bucket, 7.17 kB a step$"),
    "ring": ("SGD", {"topology": "ring"}, "4 ranks, gloo, SGD awc on ring, 1.68k parameters in 1 bucket, 14.3 kB a step"),
    "atc": ("Adam", {"algorithm": "atc", "bucket_mb": 5e-4}, "4 ranks, gloo, Adam atc on .*, 1.68k parameters in 2 buckets"),
    "tracking": ("SGD", {"algorithm": "momentum_tracking", "momentum": 0.9}, "SGD momentum_tracking on .*, 14.3 kB a step"),
    "push_sum": ("SGD", {"algorithm": "push_sum", "topology": "star"}, "SGD push_sum on star"),
    "int8": ("AdamW", {"wire_dtype": "int8", "topology": "ring"}, "on ring, .* bucket, int8 messages, 3.81 kB a step"),
    "bf16": ("AdamW", {"wire_dtype": "bf16", "topology": "ring"}, "bfloat16 messages, 7.17 kB a step"),
    "every 3": ("AdamW", {"communicate_every": 3}, "7.17 kB every 3 steps$"),
    "averages": ("AdamW", {"global_average_every": 50}, "7.17 kB a step, an average over all ranks every 50 steps$"),
    "mesh": ("AdamW", {"mesh": True}, "over 2 machines of 2 ranks .auto: the machines of mesh=., .* 14.3 kB a step"),
    "parameters": ("AdamW", {"mesh": True, "inside": "parameters"}, "over 2 machines of 2 ranks .*, .* 10.8 kB a step"),
    "start": ("AdamW", {"data_parallel_steps": 9}, f"awc on {AUTO}, after 9 data-parallel steps, 1.68k"),
    "allreduce": ("SGD", {"algorithm": "allreduce"}, "4 ranks, gloo, SGD allreduce, 1.68k parameters in .*, 10.8 kB a step"),
    "local": ("SGD", {"algorithm": "local"}, "^4 ranks, SGD local, 1.68k parameters in 1 bucket, nothing is sent$"),
    "outer": ("SGD", {"algorithm": "local", "outer": fusedfog.Outer(3)}, "local with outer every 3 steps on .*every 3 steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_rank_0_logs_one_line_with_what_it_will_send(ranks: Pool, case: str) -> None:
    kind, keywords, says = LINES[case]
    (first, *others) = ranks.run(4, built, kind, keywords)
    lines, shown, said, measured = first
    assert [one[0] for one in others] == [[]] * 3
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert re.match(rf"{kind} \({keywords.get('algorithm', 'awc')}.*, 4 ranks\nParameter Group 0\n", shown)
    every = keywords.get("communicate_every", 3 if "outer" in keywords else 1)
    if case in ("allreduce", "mesh"):
        assert said <= measured <= said * 1.01  # a few flags travel along
    elif case not in ("push_sum", "start"):  # the star's ranks differ, and rank 0 is its centre
        assert said == measured * every


def test_alone_it_says_so_too() -> None:
    (line,) = lines_of(lambda: fusedfog.AdamW(model().parameters()))
    assert line == "1 rank, AdamW awc, 1.68k parameters in 1 bucket, nothing is sent"
    opt = fusedfog.Decentralized(torch.optim.RMSprop(model().parameters()), algorithm="atc")
    assert repr(opt).startswith("Decentralized(RMSprop) (atc, 1 rank\nParameter Group 0\n")


def copied() -> list[str]:
    opt = fusedfog.SGD(model().parameters(), lr=0.1, topology="ring")
    shown = []
    if fusedfog.is_main():  # alone: building an engine would wait for the others
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            shown.append(repr(other))
            assert other._scheduler is None
    dist.barrier()
    return shown


def test_the_repr_of_a_copy_builds_nothing(ranks: Pool) -> None:
    first, second = ranks.run(2, copied)
    assert [one.partition("\n")[0] for one in first] == ["SGD (awc on ring, not started"] * 2
    assert second == []


def test_a_repr_ends_as_torchs() -> None:
    ours = repr(fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9))
    theirs = repr(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9))
    assert ours == theirs.replace("SGD (", "SGD (awc, 1 rank").replace("    momentum:", "    mix: True\n    momentum:")


# -- FUSEDFOG_LOG ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger as before the import."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", log.level)


def printed(monkeypatch: pytest.MonkeyPatch, level: str | None, *programs: logging.Handler) -> str:
    monkeypatch.setattr(logging.getLogger(), "handlers", list(programs))  # without the test runner's
    monkeypatch.delenv("FUSEDFOG_LOG", raising=False)
    if level is not None:
        monkeypatch.setenv("FUSEDFOG_LOG", level)
    out = io.StringIO()
    with redirect_stderr(out):
        logs.configure()
        logs.configure()
        fusedfog.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    log.setLevel(logging.NOTSET)
    return out.getvalue()


LINE = "fusedfog: 1 rank, SGD awc, 3 parameters in 1 bucket, nothing is sent\n"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("level", "shows"), [(None, ""), ("", ""), ("warning", ""), ("info", LINE), (" INFO ", LINE), ("debug", LINE)]
)
def test_a_library_prints_nothing_unless_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, level: str | None, shows: str
) -> None:
    assert printed(monkeypatch, level) == shows


@pytest.mark.usefixtures("fresh")
def test_a_program_with_logging_of_its_own_sees_no_line_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    assert printed(monkeypatch, "info", kept) == ""
    assert len(kept.lines) == 1


@pytest.mark.usefixtures("fresh")
def test_a_level_that_is_none_warns_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="FUSEDFOG_LOG is one of debug, info, .* is 'inof'; did you mean 'info'"):
        assert printed(monkeypatch, "inof") == ""
