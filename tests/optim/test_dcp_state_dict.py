"""Through torch.distributed.checkpoint.state_dict, runs of plain parameters go on bit for bit; and averages in a file."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import fusedfog


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2))
    net[1].num_batches_tracked.fill_(seed)  # type: ignore[union-attr, operator]
    return net


def iterate(net: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * fusedfog.rank() + step)
        net(torch.randn(8, 10, generator=generator)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def make(kind: str, net: nn.Module, keywords: dict[str, Any]) -> torch.optim.Optimizer:
    if kind == "RMSprop":
        return fusedfog.Decentralized(torch.optim.RMSprop(net.parameters(), lr=0.01), **keywords)
    return getattr(fusedfog, kind)(net.parameters(), lr=0.05, **keywords)  # type: ignore[no-any-return]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "awc": ("AdamW", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "atc": ("AdamW", {"algorithm": "atc"}),
    "atc inside backward": ("SGD", {"algorithm": "atc", "momentum": 0.9, "fused_backward": True}),
    "decentlam": ("SGD", {"algorithm": "decentlam", "momentum": 0.9}),
    "push_sum": ("SGD", {"algorithm": "push_sum", "topology": "star"}),
    "push_sum Adam": ("AdamW", {"algorithm": "push_sum", "topology": "ring"}),
    "tracking": ("SGD", {"algorithm": "momentum_tracking", "momentum": 0.9}),
    "int8": ("AdamW", {"wire_dtype": "int8"}),
    "bf16 on a changing graph": ("SGD", {"wire_dtype": "bf16", "topology": "one_peer_exponential", "momentum": 0.9}),
    "every 3": ("AdamW", {"communicate_every": 3}),
    "averages": ("AdamW", {"global_average_every": 4}),
    "outer": ("AdamW", {"algorithm": "local", "outer": fusedfog.Outer(every=3)}),
    "stateless": ("SGD", {}),
    "accumulated": ("AccumAdamW", {"accum_steps": 4}),
    "wrapped": ("RMSprop", {"algorithm": "atc", "communicate_every": 2}),
}
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "on the CPU": {"cpu_offload": True},
}


WITH_EVERY_OPTION = ("awc", "push_sum Adam", "int8")  # torch's full path asserts that there is a state


def resumed(case: str, option: str) -> tuple[bool, bool, list[str]]:
    """Whether the run that is resumed in step 5 equals the one that isn't, bit for bit; the clock; what is shown."""
    kind, keywords = CASES[case]
    options = StateDictOptions(**OPTIONS[option])
    net = network(0)
    opt = make(kind, net, keywords)
    iterate(net, opt, 0, 5)
    file = io.BytesIO()
    torch.save(get_state_dict(net, opt, options=options), file)
    iterate(net, opt, 5, 9)

    other = network(1 + fusedfog.rank())
    loaded = make(kind, other, keywords)
    file.seek(0)
    model_state, optimizer_state = torch.load(file)
    set_state_dict(other, loaded, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    iterate(other, loaded, 5, 9)
    ours, theirs = net.state_dict(), other.state_dict()
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, two = opt.state_dict(), loaded.state_dict()
    same_states = all(
        torch.equal(value, two["state"][key][name]) if isinstance(value, torch.Tensor) else True
        for key, state in one["state"].items()
        for name, value in state.items()
    )
    return same and same_states, one["fusedfog"] == two["fusedfog"], [repr(loaded).partition("\n")[0]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit(ranks: Pool, case: str) -> None:
    for option in OPTIONS if case in WITH_EVERY_OPTION else ("flat",):
        for same, in_phase, _ in ranks.run(4, resumed, case, option):
            assert same
            assert in_phase


def asked_alone(kind: str, wrapped: bool) -> tuple[bool, int, bool]:
    """Rank 0 alone asks for states, before the first step and in the middle of a run without any."""
    net = network(0)
    opt = make(kind, net, {"topology": "ring"})
    before = [p.detach().clone() for p in net.parameters()]
    if fusedfog.is_main():
        found = get_optimizer_state_dict(net, opt)
        assert found["param_groups"]
    unmoved = all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    iterate(net, opt, 0, 3)
    if fusedfog.is_main():
        get_optimizer_state_dict(net, opt)
    iterate(net, opt, 3, 5)
    clean = network(0)
    other = make(kind, clean, {"topology": "ring"})
    iterate(clean, other, 0, 5)
    same = all(torch.equal(a, b) for a, b in zip(net.parameters(), clean.parameters(), strict=True))
    return unmoved, int(opt.stats()["steps"]), same  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
def test_asking_for_states_makes_no_step_and_needs_no_other_rank(ranks: Pool, kind: str) -> None:
    assert ranks.run(2, asked_alone, kind, False) == [(True, 5, True)] * 2


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_own_checkpoints_load_and_ours_load_into_torch(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    nets = [network(0) for _ in range(4)]
    kinds = [torch.optim.AdamW, fusedfog.AdamW, torch.optim.AdamW]
    opts: list[Any] = [kind(net.parameters(), lr=0.05) for kind, net in zip(kinds, nets, strict=False)]
    iterate(nets[0], opts[0], 0, 3)
    for first in (0, 1):
        state = get_optimizer_state_dict(nets[first], opts[first], options=options)
        if flat and first == 0:
            # Flattened, torch reads back what the *loading* optimizer's groups have.
            with pytest.raises(KeyError):
                set_optimizer_state_dict(nets[1], opts[1], dict(state), options=options)
            return
        set_optimizer_state_dict(nets[first + 1], opts[first + 1], state, options=options)
    saved = [opt.state_dict()["state"] for opt in opts]
    for key, entries in saved[0].items():
        for name, value in entries.items():
            assert torch.equal(value, saved[1][key][name])
            assert torch.equal(value, saved[2][key][name])


def test_a_clock_is_no_more_than_an_entry_to_torch() -> None:
    net, other = network(0), network(0)
    ours = fusedfog.AdamW(net.parameters(), lr=0.05)
    iterate(net, ours, 0, 3)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.05)
    theirs.load_state_dict(ours.state_dict())
    iterate(other, theirs, 3, 5)
    back = fusedfog.AdamW(other.parameters(), lr=0.05)
    back.load_state_dict(theirs.state_dict())
    assert back.state_dict()["state"][0]["step"] == 5
    assert [group.get("fusedfog") for group in back.param_groups] == [""]


def loaded_elsewhere() -> str:
    """Every rank loads rank 0's."""
    net = network(0)
    opt = make("AdamW", net, {})
    iterate(net, opt, 0, 2)
    box = [get_optimizer_state_dict(net, opt) if fusedfog.is_main() else None]
    dist.broadcast_object_list(box)
    with pytest.warns(fusedfog.ForeignCheckpointWarning) if not fusedfog.is_main() else _nothing() as caught:
        set_optimizer_state_dict(net, opt, box[0] or {})
    return str(caught[0].message) if caught else ""


class _nothing:
    def __enter__(self) -> list[Any]:
        return []

    def __exit__(self, *exc: object) -> None:
        pass


def test_rank_0s_checkpoint_on_other_ranks_warns_by_this_way_too(ranks: Pool) -> None:
    first, second = ranks.run(2, loaded_elsewhere)
    assert first == ""
    assert "saved by rank 0 of 2, and this is rank 1 of 2" in second


# -- averages in a file ----------------------------------------------------------------------------------------------


def written(path: str, wrapping: str) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    net = network(0)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, topology="ring", model=net)
    iterate(net, opt, 0, 4)
    net[1].num_batches_tracked.fill_(fusedfog.rank() + 3)  # type: ignore[union-attr, operator]
    given: nn.Module | None = {"bare": net, "none": None}.get(wrapping)
    if wrapping == "ddp":
        given = DistributedDataParallel(net, init_sync=False)
    elif wrapping == "compiled":
        given = torch.compile(net)  # type: ignore[assignment]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    edits = opt.stats()["torn_messages"]
    opt.save_averaged(path, given)
    after = net.state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    with opt.averaged(net):
        average = {name: value.clone() for name, value in net.state_dict().items()}
    iterate(net, opt, 4, 6)
    return unchanged and opt.stats()["torn_messages"] == edits, average, dict(after)


@pytest.mark.parametrize("wrapping", ["bare", "none", "ddp", "compiled"])
def test_the_average_model_is_written_and_nothing_changes(ranks: Pool, tmp_path: Path, wrapping: str) -> None:
    path = tmp_path / "model.pt"
    results = ranks.run(2, written, str(path), wrapping)
    saved = torch.load(path, weights_only=True)
    assert list(saved) == list(network(0).state_dict())
    for name, value in saved.items():
        assert torch.equal(value, results[0][1][name])
    assert int(saved["1.num_batches_tracked"]) == 3  # rank 0's
    assert all(unchanged for unchanged, *_ in results)
    assert os.listdir(tmp_path) == ["model.pt"]
    assert path.stat().st_size < 16_000  # tensors, not the flat buffers that they are cut from
    assert stat.S_ISREG(path.stat().st_mode)
    network(1).load_state_dict(saved)


def refused(path: str) -> tuple[str, bool]:
    net = network(0)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, topology="ring")
    sent = opt.stats()["bytes_sent"]
    said = []
    for given in (network(0), net[0], None):
        with pytest.raises(ValueError) as caught:
            opt.save_averaged(path, given)
        said.append(str(caught.value))
    return "\n".join(said), opt.stats()["bytes_sent"] == sent


