from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finch_rag.errors import InputError
from finch_rag.heads.examples import HeadExample, make_examples, read_examples


def named(question: str) -> list[str]:
    """Names in a question, its first word left out."""
    return re.findall(r"(?<!^)\b[A-Z][a-z]+", question)


def test_the_same_seed_gives_the_same_examples() -> None:
    assert make_examples(8, 4) == make_examples(8, 4)
    assert make_examples(8, 4, seed=1) != make_examples(8, 4)


@pytest.mark.parametrize(("count", "passages"), [(24, 10), (5, 2), (1, 3)])
def test_there_are_as_many_as_asked_for(count: int, passages: int) -> None:
    made = make_examples(count, passages)
    assert len(made) == count
    assert all(len(example.passages) == passages and 0 <= example.gold < passages for example in made)


def test_the_right_passage_stands_at_every_depth() -> None:
    golds = Counter(example.gold for example in make_examples(40, 10))
    assert set(golds) == set(range(10))
    assert max(golds.values()) <= 6


@pytest.mark.parametrize("seed", range(4))
def test_only_the_right_passage_names_what_the_question_asks_about(seed: int) -> None:
    for example in make_examples(24, 10, seed):
        subject = " ".join(named(example.question))
        words = named(example.question)
        assert words, example.question
        holding = [n for n, text in enumerate(example.passages) if all(word in text for word in words)]
        assert holding == [example.gold], (subject, example)


def test_passages_of_an_example_are_all_different() -> None:
    for example in make_examples(24, 10):
        assert len(set(example.passages)) == len(example.passages)


def test_wrong_passages_look_like_the_right_one() -> None:
    for example in make_examples(12, 10):
        ending = example.passages[example.gold][-25:]  # holds no names
        assert sum(text.endswith(ending) for text in example.passages) >= 5


def line(**changes: Any) -> str:
    return json.dumps({"question": "Who?", "passages": ["It was Ann.", "It rained."], "gold": 0, **changes})


def test_examples_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"\ufeff{line()}\n\n{line(gold=1, other='is passed over')}\n", encoding="utf-8")
    passages = ("It was Ann.", "It rained.")
    assert read_examples(file) == [HeadExample("Who?", passages, 0), HeadExample("Who?", passages, 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", r"mine.jsonl, line 2 is not JSON: .*each line is"),
        ('"\\ud800"', r"line 2 is not JSON"),
        ("[1]", r"line 2 is a JSON list: .*each line is"),
        (line(passages="text"), r"line 2 is no example: each line is"),
        (line(question=" "), r"line 2: the question is empty"),
        (line(question=3), r"line 2: the question is empty"),
        (line(passages=["one"]), r"line 2: there are 1 passages.* 2 or more"),
        (line(passages=["one", " "]), r"line 2: passage 1 has no text"),
        (line(passages=["one", 2]), r"line 2: passage 1 has no text"),
        (line(gold=2), r"line 2: gold is 2: name one of the passages 0 to 1"),
        (line(gold=-1), r"line 2: gold is -1"),
        (line(gold="0"), r"line 2: gold is '0'"),
        (line(gold=True), r"line 2: gold is True"),
        (json.dumps({"question": "Who?", "passages": ["a", "b"]}), r"line 2: gold is None"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, wrong: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{line()}\n{wrong}\n")
    with pytest.raises(InputError, match=message) as error:
        read_examples(file)
    assert "\n" not in str(error.value)


def test_files_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl do not exist: pass a file of JSON lines"):
        read_examples(tmp_path / "nowhere.jsonl")
    for content, message in ((b" \n\n", "has no examples: each line is"), (b"\xff\xfe", r"is not UTF-8 \(byte 0\)")):
        file = tmp_path / "mine.jsonl"
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_examples(file)
