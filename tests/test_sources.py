"""Questions that rest on several passages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finch_rag import reading
from finch_rag.prefill.sources import cutoff_behind_sources, has_one_source
from finch_rag.reading import Ranking

from .small import small_finch, texts


@pytest.mark.parametrize(
    ("attention", "sources"),
    [
        ([2.0, 1.9, 0.5, 0.4, 0.05, 0.04, 0.03], 4),  # all before the cliff, also what is below a quarter of the best
        ([1.0, 0.9, 0.8, 0.4, 0.35, 0.1], 5),  # the highest of several cliffs
        ([1.0, 0.05, 0.04, 0.03], None),  # one source
        ([1.0, 0.9, 0.05, 0.04], None),  # two are told well enough by a part of the best
        ([1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.13, 0.09, 0.06], None),  # it falls smoothly
        ([1.0, 0.5, 0.12, 0.01, 0.01], None),  # the third is too far below the best
        ([1.0, 1.0, 1.0, 0.0, 0.0], 3),
        ([1.0, 1.0, 1.0], None),  # there is nothing behind them
        ([0.0, 0.0, 0.0, 0.0], None),
        ([1.0] * 40 + [0.01] * 5, None),  # too many to be sources
        ([], None),
    ],
)
def test_the_sources_are_those_before_the_cliff(attention: list[float], sources: int | None) -> None:
    order = torch.randperm(len(attention), generator=torch.Generator().manual_seed(0))
    cutoff = cutoff_behind_sources(torch.tensor(attention)[order])
    if sources is None:
        assert cutoff is None
    else:
        assert cutoff is not None
        assert sum(paid >= cutoff * max(attention) for paid in attention) == sources


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ([0.1, 1.0, 0.2, 0.24], True),
        ([0.1, 1.0, 0.2, 0.25], False),
        ([1.0], True),
        ([0.5, 0.5], False),
        ([0.0, 0.0], False),
        ([], False),
    ],
)
def test_one_source_has_more_than_four_times_as_much_as_any_other(attention: list[float], expected: bool) -> None:
    assert has_one_source(torch.tensor(attention)) is expected


def ranked_by(attention: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose first round gives passages this attention."""
    finch = small_finch(reread=True, alone_heads=[(0, 1)], quotes=False)
    really = reading.rank

    def made(runtime: Any, requests: Any) -> Any:
        return [Ranking(attention, each.steps, each.seconds) for each in really(runtime, requests)]

    monkeypatch.setattr(reading, "rank", made)
    return finch


@pytest.fixture
def on_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the best passages are scanned twice unless it is asked for otherwise."""
    monkeypatch.setattr(reading, "input_embedding", lambda model: type("On", (), {"device": torch.device("meta")}))


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose first round gives four of twelve passages attention, one of them little."""
    attention = torch.full((12,), 0.01)
    attention[[1, 4, 7, 9]] = torch.tensor([1.0, 0.6, 0.5, 0.2])
    return ranked_by(attention, monkeypatch)


def kept(finch: Any, **options: Any) -> set[int]:
    answer = finch.ask("Who?", texts(12, longest=8), budget=200, strategy="independent", **options)
    return {citation.index for citation in answer.citations}


def test_several_sources_are_all_kept(ranked: Any) -> None:
    assert kept(ranked) == {1, 4, 7, 9}
    assert kept(ranked, rounds=1) == {1, 4, 7, 9}


def test_a_cutoff_that_was_asked_for_holds(ranked: Any) -> None:
    assert kept(ranked, cutoff=0.25) == {1, 4, 7}
    assert kept(ranked, cutoff=0.9) == {1}


@pytest.mark.usefixtures("on_accelerator")
def test_a_second_round_is_not_asked_for_sources(ranked: Any) -> None:
    answer = ranked.ask("Who?", texts(12, longest=8), budget=200, strategy="independent")
    assert answer.report.rounds == 1
    assert {citation.index for citation in answer.citations} == {1, 4, 7, 9}
    assert ranked.ask("Who?", texts(12, longest=8), budget=60, strategy="independent", rounds=2).report.rounds == 2


@pytest.mark.usefixtures("on_accelerator")
@pytest.mark.parametrize(("second", "rounds"), [(0.2, 1), (0.3, 2)])
def test_a_second_round_is_not_asked_for_one_source(
    second: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = torch.full((12,), 0.01)
    attention[[4, 7]] = torch.tensor([1.0, second])
    finch = ranked_by(attention, monkeypatch)

    def asked(**options: Any) -> Any:
        return finch.ask("Who?", texts(12, longest=8), budget=60, strategy="independent", **options)

    assert asked().report.rounds == rounds
    assert asked(rounds=2).report.rounds == 2
    assert asked(cutoff=0.25).report.rounds == 2
    if rounds == 1:
        assert {citation.index for citation in asked().citations} == {4}
