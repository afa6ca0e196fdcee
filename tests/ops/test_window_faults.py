"""Windows while ranks write as fast as they can, are stopped, are killed, or just end: nothing torn, nobody waits."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.ports import free_port
from support.windows import TRANSPORTS, die_inside_lock, held_by_process, transport

import fusedfog


def wait_for_store(key: str) -> None:
    """Without a collective, in which others might be dead."""
    dist.distributed_c10d._get_default_store().wait([key])


def tell(key: str) -> None:
    dist.distributed_c10d._get_default_store().set(key, "")


def told(key: str) -> bool:
    return dist.distributed_c10d._get_default_store().check([key])


def filled_with_numbers(how: str, elements: int, reads: int) -> tuple[int, int]:
    """All ranks but the last write i, i, ..., i; the last reads, and counts what it saw and what was torn."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    x = torch.zeros(elements, dtype=torch.float64)
    seen = torn = 0
    with transport(how), fusedfog.Window(x, [(peer, last) for peer in range(last)]) as window:
        dist.barrier()
        number = 0
        while rank != last and not told("enough"):
            for _ in range(20 if elements < 10**5 else 1):
                number += 1
                x.fill_(float(number))
                window.put()
        newest = [0.0] * last
        while rank == last and seen < reads:
            for peer in range(last):
                value = window.update(0.0, {peer: 1.0})
                low, high = value.aminmax()
                torn += int(low != high or low.item() < newest[peer])
                newest[peer] = high.item()
                seen += 1
        tell("enough")
        dist.barrier()
    return seen, torn


@pytest.mark.parametrize(
    ("how", "elements", "reads"),
    [
        ("memory", 1000, 2000),
        ("tcp", 1000, 500),
        ("memory", 25 * 2**17, 20),
        pytest.param("memory", 1000, 100_000, marks=pytest.mark.slow),
        pytest.param("tcp", 1000, 20_000, marks=pytest.mark.slow),
        pytest.param("memory", 25 * 2**17, 1000, marks=pytest.mark.slow),
    ],
)
def test_no_reader_sees_half_a_message_or_an_older_one(ranks: Pool, how: str, elements: int, reads: int) -> None:
    seen, torn = ranks.run(3, filled_with_numbers, how, elements, reads, timeout=600, pg_timeout=500)[-1]
    assert seen >= reads and torn == 0


def added_integers(how: str, messages: int, reads: bool) -> tuple[list[int], int, float]:
    """All send to all, and collect at random moments, or not before the end."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.zeros(100, dtype=torch.int64)
    chance = random.Random(rank)
    given = 0
    with transport(how), fusedfog.Window(x, "fully_connected", zero_init=True) as window:
        dist.barrier()
        for _ in range(messages):
            amount = chance.randrange(1000)
            window.accumulate(torch.full((100,), amount))
            given += amount * (size - 1)
            if reads and chance.random() < 0.1:
                window.collect()
        window.fence(60)
        dist.barrier()
        window.collect()
        return x.tolist(), given, window.p


@pytest.mark.parametrize("how", TRANSPORTS)
@pytest.mark.parametrize("reads", [True, False])
def test_what_is_added_is_there_exactly_once(ranks: Pool, how: str, reads: bool) -> None:
    found = ranks.run(3, added_integers, how, 300, reads)
    assert sum(sum(values) for values, _, _ in found) == 100 * sum(given for _, given, _ in found)
    assert all(len(set(values)) == 1 for values, _, _ in found)
    # Each message brought the sender's p, which grows as it collects.
    assert all(p >= 1 + 2 * 300 for _, _, p in found)


def stopped(process: int) -> bool:
    """Whether all threads of a process stand still."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{process}/task").glob("*/stat")]
    return set(states) <= {"T", "t"}


def fence(window: fusedfog.Window, seconds: float) -> str:
    """The error of a fence in which rank 1 does not confirm; "" for none."""
    while True:
        try:
            window.fence(seconds)
            return ""
        except RuntimeError as error:
            # Whoever lives confirms in the end: on a busy machine a fence of a second may name both of the others.
            if not isinstance(error, fusedfog.PeerTimeout) or "from rank 1 within" in str(error):
                return f"{type(error).__name__}: {error}"


INSIDE_LOCK = "SIGKILL inside the lock of an edge's memory"


