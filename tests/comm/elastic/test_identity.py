"""Who a process is, by the variables of each launcher; and what is wrong with them, in words."""

from __future__ import annotations

import pytest

from fusedfog.comm.elastic.identity import Identity, read_identity
from fusedfog.errors import LaunchError

OURS = {
    "FUSEDFOG_RUN_ID": "a",
    "FUSEDFOG_SLOT": "2",
    "FUSEDFOG_SLOTS": "4",
    "FUSEDFOG_INCARNATION": "3",
    "FUSEDFOG_STORES": "node1:29400, [::1]:29401",
}


def test_our_own_launcher() -> None:
    found = read_identity(OURS)
    assert found == Identity("a", 2, 4, 3, (("node1", 29400), ("::1", 29401)), hosts=False)
    assert found.uid == "2.3"


def test_plain_ranks_with_a_store_in_the_first_of_them() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert read_identity(env) == Identity("run", 0, 3, 0, (("node1", 29500),), hosts=True)
    assert not read_identity({**env, "RANK": "1"}).hosts
    assert not read_identity({**env, "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts


@pytest.mark.parametrize("name", ["REPLICA", "GROUP_RANK"])
def test_a_torchrun_for_each_replica(name: str) -> None:
    env = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        name: "2",
        "FUSEDFOG_SLOTS": "3",
        "FUSEDFOG_STORES": "node1:29400",
        "TORCHELASTIC_RESTART_COUNT": "5",
    }
    assert read_identity(env).uid == "2.5"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"FUSEDFOG_SLOT": "4"}, "more processes than places"),
        ({"FUSEDFOG_SLOT": "two"}, "FUSEDFOG_SLOT must be a whole number"),
        ({"FUSEDFOG_SLOT": ""}, "FUSEDFOG_SLOT .or RANK. is missing"),
        ({"FUSEDFOG_SLOTS": ""}, "FUSEDFOG_SLOTS .or WORLD_SIZE. is missing"),
        ({"FUSEDFOG_STORES": ""}, "say where the store is"),
        ({"FUSEDFOG_STORES": "node1"}, "an address is host:port"),
        ({"FUSEDFOG_STORES": "node1:99999"}, "an address is host:port"),
    ],
)
def test_what_is_missing_or_wrong_is_said(change: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        read_identity({**OURS, **change})
