"""What a program is told of changes of members: everything since the last time, though epochs end before anybody is ready."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusedfog.comm.elastic.record import Record, Seat
from fusedfog.comm.elastic.run import Change, Run


def alone(told: list[Change]) -> Run:
    """A run of which only what is told matters."""
    run = object.__new__(Run)
    run._on_change, run._change, run._known = told.append, None, ()
    return run


def record(epoch: int, uids: tuple[str, ...], cause: str) -> Record:
    return Record(epoch, tuple(Seat(uid, "host", "::1", 1, "") for uid in uids), cause=cause)


def test_epochs_that_ended_at_once_are_one_change() -> None:
    told: list[Change] = []
    run = alone(told)
    run._note(("0.0", "1.0", "2.0"), record(1, ("0.0", "1.0"), "slot 2 has ended"))
    run._note(("0.0", "1.0"), record(2, ("0.0", "2.1"), "slot 1 has ended"))
    run.tell()
    run.tell()
    cause = "slot 2 has ended; slot 1 has ended"
    assert told == [Change(2, ("0.0", "2.1"), left=("1.0", "2.0"), joined=("2.1",), cause=cause)]


MEMBERS = st.sets(st.sampled_from(["0.0", "1.0", "1.1", "2.0", "2.1"]), min_size=1).map(
    lambda uids: tuple(sorted(uids))
)


@given(MEMBERS, st.lists(st.tuples(MEMBERS, st.booleans()), min_size=1, max_size=8))
def test_who_counts_what_it_was_told_knows_the_members(
    first: tuple[str, ...], epochs: list[tuple[tuple[str, ...], bool]]
) -> None:
    told: list[Change] = []
    run, known, now = alone(told), set(first), first
    for number, (uids, ready) in enumerate([*epochs, (first, True)]):
        run._note(now, record(number, uids, "somebody came"))
        now = uids
        if ready:
            run.tell()
            change = told[-1]
            assert set(change.left) <= known and not set(change.joined) & known
            known = (known - set(change.left)) | set(change.joined)
            assert known == set(change.members) == set(uids) and change.cause == "somebody came"
