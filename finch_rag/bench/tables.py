"""Benchmark results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ..terminal.output import out, say
from .bootstrap import Estimate
from .summary import AT_EQUAL_BUDGET, BASELINE, METRICS, equal_budget_key

METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1"}


def show_quality(summary: Mapping[str, Any]) -> None:
    """Prints what `finch_rag.bench.quality` found: a row for each method, best F1 first.

    Args:
        summary: What the JSON line holds.
    """
    settings = summary["settings"]
    retrieved = f"answer's passage retrieved for {summary['gold_retrieved']:.3f}"
    order = "" if settings["order"] == "rank" else f" in order {settings['order']}"
    say(f"{settings['data']}, {settings['retriever']} top {settings['top_k']}{order}, {settings['model']}")
    say(f"{summary['cases']:,} questions, {retrieved}; means with 95% bootstrap intervals")
    table = _table("method", "n", "KV", "accuracy", "F1", "gold kept", "prefill s", "decode s", "calls", "peak MiB")
    rows = dict(sorted(summary["methods"].items(), key=lambda item: -item[1].get("f1", {}).get("mean", -1.0)))
    for name, row in rows.items():
        if row["n"]:
            table.add_row(
                Text(name),
                f"{row['n']:,}",
                f"{row['kv_tokens']:,.0f}",
                *(str(Estimate(**row[metric])) for metric in METRICS),
                "" if row["gold_kept"] is None else f"{row['gold_kept']:.3f}",
                f"{row['prefill_seconds']:.2f}",
                f"{row['decode_seconds']:.2f}",
                f"{row['calls']:.1f}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            )
    out.print(table)
    for name, row in rows.items():
        if not row["n"]:
            say(f"{name} skipped: {row['skipped']}")
        elif row["skipped"]:
            say(f"{name}: {row['skipped']:,} of {row['n'] + row['skipped']:,} questions skipped")
    _show_differences(rows)


def _show_differences(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints each method's paired differences against the baselines."""
    table = _table("paired difference", *METRIC_NAMES.values())
    for name, row in rows.items():
        method, _, budget = name.rpartition("@")
        baselines = {"difference": BASELINE}
        for number, other in enumerate(AT_EQUAL_BUDGET):
            if method not in AT_EQUAL_BUDGET[:number]:  # else the other's row has that pair already
                baselines[equal_budget_key(other)] = f"{other}@{budget}"
        for key, other in baselines.items():
            if f"f1_{key}" in row:
                table.add_row(
                    Text(f"{name} - {other}"), *(Estimate(**row[f"{metric}_{key}"]).signed for metric in METRICS)
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
                    Text(name),
                    METRIC_NAMES[metric],
                    str(min(figures["n"] for figures in row["places"].values())),
                    *(f"{found[p]['mean']:.3f}" if found.get(p) else "skipped" for p in places),
                    "" if row["spread"] is None else f"{row['spread'][metric]:.3f}",
                )
        out.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
