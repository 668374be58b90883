"""Each attack of `make torture` for a moment, and whether an attack would notice what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from finch_rag.errors import InputError

from .torture import concurrency, forgery, interrupts, kills
from .torture.tally import CLEAR, RAW, RECOVERED, WRONG, Tally


def check(tally: Tally, least: int) -> None:
    assert tally.bad == 0, tally.examples
    assert tally.counts[RECOVERED] >= least


def test_no_control_token_is_forged() -> None:
    check(forgery.attack(2000), 2000)


def test_an_interrupt_leaves_all_as_it_was(tmp_path: Path) -> None:
    check(interrupts.attack(tmp_path, 4), 28)


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    check(kills.attack(tmp_path, 6), 6)


@pytest.mark.slow
def test_questions_at_once_are_answered_as_one_by_one(tmp_path: Path) -> None:
    tallies = concurrency.attack(tmp_path, questions=12, threads=4, tasks=6)
    assert len(tallies) == 5
    for tally in tallies:
        check(tally, 24)


def test_a_tally_tells_what_came_out() -> None:
    tally = Tally("something")

    def refused(line: str) -> None:
        raise InputError(line)

    tally.expect(lambda: 1, 1)
    tally.expect(lambda: 2, 1)
    tally.expect(lambda: refused("too long: shorten it"), 1)
    tally.expect(lambda: [][0], 1)
    assert [tally.counts[each] for each in (RECOVERED, CLEAR, WRONG, RAW)] == [1, 1, 1, 1]
    assert tally.row("x") == "| something | 4 | 1 | 1 | 1 | 1 | x |"
    assert tally.examples[0] == "wrong: 2 in place of 1"
