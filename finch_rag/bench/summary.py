"""Figures of a benchmark's results: means with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from .bootstrap import bootstrap, bootstrap_auroc
from .cases import QualityCase
from .grading import CITATIONS, grade, metrics_of

BASELINE = "full"
AT_EQUAL_BUDGET = ("top-k", "finch")  # baselines too, each method's with the same budget
CONFIDENCES = ("support", "log_probability")  # what may tell questions that have an answer from those that have none

Record = Mapping[str, Any]


def summarise(cases: Sequence[QualityCase], results: Iterable[Record]) -> dict[str, Any]:
    """Figures of each method, and its paired differences against the baselines.

    A row's figures are of the questions that have an answer. Its ``f1_difference`` is against `BASELINE`, its
    ``f1_difference_top_k`` and ``f1_difference_finch`` are against those methods with the same budget; likewise for the
    other metrics. ``gold_any_kept`` and ``gold_all_kept`` are shares of all questions, whatever was retrieved;
    ``gold_kept`` is the first one's share where a gold passage was retrieved.

    Where questions without an answer were asked, ``auroc_support`` and ``auroc_log_probability`` say how well a
    method's confidence tells them from those that have one and all of their gold passages. Questions of which a gold
    passage was not retrieved count on neither side: nobody knows whether the others answer them.

    Args:
        cases: The cases that count.
        results: Of any methods; those of other cases are left out.

    Returns:
        ``cases`` and ``unanswerable`` (how many questions have an answer, and have none), ``gold_retrieved`` and
        ``gold_all_retrieved`` (the share of those that have one for which any, and all, of their gold passages were
        retrieved), and ``methods``, a row for each.
    """
    found = {case.question.id: case for case in cases}
    answerable = {key: case for key, case in found.items() if case.question.answerable}
    metrics = metrics_of(list(answerable.values()))
    by_label: dict[str, dict[str, Record]] = {}
    for record in results:
        if record["id"] in found:
            grades = {}
            if record["id"] in answerable and "skipped" not in record:
                grades = grade(found[record["id"]], record, metrics)
            by_label.setdefault(record["label"], {})[record["id"]] = {**record, **grades}
    rows = {}
    for name, records in by_label.items():
        own = {key: record for key, record in records.items() if key in answerable}
        budget = name.rpartition("@")[2]
        against = {"difference": BASELINE}
        against |= {equal_budget_key(method): f"{method}@{budget}" for method in AT_EQUAL_BUDGET}
        baselines = {key: by_label[other] for key, other in against.items() if other in by_label and other != name}
        rows[name] = _row(own, answerable, baselines, metrics)
        if len(answerable) < len(found):
            rows[name] |= _told_apart(records, found)
    return {
        "cases": len(answerable),
        "unanswerable": len(found) - len(answerable),
        "gold_retrieved": _share(case.has_gold for case in answerable.values()),
        "gold_all_retrieved": _share(case.has_all_gold for case in answerable.values()),
        "methods": rows,
    }


def equal_budget_key(baseline: str) -> str:
    """What ends the key of a row's difference against a baseline with the same budget.

    Args:
        baseline: Of `AT_EQUAL_BUDGET`.
    """
    return f"difference_{baseline.replace('-', '_')}"


def _row(
    records: Mapping[str, Record],
    cases: Mapping[str, QualityCase],
    baselines: Mapping[str, Mapping[str, Record]],
    metrics: Sequence[str],
) -> dict[str, Any]:
    ran = {key: record for key, record in records.items() if "skipped" not in record}
    if not ran:
        reasons = (record["skipped"] for record in records.values())
        return {"n": 0, "skipped": next(reasons, "no question that has an answer was asked")}
    values = list(ran.values())
    row: dict[str, Any] = {"n": len(ran), "skipped": len(records) - len(ran)}
    for metric in metrics:
        row[metric] = asdict(bootstrap([record[metric] for record in values]))
        for key, baseline in baselines.items():
            pairs = [(ran[k][metric], baseline[k][metric]) for k in ran if metric in baseline.get(k, {})]
            if pairs:
                row[f"{metric}_{key}"] = asdict(bootstrap([ours - theirs for ours, theirs in pairs]))
    for metric in CITATIONS:
        if cited := [record[metric] for record in values if metric in record]:
            row[metric] = asdict(bootstrap(cited))
    row["gold_kept"] = _share(record["gold_any_kept"] for key, record in ran.items() if cases[key].has_gold)
    for name in ("gold_any_kept", "gold_all_kept", "kv_tokens", "prefill_seconds", "decode_seconds", "calls"):
        row[name] = fmean(record[name] for record in values)
    peaks = [record["peak_mib"] for record in values if record.get("peak_mib") is not None]
    row["peak_mib"] = max(peaks) if peaks else None
    return row


def _told_apart(records: Mapping[str, Record], cases: Mapping[str, QualityCase]) -> dict[str, Any]:
    """How well confidences tell questions that have an answer from those that have none."""
    ran = [record for record in records.values() if "skipped" not in record]
    told: dict[str, Any] = {"n_unanswerable": sum(not cases[record["id"]].question.answerable for record in ran)}
    for confidence in CONFIDENCES:
        known = [(cases[record["id"]], record[confidence]) for record in ran if record.get(confidence) is not None]
        high = [value for case, value in known if case.question.answerable and case.has_all_gold]
        low = [value for case, value in known if not case.question.answerable]
        if high and low:
            told[f"auroc_{confidence}"] = asdict(bootstrap_auroc(high, low))
    return told


def _share(happened: Iterable[float]) -> float | None:
    """The share of what happened, None of nothing."""
    values = list(happened)
    return fmean(values) if values else None
