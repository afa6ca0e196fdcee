"""Scaling efficiency on slow networks: python bench/network.py [--full] (about 7 minutes; full: an hour)

Hosts are network namespaces on this machine, one process each, joined by links that are shaped so that one transfer of
the model takes a given fraction of a step; see network_hosts.py. It needs root and iproute2, and without them says so and
ends. Efficiency is the time of a `local` step (torch's fused SGD, no communication) over that of a method. All methods
live in the same processes and take turns, so that a slow minute hits them alike: the ratio is taken within each round, and
tables give its median and range over rounds. Hosts are dealt out to the cores and stay there. A run of all methods writes
results/network.json and .md; with --full results/network-full.json, .md and .png.

Networks: `4 hosts`, `8 hosts` (a shaped link each), `2 x 4 hosts` and `4 x 2 hosts` (machines of several hosts; the links between
machines are shaped, those inside are not). Kinds of compute, see network_models.py: in `device-like` compute a layer waits with
the CPU free, in `real` compute the hosts share this machine's cores with the network's own work, which is charged to the
method that causes it. `device-like, 9.4 MB`, which has to be asked for, has default buckets.

    --full             all four networks, fractions 0.3, 0.6 and 0.9, every method: what a quiet machine is asked for
    --networks 4 8 2x4 4x2 --transfers 0.6 --kinds device-like real --methods DDP "AWC one-peer" --rounds 3 --steps 3
                       a choice of one's own (a round is `steps` steps of each method)
    --runs 3           everything so often, with new processes and a new calibration each time
    --save NAME        write results/NAME.json, .md and, for several transfers, .png, whatever was chosen
    --timelines FILE   write what was measured, in seconds and bytes, as JSON: layers, links, turns
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from network_hosts import INTERFACE, Network, obstacle
from network_models import KINDS, METHODS, UNGRADED, installed
from network_report import show, show_targets, write

NETWORKS = {"4": (4, 1), "8": (8, 1), "2x4": (2, 4), "4x2": (4, 2)}
ROUNDS = {"device-like": 3, "device-like, 9.4 MB": 3, "real": 12}
"""Unless told otherwise. With real compute, eight hosts share two cores, and one round's ratios stray by a twentieth."""
WARM = 1
_PATIENCE_S = 180


