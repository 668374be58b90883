"""Several questions over one list of passages: one after another by `Finch.ask`, and together by `Finch.ask_many`."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from ..answer import Answer
from ..batch import answer_together
from ..errors import InputError
from ..prefill.shared import shares_scan
from ..reading import planned
from ..streaming import AnswerStream
from ..terminal.output import cell, out, say, say_json
from .shapes import SHAPES
from .timing import Subject

_READ, _WRITE = "reading (s)", "answers (s)"


@dataclass(frozen=True, slots=True)
class _Timed:
    """Seconds of one way of answering all questions; reading and answers by the answers' reports."""

    read: float
    write: float
    total: float


def main(
    *,
    model: str = "embedded",
    tokens: int = 32768,
    questions: int = 8,
    budget: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
    shape: str | None = None,
) -> dict[str, Any]:
    """Times both ways in turns, prints a table and, as the last line, one JSON object.

    Every answer has all of its tokens: where a model would end it, it is made to go on.

    Args:
        model: What `Finch.from_pretrained` takes.
        tokens: Of the passages.
        questions: Number of questions.
        budget: Document tokens kept for each.
        new_tokens: Tokens of an answer.
        repeats: Runs of each way; medians are reported.
        shape: Of `finch_rag.bench.shapes.SHAPES`: random weights in place of ``model``.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
    """
    if min(tokens, questions, new_tokens, repeats) < 1:
        least = f"{tokens} tokens, {questions} questions, {new_tokens} new tokens, {repeats} repeats"
        raise InputError(f"{least} measure nothing: each must be at least 1")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    subject = Subject.of(model="" if shape else model, shape=shape or "")
    runtime = subject.finch.runtime
    prompt = subject.prompt(tokens)
    rng = random.Random(0)
    prompts = [replace(prompt, question=rng.sample(prompt.question, len(prompt.question))) for _ in range(questions)]
    requests = [subject.request(own, budget=budget, new_tokens=new_tokens) for own in prompts]
    plan = planned(runtime, requests[0])
    shared = shares_scan(plan, requests[0].passage_tokens, questions)

    def one_after_another() -> list[Answer]:
        return [AnswerStream(runtime, request).read() for request in requests]  # what `Finch.ask` executes

    ways: dict[str, Callable[[], list[Answer]]] = {
        "one by one": one_after_another,
        "ask_many": lambda: answer_together(runtime, requests, shared=True),
    }
    runs: dict[str, list[_Timed]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            timed = _timed(way)
            if number:  # the first warms up
                runs[name].append(timed)
    rows = {
        name: {
            _READ: statistics.median(run.read for run in timed_runs),
            _WRITE: statistics.median(run.write for run in timed_runs),
            "seconds": statistics.median(run.total for run in timed_runs),
        }
        for name, timed_runs in runs.items()
    }
    summary = {
        "model": f"{shape} (random weights)" if shape else model,
        "device": torch.cuda.get_device_name() if runtime.model.device.type == "cuda" else str(runtime.model.device),
        **{"tokens": tokens, "questions": questions, "budget": plan.budget, "new_tokens": new_tokens, "shared": shared},
        **{"repeats": repeats, "ways": {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()}},
        "throughput": round(rows["one by one"]["seconds"] / rows["ask_many"]["seconds"], 3),
    }
    _print(summary)
    say_json(summary)
    return summary


def _timed(way: Callable[[], Sequence[Answer]]) -> _Timed:
    """Answers all questions; an answer is complete when its last token is on the host, so the clock needs no device."""
    gc.collect()  # so that nothing of an earlier run is on the device
    start = time.perf_counter()
    reports = [answer.report for answer in way()]
    total = time.perf_counter() - start
    read, write = (sum(getattr(report, name) for report in reports) for name in ("prefill_seconds", "decode_seconds"))
    return _Timed(read, write, total)


def _print(summary: dict[str, Any]) -> None:
    title = (
        f"{summary['model']}, {summary['device']}, {summary['questions']} questions over {summary['tokens']:,} tokens"
    )
    table = Table(title=cell(title, "table.title"))
    columns = (_READ, _WRITE, "seconds")
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for name, row in summary["ways"].items():
        table.add_row(cell(name), *(f"{row[column]:.2f}" for column in columns))
    out.print(table)
    how = "read once for all, then a shortlist each" if summary["shared"] else "read for each: too short to share"
    say(f"ask_many answers {summary['throughput']:.2f} times as many questions a second (the list is {how})")
