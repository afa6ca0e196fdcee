"""Windows beside ranks that die or stop, and on slow links: python bench/window_faults.py

Three ranks put, add, take each other's mutexes and mix, over shared memory and over TCP; messages of 80 bytes to 8 MB. At a
random moment one is killed (SIGKILL), kills itself while it holds the lock of an edge's memory, is stopped (SIGSTOP) or, for
comparison, just does nothing more; a process that it has forked lives on. The others look for values of which half is older,
and time every put before and after, those to the victim included. 100 kills take three minutes. (results/window_faults.json
and .md; runs with another --seed are added to what is there)

    --seed 1 --kills 100    a hundred kills, every second one inside the lock, and ten stops and ten idle ranks
    --links                 hosts in network namespaces on links of 200 Mbit/s put 10 MB for 15 s (needs root and iproute2)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, table
from network_hosts import INTERFACE, Network, obstacle
from support.pool import Pool
from support.windows import TRANSPORTS, die_inside_lock, transport

import fusedfog

PUTS, PAUSE = 60, 0.001
"""How many puts before the end, and after it; seconds between two puts, so that three ranks fit on two cores."""

KILLED, IN_LOCK, STOPPED, IDLE = "killed", "killed inside the lock", "stopped", "idle"
SIZES = (10, 1000, 10**6)
"""Elements of 8 bytes."""

HOSTS, RATE, MESSAGE, SECONDS = 3, 200e6 / 8, 10e6, 15.0
"""Hosts on slow links; bytes a second of a link; bytes of a message; seconds of puts."""


def victim(window: fusedfog.Window, x: torch.Tensor, ending: str) -> None:
    """Rank 1: does everything until it is killed or stopped, or is told that its moment has come."""
    told = []
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    dist.distributed_c10d._get_default_store().set("pid", str(os.getpid()))
    if os.fork() == 0:  # As a DataLoader's worker, which outlives it.
        time.sleep(3.0)
        os._exit(0)
    number = 0
    while ending != IDLE or not told:
        if ending == IN_LOCK and told:
            die_inside_lock()
        number += 1
        x.fill_(float(number))
        window.put()
        window.accumulate(torch.zeros_like(x))
        with window.mutex([0]):
            window.update(1.0, {0: 0.0, 2: 0.0})
        time.sleep(PAUSE)


def beside(how: str, elements: int, ending: str, delay: float) -> dict[str, Any]:
    """What a rank saw, and how long its puts took."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    x = torch.full((elements,), float(rank), dtype=torch.float64)
    with transport(how):
        window = fusedfog.Window(x, "fully_connected")
    found: dict[str, Any] = {}
    if rank == 1:
        victim(window, x, ending)
    else:
        found = beside_victim(window, x, rank, ending, delay)
    store.set(f"through/{rank}", "")
    store.wait(["through/0", "through/2"])
    if rank == 0 and ending == STOPPED:
        os.kill(int(store.get("pid")), signal.SIGKILL)
    begin = time.monotonic()
    window.close()
    return {} if rank == 1 else {**found, "close": time.monotonic() - begin}


def beside_victim(window: fusedfog.Window, x: torch.Tensor, rank: int, ending: str, delay: float) -> dict[str, Any]:
    """Puts before the victim's moment, which rank 0 brings about once both ranks have made enough, and after it."""
    store = dist.distributed_c10d._get_default_store()
    pid, torn = int(store.get("pid")), [0]
    before = puts(window, x, rank, torn, lambda made: made >= PUTS)
    store.set(f"ready/{rank}", "")
    others = [f"ready/{2 - rank}"] if rank == 0 else ["over"]
    before += puts(window, x, rank, torn, lambda made: made % 10 == 0 and store.check(others))
    if rank == 0:
        moment = time.monotonic() + delay
        puts(window, x, rank, torn, lambda made: time.monotonic() > moment)
        os.kill(pid, {KILLED: signal.SIGKILL, STOPPED: signal.SIGSTOP}.get(ending, signal.SIGUSR1))
        store.set("over", "")
    if ending in (KILLED, IN_LOCK):
        puts(window, x, rank, torn, lambda made: not window.alive[1])
    after = puts(window, x, rank, torn, lambda made: made >= PUTS)
    times = {"before": statistics.median(before), "after": statistics.median(after), "worst": max(after)}
    return {**times, "torn": torn[0], "fence": fence_of(window), "alive": window.alive[1]}


def puts(
    window: fusedfog.Window, x: torch.Tensor, rank: int, torn: list[int], enough: Callable[[int], bool]
) -> list[float]:
    """Seconds of each put, until there are enough; torn values are counted."""
    times: list[float] = []
    while not enough(len(times)):
        times.append(timed(window.put))
        window.update(0.0, {1: 1.0})
        torn[0] += int(x.min() != x.max())
        with window.mutex([2 - rank]):
            pass
        time.sleep(PAUSE)
    return times


