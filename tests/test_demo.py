import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from finch_rag import CorpusError, Passage
from finch_rag.cli import app as commands
from finch_rag.cli import demo
from finch_rag.cli.contest import DEMO_METHODS, Contest, FullWindow, run_contest, summary
from finch_rag.corpus import Question, example, read_corpus, retrieval
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import Retriever, in_rank_order

from .hashed import hashed_embedder
from .small import chat_tokenizer, small_finch, small_model, texts

PASSAGES = [Passage(text, f"p{number}") for number, text in enumerate(texts(60))]
QUESTIONS = [
    Question("q1", "Who built the harbour in 1874?", ("x",), ("p3",)),
    Question("q2", "When was the lighthouse lit for the first time, in which winter?", ("x",), ("p59",)),
]


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Contest:
    monkeypatch.setattr(retrieval, "_load_embedder", lambda: hashed_embedder)
    return Contest(small_finch(), Retriever.build(PASSAGES), PASSAGES, QUESTIONS, 100, 6)


def test_the_demos_question_is_one_of_the_example_corpus() -> None:
    questions = [json.loads(line) for line in (example_corpus() / "questions.jsonl").read_text().splitlines()]
    assert demo.QUESTION_ID in {question["id"] for question in questions}
    assert demo.BUDGET <= 1024


def test_the_example_corpus_of_an_installed_package_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "__file__", str(tmp_path / "finch_rag" / "corpus" / "example.py"))
    with pytest.raises(CorpusError, match="install finch-rag again"):
        example_corpus()
    (tmp_path / "examples" / "corpus").mkdir(parents=True)
    assert example_corpus() == tmp_path / "examples" / "corpus"
    (tmp_path / "finch_rag" / "example_corpus").mkdir(parents=True)
    assert example_corpus() == tmp_path / "finch_rag" / "example_corpus"


def test_the_full_window_is_the_models_own_generation_on_a_full_window() -> None:
    finch, plain = small_finch(), small_model()
    window = FullWindow(finch, PASSAGES, [question.question for question in QUESTIONS], 6)
    longest = 0
    for question in (*QUESTIONS, QUESTIONS[0]):  # the first again: asking leaves no trace
        prompt = finch.prompts.build(question.question, PASSAGES)
        document = [token for passage in prompt.passages for token in passage][: window.tokens]
        context = [*prompt.prefix, *document, *prompt.question, *prompt.tail]
        longest = max(longest, len(context) + 6)
        output = plain.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)
        expected = str(chat_tokenizer().decode(output[0, len(context) :], skip_special_tokens=True))
        assert window.answer(question.question).text == expected.strip()
    assert longest == finch.window
    lengths = [len(passage) for passage in finch.prompts.build("x", PASSAGES).passages]
    whole = {f"p{number}" for number in range(60) if sum(lengths[: number + 1]) <= window.tokens}
    assert window.passage_ids == whole
    assert "p0" in whole
    assert "p59" not in whole


def test_each_method_sees_what_it_claims(contest: Contest) -> None:
    for question in QUESTIONS:
        outcomes = contest.run(question)
        assert list(outcomes) == list(DEMO_METHODS)
        ranked = in_rank_order(Retriever.build(PASSAGES), PASSAGES, question.question, 60)
        ends = list(accumulate(len(passage) for passage in small_finch().prompts.build("x", ranked).passages))
        fitting = ranked[: sum(end <= 100 for end in ends)]
        assert outcomes["minilm_passages"].tokens == ends[len(fitting) - 1]  # nothing evicted
        assert outcomes["bm25_passages"].tokens <= 100
        assert outcomes["minilm_passages"].has_gold == any(p.id == question.gold_ids[0] for p in fitting)
        assert 0 < outcomes["finch"].tokens <= 100
        assert outcomes["full_window"].has_gold == (question.id == "q1")
        assert all(outcome.seconds > 0 for outcome in outcomes.values())