def test_another_model_is_refused_before_anything_is_sent(ranks: Pool, tmp_path: Path) -> None:
    for rank, (said, quiet) in enumerate(ranks.run(2, refused, str(tmp_path / "model.pt"))):
        other, part, none = said.split("\n")
        assert other.startswith(
            f"rank {rank}: SGD.save_averaged: parameter 0 and 5 more of the optimizer is not in this Seq"
        )
        assert "parameter 2 and 3 more" in part
        assert "needs the model" in none
        assert quiet
    assert os.listdir(tmp_path) == []


def unwritable(path: str) -> tuple[str, str]:
    net = network(0)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, topology="ring")
    with pytest.raises((OSError, RuntimeError)) as caught:
        opt.save_averaged(path, net)
    iterate(net, opt, 0, 2)
    return type(caught.value).__name__, str(caught.value)


def test_a_file_that_cannot_be_written_is_an_error_on_every_rank(ranks: Pool, tmp_path: Path) -> None:
    first, second = ranks.run(2, unwritable, str(tmp_path / "nowhere" / "model.pt"))
    assert first[0] == "FileNotFoundError"
    assert second == ("RuntimeError", f"rank 1: SGD.save_averaged: rank 0 could not write {tmp_path}/nowhere/model.pt; "
                      f"its error says why")  # fmt: skip


def test_alone_the_average_is_the_model(tmp_path: Path) -> None:
    net = network(0)
    (tmp_path / "m.pt").write_text("an older one")
    fusedfog.AdamW(net.parameters()).save_averaged(tmp_path / "m.pt", net)
    saved = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in net.state_dict().items())


def test_who_takes_the_clock_away_goes_on_without() -> None:
    net = network(0)
    opt = fusedfog.AdamW(net.parameters(), lr=0.05)
    iterate(net, opt, 0, 3)
    saved = opt.state_dict()
    del saved["fusedfog"]
    opt.load_state_dict(saved)
    assert opt.stats()["steps"] == 0
