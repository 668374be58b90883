"""Grades of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..corpus.metrics import contains_answer, share_of_answers, token_f1
from ..errors import MissingExtraError
from .cases import QualityCase, are_long
from .sentences import best_support

METRICS = ("accuracy", "f1")  # of every set
CITATIONS = ("citation_precision", "citation_recall", "citation_f1")  # where sentences are marked, and quoted


def metrics_of(cases: Sequence[QualityCase]) -> tuple[str, ...]:
    """What the answers of a set are graded by.

    Args:
        cases: The set's.

    Returns:
        `METRICS`, then "match" where all known answers are asked for, and "rouge_l" where they are long.
    """
    questions = [case.question for case in cases]
    match = ("match",) if any(question.needs_all for question in questions) else ()
    rouge = ("rouge_l",) if are_long(questions) else ()
    return (*METRICS, *match, *rouge)


def grade(case: QualityCase, record: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, float]:
    """What an answer to a question that has one is worth, each from 0 to 1.

    Where all known answers are asked for, it is right if it contains all of them, and F1 is against all in a row.

    Args:
        case: What was asked.
        record: The fields of `finch_rag.bench.methods.Outcome`.
        metrics: Of `metrics_of`.

    Returns:
        The metrics, "gold_any_kept", "gold_all_kept", and `CITATIONS` where they can be told.

    Raises:
        MissingExtraError: If rouge-score is needed and not installed.
    """
    question, said = case.question, record.get("prediction", "")
    kept, gold = set(record.get("kept_ids", ())), set(question.gold_ids)
    match = share_of_answers(said, question.answers)
    one = [" ".join(question.answers)] if question.needs_all else question.answers
    grades = {
        "accuracy": float(match == 1 if question.needs_all else contains_answer(said, question.answers)),
        "f1": token_f1(said, one),
        "gold_any_kept": float(bool(kept & gold)),
        "gold_all_kept": float(kept >= gold),
    }
    if "match" in metrics:
        grades["match"] = match
    if "rouge_l" in metrics:
        grades["rouge_l"] = rouge_l(said, one)
    if question.sentences and record.get("quotes") is not None:
        quotes = [(passage_id, text) for passage_id, text in record["quotes"]]
        support = best_support(quotes, question.sentences, gold)
        grades |= zip(CITATIONS, (support.precision, support.recall, support.f1), strict=True)
    return grades


def rouge_l(text: str, answers: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): F1 by the longest common subsequence of stemmed words, against the best of the answers.

    Args:
        text: What a model said.
        answers: Answers of which any is right.

    Raises:
        MissingExtraError: If rouge-score is not installed.
    """
    return max((float(_scorer().score(answer, text)["rougeL"].fmeasure) for answer in answers), default=0.0)


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # seconds, and only long answers need it
    except ModuleNotFoundError as missing:
        raise MissingExtraError.of(missing.name or "rouge_score", "bench") from missing
    return RougeScorer(["rougeL"], use_stemmer=True)
