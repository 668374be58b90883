"""Answer quality: the same questions by several methods, with the same model, prompt and cache size.

Results are JSON lines in a folder, one a question and method; a run that was cut off goes on where it stopped, and
results that other programs have put there (see `finch_rag.bench.peers`) are counted too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..engine import Finch
from ..errors import InputError
from ..metrics import contains_answer, token_f1
from .cases import Case, DataSet, RetrieverName, make_cases, read_cases, write_cases
from .methods import METHODS, WITHOUT_BUDGET, Contestant, DoesNotFitError, run
from .statistics import Estimate, bootstrap

BASELINE = "full"
_CASES = "cases.jsonl.gz"
_SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a results folder holds; all of its results have the same.

    Attributes:
        model: What `Finch.from_pretrained` takes.
        data: Name of the data set.
        retriever: "bm25" or "dense".
        top_k: Passages a question.
        order: See `finch_rag.bench.cases.make_cases`.
        limit: Questions; None for all.
        seed: Of the draw.
        max_new_tokens: The most tokens of an answer.
    """

    model: str
    data: str
    retriever: RetrieverName
    top_k: int
    order: str
    limit: int | None
    seed: int
    max_new_tokens: int


def main(
    data: str | Path,
    out: str | Path,
    *,
    model: str = "embedded",
    retriever: RetrieverName = "bm25",
    top_k: int = 100,
    order: str = "rank",
    limit: int | None = None,
    seed: int = 0,
    budgets: Sequence[int] = (512,),
    methods: Sequence[str] = ("finch", "full", "top-k"),
    max_new_tokens: int = 16,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Runs what is missing in ``out``, prints a table of all that is there and, as the last line, one JSON object.

    Args:
        data: Folder of a data set, see `finch_rag.bench.cases.DataSet.read`.
        out: Folder of the results.
        model: What `Finch.from_pretrained` takes.
        retriever: "bm25" or "dense".
        top_k: Passages a question.
        order: See `finch_rag.bench.cases.make_cases`.
        limit: Questions; all when None.
        seed: Of the draw.
        budgets: Document tokens in the cache; each method that has a budget runs with each.
        methods: Of `finch_rag.bench.methods.METHODS`.
        max_new_tokens: The most tokens of an answer.
        shard: (i, n): only each n-th case, from the i-th; for several processes on one accelerator.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work, or ``out`` holds results of other settings.
    """
    if unknown := set(methods) - set(METHODS):
        raise InputError(f"method {', '.join(sorted(unknown))} is unknown: use {', '.join(METHODS)}")
    if not methods or not budgets or min(budgets) < 1 or top_k < 1 or max_new_tokens < 1:
        raise InputError("there must be a method, and budgets, top-k and max-new-tokens of at least 1")
    settings = Settings(model, Path(data).resolve().name, retriever, top_k, order, limit, seed, max_new_tokens)
    folder = Path(out)
    cases = _cases(settings, Path(data), folder)
    part, parts = shard
    wanted = [(case, method, budget) for case in cases[part::parts] for method, budget in labels(methods, budgets)]
    done = {(record["id"], record["label"]) for record in read_results(folder)}
    todo = [item for item in wanted if (item[0].question.id, label(*item[1:])) not in done]
    if todo:
        finch = Finch.from_pretrained(model)
        results = folder / f"results-{part}.jsonl"
        cut_off = results.exists() and not results.read_bytes().endswith(b"\n")
        with results.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off)
            for case, method, budget in _progress(todo):
                file.write(json.dumps(_record(finch, settings, case, method, budget), ensure_ascii=False) + "\n")
                file.flush()
    summary = summarise(cases, list(read_results(folder)), settings)
    show(summary)
    return summary


def labels(methods: Sequence[str], budgets: Sequence[int]) -> list[tuple[str, int]]:
    """Each method with each budget, and once where the budget makes no difference."""
    return [(m, b) for m in methods for b in (budgets[:1] if m in WITHOUT_BUDGET else budgets)]


def label(method: str, budget: int) -> str:
    """Name of a method in results: "finch@512"."""
    return method if method in WITHOUT_BUDGET else f"{method}@{budget}"


def read_results(folder: Path) -> Iterator[dict[str, Any]]:
    """All results of a folder; a last line that was cut off is passed over."""
    for file in sorted(folder.glob("results*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            yield record


def summarise(cases: Sequence[Case], results: Iterable[Mapping[str, Any]], settings: Settings) -> dict[str, Any]:
    """Figures of each method, and its paired differences against `BASELINE`.

    Args:
        cases: The cases that count.
        results: Of any methods; those of other cases are left out.
        settings: For the record.
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
    rows = {name: _row(records, by_label.get(BASELINE, {})) for name, records in by_label.items()}
    retrieved = fmean(case.has_gold for case in cases)
    return {"settings": asdict(settings), "cases": len(cases), "gold_retrieved": retrieved, "methods": rows}


def _row(records: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ran = {key: record for key, record in records.items() if "skipped" not in record}
    if not ran:
        return {"n": 0, "skipped": next(iter(records.values()))["skipped"]}
    values = list(ran.values())
    row: dict[str, Any] = {"n": len(ran), "skipped": len(records) - len(ran)}
    for metric in ("accuracy", "f1"):
        row[metric] = asdict(bootstrap([record[metric] for record in values]))
        both = [key for key in ran if key in baseline and "skipped" not in baseline[key]]
        if both and baseline is not records:
            row[f"{metric}_difference"] = asdict(bootstrap([ran[k][metric] - baseline[k][metric] for k in both]))
    retrieved = [record["gold_kept"] for record in values if record["gold_found"]]
    row["gold_kept"] = fmean(retrieved) if retrieved else None
    for name in ("kv_tokens", "prefill_seconds", "decode_seconds", "calls"):
        row[name] = fmean(record[name] for record in values)
    peaks = [record["peak_mib"] for record in values if record.get("peak_mib") is not None]
    row["peak_mib"] = max(peaks) if peaks else None
    return row


def show(summary: Mapping[str, Any]) -> None:
    """Prints a summary as a table and, as the last line, as JSON."""
    settings = summary["settings"]
    table = Table(
        title=f"{settings['data']}, {settings['retriever']} top {settings['top_k']}, {settings['model']}, "
        f"n={summary['cases']} (answer's passage retrieved: {summary['gold_retrieved']:.3f})"
    )
    names = "method n KV accuracy F1 accuracy-full F1-full gold prefill decode calls peak".split()
    for name in names:
        table.add_column(name)
    order = sorted(summary["methods"].items(), key=lambda item: -item[1].get("f1", {}).get("mean", -1.0))
    for name, row in order:
        if not row["n"]:
            table.add_row(name, "0", str(row["skipped"]))
            continue
        table.add_row(
            name,
            str(row["n"]),
            f"{row['kv_tokens']:.0f}",
            str(Estimate(**row["accuracy"])),
            str(Estimate(**row["f1"])),
            *(Estimate(**row[d]).signed if (d := f"{m}_difference") in row else "" for m in ("accuracy", "f1")),
            "" if row["gold_kept"] is None else f"{row['gold_kept']:.3f}",
            f"{row['prefill_seconds']:.2f} s",
            f"{row['decode_seconds']:.2f} s",
            f"{row['calls']:.1f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB",
        )
    rich.print(table)
    sys.stdout.write(json.dumps(summary) + "\n")


def _cases(settings: Settings, data: Path, folder: Path) -> list[Case]:
    """The cases of a results folder, made at its first use."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _SETTINGS
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if changed := [f"{k} ({stored.get(k)} there)" for k, v in asdict(settings).items() if stored.get(k) != v]:
            raise InputError(f"{folder} holds results with another {', '.join(changed)}: choose another --out")
        return list(read_cases(folder / _CASES))
    cases = make_cases(
        DataSet.read(data), settings.retriever, settings.top_k, settings.order, settings.limit, settings.seed
    )
    write_cases(cases, folder / _CASES)
    file.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    return cases


def _record(finch: Finch, settings: Settings, case: Case, method: str, budget: int) -> dict[str, Any]:
    record = {"id": case.question.id, "label": label(method, budget), "budget": budget}
    try:
        outcome = run(method, Contestant(finch, budget, settings.max_new_tokens), case)
    except DoesNotFitError as reason:
        return {**record, "skipped": str(reason)}
    return {**record, **asdict(outcome)}


def _progress(todo: list[tuple[Case, str, int]]) -> Iterator[tuple[Case, str, int]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True)) as bars:
        task = bars.add_task("questions x methods", total=len(todo))
        for item in todo:
            yield item
            bars.advance(task)
