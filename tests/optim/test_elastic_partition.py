"""An elastic run whose network breaks in two: one side trains on, the other says why it does not. In network namespaces."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from support import namespaces
from support.elastic import Members, let_go_after, say
from support.namespaces import Network

import fusedfog

PORT = 29400
REASON = namespaces.why_not()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=f"NOT TESTED, partitions: {REASON}")]


def train(network: str, steps: int) -> dict[str, Any]:
    """Train for so many steps after the members have changed; with the sides they are on."""
    namespaces.enter(int(os.environ["FUSEDFOG_SLOT"]), network)
    fusedfog.init(elastic=True, timeout=60)
    let_go_after(2.0)
    model = torch.nn.Linear(4, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="fully_connected")
    until, told = 10**9, False
    try:
        while opt.steps < until:
            opt.zero_grad()
            model(torch.ones(4)).square().backward()
            opt.step()
            if not told and opt.steps >= 10:
                told = True
                say("trains")
            if until == 10**9 and opt.stats()["epoch"] > 0:
                until = opt.steps + steps
            time.sleep(0.01)
    except (fusedfog.Minority, fusedfog.StoreLost, fusedfog.PeerTimeout) as error:
        return {"error": type(error).__name__, "text": str(error), "steps": opt.steps}
    return {"members": opt.stats()["members"], "steps": opt.steps, "until": until}


@pytest.mark.parametrize("store_at", [0, 4], ids=["the larger side has the store", "the smaller side has the store"])
def test_the_larger_side_of_a_broken_network_goes_on_and_the_smaller_one_says_so(store_at: int) -> None:
    from torch.distributed import TCPStore

    def host(machine: int) -> Any:
        where = namespaces.address(machine)
        return network.inside(machine, lambda: TCPStore(where, PORT, is_master=True, wait_for_workers=False))

    with Network([3, 2]) as network:
        order = [store_at, 4 - store_at]
        stores = [host(machine) for machine in order]
        env = {
            "FUSEDFOG_STORES": ",".join(f"{namespaces.address(machine)}:{PORT}" for machine in order),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        with Members(5, **env) as members:
            members.start(train, network.name, 20)
            for slot in range(5):
                members.wait_for(f"{slot}.0", "trains")
            network.cut()
            results = members.results(180)
        del stores
    for slot in range(3):
        result = results[f"{slot}.0"]
        assert result.get("members") == ("0.0", "1.0", "2.0"), result
        assert result["steps"] == result["until"]
    for slot in (3, 4):
        assert results[f"{slot}.0"].get("error") == "Minority", results[f"{slot}.0"]
