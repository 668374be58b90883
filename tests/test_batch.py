from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from finch_rag.answer import Answer, Quote
from finch_rag.engine import Finch
from finch_rag.errors import InputError, WindowError
from finch_rag.prompts.passages import Passage

from .small import small_finch, texts

QUESTIONS = [f"{word} {n}?" for n, word in enumerate(("When", "Who was", "Where", "Why did the boats", "How") * 2)]


def bare(answer: Answer) -> Answer:
    """Without seconds, and shares rounded."""

    def rounded(share: float, quotes: tuple[Quote, ...]) -> dict[str, Any]:
        return {
            "share": round(share, 3),
            "quotes": tuple(replace(quote, share=round(quote.share, 3)) for quote in quotes),
        }

    cited = [replace(citation, **rounded(citation.share, citation.quotes)) for citation in answer.citations]
    statements = tuple(
        replace(each, sources=tuple(replace(source, **rounded(source.share, source.quotes)) for source in each.sources))
        for each in answer.statements
    )
    report = replace(answer.report, prefill_seconds=0, decode_seconds=0, quote_seconds=0)
    return Answer(answer.text, cited, report, statements)


def one_by_one(finch: Finch, lists: list[Any], **options: Any) -> list[Answer]:
    return [bare(finch.ask(q, own, **options)) for q, own in zip(QUESTIONS, lists, strict=True)]


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reread": True},
        {"selection": "token"},
        {"temperature": 0.9, "top_k": 20, "seed": 4},
        {"stop": ["e", "an"], "max_new_tokens": 20},
        {"max_new_tokens": 1},
        {"chunk_size": 300},
    ],
)
def test_the_answers_are_those_of_one_by_one(
    options: dict[str, Any], steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    finch = small_finch()
    lists = [texts(2 + 2 * n, seed=n) for n in range(10)]  # from one chunk to several
    expected = one_by_one(finch, lists, **options)
    monkeypatch.setattr(finch.runtime.graphs, "enabled", steps)  # as on a GPU, but for the recording
    assert [bare(answer) for answer in finch.ask_many(QUESTIONS, lists, **options)] == expected
    assert len({answer.text for answer in expected}) > 1


def test_answers_that_end_early_leave_the_others_alone() -> None:
    finch = small_finch(max_new_tokens=30)
    lists = [texts(4, seed=n) for n in range(10)]
    ends = [finch.ask(QUESTIONS[n], lists[n]).report.new_tokens for n in range(10)]
    stop = [answer.text[len(answer.text) // 2 :][:2] for answer in one_by_one(finch, lists)[:3]]
    expected = one_by_one(finch, lists, stop=stop)
    assert len({answer.report.new_tokens for answer in expected}) > 2, ends
    assert [bare(answer) for answer in finch.ask_many(QUESTIONS, lists, stop=stop)] == expected


def test_a_short_shared_list_gives_what_one_by_one_gives(finch: Finch) -> None:
    expected = one_by_one(finch, [texts(6)] * 10)
    assert [bare(answer) for answer in finch.ask_many(iter(QUESTIONS), iter(texts(6)))] == expected


def test_a_long_shared_list_is_read_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 120)
    finch = small_finch(reread=True, budget=80, chunk_size=200)
    passages = [Passage(text, id=f"p{n}", title=f"T{n}") for n, text in enumerate(texts(60))]
    document = finch.ask(QUESTIONS[0], passages).report.context_tokens
    seen: list[tuple[str, int, int]] = []
    answers = finch.ask_many(QUESTIONS, passages, on_progress=lambda *step: seen.append(step))
    assert [step[1:] for step in seen].count((document, document)) == 1  # once for all ten, in groups or not
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer.report.context_tokens == document
        assert answer.report.passages == 60
        assert 0 < answer.report.kept_tokens <= 80
        for citation in answer.citations:
            assert (citation.passage_id, citation.title) == (f"p{citation.index}", f"T{citation.index}")
            assert citation.kept_tokens == citation.passage_tokens > 0
        cited = [passages[citation.index] for citation in answer.citations]
        assert answer.text == finch.ask(question, list(reversed(cited)), reread=False).text


def test_a_history_that_is_cut_differently_for_each_question_is_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 120)
    finch = small_finch()
    turns = [{"role": "user", "content": "where is the old harbour?"}, {"role": "assistant", "content": "by the sea"}]
    questions = ["Who was it?", "Who was it, " + "and when and why and how " * 6 + "?"]
    options: dict[str, Any] = {"history": turns * 20}
    found = [bare(answer) for answer in finch.ask_many(questions, texts(60), **options)]
    assert found[0].report.passages != found[1].report.passages  # older turns among them
    assert found == [bare(finch.ask(question, texts(60), **options)) for question in questions]


def test_a_shared_list_of_ten_times_the_window_is_read() -> None:
    finch = small_finch(reread=True, budget=40, chunk_size=200)
    answers = finch.ask_many(QUESTIONS[:4], texts(400))
    assert all(answer.report.context_tokens > 5000 for answer in answers)
    assert all(answer.report.chunk_size == 200 for answer in answers)


def test_progress_counts_the_tokens_of_all_lists() -> None:
    finch = small_finch()
    lists = [texts(count, seed=count) for count in (2, 2, 12, 0, 3)]  # side by side, alone in several steps, nothing
    seen: list[tuple[str, int, int]] = []
    answers = finch.ask_many(QUESTIONS[:5], lists, chunk_size=150, on_progress=lambda *step: seen.append(step))
    ends = [answer.report.context_tokens for answer in answers]
    done = [step[1] for step in seen]
    assert done == sorted(set(done))
    assert {step[2] for step in seen} == {done[-1]} == {sum(ends)}
    assert len(done) > 4
    assert sum(ends[:2]) in done


def test_no_questions_have_no_answers(finch: Finch) -> None:
    assert finch.ask_many([], texts(3)) == []
    assert finch.ask_many([], []) == []


def test_no_passages_are_answered_alone(finch: Finch) -> None:
    expected = [bare(finch.ask(question)) for question in QUESTIONS[:3]]
    assert [bare(answer) for answer in finch.ask_many(QUESTIONS[:3], [])] == expected
    assert [bare(answer) for answer in finch.ask_many(QUESTIONS[:3], [[], [], []])] == expected


@pytest.mark.parametrize(
    ("questions", "passages", "reason"),
    [
        ("When?", ["a"], "questions is a single text"),
        (["When?"], "a", "passages is a single text"),
        (["When?"], 7, "passages is int"),
        (["When?", "Who?"], [["a"]], "2 questions and 1 lists of passages"),
        (["When?", "Who?"], ["a", ["b"]], r"mixes texts and lists \(at 1\)"),
        (["When?", "Who?"], [["a"], "b"], r"mixes texts and lists \(at 1\)"),
        (["When?", " "], ["a"], "the question is empty"),
        (["When?", 7], ["a"], "the question is empty"),
        (["When?"], [7], "passages is int"),
    ],
)
def test_bad_input_is_told_before_anything_is_read(finch: Finch, questions: Any, passages: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        finch.ask_many(questions, passages)


def test_one_question_too_long_is_told_before_anything_is_read(finch: Finch) -> None:
    with pytest.raises(WindowError):
        finch.ask_many(["When?", "why " * 600], texts(3))


def test_a_bad_option_is_told(finch: Finch) -> None:
    with pytest.raises(InputError, match="unknown option"):
        finch.ask_many(["When?"], texts(3), bugdet=3)  # type: ignore[call-arg]


def test_many_questions_are_answered_for_an_event_loop() -> None:
    finch = small_finch()
    questions = [f"When {n}?" for n in range(3)]
    expected = [answer.text for answer in finch.ask_many(questions, texts(6))]
    assert [answer.text for answer in asyncio.run(finch.aask_many(questions, texts(6)))] == expected


@pytest.mark.parametrize("lists", [texts(60), [texts(60)] * 10], ids=["shared", "own"])
def test_a_cancelled_task_ends_many_answers(lists: Any) -> None:
    steps: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def on_progress(stage: str, done: int, total: int) -> None:
        steps.append(done)
        begun.set()
        go_on.wait(10)

    async def run() -> None:
        asking = small_finch(on_progress=on_progress).aask_many([f"When {n}?" for n in range(10)], lists)
        task = asyncio.create_task(asking)
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(run())  # which waits for the thread
    assert len(steps) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_report_shows_the_budget_that_was_used(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 120)
    finch = small_finch(budget=None, chunk_size=None, max_new_tokens=4)
    questions = ["When?", f"When {'was it ' * 60}?"]  # the longer one leaves less room
    alone = [finch.ask(question, texts(60)).report.budget for question in questions]
    assert alone[0] > alone[1]
    answers = finch.ask_many(questions, texts(60) if shared else [texts(60)] * 2)
    assert [answer.report.budget for answer in answers] == ([alone[1]] * 2 if shared else alone)
    assert all(answer.report.kept_tokens <= answer.report.budget for answer in answers)
