"""Passages that are ranked twice: the best of the first round are scanned once more by the loop."""

from __future__ import annotations

from typing import Any

import pytest

from finch_rag import Finch, InputError
from finch_rag.prefill import shortlists

from .small import small_finch, texts

QUESTION = "who built the bridge?"
PASSAGES = texts(40)


@pytest.fixture
def finch(monkeypatch: pytest.MonkeyPatch) -> Finch:
    monkeypatch.setattr(shortlists, "_SHORTLIST_TOKENS", 150)
    return small_finch(reread=True, budget=60, alone_heads=[(0, 1)], quotes=False)


@pytest.mark.parametrize("options", [{"strategy": "independent"}, {"store": True}])
def test_the_loop_scans_the_best_of_those_read_alone(finch: Finch, options: dict[str, Any]) -> None:
    once = finch.ask(QUESTION, PASSAGES, **options)  # the default on a CPU
    twice = finch.ask(QUESTION, PASSAGES, rounds=2, **options)
    assert (once.report.rounds, once.report.heads) == (1, ((0, 1),))
    assert (twice.report.rounds, twice.report.heads) == (2, ((0, 1), (1, 2)))
    assert finch.ask(QUESTION, PASSAGES, rounds=1, **options).text == once.text
    by_tokens = finch.ask(QUESTION, PASSAGES, shortlist_tokens=150, **options)
    assert (by_tokens.text, by_tokens.citations) == (twice.text, twice.citations)


def test_the_loop_scans_its_own_best_once_more(finch: Finch) -> None:
    options: dict[str, Any] = {"strategy": "loop", "rounds": 2}
    ranked = finch.rank(QUESTION, PASSAGES, strategy="loop")
    lengths = [citation.passage_tokens for citation in ranked]
    fitting = next(n for n in range(len(lengths)) if sum(lengths[: n + 1]) > 150)
    best = sorted(citation.index for citation in ranked[:fitting])
    twice = finch.ask(QUESTION, PASSAGES, **options)
    alone = finch.ask(QUESTION, [PASSAGES[index] for index in best], strategy="loop")
    assert twice.text == alone.text
    assert [best[citation.index] for citation in alone.citations] == [citation.index for citation in twice.citations]
    assert twice.report.rounds == 2
    assert finch.ask_many([QUESTION] * 2, PASSAGES, **options)[1].citations == twice.citations
    assert finch.ask(QUESTION, PASSAGES[:2], **options).report.rounds == 1  # fits into one round


def test_an_accelerator_takes_two_rounds(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    from finch_rag import reading

    class Elsewhere:
        class device:  # noqa: N801 - as torch names it
            type = "cuda"

    monkeypatch.setattr(reading, "input_embedding", lambda model: Elsewhere)
    monkeypatch.setattr(reading, "cutoff_behind_sources", lambda attention: None)
    assert finch.ask(QUESTION, PASSAGES, strategy="independent").report.rounds == 2
    assert finch.ask(QUESTION, PASSAGES, strategy="independent", rounds=1).report.rounds == 1
    assert finch.ask(QUESTION, PASSAGES, strategy="independent", shortlist_tokens=0).report.rounds == 1
    assert finch.ask(QUESTION, PASSAGES, strategy="loop").report.rounds == 1


@pytest.mark.parametrize(("rounds", "tokens"), [(1, 100), (2, 0)])
def test_rounds_and_tokens_of_the_second_must_agree(finch: Finch, rounds: int, tokens: int) -> None:
    with pytest.raises(InputError, match=rf"rounds is {rounds}, and shortlist_tokens={tokens} "):
        finch.ask(QUESTION, PASSAGES, rounds=rounds, shortlist_tokens=tokens)


def test_ranking_takes_one_round(finch: Finch) -> None:
    assert finch.rank(QUESTION, PASSAGES, rounds=2) == finch.rank(QUESTION, PASSAGES)
