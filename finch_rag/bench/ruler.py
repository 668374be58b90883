"""RULER's tasks (Hsieh et al., 2024, arXiv 2404.06654) at several lengths, by the methods of the quality benchmark.

Each length and each task is a results folder of `finch_rag.bench.quality`, so a run that was cut off goes on where it
stopped, and the peers answer the same questions. The text is made, see `finch_rag.bench.ruler_tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..corpus.reading import Question
from ..engine import Finch
from ..errors import InputError
from ..prompts.passages import Passage
from ..terminal.output import say_json
from ..terminal.progress import ProgressBars
from . import tables
from .arguments import check_runs
from .cases import QualityCase
from .methods import METHODS, OF_CORPUS, Contestant
from .quality import RunSettings, Source, loader, measure
from .ruler_tasks import INSTRUCTIONS, TASKS, make_case


def main(
    out: str | Path,
    *,
    tokens: Sequence[int] = (8192,),
    tasks: Sequence[str] = TASKS,
    model: str = "embedded",
    limit: int = 20,
    seed: int = 0,
    budgets: Sequence[int] = (512,),
    methods: Sequence[str] = ("finch", "full", "top-k"),
    max_new_tokens: int = 160,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Runs what is missing in ``out``, prints a table for each length and, as the last line, one JSON object.

    Args:
        out: Folder of the results folders, LENGTH-tokens/TASK.
        tokens: Lengths, each of the whole prompt with the answer, in the model's tokens.
        tasks: Of `finch_rag.bench.ruler_tasks.TASKS`.
        model: What `Finch.from_pretrained` takes.
        limit: Questions of a task.
        seed: Of the made text.
        budgets: Document tokens in the cache; each method that has a budget runs with each.
        methods: Of `finch_rag.bench.methods.METHODS`, but for those that need a store of all passages.
        max_new_tokens: The most tokens of an answer.
        shard: See `finch_rag.bench.quality.main`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work, or a folder in ``out`` holds results of other settings.
        MissingExtraError: If a package is missing.
    """
    known = [method for method in METHODS if method not in OF_CORPUS]
    check_runs(methods, known, budgets, limit=limit, max_new_tokens=max_new_tokens, tokens=min(tokens, default=0))
    if not tasks or (unknown := [task for task in tasks if task not in TASKS]):
        wrong = f"task {', '.join(unknown)} is unknown" if tasks else "there is no task"
        raise InputError(f"{wrong}: use {', '.join(TASKS)}")
    runs = [
        RunSettings(
            model=model,
            data=f"ruler/{task}/{length}",
            retriever="bm25",
            top_k=None,
            order="document",
            limit=limit,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        for length in tokens
        for task in tasks
    ]
    found: dict[str, dict[str, Any]] = {str(length): {} for length in tokens}
    with ProgressBars(remaining=True) as bars:
        load = loader(model, bars)
        folders = [Path(out) / f"{length}-tokens" / task for length in tokens for task in tasks]
        for settings, folder in zip(runs, folders, strict=True):
            if not folder.exists():
                made_cases(load, replace(settings, limit=1))  # what cannot work shows before hours of answers
        for settings, folder in zip(runs, folders, strict=True):
            _, task, length = settings.data.split("/")
            source, on_progress = Source(partial(made_cases, load, settings), _no_corpus), partial(bars, settings.data)
            found[length][task] = measure(settings, source, folder, budgets, methods, load, on_progress, shard)
    result = {
        "settings": {"model": model, "limit": limit, "seed": seed, "max_new_tokens": max_new_tokens},
        "tokens": found,
    }
    tables.show_ruler(result)
    say_json(result)
    return result


def made_cases(load: Callable[[], Finch], settings: RunSettings) -> list[QualityCase]:
    """The questions of a task at a length.

    Args:
        load: The engine, whose tokenizer measures.
        settings: ``data`` is ruler/TASK/LENGTH.

    Raises:
        InputError: If the task needs more tokens.
    """
    _, task, length = settings.data.split("/")
    finch = load()
    contestant = Contestant(finch, 1, settings.max_new_tokens)

    def room(question: str) -> int:
        """Tokens that the rest of the prompt and the answer leave."""
        short = QualityCase(Question("", question, (), ()), [Passage("?")], [0], INSTRUCTIONS)
        return int(length) - (finch.window - contestant.room(short))

    numbers = range(settings.limit or 0)
    return [make_case(task, number, room, contestant.lengths, settings.seed) for number in numbers]


def _no_corpus() -> list[Passage]:
    raise InputError(f"each question has passages of its own: leave out {', '.join(OF_CORPUS)}")
