"""Questions that rest on several passages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finch_rag import reading
from finch_rag.prefill.sources import cutoff_behind_sources
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


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine whose first round gives four of twelve passages attention, one of them little."""
    finch = small_finch(reread=True, alone_heads=[(0, 1)], quotes=False)
    attention = torch.full((12,), 0.01)
    attention[[1, 4, 7, 9]] = torch.tensor([1.0, 0.6, 0.5, 0.2])
    really = reading.rank

    def made(runtime: Any, requests: Any) -> Any:
        return [Ranking(attention, each.steps, each.seconds) for each in really(runtime, requests)]

    monkeypatch.setattr(reading, "rank", made)
    return finch


def kept(finch: Any, **options: Any) -> set[int]:
    answer = finch.ask("Who?", texts(12, longest=8), budget=200, strategy="independent", **options)
    return {citation.index for citation in answer.citations}


def test_several_sources_are_all_kept(ranked: Any) -> None:
    assert kept(ranked) == {1, 4, 7, 9}
    assert kept(ranked, rounds=1) == {1, 4, 7, 9}


def test_a_cutoff_that_was_asked_for_holds(ranked: Any) -> None:
    assert kept(ranked, cutoff=0.25) == {1, 4, 7}
    assert kept(ranked, cutoff=0.9) == {1}


def test_a_second_round_is_not_asked_for_sources(ranked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "input_embedding", lambda model: type("On", (), {"device": torch.device("meta")}))
    answer = ranked.ask("Who?", texts(12, longest=8), budget=200, strategy="independent")
    assert answer.report.rounds == 1
    assert {citation.index for citation in answer.citations} == {1, 4, 7, 9}
    assert ranked.ask("Who?", texts(12, longest=8), budget=60, strategy="independent", rounds=2).report.rounds == 2