def test_outcomes_are_counted(contest: Contest) -> None:
    def outcome(right: bool, gold: bool, tokens: int) -> dict[str, Any]:
        return {"right": right, "has_gold": gold, "tokens": tokens, "seconds": 2.0}

    results = [
        {"outcomes": dict.fromkeys(DEMO_METHODS, outcome(True, True, 10))},
        {"outcomes": {**dict.fromkeys(DEMO_METHODS, outcome(True, True, 20)), "finch": outcome(False, True, 30)}},
    ]
    totals = summary(results)
    assert totals["finch"] == {"right": 1, "has_gold": 2, "mean_tokens": 20, "mean_seconds": 2}
    assert totals["full_window"] == {"right": 2, "has_gold": 2, "mean_tokens": 15, "mean_seconds": 2}


def test_run_contest_reports_progress_and_plain_values(contest: Contest) -> None:
    seen: list[tuple[str, int, int]] = []
    results = run_contest(contest, QUESTIONS, lambda *step: seen.append(step))
    assert seen == [("questions", 0, 2), ("questions", 1, 2), ("questions", 2, 2)]
    assert json.loads(json.dumps(results)) == results
    assert [result["id"] for result in results] == ["q1", "q2"]


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's commands on a small corpus and a small model."""
    folder = tmp_path / "example"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"id": p.id, "text": p.text}) for p in PASSAGES))
    lines = [{"id": q.id, "question": q.question, "answers": ["zzz"], "gold_ids": q.gold_ids} for q in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(demo, "example_corpus", lambda: folder)
    monkeypatch.setattr(demo, "QUESTION_ID", "q2")
    monkeypatch.setattr(demo, "SECOND_QUESTION_ID", "q1")
    monkeypatch.setattr(demo, "BUDGET", 100)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(demo, "load_finch", lambda name, bars, **settings: small_finch(**settings))
    monkeypatch.setattr(retrieval, "_load_embedder", lambda: hashed_embedder)


@pytest.mark.usefixtures("small_demo")
def test_demo_reads_everything_and_says_whether_the_answer_is_right() -> None:
    shown = json.loads(CliRunner().invoke(commands.app, ["demo", "--json"]).stdout)
    keys = [
        "question",
        "answer",
        "citations",
        "statements",
        "support",
        "report",
        "answers",
        "right",
        "window",
        "first_piece_seconds",
    ]
    assert list(shown) == [*keys, "second"]
    assert list(shown["second"]) == keys
    assert (shown["second"]["question"], shown["second"]["report"]["stored_tokens"]) == (QUESTIONS[0].question, 0)
    assert shown["second"]["report"]["known_tokens"] == shown["report"]["stored_tokens"]
    assert 0 < shown["second"]["first_piece_seconds"] < shown["first_piece_seconds"]
    assert shown["question"] == QUESTIONS[1].question
    assert shown["right"] is False
    assert (shown["report"]["passages"], shown["report"]["budget"]) == (60, 100)
    assert shown["report"]["context_tokens"] > shown["window"] == 512
    words = CliRunner().invoke(commands.app, ["demo"]).stdout
    assert f"Question 1: {QUESTIONS[1].question}" in words
    assert f"Question 2: {QUESTIONS[0].question}" in words
    assert "s for the second question: each passage is read once" in words.replace("\n", " ")
    assert "The answer is wrong" in words
    read, kept = shown["report"]["context_tokens"], shown["report"]["kept_tokens"]
    assert f"Finch read {read:,} tokens of passages; the model's window is 512; {kept} were kept" in words


@pytest.mark.usefixtures("small_demo")
def test_demo_all_compares_the_methods() -> None:
    shown = json.loads(CliRunner().invoke(commands.app, ["demo", "--all", "--limit", "1", "--json"]).stdout)
    assert (shown["questions"], shown["budget"]) == (1, 100)
    assert list(shown["methods"]) == list(DEMO_METHODS)
    assert shown["methods"]["full_window"]["has_gold"] == 1
    table = CliRunner().invoke(commands.app, ["demo", "--all"]).stdout
    assert table.count("0 of 2") >= 3
    assert all(name in table for name in DEMO_METHODS.values())


def test_the_example_corpus_is_larger_than_the_embedded_models_window() -> None:
    words = sum(len(passage.text.split()) for passage in read_corpus(example_corpus()).passages)
    assert words > 8192  # and a token is at most a word