class Crew:
    """One worker process per host of a network, all asked the same things."""

    def __init__(self, network: Network) -> None:
        self._network = network
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._workers = []
        for rank in range(network.size):
            place = {"rank": rank, "address": network.address(0), "machines": network.machines, "local": network.local}
            command = [sys.executable, str(Path(__file__).with_name("network_worker.py")), json.dumps(place)]
            self._workers.append(
                subprocess.Popen(
                    network.inside(rank, command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            # Where the kernel moves hosts about, the time of one method over another's strays twice as far from round to
            # round: quartiles of 0.91 and 1.01 instead of 0.95 and 1.00 (4 hosts, 24 rounds).
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(self._workers[-1].pid, {cores[rank % len(cores)]})

    def __enter__(self) -> Self:
        try:
            self._answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()

    def ask(self, *request: Any) -> list[Any]:
        """Every host's answer to a request.

        Raises:
            RuntimeError: a host's process has ended, or does not answer.
        """
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        signal.alarm(_PATIENCE_S)
        for rank, worker in enumerate(self._workers):
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"host {rank}'s process has ended with status {worker.wait()}; see its error above")
            answers.append(json.loads(line))
        signal.alarm(0)
        return answers


def calibrate(network: Network, crew: Crew, model_bytes: int, target_s: float) -> float:
    """Shape the links so that one transfer of the model takes `target_s`; returns the payload rate set, in bytes/s."""
    rate = model_bytes / target_s
    for _ in range(2):
        network.shape(rate)
        measured = finished(crew.ask("transfer", model_bytes // network.local, 3))
        rate *= measured / target_s
    network.shape(rate)
    return rate


def measure_links(network: Network, crew: Crew, model_bytes: int, bucket_bytes: int) -> dict[str, float]:
    """What the network does with one message at a time: for the table, and for whoever predicts step times."""
    share = network.local
    return {
        "transfer_s": finished(crew.ask("transfer", model_bytes // share, 5)),
        "transfer_bucket_s": finished(crew.ask("transfer", bucket_bytes // share, 9)),
        "transfer_4_bytes_s": finished(crew.ask("transfer", 4, 21)),
        "allreduce_s": finished(crew.ask("allreduce", model_bytes, 3)),
        "allreduce_bucket_s": finished(crew.ask("allreduce", bucket_bytes, 5)),
    }


def finished(answers: Sequence[Sequence[float]]) -> float:
    """Seconds until the last host was done: hosts that share a link do not share it evenly. Median over repeats."""
    return statistics.median(max(repeat) for repeat in zip(*answers, strict=True))


def measure_rounds(crew: Crew, kind: str, methods: Sequence[str], rounds: int, steps: int) -> dict[str, list[dict]]:
    """Each method's turn in each round: means over hosts. Every round begins with another method."""
    turns: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for turn in range(rounds):
        for i in range(len(methods)):
            method = methods[(turn + i) % len(methods)]
            turns[method].append(mean(crew.ask("turn", kind, method, WARM, steps)))
    return turns


def mean(answers: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key by key, the mean over hosts."""
    return {key: statistics.mean(answer[key] for answer in answers) for key in answers[0]}


def measure_kind(network: Network, crew: Crew, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each transfer fraction: the calibration, and every method's turns."""
    methods = [method for method in options.methods if chosen(method, network, kind)]
    built = crew.ask("build", kind, methods)[0]
    model_bytes = sum(built["layer_bytes"])
    bucket_mb = KINDS[kind].bucket_mb
    bucket_bytes = model_bytes if bucket_mb is None else int(bucket_mb * (1 << 20))
    network.shape(1e9)
    for method in methods:  # decent-dp lays its buckets in the second step, DDP after the first
        crew.ask("turn", kind, method, 1, 2)
    local_s = statistics.median(mean(crew.ask("turn", kind, "local", WARM, options.steps))["step_s"] for _ in range(5))
    built |= mean(crew.ask("phases", kind, options.steps))
    results = []
    for fraction in options.transfers:
        rate = calibrate(network, crew, model_bytes, fraction * local_s)
        links = measure_links(network, crew, model_bytes, bucket_bytes)
        print(
            f"{name(network)}, {kind}: local step {1e3 * local_s:.0f} ms, model {model_bytes / 1e6:.2f} MB, link "
            f"{rate / 1e6:.1f} MB/s: one transfer takes {1e3 * links['transfer_s']:.0f} ms, "
            f"{links['transfer_s'] / local_s:.2f} of a step (asked: {fraction})",
            flush=True,
        )
        results.append(
            {
                "network": name(network),
                "kind": kind,
                "transfer": fraction,
                "machines": network.machines,
                "local": network.local,
                "bucket_bytes": bucket_bytes,
                **built,
                "rate_bytes_s": rate,
                **links,
                "turns": measure_rounds(crew, kind, methods, options.rounds or ROUNDS[kind], options.steps),
            }
        )
        show(results[-1:])
    return results


def name(network: Network) -> str:
    """The network as tables call it."""
    return f"{network.size} hosts" if network.local == 1 else f"{network.machines} x {network.local} hosts"


def chosen(method: str, network: Network, kind: str) -> bool:
    """Whether a method makes sense: hierarchical mixing wants machines, four neighbours more than four hosts, and only default
    buckets are graded or not.
    """
    fits = (network.local > 1 or "hierarchical" not in method) and (network.size > 4 or "four neighbours" not in method)
    return installed(method) and fits and (KINDS[kind].bucket_mb is None or UNGRADED not in method)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["8"])
    parser.add_argument("--transfers", nargs="+", type=float, default=[0.6])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["device-like", "real"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--save")
    parser.add_argument("--timelines", type=Path)
    options = parser.parse_args()
    if options.full:
        options.networks, options.transfers = list(NETWORKS), [0.3, 0.6, 0.9]
    if "local" not in options.methods:
        options.methods.insert(0, "local")
    return options


def give_up(number: int, _: object) -> None:
    raise SystemExit(f"stopped by signal {number}" + (": a host does not answer" if number == signal.SIGALRM else ""))


def main() -> None:
    """Measure, print and, for a run of all methods or with --save, write."""
    options = parse()
    if reason := obstacle():
        print(f"bench/network.py is skipped: {reason}")
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, give_up)  # as an exception, so that namespaces are removed
    for method in METHODS:
        if not installed(method):
            print(f"decent-dp is not installed: row left out ({method})")
    results = []
    for run in range(options.runs):
        for key in options.networks:
            begin = time.monotonic()
            with Network(*NETWORKS[key]) as network, Crew(network) as crew:
                for kind in options.kinds:
                    results += [{"run": run + 1, **r} for r in measure_kind(network, crew, kind, options)]
            print(f"{name(network)}: {time.monotonic() - begin:.0f} s", flush=True)
    show_targets(results)
    if options.save or set(options.methods) >= set(METHODS):
        write(options.save or ("network-full" if options.full else "network"), results)
    if options.timelines:
        options.timelines.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
