"""Benchmark results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from ..terminal.output import cell, out, say
from .bootstrap import Estimate
from .grading import METRICS
from .summary import AT_EQUAL_BUDGET, BASELINE, equal_budget_key

METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "match": "match", "rouge_l": "ROUGE-L"}
_ESTIMATES = {  # in a table of their own, where there are any
    "citation_precision": "cited right",
    "citation_recall": "right cited",
    "citation_f1": "citation F1",
    "auroc_support": "AUROC of support",
    "auroc_log_probability": "AUROC of log probability",
}
_FIGURES = {  # the heading and how a number is written
    "gold_any_kept": ("any gold kept", ".3f"),
    "gold_all_kept": ("all gold kept", ".3f"),
    "prefill_seconds": ("prefill s", ".2f"),
    "decode_seconds": ("decode s", ".2f"),
    "calls": ("calls", ".1f"),
    "peak_mib": ("peak MiB", ",.0f"),
}


def show_quality(summary: Mapping[str, Any]) -> None:
    """Prints what `finch_rag.bench.quality` found: a row for each method, best F1 first.

    Args:
        summary: What the JSON line holds.
    """
    rows = dict(sorted(summary["methods"].items(), key=lambda item: -item[1].get("f1", {}).get("mean", -1.0)))
    _show_setting(summary)
    metrics = [metric for metric in METRIC_NAMES if any(metric in row for row in rows.values())]
    shown = [key for key in _FIGURES if any(row.get(key) is not None for row in rows.values())]
    names = (METRIC_NAMES[metric] for metric in metrics)
    table = _table("method", "n", "KV", *names, *(_FIGURES[key][0] for key in shown))
    for name, row in rows.items():
        if row["n"]:
            estimates = (str(Estimate(**row[metric])) for metric in metrics)
            figures = ("" if row.get(key) is None else format(row[key], _FIGURES[key][1]) for key in shown)
            table.add_row(cell(name), f"{row['n']:,}", f"{row['kv_tokens']:,.0f}", *estimates, *figures)
    out.print(table)
    for name, row in rows.items():
        if not row["n"]:
            say(f"{name} skipped: {row['skipped']}")
        elif row["skipped"]:
            say(f"{name}: {row['skipped']:,} of {row['n'] + row['skipped']:,} questions skipped")
    _show_estimates(rows)
    _show_differences(rows, metrics)


def _show_setting(summary: Mapping[str, Any]) -> None:
    """Prints what was asked, and how much of it was retrieved."""
    settings = summary["settings"]
    order = "" if settings["order"] == "rank" else f" in order {settings['order']}"
    top_k = "all passages" if settings["top_k"] is None else f"top {settings['top_k']}"
    say(f"{settings['data']}, {settings['retriever']} {top_k}{order}, {settings['model']}")
    more = f", and {summary['unanswerable']:,} without an answer" if summary["unanswerable"] else ""
    retrieved = ""
    if summary["cases"]:
        any_gold, all_gold = summary["gold_retrieved"], summary["gold_all_retrieved"]
        retrieved = f"any gold passage retrieved for {any_gold:.3f}, all for {all_gold:.3f}; "
    say(f"{summary['cases']:,} questions{more}; {retrieved}means with 95% bootstrap intervals")


def _show_estimates(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints how well methods quote, and how well they tell what has no answer, where that was measured."""
    shown = [key for key in _ESTIMATES if any(key in row for row in rows.values())]
    table = _table("method", *(_ESTIMATES[key] for key in shown))
    for name, row in rows.items():
        if found := {key: str(Estimate(**row[key])) for key in shown if key in row}:
            table.add_row(cell(name), *(found.get(key, "") for key in shown))
    if table.row_count:
        say()
        out.print(table)


def _show_differences(rows: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Prints each method's paired differences against the baselines."""
    table = _table("paired difference", *(METRIC_NAMES[metric] for metric in metrics))
    for name, row in rows.items():
        method, _, budget = name.rpartition("@")
        baselines = {"difference": BASELINE}
        for number, other in enumerate(AT_EQUAL_BUDGET):
            if method not in AT_EQUAL_BUDGET[:number]:  # else the other's row has that pair already
                baselines[equal_budget_key(other)] = f"{other}@{budget}"
        for key, other in baselines.items():
            if f"f1_{key}" in row:
                table.add_row(
                    cell(f"{name} - {other}"), *(Estimate(**row[f"{metric}_{key}"]).signed for metric in metrics)
                )
    if table.row_count:
        say()
        out.print(table)


def show_positions(summary: Mapping[str, Any]) -> None:
    """Prints what `finch_rag.bench.positions` found: a table for each number of passages.

    Args:
        summary: What the JSON line holds.
    """
    settings = summary["settings"]
    for passages, methods in summary["passages"].items():
        say(
            f"{settings['data']}, {settings['retriever']}, {settings['model']}, {summary['cases']} questions; "
            f"the answer's passage at a place of {passages}, from 0"
        )
        places = list(dict.fromkeys(place for row in methods.values() for place in row["places"]))
        table = _table("method", "metric", "n", *places, "spread")
        for name, row in methods.items():
            for metric in METRICS:
                found = {place: figures.get(metric) for place, figures in row["places"].items()}
                table.add_row(
                    cell(name),
                    METRIC_NAMES[metric],
                    str(min(figures["n"] for figures in row["places"].values())),
                    *(f"{found[p]['mean']:.3f}" if found.get(p) else "skipped" for p in places),
                    "" if row["spread"] is None else f"{row['spread'][metric]:.3f}",
                )
        out.print(table)


def show_ruler(summary: Mapping[str, Any]) -> None:
    """Prints what `finch_rag.bench.ruler` found: a table for each length, best mean first.

    Args:
        summary: What the JSON line holds.
    """
    for length, by_task in summary["tokens"].items():
        questions = sum(found["cases"] for found in by_task.values())
        model = summary["settings"]["model"]
        say(f"{int(length):,} tokens, {questions:,} made questions, {model}; share of the answers found")
        rows: dict[str, dict[str, float]] = {}
        for task, found in by_task.items():
            for name, row in found["methods"].items():
                rows.setdefault(name, {}).update({task: row["match"]["mean"]} if row["n"] else {})
        table = _table("method", *by_task, "mean")
        for name, scores in sorted(rows.items(), key=lambda item: -sum(item[1].values())):
            cells = (f"{scores[task]:.3f}" if task in scores else "skipped" for task in by_task)
            mean = f"{fmean(scores.values()):.3f}" if len(scores) == len(by_task) else ""
            table.add_row(cell(name), *cells, mean)
        out.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
