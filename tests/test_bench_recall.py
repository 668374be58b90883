"""``finch-rag bench recall``: how often a ranking has the passages that answer among its first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finch_rag.bench import recall
from finch_rag.bench.recall import RANKERS
from finch_rag.corpus.reading import Question
from finch_rag.engine import Finch

from .command_line import one_error, run
from .small import chat_tokenizer, small_model

COUNT = 12


def test_shares_of_questions_are_counted() -> None:
    questions = [Question("a", "?", ("x",), ("p1",)), Question("b", "?", ("x",), ("p2", "p3"))]
    found = recall.recall(questions, [["p0", "p1"], ["p2", "p0", "p5", "p3"]])
    assert found == {"first": [0.5, 1.0, 1.0, 1.0, 1.0], "all": [0.0, 0.5, 1.0, 1.0, 1.0]}


@pytest.mark.usefixtures("hashed")
def test_every_ranker_is_measured(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = Finch(
        small_model(max_position_embeddings=4096),
        chat_tokenizer(),
        heads=[(0, 1)],
        alone_heads=[(0, 1), (1, 2)],
        chunk_size=256,
    )
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: finch)
    result = run("bench", "recall", numbered, "--rankers", ",".join(RANKERS), "--limit", 12)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert (found["passages"], found["questions"]) == (COUNT, COUNT)
    assert list(found["rankers"]) == list(RANKERS)
    for row in found["rankers"].values():
        assert row["first"] == sorted(row["first"])
        assert row["first"][-1] == row["all"][-1] == 1  # all of twelve passages are among the first twenty
        assert row["seconds"] > 0
    assert found["rankers"]["bm25"]["first"][0] == 1  # each question's word is in its passage alone
    assert found["rankers"]["bm25"]["all"][0] == pytest.approx(11 / 12)
    assert "first @1" in result.stdout


def test_questions_without_an_answer_are_left_out(numbered: Path) -> None:
    file = next(numbered.glob("questions*"))
    first, *lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "answerable": False}), *lines]))
    result = run("bench", "recall", numbered, "--rankers", "bm25", "--limit", 12)
    assert json.loads(result.stdout.splitlines()[-1])["questions"] == COUNT - 1


def test_help_names_every_ranker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = run("bench", "recall", "--help").stdout
    listed = shown.partition("Of: ")[2].partition("[default")[0]
    assert set(RANKERS) <= set(re.findall(r"[\w-]+", listed))
    assert "finch" not in listed


def test_what_cannot_be_measured_is_said_in_one_line(numbered: Path) -> None:
    assert "ranker bm26 is unknown: use bm25" in one_error(run("bench", "recall", numbered, "--rankers", "bm26"))
    assert "there is no ranker" in one_error(run("bench", "recall", numbered, "--rankers", ","))
    assert "--limit is 0" in one_error(run("bench", "recall", numbered, "--limit", 0))
