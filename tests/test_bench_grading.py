"""Grades of answers: quotes against marked sentences, ROUGE-L, confidences, several gold passages."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from typing import Any

import pytest

from finch_rag.bench.bootstrap import Estimate, auroc, bootstrap_auroc
from finch_rag.bench.cases import QualityCase
from finch_rag.bench.grading import grade, metrics_of, rouge_l
from finch_rag.bench.methods import Contestant, Outcome, run
from finch_rag.bench.sentences import best_support, matches, support
from finch_rag.bench.summary import summarise
from finch_rag.corpus import Question
from finch_rag.prompts.passages import Passage

from .small import small_finch

LONG = "It was the longest bridge of the country when it was built, by the engineer Clara Novak in 1874."


def case(question_id: str = "q", retrieved: str = "abc", **of_question: Any) -> QualityCase:
    fields: dict[str, Any] = {"answers": ("x",), "gold_ids": ("a", "b"), **of_question}
    question = Question(question_id, "Who?", **fields)
    return QualityCase(question, [Passage("text", id=name) for name in retrieved], [*range(len(retrieved))])


def record(question_id: str = "q", label: str = "finch@1", said: str = "x", **fields: Any) -> dict[str, Any]:
    return {"id": question_id, "label": label, **asdict(replace(Outcome(said, [], 1, 0.0, 0.0), **fields))}


@pytest.mark.parametrize(
    ("quote", "marked", "same"),
    [
        ("The bridge was built in 1874.", "The bridge was built in 1874 .", True),
        ("The old bridge was built in 1874, they say.", "bridge was built in 1874", True),  # a part was marked
        ("It was old.", "It was old . It fell .", True),  # two were marked as one
        ("old it was", "It was old . It fell .", False),  # a part, but in another order
        ("one two three four seven", "one two three four five", True),  # four fifths
        ("one two three six seven", "one two three four five", False),
        ("one one one one one", "one two three four five", False),  # a word counts as often as it is there
        ("ear", "the year was dry", False),  # parts are made of words
        ("The!", "The bridge", False),  # nothing is left of it
        ("The bridge", "...", False),
    ],
)
def test_a_quote_is_a_marked_sentence(quote: str, marked: str, same: bool) -> None:
    assert matches(quote, marked) is same


def test_precision_counts_quotes_and_recall_marked_sentences() -> None:
    marked = ["It rains .", "It snows .", "It is warm .", "Nobody knows ."]
    quotes = [("a", "It rains."), ("a", "It rains. It snows."), ("a", "Bread is dear.")]
    found = support(quotes, marked, {"a"})
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 0.5
    assert found.f1 == pytest.approx(4 / 7)
    assert support([("z", "It rains.")], marked, {"a"}).f1 == 0  # the same words in another passage
    assert support([], marked, {"a"}).f1 == 0


def test_the_annotator_who_agrees_most_counts() -> None:
    quotes = [("a", "It rains."), ("a", "It snows.")]
    # The first has the better precision, the second the better F1.
    found = best_support(quotes, [["It rains .", "It snows .", "w", "x", "y", "z"], ["It rains ."]], {"a"})
    assert (found.precision, found.recall) == (0.5, 1)


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("police kill the gunman", ["police killed the gunman"], 1.0),  # stems
        ("the gunman kill police", ["police killed the gunman"], 0.5),  # the longest row in order is two of four
        ("police", ["dogs bark", "police come"], 2 / 3),  # the best answer; precision 1, recall 1/2
        ("x", [], 0.0),
    ],
)
def test_rouge_l(text: str, answers: list[str], score: float) -> None:
    assert rouge_l(text, answers) == pytest.approx(score)


def test_long_answers_are_graded_by_rouge_l_and_others_are_not() -> None:
    short, long, both = case(), case(answers=(LONG,)), case(answers=(LONG, "x", "x"))
    assert metrics_of([short]) == metrics_of([both]) == ("accuracy", "f1")
    assert metrics_of([long]) == ("accuracy", "f1", "rouge_l")
    assert grade(long, record(said=LONG.lower()), metrics_of([long]))["rouge_l"] == 1
    assert "rouge_l" not in grade(short, record(), metrics_of([short]))


def test_where_all_answers_are_asked_for_a_part_of_them_is_not_right() -> None:
    asked = case(answers=("17", "23", "5", "9"), needs_all=True)
    metrics = metrics_of([asked])
    assert metrics == ("accuracy", "f1", "match")
    some, every = (grade(asked, record(said=said), metrics) for said in ("17 and 23", "9, 5, 23, 17"))
    assert (some["match"], some["accuracy"]) == (0.5, 0)
    assert some["f1"] == pytest.approx(4 / 7)  # two of three words, two of four numbers
    assert (every["match"], every["accuracy"], every["f1"]) == (1, 1, 1)


def test_any_and_all_gold_passages_are_counted_of_all_questions() -> None:
    cases = [case("none", "cd"), case("one", "acd"), case("two", "abcd")]
    kept = {"none": ["c"], "one": ["a", "c"], "two": ["b"]}
    records = [record(key, kept_ids=ids) for key, ids in kept.items()]
    records += [record(case.question.id, "full", kept_ids=[p.id for p in case.passages]) for case in cases]
    records.append({"id": "one", "label": "gold", "skipped": "too long"})
    found = summarise(cases, records)
    assert (found["gold_retrieved"], found["gold_all_retrieved"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    rows = found["methods"]
    assert (rows["finch@1"]["gold_any_kept"], rows["finch@1"]["gold_all_kept"]) == (pytest.approx(2 / 3), 0)
    assert (rows["full"]["gold_any_kept"], rows["full"]["gold_all_kept"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert rows["finch@1"]["gold_kept"] == rows["full"]["gold_kept"] == 1  # of those that were retrieved
    assert rows["gold"] == {"n": 0, "skipped": "too long"}


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs(seed: int) -> None:
    rng = random.Random(seed)
    high = [rng.randint(0, 6) / 6 for _ in range(rng.randint(1, 40))]  # many are equal
    low = [rng.randint(0, 5) / 6 for _ in range(rng.randint(1, 40))]
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(low, high) == pytest.approx(1 - auroc(high, low))


def test_the_interval_of_an_auroc_holds_it_and_narrows_with_more_cases() -> None:
    rng = random.Random(0)
    high, low = ([rng.gauss(mean, 1) for _ in range(400)] for mean in (1, 0))
    few, many = bootstrap_auroc(high[:30], low[:30]), bootstrap_auroc(high, low)
    assert many.mean == auroc(high, low) == pytest.approx(0.76, abs=0.03)  # of two normals, one deviation apart
    assert few.low < few.mean < few.high
    assert many.low < many.mean < many.high
    error = 0.0171  # by the formula of Hanley and McNeil (1982)
    assert many.high - many.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert few.high - few.low > 3 * (many.high - many.low)
    assert bootstrap_auroc([1.0, 2.0], [0.0]) == bootstrap_auroc([5.0], [0.0, 3.0]) == Estimate(1, 1, 1)
    assert bootstrap_auroc([1.0, 1.0], [1.0]) == Estimate(0.5, 0.5, 0.5)


def test_support_tells_questions_with_an_answer_from_those_without() -> None:
    cases = [case("a"), case("b"), case("missed", "bc"), case("c", "c", answers=(), answerable=False)]
    cases.append(case("d", "c", answers=(), answerable=False))
    supports = {"a": 0.9, "b": 0.2, "missed": 0.0, "c": 0.2, "d": 0.1}  # one pair is even, three are right
    records = [record(key, support=value, said="x" if key in "ab" else "y") for key, value in supports.items()]
    records += [record(key, "full", log_probability=-value) for key, value in supports.items()]
    found = summarise(cases, records)
    assert (found["cases"], found["unanswerable"]) == (3, 2)
    row = found["methods"]["finch@1"]
    assert (row["n"], row["n_unanswerable"]) == (3, 2)
    assert row["accuracy"]["mean"] == pytest.approx(2 / 3)  # questions without an answer are not graded
    assert row["auroc_support"]["mean"] == pytest.approx(3.5 / 4)
    assert "auroc_log_probability" not in row
    assert found["methods"]["full"]["auroc_log_probability"]["mean"] == pytest.approx(0.5 / 4)
    assert "auroc_support" not in found["methods"]["full"]


def test_a_set_of_questions_without_an_answer_has_no_grades() -> None:
    found = summarise([case(answers=(), answerable=False)], [record(support=0.5)])
    assert (found["cases"], found["gold_retrieved"]) == (0, None)
    assert found["methods"]["finch@1"]["skipped"] == "no question that has an answer was asked"


def test_citations_are_graded_where_sentences_are_marked() -> None:
    marked = case(sentences=(("It rains .", "It snows ."),))
    plain = case("plain")
    quotes = [("a", "It rains."), ("a", "It pours.")]
    records = [record(quotes=quotes), record("plain", quotes=quotes), record(label="full")]
    rows = summarise([marked, plain], records)["methods"]
    assert rows["finch@1"]["citation_precision"]["mean"] == rows["finch@1"]["citation_recall"]["mean"] == 0.5
    assert rows["finch@1"]["citation_f1"]["mean"] == 0.5
    assert "citation_f1" not in rows["full"]


def test_an_outcome_has_what_the_answer_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.quotes.support.calibrated", lambda runtime, told: (0.0, 1.0, 1.0))
    monkeypatch.setattr("finch_rag.quotes.choosing.LEAST_ATTENTION", 0.0)
    finch = small_finch(reread=True)
    asked = case()
    judged = run("full", Contestant(finch, 60, 8, judges=True), asked)
    answer = finch.ask(
        asked.question.question, asked.passages, budget=400, reread=False, max_new_tokens=8, support=True
    )
    assert judged.support == answer.support is not None
    assert judged.quotes
    assert judged.quotes == [(cited.passage_id, quote.text) for cited in answer.citations for quote in cited.quotes]
    assert run("full", Contestant(finch, 60, 8), asked).support is None
    assert run("full", Contestant(small_finch(quotes=False), 60, 8), asked).quotes is None


@pytest.mark.parametrize("method", ["finch", "full", "refine", "map-reduce", "finch-store"])
def test_a_cases_instructions_reach_the_model(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch()
    ask, seen = finch.ask, list[str]()

    def listening(*args: Any, **options: Any) -> Any:
        seen.append(options.get("instructions", ""))
        return ask(*args, **options)

    monkeypatch.setattr(finch, "ask", listening)
    run(method, Contestant(finch, 60, 2), replace(case(), instructions="Sing it."))
    assert seen
    assert all(text.startswith("Sing it.") for text in seen)
