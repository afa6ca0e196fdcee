"""`fusedfog run`, as a user types it: ranks are short scripts without torch, and the launcher is this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ports import free_port
from torch.distributed import TCPStore

from fusedfog.cli import run_launcher, run_stores
from fusedfog.cli.main import main
from fusedfog.cli.run_stores import Stores, connect, host_store, parse_stores, show_stores
from fusedfog.comm.elastic.record import Record, Seat
from fusedfog.errors import LaunchError

PATIENCE = 240.0

RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
slot, incarnation = int(os.environ["RANK"]), int(os.environ["FUSEDFOG_INCARNATION"])
def note(name, text=""): (folder / f"{slot}.{incarnation}.{name}").write_text(text)
def wait(name):
    while not (folder / name).exists(): time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run_launcher, run_stores):
        monkeypatch.setattr(module, "EVERY", 0.05)
    monkeypatch.setattr(run_stores, "DEADLINE", 5.0)
    monkeypatch.setattr(run_launcher, "STILL", 0.5)


@pytest.fixture
def port() -> int:
    return free_port()


def launch(folder: Path, body: str, *options: str, ranks: int = 2) -> int:
    script = folder / "rank.py"
    script.write_text(RANK + body)
    return main(["run", "--nproc-per-node", str(ranks), *options, str(script), str(folder)])


@contextlib.contextmanager
def meanwhile(function: Callable[[], None]) -> Iterator[None]:
    """Call it in a thread; what it raises is raised at the end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def patient(store: TCPStore) -> TCPStore:
    """The same, for the test's own questions: the launcher's deadlines are short here, and answers late on a busy machine."""
    store.set_timeout(timedelta(seconds=PATIENCE))
    return store


class Run:
    """The store of a run that is being launched at this port, as its ranks see it."""

    def __init__(self, port: int, folder: Path, name: str = "r") -> None:
        self.options = ("--stores", f"127.0.0.1:{port}", "--run-id", name)
        self.folder, self._port, self._prefix = folder, port, f"fusedfog/{name}/"
        self._store: TCPStore | None = None

    def store(self) -> TCPStore:
        while self._store is None:
            time.sleep(0.02)
            with contextlib.suppress(OSError, RuntimeError):
                self._store = patient(connect(("127.0.0.1", self._port)))
        return self._store

    def be_elastic(self) -> None:
        self.store().set(self._prefix + "slot/1", "{}")

    def get(self, key: str) -> str:
        return self.store().get(self._prefix + key).decode() if self.store().check([self._prefix + key]) else ""

    def noted(self, name: str) -> str:
        path = self.folder / name
        until(path.exists)
        return path.read_text()

    def tell(self, name: str) -> None:
        (self.folder / name).touch()


# ------------------------------------------------------------------------------------------------- as torchrun's ranks


def test_ranks_have_the_variables_that_torchrun_sets_and_those_of_members(tmp_path: Path) -> None:
    assert launch(tmp_path, "note('env', json.dumps(dict(os.environ)))", "--max-restarts", "5") == 0
    first, second = (json.loads((tmp_path / f"{slot}.0.env").read_text()) for slot in (0, 1))
    assert second["RANK"] == second["LOCAL_RANK"] == second["ROLE_RANK"] == second["FUSEDFOG_SLOT"] == "1"
    assert (
        first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == first["ROLE_WORLD_SIZE"] == first["FUSEDFOG_SLOTS"] == "2"
    )
    assert first["GROUP_RANK"] == "0" and first["GROUP_WORLD_SIZE"] == "1" and first["ROLE_NAME"] == "default"
    assert first["FUSEDFOG_STORES"] == f"{first['MASTER_ADDR']}:{first['MASTER_PORT']}"
    assert first["TORCHELASTIC_USE_AGENT_STORE"] == "True" and first["TORCHELASTIC_MAX_RESTARTS"] == "5"
    assert first["TORCHELASTIC_RUN_ID"] == first["FUSEDFOG_RUN_ID"] == second["FUSEDFOG_RUN_ID"]
    assert first["TORCHELASTIC_RESTART_COUNT"] == first["FUSEDFOG_INCARNATION"] == "0"
    assert first["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")


