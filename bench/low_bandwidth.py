"""The recipe for slow networks on shaped links: python bench/low_bandwidth.py (about three minutes)

Hosts are network namespaces on this machine, one rank each, as in network_hosts.py. It needs root and iproute2, and without
them says so and ends. Each host runs `fusedfog.examples.recipes.low_bandwidth`, which prints the predicted and the measured time
of a step for each way to send less, and all that follows `--` goes there.

    --hosts 4          ranks
    --rate 5           megabytes a second that each host's link carries, each way
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from network_hosts import INTERFACE, Network, obstacle

RECIPE = "fusedfog.examples.recipes.low_bandwidth"


def start(network: Network, rank: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """A rank on its host, which keeps to one core."""
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(network.size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        network.inside(rank, [sys.executable, "-m", RECIPE, *arguments]),
        env=environment,
        stdout=None if rank == 0 else subprocess.DEVNULL,
    )
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(process.pid, {cores[rank % len(cores)]})
    return process


def main() -> int:
    """Run the recipe on every host; returns the first exit status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("recipe", nargs="*")
    options = parser.parse_args()
    if reason := obstacle():
        print(f"bench/low_bandwidth.py is skipped: {reason}")
        return 0
    with Network(machines=options.hosts, local=1) as network:
        network.shape(options.rate * 1e6)
        processes = [start(network, rank, options.recipe) for rank in range(network.size)]
        try:
            return max(abs(process.wait()) for process in processes)
        finally:
            for process in processes:
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
