"""The slowest of many steps on slow links, and what made them slow: python bench/stragglers.py [--steps 500] (an hour)

Eight hosts as in network.py, compute that leaves the CPU free, the model of 9.4 MB whose transfer takes 0.69 of a step, and
every method's own default buckets. A link holds what waits for it for 0.3 s, as many a real one does, or 64 MB, more than is
ever under way. A step's time is that of the host on which it took longest. TCP segments that are sent again tell of losses:
a queue was full. Methods take turns of 50 steps. Needs root and iproute2. Writes results/stragglers.json and stragglers.md.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections.abc import Sequence
from typing import Any

from common import RESULTS, machine, save, table
from network import Crew, calibrate, give_up
from network_hosts import QUEUE, Network, obstacle
from network_models import installed

KIND = "device-like, 9.4 MB"
METHODS = (
    "AWC one-peer",
    "AWC one-peer pairs, fused_backward",
    "ATC one-peer, fused_backward",
    "decent-dp one-peer",
    "DDP",
)
HOSTS, TRANSFER, TURN, WARM = 8, 0.69, 50, 2
LONG_S = 0.1
"""By so much more than the median a step counts as slow."""


def measure(crew: Crew, methods: Sequence[str], steps: int) -> dict[str, dict[str, Any]]:
    """Of each method the slowest host's seconds of every step, and segments of all hosts: sent, and sent again."""
    found: dict[str, dict[str, Any]] = {method: {"step_s": [], "segments": [0, 0]} for method in methods}
    for _ in range(max(1, steps // TURN)):
        for method in methods:
            answers = crew.ask("every_step", KIND, method, WARM, min(steps, TURN))
            found[method]["step_s"] += [max(times) for times in zip(*(a["step_s"] for a in answers), strict=True)]
            counts = [sum(numbers) for numbers in zip(*(a["segments"] for a in answers), strict=True)]
            found[method]["segments"] = [a + b for a, b in zip(found[method]["segments"], counts, strict=True)]
    return found


def row(queue: str, method: str, local_s: float, one: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    times = sorted(one["step_s"])
    median = statistics.median(times)
    sent, again = one["segments"]
    return {
        "a link holds": queue,
        "method": method,
        "steps": len(times),
        "median, ms": round(1e3 * median),
        "99 %": round(1e3 * times[min(len(times) - 1, int(0.99 * len(times)))]),
        "slowest": round(1e3 * times[-1]),
        f"over the median by {1e3 * LONG_S:.0f} ms": sum(time > median + LONG_S for time in times),
        "of linear, mean": local_s / statistics.mean(times),
        "segments sent again, of a million": round(1e6 * again / max(sent, 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--queues", nargs="+", choices=["0.3 s", "64 MB"], default=["0.3 s", "64 MB"])
    given = parser.parse_args()
    if reason := obstacle():
        print(f"bench/stragglers.py is skipped: {reason}")
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, give_up)
    methods = [method for method in given.methods if installed(method)]
    rows, raw = [], {}
    with Network(HOSTS, 1) as network, Crew(network) as crew:
        size = sum(crew.ask("build", KIND, ["local", *methods])[0]["layer_bytes"])
        network.shape(1e9)
        for method in methods:  # decent-dp lays its buckets in the second step, DDP after the first.
            crew.ask("turn", KIND, method, 1, 2)
        local_s = statistics.median(answer["step_s"] for answer in crew.ask("turn", KIND, "local", 1, 5))
        rate = calibrate(network, crew, size, TRANSFER * local_s)
        for queue in given.queues:
            network.shape(rate, int(0.3 * rate) if queue == "0.3 s" else QUEUE)
            raw[queue] = measure(crew, methods, given.steps)
            rows += [row(queue, method, local_s, one) for method, one in raw[queue].items()]
    save("stragglers", rows, local_s=local_s, rate_bytes_s=rate, measured=raw)
    words = ", ".join(f"{key} {value}" for key, value in machine().items())
    (RESULTS / "stragglers.md").write_text(f"{words}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
