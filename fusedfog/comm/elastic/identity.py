"""Who this process is in an elastic run, by the variables that its launcher set. Pure: nothing is opened or asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedfog.errors import LaunchError

_RUN, _SLOT, _SLOTS, _INCARNATION, _STORES = (
    f"FUSEDFOG_{name}" for name in ("RUN_ID", "SLOT", "SLOTS", "INCARNATION", "STORES")
)


@dataclass(frozen=True)
class Identity:
    """A process of an elastic run.

    Attributes:
        run: the run's name, the same for all of its processes.
        slot, slots: this process' place, and how many places there are.
        incarnation: how often the process of this place was restarted.
        returns: how often this process has come back to members that had let it go.
        stores: (host, port) of the stores, the first to be used if it answers.
        hosts: this process hosts the first store, since no launcher does.
    """

    run: str
    slot: int
    slots: int
    incarnation: int
    stores: tuple[tuple[str, int], ...]
    hosts: bool
    returns: int = 0

    @property
    def uid(self) -> str:
        """The member: "slot.incarnation", and once it has come back "slot.incarnation.returns"."""
        return f"{self.slot}.{self.incarnation}{f'.{self.returns}' if self.returns else ''}"


def read_identity(env: Mapping[str, str]) -> Identity:
    """This process by `FUSEDFOG_SLOT` and its kin, or else by torchrun's variables; see the package's page.

    Raises:
        LaunchError: something is missing, no number, or contradicts something else; says what.
    """
    size = _number(env, "WORLD_SIZE", 1)
    slot = _number(env, _SLOT)
    if slot is None:
        # One torchrun for each replica: its only rank is 0.
        alone = (size or 1) == 1
        slot = next(
            (
                found
                for name in (("REPLICA", "GROUP_RANK") if alone else ())
                if (found := _number(env, name)) is not None
            ),
            None,
        )
    slot = slot if slot is not None else _number(env, "RANK")
    slots = _number(env, _SLOTS, 1) or size
    if slot is None or slots is None:
        missing = f"{_SLOT} (or RANK)" if slot is None else f"{_SLOTS} (or WORLD_SIZE)"
        raise LaunchError(
            f"fusedfog.init(elastic=True): {missing} is missing, so this process does not know its place in the run: start it "
            f"with `fusedfog run --nproc-per-node 4 train.py`, or by a torchrun for each replica with {_SLOT}, {_SLOTS} and "
            f"{_STORES} set"
        )
    if slot >= slots:
        raise LaunchError(
            f"fusedfog.init(elastic=True): this is slot {slot} of {slots}, but slots count from 0 to {slots - 1}: there are more "
            f"processes than places. Raise {_SLOTS}, or start fewer"
        )
    given = [one.strip() for one in env.get(_STORES, "").split(",") if one.strip()]
    own = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if not given and not all(own):
        raise LaunchError(
            f"fusedfog.init(elastic=True): slot {slot}: neither {_STORES} nor MASTER_ADDR and MASTER_PORT say where the store is"
        )
    stores = tuple(_address(one) for one in given or [f"{own[0]}:{own[1]}"])
    incarnation = _number(env, _INCARNATION)
    if incarnation is None:
        incarnation = _number(env, "TORCHELASTIC_RESTART_COUNT") or 0
    hosted = bool(given) or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    name = env.get(_RUN) or env.get("TORCHELASTIC_RUN_ID") or "run"
    return Identity(name, slot, slots, incarnation, stores, hosts=not hosted and slot == 0)


def _number(env: Mapping[str, str], name: str, least: int = 0) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name} must be a whole number of at least {least}, and is {text!r}")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LaunchError(f"{_STORES}: an address is host:port, as node1:29400, and this is {text!r}")
    return host.strip("[]"), int(port)
