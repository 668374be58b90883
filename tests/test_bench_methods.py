"""The order of a case's passages, and methods that call the model more than once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finch_rag.bench import cases
from finch_rag.bench.cases import DataSet, QualityCase, make_cases
from finch_rag.bench.methods import Contestant, run
from finch_rag.corpus import Question
from finch_rag.engine import Finch
from finch_rag.errors import WindowError
from finch_rag.prompts.passages import Passage

from .small import small_finch, texts

COUNT = 12
TOP_K = 6


def retrieved(monkeypatch: pytest.MonkeyPatch, ranking: list[int], gold: tuple[int, ...], place: int) -> QualityCase:
    """A question of which some passages are gold, one of them at a place, for a retriever that ranks so."""
    monkeypatch.setattr(cases, "search_by", lambda name, passages: lambda question, top_k: ranking[:top_k])
    passages = [Passage(text, id=f"p{n}") for n, text in enumerate(texts(COUNT))]
    data = DataSet("made", passages, [Question("q", "Who?", ("x",), tuple(f"p{n}" for n in gold))])
    [case] = make_cases(data, "bm25", TOP_K, order=f"gold-at:{place}")
    return case


@pytest.mark.parametrize(
    ("gold", "ranked"),
    [
        (7, ["p7", "p2", "p9", "p0", "p4", "p11"]),  # the retriever's first
        (9, ["p7", "p2", "p9", "p0", "p4", "p11"]),  # its third
        (5, ["p7", "p2", "p9", "p0", "p4", "p5"]),  # not retrieved
    ],
)
def test_top_k_takes_the_same_passages_wherever_gold_stands(
    monkeypatch: pytest.MonkeyPatch, gold: int, ranked: list[str]
) -> None:
    contestant = Contestant(small_finch(), 60, 2)
    for place in range(TOP_K):
        case = retrieved(monkeypatch, [7, 2, 9, 0, 4, 11, 1, 3, 5, 6, 8, 10], (gold,), place)
        assert case.passages[place].id == f"p{gold}"
        taken = set(run("top-k", contestant, case).kept_ids)
        assert 0 < len(taken) < TOP_K
        assert taken == set(ranked[: len(taken)])
        assert [passage.id for passage in case.ranked] == ranked


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_question_with_several_gold_passages_has_one_of_them_and_a_full_list(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    case = retrieved(monkeypatch, list(range(COUNT)), (2, 4), place)
    assert [passage.id == "p2" for passage in case.passages] == [n == place for n in range(TOP_K)]
    assert [passage.id for passage in case.ranked] == ["p0", "p1", "p2", "p3", "p5", "p6"]


def unranked() -> QualityCase:
    passages = [Passage(text, id=f"p{n}") for n, text in enumerate(texts(COUNT))]
    return QualityCase(Question("q", "Who?", ("x",), ("p0",)), passages, list(range(COUNT)))


def with_long_answers(monkeypatch: pytest.MonkeyPatch, words: int) -> tuple[Finch, list[int]]:
    """An engine whose answers have so many words, and the number of passages of each call; many calls are a failure."""
    finch, calls = small_finch(), list[int]()
    ask = finch.ask

    def answer(question: str, passages: list[Passage], **options: Any) -> Any:
        calls.append(len(passages))
        if len(calls) > 50:
            pytest.fail("map-reduce does not end")
        return replace(ask(question, passages, **options), text="word " * words)

    monkeypatch.setattr(finch, "ask", answer)
    return finch, calls


def test_map_reduce_ends_though_no_two_answers_fit_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    finch, calls = with_long_answers(monkeypatch, words=30)
    contestant, case = Contestant(finch, 60, 4), unranked()
    [length] = contestant.lengths([Passage("word " * 30)])
    assert 2 * length > 60
    expected = [len(pack) for pack in contestant.packs(case.passages, 60)]
    level = len(expected)
    assert level > 3  # so that there are levels whose last answer stands alone or in a pair
    while level > 1:
        expected += [2] * (level // 2) + [1] * (level % 2)
        level = level // 2 + level % 2
    assert run("map-reduce", contestant, case).calls == len(expected)
    assert calls == expected


def test_map_reduce_ends_where_two_answers_do_not_fit_into_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    finch, _ = with_long_answers(monkeypatch, words=100)  # one answer fits, two do not
    with pytest.raises(WindowError, match=r"budget \d+ is too large"):
        run("map-reduce", Contestant(finch, 60, 4), unranked())