def beside_a_victim(how: str, size: int, signal_name: str, delay: float) -> dict[str, Any]:
    """Rank 1 writes, adds and takes the mutex until it is stopped, killed or kills itself; the others go on."""
    rank = dist.get_rank()
    x = torch.full((size,), float(rank), dtype=torch.float64)
    found: dict[str, Any] = {"torn": 0}
    with transport(how):
        window = fusedfog.Window(x, "fully_connected")
    dist.barrier()
    if rank == 1:
        tell(f"victim/{os.getpid()}")
        dist.distributed_c10d._get_default_store().set("pid", str(os.getpid()))
        if os.fork() == 0:  # As a DataLoader worker that outlives it for a moment.
            time.sleep(delay + 1.0)
            os._exit(0)
        number, begin = 0, time.monotonic()
        while True:
            if signal_name == INSIDE_LOCK and time.monotonic() > begin + delay:
                die_inside_lock()
            number += 1
            x.fill_(float(number))
            window.put()
            window.accumulate(torch.zeros_like(x))
            with window.mutex([0]):
                window.update(1.0, {0: 0.0, 2: 0.0})
    store = dist.distributed_c10d._get_default_store()
    victim = int(store.get("pid"))
    if rank == 0:
        time.sleep(delay)
        if signal_name != INSIDE_LOCK:
            os.kill(victim, getattr(signal, signal_name))
        while signal_name == "SIGSTOP" and not stopped(victim):
            time.sleep(0.01)  # A thread that runs on another core answers for another moment.
        tell("done")
    rounds = 0
    while rounds < 30 or not told("done") or (signal_name == INSIDE_LOCK and window.alive[1]):
        rounds += 1
        window.put(weights=[2 - rank, 1])
        window.update(0.0, {1: 1.0})
        found["torn"] += int(x.min() != x.max())
        with window.mutex([2 - rank]):
            pass
    window.put(weights=[2 - rank, 1])  # What the victim had before it was stopped it has confirmed, perhaps.
    # A process that stands still is named after this time; one that has ended is as soon as the living have confirmed.
    found["fence"] = fence(window, 1.0 if signal_name == "SIGSTOP" else 20.0)
    window.fence(20.0) if signal_name != "SIGSTOP" else None
    found["alive"] = window.alive
    tell(f"through/{rank}")
    wait_for_store("through/0"), wait_for_store("through/2")
    if rank == 0 and signal_name == "SIGSTOP":
        os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    window.close()
    found["close"] = time.monotonic() - begin
    return found


@pytest.mark.parametrize(("how", "ending"), [("memory", "SIGKILL"), ("tcp", "SIGKILL"), ("memory", INSIDE_LOCK)])
def test_a_killed_rank_tears_nothing_and_holds_up_nobody(ranks: Pool, how: str, ending: str) -> None:
    kill_and_look(ranks, how, 0.05, 1000, ending)


