"""Figures of a benchmark's results: means with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..corpus.metrics import contains_answer, token_f1
from .bootstrap import bootstrap
from .cases import QualityCase

BASELINE = "full"
AT_EQUAL_BUDGET = ("top-k", "finch")  # baselines too, each method's with the same budget
METRICS = ("accuracy", "f1")
_SKIPPED = {"skipped": "never asked"}


def summarise(cases: Sequence[QualityCase], results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of each method, and its paired differences against the baselines.

    A row's ``f1_difference`` is against `BASELINE`, its ``f1_difference_top_k`` and ``f1_difference_finch`` are against
    those methods with the same budget; likewise for ``accuracy``.

    Args:
        cases: The cases that count.
        results: Of any methods; those of other cases are left out.

    Returns:
        ``cases`` (how many), ``gold_retrieved`` (the share of them for which the answer's passage was retrieved) and
        ``methods``, a row for each.
    """
    found = {case.question.id: case for case in cases}
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    for record in results:
        if record["id"] in found:
            case = found[record["id"]]
            graded = {
                **record,
                "accuracy": float(contains_answer(record.get("prediction", ""), case.question.answers)),
                "f1": token_f1(record.get("prediction", ""), case.question.answers),
                "gold_kept": float(any(i in case.question.gold_ids for i in record.get("kept_ids", ()))),
                "gold_found": case.has_gold,
            }
            by_label.setdefault(record["label"], {})[record["id"]] = graded
    rows = {}
    for name, records in by_label.items():
        budget = name.rpartition("@")[2]
        against = {"difference": BASELINE}
        against |= {equal_budget_key(method): f"{method}@{budget}" for method in AT_EQUAL_BUDGET}
        baselines = {key: by_label[other] for key, other in against.items() if other in by_label and other != name}
        rows[name] = _row(records, baselines)
    retrieved = fmean(case.has_gold for case in cases)
    return {"cases": len(cases), "gold_retrieved": retrieved, "methods": rows}


def equal_budget_key(baseline: str) -> str:
    """What ends the key of a row's difference against a baseline with the same budget.

    Args:
        baseline: Of `AT_EQUAL_BUDGET`.
    """
    return f"difference_{baseline.replace('-', '_')}"


def _row(
    records: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    ran = {key: record for key, record in records.items() if "skipped" not in record}
    if not ran:
        return {"n": 0, "skipped": next(iter(records.values()))["skipped"]}
    values = list(ran.values())
    row: dict[str, Any] = {"n": len(ran), "skipped": len(records) - len(ran)}
    for metric in METRICS:
        row[metric] = asdict(bootstrap([record[metric] for record in values]))
        for key, baseline in baselines.items():
            pairs = [(ran[k][metric], baseline[k][metric]) for k in ran if "skipped" not in baseline.get(k, _SKIPPED)]
            if pairs:
                row[f"{metric}_{key}"] = asdict(bootstrap([ours - theirs for ours, theirs in pairs]))
    retrieved = [record["gold_kept"] for record in values if record["gold_found"]]
    row["gold_kept"] = fmean(retrieved) if retrieved else None
    for name in ("kv_tokens", "prefill_seconds", "decode_seconds", "calls"):
        row[name] = fmean(record[name] for record in values)
    peaks = [record["peak_mib"] for record in values if record.get("peak_mib") is not None]
    row["peak_mib"] = max(peaks) if peaks else None
    return row
