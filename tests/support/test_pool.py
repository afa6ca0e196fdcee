"""The process pool itself: real ranks, real errors, real deaths, and a usable pool after each of them."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from support.pool import Pool, RankFailure, fail_at
from support.waits import await_said, say


def total() -> float:
    x = torch.full((5,), float(dist.get_rank() + 1))
    dist.all_reduce(x)
    return x[3].item()


def identity() -> tuple:
    env = tuple(os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return dist.get_rank(), dist.get_world_size(), env, os.getpid(), torch.get_num_threads(), dist.get_backend()


def odd_ranks_raise(word: str, *, code: int) -> str:
    if dist.get_rank() % 2:
        raise LookupError(f"{word} {code}")
    return word


def leave(how: str) -> int:
    fail_at(1, 0, how).check(0)
    return dist.get_rank() * 10


def train(how: str) -> list[int]:
    """Three steps of all_reduce; rank 1 fails before the second."""
    injector, done = fail_at(1, 1, how), []
    for step in range(3):
        injector.check(step)
        dist.all_reduce(torch.ones(3))
        done.append(step)
    return done


def named_sleep(seconds: float) -> int:
    if dist.get_rank() == 2:
        time.sleep(seconds)
    return dist.get_rank()


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        begin = time.perf_counter()
        try:
            dist.recv(torch.zeros(3), src=1)
        finally:
            waited = time.perf_counter() - begin
            say("told")
            assert 1.9 < waited < 20
    else:
        await_said("told")  # rank 1 stays in the world but never sends


def poison_group() -> str:
    """Rank 0 leaves the world with a receive in flight that nothing will ever answer."""
    if dist.get_rank() == 0:
        dist.irecv(torch.zeros(3), src=1)
        say("begun")
    else:
        await_said("begun")  # the receive needs a peer that is still there
    return "left"


def bare() -> tuple:
    return dist.is_initialized(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def own_init() -> float:
    dist.init_process_group("gloo")
    return total()


def fail_to_open() -> str:
    if os.environ["RANK"] == "1":
        return "stayed away"
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    except RuntimeError:
        return "timeout"
    return "opened alone"


def big_result(count: int) -> dict:
    x = torch.arange(count, dtype=torch.float64) + dist.get_rank()
    return {"tensor": x, "bf16": x[:4].bfloat16(), "array": x.numpy()[:7]}


def unpicklable() -> object:
    return lambda: None


def dirty() -> tuple:
    state = (os.environ.get("DIRT"), torch.get_default_dtype(), torch.rand(1).item(), torch.is_grad_enabled())
    os.environ["DIRT"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(os.getpid())
    return state


def quits() -> None:
    raise SystemExit(3)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_all_reduce_over_8_ranks(ranks: Pool) -> None:
    assert ranks.run(8, total) == [36.0] * 8


def test_zygote_had_no_thread_when_it_forked(ranks: Pool) -> None:
    ranks.run(1, total)
    assert ranks.zygote_threads == 1


def test_ranks_know_who_they_are(ranks: Pool) -> None:
    results = ranks.run(3, identity)
    for rank, (r, n, env, _, threads, backend) in enumerate(results):
        assert (r, n, threads, backend) == (rank, 3, 1, "gloo")
        assert env == (str(rank), "3", str(rank), "3")
    assert len({pid for *_, pid, _, _ in results}) == 3


def test_workers_are_reused_in_worlds_of_any_size(ranks: Pool) -> None:
    first = ranks.pids() or (ranks.run(8, total) and ranks.pids())
    assert [ranks.run(n, total)[0] for n in (1, 4, 2, 8)] == [1.0, 10.0, 3.0, 36.0]
    assert ranks.pids()[: len(first)] == first


def test_exceptions_come_back_as_one_error_with_each_traceback(ranks: Pool) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.run(4, odd_ranks_raise, "bad", code=7)
    errors = caught.value.errors
    assert sorted(errors) == [1, 3]
    assert (errors[3].type_name, errors[3].message) == ("LookupError", "bad 7")
    text = str(caught.value)
    assert "2 of 4 ranks failed" in text
    assert "rank 1: LookupError: bad 7" in text and "rank 3: LookupError: bad 7" in text
    assert text.count("in odd_ranks_raise") == 2
    assert ranks.run(4, total) == [10.0] * 4


def test_outcomes_do_not_raise(ranks: Pool) -> None:
    outcomes = ranks.outcomes(2, odd_ranks_raise, "bad", code=7)
    assert outcomes[0].ok and outcomes[0].value == "bad"
    assert (outcomes[1].error_type, outcomes[1].message, outcomes[1].value) == ("LookupError", "bad 7", None)
    assert "in odd_ranks_raise" in outcomes[1].traceback
    assert outcomes[1].seconds < 30


def test_seconds_measure_the_function(ranks: Pool) -> None:
    seconds = [o.seconds for o in ranks.outcomes(4, named_sleep, 0.3)]
    assert 0.3 <= seconds[2] < 30
    assert min(seconds) < 0.3


@pytest.mark.parametrize(("how", "message"), [("exit", "exited with status 17"), ("kill", "killed by SIGKILL")])
def test_death_is_reported_and_healed(ranks: Pool, how: str, message: str) -> None:
    ranks.run(3, total)
    before = ranks.pids()
    outcomes = ranks.outcomes(3, leave, how)
    assert (outcomes[1].error_type, outcomes[1].message) == ("Died", message)
    assert [outcomes[0].value, outcomes[2].value] == [0, 20]
    after = ranks.pids()
    assert after[1] != before[1] and after[0] == before[0] and after[2] == before[2]
    assert ranks.run(3, total) == [6.0] * 3


def test_death_names_the_rank_in_run(ranks: Pool) -> None:
    with pytest.raises(RankFailure, match="rank 1: Died: exited with status 17"):
        ranks.run(2, leave, "exit")


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_survivors_of_a_failed_peer_are_collected(ranks: Pool, how: str) -> None:
    outcomes = ranks.outcomes(3, train, how, pg_timeout=60)
    assert outcomes[1].error_type == ("InjectedFailure" if how == "raise" else "Died")
    # gloo tells the others at once that the connection is closed: nobody sits out the timeout
    assert outcomes[0].error_type == outcomes[2].error_type == "RuntimeError"
    assert max(outcomes[0].seconds, outcomes[2].seconds) < 30
    assert ranks.run(3, total) == [6.0] * 3


def test_hang_is_killed_named_and_healed(ranks: Pool) -> None:
    # On a busy machine the others may need more than two seconds, too, and count as hung then: they get more.
    for limit in (2, 60):
        start = time.monotonic()
        outcomes = ranks.outcomes(4, named_sleep, 600.0, timeout=limit)
        assert time.monotonic() - start < limit + 60
        if all(outcomes[rank].ok for rank in (0, 1, 3)):
            break
    assert outcomes[2].error_type == "Hung" and f"{limit} s" in outcomes[2].message
    assert "named_sleep" in outcomes[2].traceback
    assert [outcomes[r].value for r in (0, 1, 3)] == [0, 1, 3]
    with pytest.raises(RankFailure, match="rank 2: Hung"):
        ranks.run(4, named_sleep, 600.0, timeout=1.0)
    assert ranks.run(4, total) == [10.0] * 4


def test_process_group_timeout_is_the_one_asked_for(ranks: Pool) -> None:
    outcome = ranks.outcomes(2, wait_for_nobody, pg_timeout=2)[0]
    assert outcome.error_type == "RuntimeError" and "2000ms" in outcome.message


def test_a_poisoned_group_does_not_leak_into_the_next_call(ranks: Pool) -> None:
    assert ranks.run(2, poison_group) == ["left"] * 2
    assert ranks.run(2, total) == [3.0] * 2


def test_a_world_that_could_not_open_does_not_spoil_the_next(ranks: Pool) -> None:
    assert ranks.run(2, fail_to_open, init=False) == ["timeout", "stayed away"]
    assert ranks.run(2, total) == [3.0] * 2


def test_a_rank_that_fails_at_once_does_not_break_the_others_entry(ranks: Pool) -> None:
    for _ in range(20):
        outcomes = ranks.outcomes(4, odd_ranks_raise, "in", code=0)
        assert [o.error_type or o.value for o in outcomes] == ["in", "LookupError"] * 2


def test_worlds_start_clean(ranks: Pool) -> None:
    first, again = ranks.run(2, dirty), ranks.run(2, dirty)
    assert first == again == [first[0]] * 2
    assert first[0][0] is None and first[0][1] is torch.float32 and first[0][3] is True


def test_without_a_process_group(ranks: Pool) -> None:
    assert ranks.run(2, bare, init=False) == [(False, "0", "2"), (False, "1", "2")]


def test_environment_serves_a_group_of_ones_own(ranks: Pool) -> None:
    assert ranks.run(3, own_init, init=False) == [6.0] * 3
    assert ranks.run(2, bare, init=False)[0][0] is False


def test_results_larger_than_a_pipe(ranks: Pool) -> None:
    results = ranks.run(2, big_result, 300_000)
    assert torch.equal(results[1]["tensor"], torch.arange(300_000, dtype=torch.float64) + 1)
    assert results[1]["bf16"].dtype is torch.bfloat16 and results[1]["array"].tolist()[-1] == 7.0


def test_unusual_ends_are_reported(ranks: Pool) -> None:
    assert {o.error_type for o in ranks.outcomes(2, unpicklable)} <= {"PicklingError", "AttributeError"}
    assert [(o.error_type, o.message) for o in ranks.outcomes(2, quits)] == [("SystemExit", "3")] * 2
    assert ranks.run(2, total) == [3.0] * 2


def test_functions_must_be_importable(ranks: Pool) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        ranks.run(2, lambda: 1)
    with pytest.raises(ValueError, match="at least one rank"):
        ranks.run(0, total)


def test_worker_killed_between_calls_is_noticed(ranks: Pool) -> None:
    ranks.run(2, total)
    victim = ranks.pids()[1]
    os.kill(victim, signal.SIGKILL)
    assert gone_within([victim], 60)
    assert ranks.outcomes(2, bare, init=False)[1].error_type == "Died"
    assert ranks.run(2, total) == [3.0] * 2


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.slow
def test_close_is_quick_and_leaves_no_process(own_pool: Pool) -> None:
    assert own_pool.run(2, total) == [3.0] * 2
    pids = own_pool.pids()
    os.kill(pids[0], signal.SIGSTOP)  # as stuck as a process gets
    start = time.monotonic()
    own_pool.close()
    assert time.monotonic() - start < 30
    assert gone_within(pids, 60)
    assert own_pool.run(2, total) == [3.0] * 2  # and it starts anew when asked


def interrupt(pid: int) -> None:
    """Rank 2 interrupts the pool's own process, which waits for all of them."""
    if dist.get_rank() == 2:
        os.kill(pid, signal.SIGALRM)
    time.sleep(600)


def test_interrupted_call_leaves_nothing_behind(own_pool: Pool) -> None:
    own_pool.run(2, total)
    before = own_pool.pids()
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with pytest.raises(KeyboardInterrupt):
            own_pool.run(3, interrupt, os.getpid())
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert len(own_pool.pids()) == 3 and not set(own_pool.pids()) & set(before)
    assert own_pool.run(3, total) == [6.0] * 3
