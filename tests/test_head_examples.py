from __future__ import annotations

import re
from collections import Counter

import pytest

from finch_rag.head_examples import make_examples


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
