"""Several questions over one list of passages: one after another, and together as `Finch.ask_many` does it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from ..decode import Sampling, Writer, decode_many
from ..display import out, say_json
from ..errors import InputError
from ..prefill import Prefilled, prefill
from ..prefill_many import prefill_many, prefill_shared, shares_reading
from ..prompt import Prompt
from .clock import Clock
from .shapes import SHAPES
from .timing import Case, Subject, plan_of

_READ, _WRITE = "reading (s)", "answers (s)"


@dataclass(frozen=True, slots=True)
class _Timed:
    """Seconds of one way of answering all questions."""

    read: float
    write: float

    @property
    def total(self) -> float:
        return self.read + self.write


def main(
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
    case = Case("finch", tokens, "" if shape else model, shape or "", budget, 0)
    subject = Subject.of(case)
    prompt = subject.prompt(tokens)
    rng = random.Random(0)
    prompts = [replace(prompt, question=rng.sample(prompt.question, len(prompt.question))) for _ in range(questions)]
    plan = plan_of(case, subject, prompt, new_tokens)
    shared = shares_reading(plan, [len(passage) for passage in prompt.passages], questions)

    def one(prompts: Sequence[Prompt]) -> list[Prefilled]:
        return [prefill(subject.model, its, plan, subject.rotation) for its in prompts]

    def all_at_once(prompts: Sequence[Prompt]) -> list[Prefilled]:
        if shared:
            return prefill_shared(subject.model, prompts, plan, subject.rotation)
        return prefill_many(subject.model, prompts, [plan] * len(prompts), subject.rotation)

    def one_after_another() -> _Timed:
        parts = [_timed(subject, [its], one, new_tokens) for its in prompts]
        return _Timed(sum(part.read for part in parts), sum(part.write for part in parts))

    ways: dict[str, Callable[[], _Timed]] = {
        "one by one": one_after_another,
        "ask_many": partial(_timed, subject, prompts, all_at_once, new_tokens),
    }
    runs: dict[str, list[_Timed]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            timed = way()
            if number:  # the first warms up
                runs[name].append(timed)
    rows = {
        name: {
            _READ: statistics.median(run.read for run in its),
            _WRITE: statistics.median(run.write for run in its),
            "seconds": statistics.median(run.total for run in its),
        }
        for name, its in runs.items()
    }
    summary = {
        "model": f"{shape} (random weights)" if shape else model,
        "device": torch.cuda.get_device_name() if subject.model.device.type == "cuda" else str(subject.model.device),
        **{"tokens": tokens, "questions": questions, "budget": plan.budget, "new_tokens": new_tokens, "shared": shared},
        **{"repeats": repeats, "ways": {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()}},
        "throughput": round(rows["one by one"]["seconds"] / rows["ask_many"]["seconds"], 3),
    }
    _print(summary)
    say_json(summary)
    return summary


def _timed(
    subject: Subject, prompts: Sequence[Prompt], read: Callable[[Sequence[Prompt]], list[Prefilled]], new_tokens: int
) -> _Timed:
    """Reads for some questions and answers them side by side."""
    writers = [Writer(Sampling(new_tokens), frozenset(), lambda tokens: "") for _ in prompts]
    clock = Clock(subject.model.device)
    caches = [its.cache.fork(len(prompts[0].question) + len(prompts[0].tail) + new_tokens) for its in read(prompts)]
    clock.mark()
    last = [[*prompt.question, *prompt.tail] for prompt in prompts]
    decode_many(subject.model, caches, last, writers, new_tokens, subject.graphs)
    clock.mark()
    return _Timed(*clock.laps())


def _print(summary: dict[str, Any]) -> None:
    title = (
        f"{summary['model']}, {summary['device']}, {summary['questions']} questions over {summary['tokens']:,} tokens"
    )
    table = Table(title=title)
    columns = (_READ, _WRITE, "seconds")
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for name, row in summary["ways"].items():
        table.add_row(name, *(f"{row[column]:.2f}" for column in columns))
    out.print(table)
    how = "read once for all, then a shortlist each" if summary["shared"] else "read for each: too short to share"
    out.print(f"ask_many answers {summary['throughput']:.2f} times as many questions a second (the list is {how})")
