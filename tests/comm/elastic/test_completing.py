"""One verdict on a call for all members, whatever becomes of what they say to the store."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest

from fusedfog.comm.elastic.completing import completed
from fusedfog.errors import StoreLost

MEMBERS = ("0.0", "1.0", "2.1")


class Shaky:
    """A store that in some cases does what it is asked and does not say so, or does not do it."""

    def __init__(self, seed: int, shaky: float) -> None:
        self._chance, self._shaky = random.Random(seed), shaky
        self.values: dict[str, str] = {}
        self._lock = threading.Lock()

    def _fails(self) -> None:
        if self._chance.random() < self._shaky:
            raise StoreLost("no answer")

    def get(self, key: str) -> str | None:
        with self._lock:
            self._fails()
            return self.values.get(key)

    def has(self, keys: Sequence[str]) -> bool:
        with self._lock:
            self._fails()
            return all(key in self.values for key in keys)

    def swap(self, key: str, old: str | None, new: str) -> str:
        with self._lock:
            self._fails()
            if self.values.get(key) == old:
                self.values[key] = new
            self._fails()
            return self.values[key]


def verdicts(board: Shaky, members: Sequence[str], why_not: str = "") -> list[bool]:
    found: dict[str, bool] = {}

    def say(own: str) -> None:
        found[own] = completed(board, "done/4/1", own, MEMBERS, lambda: why_not, patience=60.0)

    threads = [threading.Thread(target=say, args=(own,)) for own in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return list(found.values())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shaky", [0.0, 0.3])
def test_all_members_have_the_same_verdict_though_the_store_takes_words_without_an_answer(
    seed: int, shaky: float
) -> None:
    assert verdicts(Shaky(seed, shaky), MEMBERS) == [True] * 3


@pytest.mark.parametrize("seed", range(20))
def test_where_one_never_comes_the_others_make_the_call_again(seed: int) -> None:
    assert verdicts(Shaky(seed, 0.3), MEMBERS[:2], why_not="2.1 has ended") == [False] * 2


def test_a_member_that_is_done_when_another_gives_up_goes_by_the_first_word() -> None:
    board = Shaky(0, 0.0)
    assert verdicts(board, MEMBERS[:1], why_not="1.0 has ended") == [False]
    assert verdicts(board, MEMBERS[1:]) == [False] * 2


def test_without_a_store_there_is_no_verdict() -> None:
    with pytest.raises(StoreLost):
        completed(Shaky(0, 1.0), "done/4/1", "0.0", MEMBERS, lambda: "", patience=0.05)


def test_a_store_that_was_started_anew_is_told_again() -> None:
    board = Shaky(0, 0.0)
    found: list[bool] = []
    first = threading.Thread(
        target=lambda: found.append(completed(board, "done/4/1", "0.0", MEMBERS, lambda: "", patience=60.0))
    )
    first.start()
    while not board.values:
        pass
    with board._lock:
        board.values.clear()
    assert verdicts(board, MEMBERS[1:]) == [True] * 2
    first.join(30)
    assert found == [True]