def kill_and_look(ranks: Pool, how: str, delay: float, size: int, ending: str) -> None:
    outcomes = ranks.outcomes(3, beside_a_victim, how, size, ending, delay, timeout=120)
    assert outcomes[1].error_type == "Died"
    for rank in (0, 2):
        found = outcomes[rank].value
        assert outcomes[rank].ok, outcomes[rank]
        assert found["torn"] == 0
        assert found["alive"] == {1: False, 2 - rank: True}
        assert found["fence"] == "" or "rank 1 ended before" in found["fence"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ranks_killed_at_fifty_random_moments_tear_nothing_and_hold_up_nobody(ranks: Pool, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(50):
        how, ending = TRANSPORTS[number % 4 == 3], INSIDE_LOCK if number % 4 == 2 else "SIGKILL"
        kill_and_look(ranks, how, chance.uniform(0.0, 0.1), chance.choice([10, 1000, 10**6]), ending)


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_stopped_rank_holds_up_nobody_and_fence_names_it(ranks: Pool, how: str) -> None:
    outcomes = ranks.outcomes(3, beside_a_victim, how, 1000, "SIGSTOP", 0.05)
    assert outcomes[1].error_type == "Died"
    for rank in (0, 2):
        found = outcomes[rank].value
        assert outcomes[rank].ok, outcomes[rank]
        assert found["torn"] == 0 and found["alive"] == {1: True, 2 - rank: True}
        assert f"PeerTimeout: rank {rank}: Window: fence: nothing from rank 1 within 1 s" in found["fence"]


def fence_once_after_a_death() -> list[str]:
    rank, found = dist.get_rank(), []
    x = torch.zeros(3)
    window = fusedfog.Window(x, "fully_connected")
    window.fence(20)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while window.alive[1]:
        time.sleep(0.01)
    for call in (window.fence, window.put, window.fence, window.get, window.mutex([1]).__enter__):
        try:
            call()
            found.append("")
        except fusedfog.ExchangeError as error:
            found.append(str(error))
    tell(f"through/{rank}")
    wait_for_store("through/0"), wait_for_store("through/2")
    window.close()
    return found


def test_what_was_sent_to_the_dead_is_dropped_and_what_needs_them_says_so(ranks: Pool) -> None:
    outcomes = ranks.outcomes(3, fence_once_after_a_death)
    for rank in (0, 2):
        fence, put, again, get, mutex = outcomes[rank].value
        assert fence == put == again == ""  # All that was sent had been confirmed; nothing was sent since.
        assert "get cannot be: rank 1 has ended" in get and "mutex cannot be: rank 1 has ended" in mutex


SCRIPT = """
import torch
import fusedfog
from fusedfog.comm.window.memory import Sharing

fusedfog.init()
windows = []
for Sharing.allowed in (True, False):
    windows.append(fusedfog.Window(torch.full((1 << 20,), float(fusedfog.rank())), "fully_connected"))
for _ in range(3):
    for window in windows:
        window.put()
        window.accumulate()
{last}
"""


@pytest.mark.parametrize(
    ("last", "times"),
    [
        pytest.param("", 1, marks=pytest.mark.slow),
        pytest.param("", 30, marks=pytest.mark.slow),
        pytest.param("torch.distributed.destroy_process_group()", 1, marks=pytest.mark.slow),
        # Rank 0 hosts the store, and ends first.
        pytest.param("import time; time.sleep(3.0 * (fusedfog.rank() > 0)); window.put()", 1, marks=pytest.mark.slow),
        pytest.param("import os; os.fork() or os._exit(0)", 1, marks=pytest.mark.slow),
    ],
)
def test_a_script_that_just_ends_exits_with_status_zero(tmp_path: Path, last: str, times: int) -> None:
    script, mark = tmp_path / "train.py", f"FUSEDFOG_TEST_OF_EXITS={tmp_path}"
    script.write_text(SCRIPT.format(last=last))
    for _ in range(times):
        base = os.environ | {
            "WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "FUSEDFOG_TEST_OF_EXITS": str(tmp_path),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=base | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
        for rank in ranks:
            output, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
            # torch says so when its store's connection is reset at the very beginning, and connects again.
            assert not output and not re.sub(r"\[W[^\n]* TCPStore\.cpp:.*?\n\n", "", errors, flags=re.DOTALL)
        assert not processes_with(mark) or "fork" in last
    assert not [name for name in os.listdir("/dev/shm") if "fusedfog" in name]


def processes_with(variable: str) -> list[str]:
    """Processes with this environment: what somebody has left."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if variable.encode() in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(name)
    return found


SMALL_SHM = """
import os
import torch
import fusedfog

fusedfog.init()
room = os.statvfs("/dev/shm")
assert room.f_blocks * room.f_frsize <= 65536
x = torch.full((25 << 17,), float(fusedfog.rank()), dtype=torch.float64)
with fusedfog.Window(x, "ring") as window:
    assert all(link.courier is None for link in window._endpoint.links())
    window.put()
    window.fence()
    torch.distributed.barrier()
    assert window.update().unique().tolist() == [0.5]
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_memory_that_ranks_share_does_not_depend_on_dev_shm(tmp_path: Path) -> None:
    """As in a container, where /dev/shm is small; a mount namespace of its own has one of 64 kB."""
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "--mount", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    script = tmp_path / "train.py"
    script.write_text(SMALL_SHM)
    launch = f"{small} && exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 {script}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", launch], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def many_steps(how: str, steps: int) -> list[tuple[int, int, int]]:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    found = []
    with transport(how), fusedfog.Window(torch.zeros(10_000), "ring") as window:
        dist.barrier()
        for step in range(steps):
            window.put()
            window.accumulate(self_weight=0.5)
            window.update()
            if step % 50 == 0:
                window.fence(60)
            if step in (steps // 5, steps - 1):
                found.append((resident(), *held_by_process()))
        dist.barrier()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_long_run_takes_no_more_memory_threads_or_descriptors(ranks: Pool, how: str) -> None:
    for early, late in ranks.run(3, many_steps, how, 20_000, timeout=600, pg_timeout=500):
        assert late[1:] == early[1:]
        assert late[0] - early[0] < 2 * 2**20
