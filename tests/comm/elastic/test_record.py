"""Who goes on, as each process finds by itself: of a split of the members one side at most; and when newcomers come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedfog.comm.elastic.record import (
    Note,
    Record,
    Seat,
    Situation,
    Verdict,
    has_quorum,
    judge,
    launched,
    read_note,
    read_record,
)


def seat(uid: str) -> Seat:
    return Seat(uid, "here", "127.0.0.1", 1, "t")


def record(*uids: str, epoch: int = 3) -> Record:
    return Record(epoch, tuple(map(seat, uids)), uids, (), 10, 10)


def note(uid: str, **about: object) -> Note:
    return replace(Note(seat(uid), "begin", 10, 10, True), **about)  # type: ignore[arg-type]


def look(own: str, base: Record | None, notes: list[Note], **about: object) -> Verdict:
    by_uid = {one.seat.uid: one for one in notes}
    now = Situation(own, base, 4, by_uid, set(by_uid), (), (), late=False, min_ranks=1)
    return judge(replace(now, **about))  # type: ignore[arg-type]


def proposed(verdict: Verdict) -> Record:
    assert verdict.propose is not None, verdict
    return verdict.propose


def test_a_run_begins_when_all_slots_have_come_or_when_it_has_waited() -> None:
    notes = [note(uid, built=False, at="construction") for uid in ("0.0", "2.1", "3.0")]
    assert look("0.0", None, notes).waits_for == ("slot 1",)
    late = proposed(look("0.0", None, notes, late=True))
    assert late.uids == ("0.0", "2.1", "3.0") and late.epoch == 0
    assert look("0.0", None, notes, late=True, min_ranks=4).propose is None
    assert look("2.1", None, notes, late=True).waits_for == ("0.0",), "the lowest proposes"


def test_it_begins_again_when_all_members_have_died() -> None:
    base = record("0.0", "1.0")
    notes = [note(f"{slot}.1", built=False, at="construction") for slot in range(4)]
    again = proposed(look("0.1", base, notes, dead=("0.0", "1.0")))
    assert again.epoch == 4 and again.built == ()


def test_survivors_wait_for_every_living_member_and_take_the_clock_of_the_one_ahead() -> None:
    base = record("0.0", "1.0", "2.0", "3.0")
    ready = [note("0.0", steps=10), note("1.0", steps=12, exchanges=11)]
    assert look("0.0", base, ready, dead=("2.0",)).waits_for == ("3.0",)
    found = proposed(look("0.0", base, [*ready, note("3.0", steps=11)], dead=("2.0",)))
    assert (found.uids, found.steps, found.exchanges) == (("0.0", "1.0", "3.0"), 12, 11)
    assert found.fresh == () and found.built == found.uids


@pytest.mark.parametrize(
    "hearsay", ["", "the members form a new epoch", "a member has given it up", "slot 11 came back"]
)
@pytest.mark.parametrize(
    ("said", "about", "cause"),
    [
        ("slot 1: no route to it", {"dead": ("1.0",)}, "slot 1: no route to it"),
        ("", {"dead": ("1.0",)}, "slot 1 has ended"),
        ("", {"lost": ("1.0",)}, "slot 1 has not answered"),
        ("slot 1 has ended", {"dead": ("1.0", "3.0")}, "slot 1 has ended; slot 3 has ended"),
        ("", {"dead": ("1.0",), "lost": ("3.0",)}, "slot 1 has ended; slot 3 has not answered"),
    ],
)
def test_the_cause_names_everyone_who_has_left_though_some_have_only_heard_of_it(
    hearsay: str, said: str, about: dict[str, tuple[str, ...]], cause: str
) -> None:
    base = record("0.0", "1.0", "2.0", "3.0")
    gone = {uid for uids in about.values() for uid in uids}
    ready = [note("0.0", cause=hearsay), note("2.0", cause=said), note("3.0", cause=hearsay)]
    found = proposed(look("0.0", base, [one for one in ready if one.seat.uid not in gone], **about))
    assert found.cause == cause


def test_who_has_no_optimizer_where_others_have_one_is_named_too() -> None:
    base, late = record("0.0", "1.0"), note("1.0", built=False, at="construction", cause="an optimizer was being built")
    found = proposed(look("0.0", base, [note("0.0", cause="the members form a new epoch"), late]))
    assert found.cause == "slot 1 had no optimizer"


def test_a_member_that_does_not_answer_is_waited_for_until_it_is_lost() -> None:
    base = record("0.0", "1.0", "2.0")
    ready = [note("0.0"), note("2.0")]
    assert look("0.0", base, ready).waits_for == ("1.0",)
    assert proposed(look("0.0", base, ready, lost=("1.0",))).uids == ("0.0", "2.0")
    told = [note("0.0"), note("2.0", lost=("1.0",))]
    assert proposed(look("0.0", base, told)).uids == ("0.0", "2.0"), "another one's clock counts as well"


def test_newcomers_come_in_only_where_all_members_are_about_to_begin_a_step() -> None:
    base = record("0.0", "1.0", "2.0")
    newcomer = note("3.4", at="join")
    all_ready = [note("0.0"), note("1.0"), note("2.0")]
    found = proposed(look("0.0", base, [*all_ready, newcomer]))
    assert found.uids == ("0.0", "1.0", "2.0", "3.4") and found.fresh == ("3.4",)
    in_call = [note("0.0"), note("1.0", at="call"), note("2.0")]
    without = proposed(look("0.0", base, [*in_call, newcomer]))
    assert without.uids == base.uids and without.passed_over
    assert not proposed(look("0.0", base, in_call)).passed_over


def test_a_newcomer_that_has_not_begun_a_step_is_one_in_the_next_epoch_too() -> None:
    base = record("0.0", "1.1", "2.0")
    notes = [note("0.0"), note("1.1", at="join", steps=7, exchanges=7), note("2.0", at="begin")]
    found = proposed(look("0.0", base, notes))
    assert found.fresh == ("1.1",) and (found.steps, found.exchanges) == (10, 10)
    alone = proposed(look("1.1", base, notes[1:2], dead=("0.0", "2.0")))
    assert alone.fresh == (), "somebody has to have values"


def test_who_has_no_optimizer_is_dropped_where_others_have_one() -> None:
    base = record("0.0", "1.0", "2.0")
    found = proposed(
        look("1.0", base, [note("0.0", built=False, at="construction"), note("1.0"), note("2.0")], dead=())
    )
    assert found.uids == ("1.0", "2.0")


def test_a_newcomer_proposes_nothing_while_members_live() -> None:
    verdict = look("0.1", record("1.0", "2.0"), [note("0.1", at="join"), note("1.0")])
    assert verdict.propose is None and verdict.waits_for == ("2.0",)


@given(
    st.integers(2, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.sampled_from("abd"), min_size=n, max_size=n)))
)
def test_of_two_sides_that_do_not_reach_each_other_one_at_most_goes_on(split: tuple[int, list[str]]) -> None:
    n, sides = split
    base = record(*(f"{slot}.0" for slot in range(n)))
    dead = [uid for uid, side in zip(base.uids, sides, strict=True) if side == "d"]
    went_on = []
    for name in "ab":
        side = [uid for uid, mine in zip(base.uids, sides, strict=True) if mine == name]
        others = [uid for uid in base.uids if uid not in side and uid not in dead]
        verdicts = [look(uid, base, [note(one) for one in side], dead=dead, lost=others) for uid in side]
        went_on += [name for verdict in verdicts if verdict.propose is not None]
        if side and not any(verdict.propose for verdict in verdicts):
            assert all(verdict.minority for verdict in verdicts)
            assert "cannot reach" in verdicts[0].minority
    assert len(went_on) <= 1
    assert len(went_on) == 1 or len(dead) == n


@given(st.integers(1, 20), st.data())
def test_a_quorum_is_never_on_both_sides(n: int, data: st.DataObject) -> None:
    alive = [f"{slot}.0" for slot in range(n)]
    here = data.draw(st.lists(st.sampled_from(alive), unique=True))
    there = [uid for uid in alive if uid not in here]
    assert not (here and there and has_quorum(here, alive) and has_quorum(there, alive))
    assert has_quorum(alive, alive)


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "{}", '{"epoch": 1}', '{"seats": 3}', None, '{"seats": [{"uid": 1}]}']
)
def test_what_is_no_record_is_none(text: str | None) -> None:
    assert read_record(text) is None
    assert read_note(text) is None


def test_records_and_notes_come_back_as_they_were() -> None:
    one = record("0.0", "1.3")
    assert read_record(one.text()) == one
    two = note("1.3", lost=("0.0",), cause='it "ended"')
    assert read_note(two.text()) == two


def test_a_record_has_each_member_s_clock_and_a_newcomer_that_of_its_source() -> None:
    notes = [note("0.0", steps=50), note("1.0", steps=40), note("2.1", at="join", steps=35)]
    found = read_record(proposed(look("0.0", record("0.0", "1.0"), notes)).text())
    assert found is not None and found.fresh == ("2.1",) and found.steps == 50
    assert [found.clock_of(uid)[0] for uid in ("0.0", "1.0", "2.1")] == [50, 40, 35]
    assert found.clock_of("3.0") == found.clock_of("0.0"), (
        "of a source that has gone, the first one's that is no newcomer"
    )


def test_a_process_that_has_come_back_is_later_than_it_was_and_earlier_than_the_next_one() -> None:
    uids = ["1.0", "1.0.1", "1.0.2", "1.1", "1.1.1", "1.10"]
    incarnations = [seat(uid).incarnation for uid in uids]
    assert incarnations == sorted(set(incarnations)) and {seat(uid).slot for uid in uids} == {1}
    assert [launched(uid) for uid in uids] == ["1.0", "1.0", "1.0", "1.1", "1.1", "1.10"]
