"""Whether an answer is right: SQuAD's normalisation and its token F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether a text, normalised, contains one of the answers as a substring.

    Args:
        text: What a model said.
        answers: Answers of which any is right; one that is empty once it is normalised is passed over.
    """
    said = normalise(text)
    return any(gold in said for gold in map(normalise, answers) if gold)


def share_of_answers(text: str, answers: Iterable[str]) -> float:
    """The share of answers that a text, normalised, contains, from 0 to 1: RULER's score, where all are asked for.

    Args:
        text: What a model said.
        answers: All that it should say; one that is empty once it is normalised is passed over.
    """
    said = normalise(text)
    golds = [gold for gold in map(normalise, answers) if gold]
    return sum(gold in said for gold in golds) / len(golds) if golds else 0.0


def token_f1(text: str, answers: Iterable[str]) -> float:
    """SQuAD's F1 of the words that a text shares with the best of the answers, from 0 to 1.

    Args:
        text: What a model said.
        answers: Answers of which any is right.
    """
    said = normalise(text).split()
    return max((_f1(said, normalise(answer).split()) for answer in answers), default=0.0)


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    shared = sum((Counter(said) & Counter(gold)).values())
    return 2 * shared / (len(said) + len(gold))