def fence_of(window: fusedfog.Window) -> str:
    """What a fence of a second says."""
    try:
        window.fence(1.0)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def kill_many(kills: int, seed: int) -> list[dict[str, Any]]:
    """One entry for each run."""
    chance, found, pool = random.Random(seed), [], Pool()
    endings = [(KILLED, IN_LOCK)[number % 2] for number in range(kills)] + [STOPPED, IDLE] * (kills // 10)
    try:
        for number, ending in enumerate(endings):
            # Between hosts there is no memory that is shared, and no lock of it.
            how = "memory" if ending == IN_LOCK else TRANSPORTS[number // 2 % 2]
            case = {"how": how, "elements": chance.choice(SIZES), "ending": ending, "delay": chance.uniform(0.0, 0.05)}
            outcomes = pool.outcomes(3, beside, **case, timeout=120, pg_timeout=60)
            survivors = [outcomes[rank] for rank in (0, 2)]
            seen = [one.value if one.ok else {"error": one.error_type, "message": one.message} for one in survivors]
            found.append({**case, "seed": seed, "seen": seen, "victim": outcomes[1].error_type or ""})
    finally:
        pool.close()
    return found


def lines(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of all runs."""
    rows = []
    for ending in (KILLED, IN_LOCK, STOPPED, IDLE):
        for how in TRANSPORTS:
            chosen = [run for run in runs if (run["ending"], run["how"]) == (ending, how)]
            seen = [one for run in chosen for one in run["seen"]]
            good = [one for one in seen if "error" not in one]
            if good:
                ratios = sorted(one["after"] / one["before"] for one in good)
                quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                rows.append(
                    {
                        "the third rank": ending,
                        "transport": how,
                        "runs": str(len(chosen)),
                        "torn reads": str(sum(one["torn"] for one in good)),
                        "ranks that hung or failed": str(len(seen) - len(good)),
                        "fences that name it": f"{sum('rank 1' in one['fence'] for one in good)} of {len(good)}",
                        "put after / before: median (quartiles)": f"{quarters[1]:.2f} ({quarters[0]:.2f}..{quarters[2]:.2f})",
                        "longest put after, ms": f"{1e3 * max(one['worst'] for one in good):.0f}",
                        "longest close, ms": f"{1e3 * max(one['close'] for one in good):.0f}",
                    }
                )
    return rows


def host(rank: int, address: str) -> None:
    """One host on a slow link: writes what it found, as JSON, to stdout."""
    torch.set_num_threads(1)
    url = f"tcp://{address}:29500"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=HOSTS, timeout=timedelta(seconds=120))
    x = torch.zeros(int(MESSAGE) // 8, dtype=torch.float64)
    spare = [torch.zeros_like(x) for _ in range(2)]
    inbox = torch.empty_like(x)
    with transport("tcp"), fusedfog.Window(x, "ring") as window:
        peers = sorted(window.versions)
        puts, copies = [], []
        arrived = {peer: {0.0} for peer in peers}
        dist.barrier()
        begin = time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            x.fill_(float(len(puts) + 1))
            puts.append(timed(window.put))
            copies.append(timed(lambda: [one.copy_(x) for one in spare]))
            for peer in peers:
                low, high = window.update(0.0, {peer: 1.0}, out=inbox).aminmax()
                assert low == high, "half a message"
                arrived[peer].add(high.item())
            time.sleep(0.02)
        fence = timed(window.fence)
        last: list[Any] = [None] * HOSTS
        dist.all_gather_object(last, len(puts))
        there = all(window.update(0.0, {peer: 1.0}, out=inbox).eq(last[peer]).all().item() for peer in peers)
        dist.barrier()
    rates = [(len(values) - 1) / SECONDS for values in arrived.values()]
    print(
        json.dumps({"puts": puts, "copies": copies, "rates": rates, "fence": fence, "last is there": there}), flush=True
    )
    dist.destroy_process_group()


def timed(action: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def slow_links() -> list[dict[str, Any]]:
    """What every host found."""
    if (why := obstacle()) is not None:
        raise SystemExit(f"--links: {why}")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with Network(machines=HOSTS, local=1) as network:
        network.shape(RATE)
        processes = [
            subprocess.Popen(
                network.inside(rank, [sys.executable, __file__, "--host", str(rank), network.address(0)]),
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(HOSTS)
        ]
        return [json.loads(process.communicate(timeout=200)[0]) for process in processes]


def link_lines(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table of slow links."""

    def times(values: list[float]) -> str:
        high = statistics.quantiles(values, n=100)[98]
        return f"{1e3 * statistics.median(values):.1f}, {1e3 * high:.1f}, {1e3 * max(values):.1f}"

    return [
        {
            "host": str(rank),
            "puts": str(len(one["puts"])),
            "a put to two neighbours, ms: median, 99 %, longest": times(one["puts"]),
            "two bare copies, likewise": times(one["copies"]),
            "messages/s that arrive on an edge": ", ".join(f"{rate:.2f}" for rate in one["rates"]),
            "fence, s": f"{one['fence']:.1f}",
            "the last value is everywhere": "yes" if one["last is there"] else "NO",
        }
        for rank, one in enumerate(found)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--host", nargs=2, metavar=("RANK", "ADDRESS"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results are (default bench/results)")
    given = parser.parse_args()
    if given.host:
        host(int(given.host[0]), given.host[1])
        return
    given.folder.mkdir(exist_ok=True)
    path = given.folder / "window_faults.json"
    kept = json.loads(path.read_text()) if path.exists() else {"runs": [], "links": []}
    if given.links:
        kept["links"] = slow_links()
    else:
        kept["runs"] = [run for run in kept["runs"] if run["seed"] != given.seed] + kill_many(given.kills, given.seed)
    kept["machine"] = machine()
    path.write_text(json.dumps(kept) + "\n")
    text = f"# Windows beside dead ranks and on slow links\n\n{', '.join(f'{k} {v}' for k, v in kept['machine'].items())}\n"
    if kept["runs"]:
        text += f"\n{table(lines(kept['runs']))}\n"
    if kept["links"]:
        wire = RATE / MESSAGE / 2
        about = f"Links of 200 Mbit/s, messages of 10 MB on a ring of {HOSTS}: the wire carries {wire:.2f} messages/s an edge."
        text += f"\n{about}\n\n{table(link_lines(kept['links']))}\n"
    (given.folder / "window_faults.md").write_text(text)
    print(text)


if __name__ == "__main__":
    import window_faults  # by this name the ranks' processes find its functions

    window_faults.main()
