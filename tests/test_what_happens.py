"""The docs' table "What happens if" is what users are told, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import misuse_of_checkpoints  # noqa: F401  # which adds to both
from support.misuse import ALONE
from support.misuse_of_ranks import WORLDS
from support.pool import Pool

PAGE = Path(__file__).parents[1] / "fusedfog" / "optim" / "README.md"

VARIES = {
    r"\S+\.py:\d+": "train.py:1",
    r"closed it \(.*?\)\. ": "closed it (in torch's words). ",
    r"It began with rank [12],": "It began with rank 1,",
    r"(receiving from|sending to) rank [12]: (left|connection lost)": r"receiving from rank 1: \2",
    r"for \d+ s\b": "for 1 s",
    r"/\S*/run\b": "run",
    r"\.unfinished-\w+": ".unfinished-1",
    r"timeout of [\d.]+ s\b": "timeout of 1 s",
    r"\b\d,\d\d\d\b": "1,000",
    r"step\(\) \d+: no exchange of this group can be complete: rank \d has given up: rank \d: ": "",
    r"within \d+:\d\d:\d\d(\.\d+)?": "within 0:00:01",
}
"""What differs from run to run: a line of a script, what torch says of a connection, which of several dead ranks was seen
first and by which message, which rank was the first to give up, sizes of files, seconds, folders."""


def same(text: str) -> str:
    """A message as it would be in any run."""
    for pattern, instead in VARIES.items():
        text = re.sub(pattern, instead, text)
    return text


def rows_of_the_table() -> list[tuple[str, str]]:
    """First and second column, the latter without its backticks."""
    section = PAGE.read_text().split("\n## What happens if\n")[1].split("\n## ")[0]
    cells = [line.strip("| \n").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    rows = []
    for cell in cells[1:]:  # the head
        code = re.fullmatch(r"(`+) ?(.+?) ?\1", cell[1])
        assert code is not None, f"not a message: {cell}"
        rows.append((cell[0], code[2]))
    return rows


TABLE = dict(rows_of_the_table())


def check(row: str, told: str) -> None:
    assert same(TABLE[row]) == same(told), f"the row of {PAGE} is out of date: | {row} | `{told}` |"


def test_every_row_has_a_misuse_and_every_misuse_a_row() -> None:
    rows = [row for row, _ in rows_of_the_table()]
    misuses = [*ALONE, *(row for world in WORLDS.values() for row in world.rows)]
    assert len(set(rows)) == len(rows)
    assert sorted(rows) == sorted(misuses)


@pytest.mark.parametrize("row", ALONE)
def test_one_process_is_told_what_its_row_says(row: str) -> None:
    check(row, ALONE[row]())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if world.slow else name for name, world in WORLDS.items()]
)
def test_ranks_are_told_what_their_rows_say(ranks: Pool, name: str) -> None:
    told = WORLDS[name].told(ranks)
    assert set(told) == set(WORLDS[name].rows)
    for row, text in told.items():
        check(row, text)
