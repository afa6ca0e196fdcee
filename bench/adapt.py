"""`adapt=` on a link that is throttled in mid-run: python bench/adapt.py (about 5 minutes)

Four hosts as in network.py, and a transfer of 0.6 of a step. The one-peer exponential graph with `adapt=8` and without take
turns in the same processes. After a while what host 0 sends to host 1 travels at an eighth of the rate, and later at the full
one again: one edge of one of two rounds. Of each part the second half is shown, when plans have been made. It needs root and
iproute2, and writes results/adapt.json and .md, but with --dry-run, which takes few steps to see that all works.
"""

from __future__ import annotations

import argparse
import statistics

from common import RESULTS, machine, save, table
from network import Crew, calibrate, mean
from network_hosts import Network, obstacle

METHODS = ("AWC one-peer", "AWC adapt")
KIND, TRANSFER, SLOWER, WARM, STEPS = "device-like", 0.6, 8, 1, 6
PARTS = {"all edges alike": 4, "one edge slow": 12, "alike again": 12}
"""Rounds of each part; a round is a turn of each method."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if reason := obstacle():
        print(f"bench/adapt.py is skipped: {reason}")
        return
    rows = []
    with Network(4, 1) as network, Crew(network) as crew:
        built = crew.ask("build", KIND, ["local", *METHODS])[0]
        network.shape(1e9)
        local_s = mean(crew.ask("turn", KIND, "local", WARM, STEPS))["step_s"]
        rate = calibrate(network, crew, sum(built["layer_bytes"]), TRANSFER * local_s)
        for part, rounds in PARTS.items():
            network.shape(rate)
            if "slow" in part:
                network.slow_edge(0, 1, rate, rate / SLOWER)
            found = measure(crew, 2 if options.dry_run else rounds)
            rows += [row(part, method, found, local_s) for method in METHODS]
            print(table(rows[-len(METHODS) :]), flush=True)
    if not options.dry_run:
        where = ", ".join(f"{name} {value}" for name, value in machine().items())
        head = f"A link that is throttled in mid-run, second half of each part, by `bench/adapt.py` ({where})."
        save("adapt", rows)
        (RESULTS / "adapt.md").write_text(f"{head}\n\n{table(rows)}\n")


def measure(crew: Crew, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each method, round by round."""
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(rounds):
        for method in METHODS[:: 1 if turn % 2 else -1]:
            found[method].append(mean(crew.ask("turn", KIND, method, WARM, STEPS))["step_s"])
    return found


def row(part: str, method: str, found: dict[str, list[float]], local_s: float) -> dict[str, str]:
    """A method's line of the table; the ratio is taken round by round."""
    late = {name: seconds[len(seconds) // 2 :] for name, seconds in found.items()}
    ratios = [one / other for one, other in zip(late[method], late[METHODS[0]], strict=True)]
    return {
        "part": part,
        "method": method,
        "ms a step": f"{1e3 * statistics.median(late[method]):.0f}",
        "efficiency": f"{local_s / statistics.median(late[method]):.2f}",
        "time over one-peer's": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
    }


if __name__ == "__main__":
    main()