def test_a_failed_rank_of_a_script_that_is_not_elastic_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
def end(number, frame):
    note('asked', signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
note('ready')
if slot == 1:
    wait('0.0.ready')
    os._exit(7)
time.sleep(60)
"""
    assert launch(tmp_path, body) == 1
    assert (tmp_path / "0.0.asked").read_text() == "SIGTERM"
    assert not list(tmp_path.glob("*.1.*"))
    assert "rank 1 (process " in (said := capfd.readouterr().err) and "ended with exit code 7: all end, since" in said


def test_a_rank_that_does_not_heed_the_request_to_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_launcher, "GRACE", 0.3)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready')\nif slot: wait('0.0.ready'); sys.exit(1)\ntime.sleep(60)"
    assert launch(tmp_path, body) == 1
    assert "rank 0: not ended within 0.3 s: SIGKILL" in capfd.readouterr().err


def test_what_a_dead_rank_had_started_is_ended_too(tmp_path: Path) -> None:
    body = "import subprocess; note('loader', str(subprocess.Popen(['sleep', '600']).pid))"
    assert launch(tmp_path, body, ranks=1) == 0
    loader = int((tmp_path / "0.0.loader").read_text())

    def gone() -> bool:
        path = Path(f"/proc/{loader}/stat")
        return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_end_is_passed_on_and_nobody_is_started_again(
    tmp_path: Path, port: int, number: signal.Signals
) -> None:
    run = Run(port, tmp_path)

    def send() -> None:
        run.be_elastic()
        run.noted("0.0.ready"), run.noted("1.0.ready")
        os.kill(os.getpid(), number)

    body = f"""
def end(number, frame):
    note('asked', signal.Signals(number).name)
    os._exit(slot)
signal.signal({int(number)}, end)
note('ready')
time.sleep(60)
"""
    with meanwhile(send):
        assert launch(tmp_path, body, *run.options) == 128 + number
    assert [(tmp_path / f"{slot}.0.asked").read_text() for slot in (0, 1)] == [number.name] * 2
    assert not list(tmp_path.glob("*.1.*"))


def test_other_signals_are_passed_on_and_training_goes_on(tmp_path: Path, port: int) -> None:
    run = Run(port, tmp_path)

    def send() -> None:
        run.noted("0.0.ready"), run.noted("1.0.ready")
        os.kill(os.getpid(), signal.SIGUSR1)

    body = "signal.signal(signal.SIGUSR1, lambda *_: note('asked')); note('ready'); wait(f'{slot}.0.asked')"
    with meanwhile(send):
        assert launch(tmp_path, body, *run.options) == 0


def test_output_goes_where_it_goes_with_torchrun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('out', slot, flush=True); print('err', slot, file=sys.stderr, flush=True)"
    assert launch(tmp_path, body) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["out 0", "out 1"] and "err 0\n" in captured.err
    assert launch(tmp_path, body, "--log-dir", str(tmp_path / "logs"), "--run-id", "x", "-t", "1:1", "-r", "0:3") == 0
    captured = capfd.readouterr()
    assert captured.out.splitlines() == ["[default1]:out 1"] and "err 0" not in captured.err and "err 1" in captured.err
    (folder,) = (tmp_path / "logs").glob("x_*")
    assert (folder / "attempt_0/0/stderr.log").read_text() == "err 0\n"
    assert (folder / "attempt_0/1/stdout.log").read_text() == "out 1\n"
    assert f"output is kept in {folder}" in captured.err


def test_modules_and_programs_are_run_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--nproc-per-node=1", "-m", "json.tool", "--help"]) == 0
    assert "usage: python -m json.tool" in capfd.readouterr().out
    assert main(["run", "--nproc_per_node", "1", "--no-python", "printenv", "RANK"]) == 0
    assert capfd.readouterr().out == "0\n"


# ------------------------------------------------------------------------------------------------------------- elastic


def test_the_dead_alone_are_started_again_and_their_deaths_are_certified(
    tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(port, tmp_path)

    def watch() -> None:
        run.be_elastic()
        run.tell("elastic")
        until(lambda: run.get("dead/1.0") and run.get("dead/1.1"))
        assert (run.get("dead/1.0"), run.get("dead/1.1")) == ("signal SIGKILL", "exit code 4")
        assert not run.get("dead/0.0")
        run.tell("end")

    body = """
note('pid', str(os.getpid()))
wait('elastic')
if slot == 1 and incarnation == 0: os.kill(os.getpid(), signal.SIGKILL)
if slot == 1 and incarnation == 1: sys.exit(4)
wait('end'); wait('1.2.pid')
"""
    with meanwhile(watch):
        assert launch(tmp_path, body, *run.options) == 0
    assert sorted(path.name for path in tmp_path.glob("*.pid")) == ["0.0.pid", "1.0.pid", "1.1.pid", "1.2.pid"]
    said = capfd.readouterr().err
    assert "ended with signal SIGKILL; it is started again as member 1.1 (restart 1 of 3)" in said
    assert "ended with exit code 4; it is started again as member 1.2 (restart 2 of 3)" in said


def test_a_rank_that_fails_too_often_is_given_up_and_the_others_come_to_the_end(
    tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(port, tmp_path)

    def watch() -> None:
        run.be_elastic()
        run.tell("elastic")
        until(lambda: run.get("dead/1.1"))
        run.tell("given up")

    body = "note('ran'); wait('elastic')\nif slot: sys.exit(3)\nwait('given up'); note('end')"
    with meanwhile(watch):
        assert launch(tmp_path, body, *run.options, "--max-restarts", "1") == 1
    assert (tmp_path / "0.0.end").exists() and not (tmp_path / "1.2.ran").exists()
    assert "ended with exit code 3; it is not started again, after 1 restarts" in capfd.readouterr().err


def test_nobody_is_started_again_for_a_run_that_is_at_its_end(
    tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(port, tmp_path)

    def watch() -> None:
        run.be_elastic()
        run.tell("elastic")
        until(lambda: run.get("dead/0.0") == "exit code 0")
        run.tell("late")

    with meanwhile(watch):
        assert launch(tmp_path, "note('ran'); wait('elastic')\nif slot: wait('late'); sys.exit(3)", *run.options) == 1
    assert not (tmp_path / "1.1.ran").exists()
    assert "others have come to the end of the program" in capfd.readouterr().err


def test_heartbeats_tell_a_stopped_process_from_one_that_only_holds_its_lock(tmp_path: Path, port: int) -> None:
    run = Run(port, tmp_path)

    def more(uid: str, than: int) -> Callable[[], bool]:
        return lambda: int(run.get(f"beat/{uid}") or 0) > than

    def watch() -> None:
        pid = int(run.noted("1.0.ready"))
        until(more("1.0", 0))
        os.kill(pid, signal.SIGSTOP)
        until(lambda: "T" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        until(more("0.0", int(run.get("beat/0.0")) + 2))  # A beat may have been on its way.
        stopped_at = run.get("beat/1.0")
        until(more("0.0", int(run.get("beat/0.0")) + 5))
        assert run.get("beat/1.0") == stopped_at
        os.kill(pid, signal.SIGCONT)
        until(more("1.0", int(stopped_at)))
        run.tell("end")

    # Rank 0 backtracks in a regular expression, which holds the interpreter's lock: none of its own threads could beat.
    body = """
note('ready', str(os.getpid()))
if slot == 1: wait('end')
else:
    import re
    while not (folder / 'end').exists(): re.match('(a+)+b', 'a' * 22)
"""
    with meanwhile(watch):
        assert launch(tmp_path, body, *run.options) == 0


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nproc-per-node", "0", "x.py"], "must be at least 1"),
        (["--nproc-per-node", "many", "x.py"], "--nproc-per-node many: Unsupported nproc_per_node value"),
        (["--max-restarts", "-1", "x.py"], "--max-restarts at least 0"),
        (["--nnodes", "2", "--stores", "a:1,b:1", "x.py"], "--nnodes 2 needs --node-rank"),
        (
            ["--nnodes", "2", "--node-rank", "2", "--stores", "a:1", "x.py"],
            "machines count from 0 to 1, so that this one",
        ),
        (["--node-rank", "1", "x.py"], "machines count from 0 to 0"),
        (["--nnodes", "2", "--node-rank", "0", "x.py"], "needs --stores, where the machines meet"),
        (["--stores", "a:1,b:1", "x.py"], "2 stores for --nnodes 1"),
        (["--stores", "hostA", "x.py"], "'hostA' is no host and port"),
        (["--stores", "hostA:99999", "x.py"], "'hostA:99999' is no host and port"),
        (["--nnodes", "2", "--node-rank", "0", "--stores", "a:1,a:1", "x.py"], "same address twice"),
        (["no_such_file.py"], "there is no file 'no_such_file.py'"),
        (["--no-python", "no_such_program"], "'no_such_program' is no program"),
        (["--no-python", "-m", "json"], "a module is run by Python"),
        (["-t", "7", "-m", "json.tool"], "-r and -t: 7 does not match"),
        (["--run-id", "a/b", "-m", "json.tool"], "make a run's name"),
    ],
)
def test_nonsense_is_refused_before_anything_is_started(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    assert main(["run", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_port_in_use_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert launch(tmp_path, "", "--stores", f"127.0.0.1:{number}") == 2
    assert f"port {number} of this machine is in use: another launcher" in capsys.readouterr().err


def test_a_second_launcher_for_the_same_places_is_refused(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted = host_store(("127.0.0.1", port))
    hosted.set("fusedfog/r/launcher/1", "hostB (process 12, abcd)")

    def sleep(seconds: float) -> None:
        """The other launcher's heart beats meanwhile, and be it as slow as it may."""
        time.sleep(seconds)
        hosted.set("fusedfog/r/launcher-beat/1", str(time.monotonic()))

    monkeypatch.setattr(run_launcher, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    options = ["--nnodes", "2", "--node-rank", "1", "--run-id", "r", "--stores", f"127.0.0.1:{port}"]
    assert launch(tmp_path, "note('ran')", *options) == 2
    assert "node 1 of the run 'r' is run by hostB (process 12, abcd) already" in capsys.readouterr().err
    assert launch(tmp_path, "note('ran')", *options, ranks=3) == 2
    assert "node 1 of 2 machines of 3 ranks, but the run 'r' is one of 2 machines of 2" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.ran"))


def test_the_places_of_a_launcher_that_has_died_are_taken_with_new_incarnations(tmp_path: Path, port: int) -> None:
    hosted = host_store(("127.0.0.1", port))
    hosted.set("fusedfog/r/launcher/1", "hostB (process 12, abcd)")
    hosted.set("fusedfog/r/launcher-beat/1", "17")
    hosted.set("fusedfog/r/incarnation/3", "1")
    options = ["--nnodes", "2", "--node-rank", "1", "--run-id", "r", "--stores", f"127.0.0.1:{port}"]
    assert launch(tmp_path, "note('ran')", *options) == 0
    assert sorted(path.name for path in tmp_path.glob("*.ran")) == ["2.0.ran", "3.2.ran"]
    assert "abcd" not in hosted.get("fusedfog/r/launcher/1").decode()


def test_a_launcher_says_where_it_looked_for_a_store(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_launcher, "MEETING", 0.2)
    options = ["--nnodes", "2", "--node-rank", "1", "--stores", f"127.0.0.1:{port}"]
    assert launch(tmp_path, "note('ran')", *options) == 2
    assert f"no store answers at 127.0.0.1:{port} within 0.2 s: is the launcher of node 0" in capsys.readouterr().err


def test_ranks_wait_for_the_first_store_and_use_the_one_that_knows_most_of_their_run(tmp_path: Path, port: int) -> None:
    own = free_port()
    both = f"127.0.0.1:{port},127.0.0.1:{own}"
    options = ["--nnodes", "2", "--node-rank", "1", "--run-id", "r", "--stores", both, "--max-restarts", "1"]
    hosted: list[TCPStore] = []

    def first() -> None:
        store = connect_when_there(own)
        until(lambda: store.check(["fusedfog/r/launcher/1"]))
        assert not list(tmp_path.glob("*.env"))
        hosted.append(host_store(("127.0.0.1", port)))
        until(lambda: len(list(tmp_path.glob("*.0.env"))) == 2)
        record = Record(3, (Seat("2.0", "h", "127.0.0.1", 1, ""),))
        store.set("fusedfog/r/record", record.text())
        (tmp_path / "die").touch()
        until(lambda: hosted[0].check(["fusedfog/r/finished/1"]))
        hosted[0].set("fusedfog/r/finished/0", "1")

    def connect_when_there(number: int) -> TCPStore:
        while True:
            time.sleep(0.02)
            with contextlib.suppress(OSError, RuntimeError):
                return patient(connect(("127.0.0.1", number)))

    body = """
note('env', os.environ['FUSEDFOG_STORES'])
if incarnation == 0: wait('die'); sys.exit(1)
wait('2.1.env'); wait('3.1.env')
"""
    with meanwhile(first):
        assert launch(tmp_path, body, *options) == 0
    assert {path.name: path.read_text() for path in tmp_path.glob("*.env")} == {
        "2.0.env": both,
        "3.0.env": both,
        "2.1.env": f"127.0.0.1:{own},127.0.0.1:{port}",
        "3.1.env": f"127.0.0.1:{own},127.0.0.1:{port}",
    }


def test_addresses_are_read_and_written() -> None:
    assert parse_stores("a:1, [fd00::1]:29400") == [("a", 1), ("fd00::1", 29400)]
    assert parse_stores(show_stores([("a", 1), ("fd00::1", 29400)])) == [("a", 1), ("fd00::1", 29400)]
    with pytest.raises(LaunchError, match="no host and port"):
        parse_stores("a:1,")


# -------------------------------------------------------------------------------------------------------------- stores


def test_facts_are_written_again_into_a_store_that_comes_back_empty(port: int) -> None:
    hosted = [host_store(("127.0.0.1", port))]
    stores = Stores([("127.0.0.1", port)], "p/")
    stores.state("dead/1.0", "exit code 3")
    until(lambda: hosted[0].check(["p/dead/1.0"]))
    hosted.clear()
    until(lambda: not stores.ask(lambda store, prefix: True))
    again = host_store(("127.0.0.1", port))
    until(lambda: again.check(["p/dead/1.0"]))
    stores.close()


def test_a_store_that_is_silent_or_gone_does_not_keep_anything_from_the_others(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_stores, "DEADLINE", 0.5)
    hosted = patient(host_store(("127.0.0.1", port)))
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        stores = Stores([silent.getsockname()[:2], free.getsockname()[:2], ("127.0.0.1", port)], "p/")
        stores.watch("failed")
        stores.state("dead/1.0", "exit code 3")
        # Hearts beat again and again: a beat is not repeated that a store was too busy to take.
        until(lambda: stores.beat("beat/0.0", "4") or hosted.check(["p/dead/1.0", "p/beat/0.0"]))
        hosted.set("p/failed", "rank 3")
        assert until(lambda: stores.seen("failed")) == ["rank 3"]
        # It may also need more than the half second in which the silent one is given up.
        answers = until(lambda: stores.ask(lambda store, prefix: store.get(prefix + "beat/0.0")))
        assert answers == {("127.0.0.1", port): b"4"}
        stores.close(0.1)


# ---------------------------------------------------------------------------------------------------------- many machines


@pytest.mark.slow
def test_two_machines_meet_and_the_failure_of_one_ends_the_other(
    tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        RANK
        + "note('ran')\n"
        + "if slot == 3 and len(sys.argv) > 2: [wait(f'{other}.0.ran') for other in range(4)]; sys.exit(5)\n"
        + "time.sleep(0 if len(sys.argv) == 2 else 600)"
    )
    both = ["--nproc-per-node", "2", "--nnodes", "2", "--stores", f"127.0.0.1:{port}"]

    def start(node: int, *more: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "fusedfog",
            "run",
            *both,
            "--node-rank",
            str(node),
            str(script),
            str(tmp_path),
            *more,
        ]
        return subprocess.Popen(command)

    def launch_node_0(*more: str) -> int:
        return main(["run", *both, "--node-rank", "0", str(script), str(tmp_path), *more])

    other = start(1)
    assert launch_node_0() == 0
    assert other.wait(PATIENCE) == 0
    other = start(1, "fail")
    assert launch_node_0("fail") == 1
    assert other.wait(PATIENCE) == 1
    said = capfd.readouterr().err
    assert "rank 3 on " in said and "ended with exit code 5: the ranks of this machine end too" in said


@pytest.mark.slow
def test_a_script_that_knows_nothing_of_it_trains_as_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "value = torch.full((1,), float(dist.get_rank() + 1))\n"
        "dist.all_reduce(value)\n"
        "print(f'sum {value.item()} of {dist.get_world_size()}', flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "fusedfog", "run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Two processes write: a line and its end may have the other's line between them.
    assert done.stdout.replace("\n", "") == "sum 3.0 of 2" * 2


@pytest.mark.slow
def test_the_script_of_the_page_runs_as_its_command_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "fusedfog" / "cli" / "README.md").read_text()
    assert "```bash\nfusedfog run --nproc-per-node 4 train.py\n```" in page
    script = page.partition("```python\n")[2].partition("```")[0]
    killed = script.replace("while sampler", "fusedfog.testing.fail_at(rank=1, step=20).__enter__()\nwhile sampler")
    assert killed != script
    (tmp_path / "train.py").write_text(killed)
    command = [sys.executable, "-m", "fusedfog", "run", "--nproc-per-node", "2", str(tmp_path / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path)
    assert "rank 1 (process " in done.stderr and "ended with signal SIGKILL" in done.stderr
    ends = [line for line in done.stdout.splitlines() if line.endswith("has made 48 steps")]
    assert ends, done.stderr
