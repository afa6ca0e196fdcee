"""What is set before an elastic run has groups of NCCL's."""

from __future__ import annotations

import os
import threading

import pytest

from fusedfog.comm.elastic import nccl


def test_torchs_watchdog_is_told_to_leave_the_process_alone_whatever_a_launcher_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in nccl._SETTINGS:
        monkeypatch.setenv(name, "1")  # As torchrun does with the first.
    monkeypatch.setattr(nccl._Used, "backend", "")
    assert nccl.backend() is None and nccl.backends("gloo") == "gloo"
    nccl.use()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert nccl.backend() == "nccl" and nccl.backends("gloo") == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize(("name", "value"), [("TORCH_DISTRIBUTED_DEBUG", "detail"), ("TORCH_NCCL_DESYNC_DEBUG", "1")])
def test_what_has_it_end_the_process_all_the_same_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.setattr(nccl._Used, "backend", "")
    with pytest.raises(ValueError, match="unset them"):
        nccl.use()
    assert nccl.backend() is None and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


class Backend:
    """Of a group that is to be aborted."""

    def __init__(self, error: str = "", hangs: bool = False) -> None:
        self.error, self.hangs, self.over = error, hangs, threading.Event()

    def abort(self) -> None:
        if self.hangs:
            threading.Event().wait()
        if self.error:
            raise RuntimeError(self.error)
        self.over.set()

    def is_completed(self) -> bool:
        """Also stands for a work of its own."""
        return self.over.is_set()


def abort(monkeypatch: pytest.MonkeyPatch, *backends: Backend, within: float = 60.0) -> None:
    monkeypatch.setattr(nccl, "_of_gpus", lambda groups: list(backends))
    monkeypatch.setattr(nccl, "_ABORTED_WITHIN", within)
    nccl.abort_all(backends)  # type: ignore[arg-type]


def test_all_are_aborted_also_beside_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Backend(hangs=True), Backend()
    with pytest.raises(nccl.NotAborted, match="Start this process again"):
        abort(monkeypatch, one, other, within=0.2)
    assert other.over.wait(60)


def test_an_abort_that_fails_or_ends_nothing_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nccl.NotAborted, match=r"\(unhandled cuda error\)"):
        abort(monkeypatch, Backend("unhandled cuda error"))
    still = Backend()
    monkeypatch.setattr(still, "is_completed", lambda: False)
    with pytest.raises(nccl.NotAborted):
        abort(monkeypatch, still, within=0.2)
    abort(monkeypatch, Backend(), Backend())
