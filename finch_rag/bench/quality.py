"""Answer quality: the same questions by several methods, with the same model, prompt and cache size.

Results are JSON lines in a folder, one a question and method; a run that was cut off goes on where it stopped, and
results that other programs have put there (see `finch_rag.bench.peers`) are counted too.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from ..corpus.reading import CorpusOptions
from ..engine import Finch
from ..errors import InputError, WindowError
from ..jsonl import complete_objects
from ..paths import told_where, write_atomically
from ..prompts.passages import Passage
from ..terminal.loading import load_finch
from ..terminal.output import note, say_json
from ..terminal.progress import ProgressBars
from . import tables
from .arguments import check_runs
from .cases import DataSet, QualityCase, RetrieverName, are_long, make_cases, read_cases, write_cases
from .memory import in_use, peak_memory
from .methods import METHODS, OF_CORPUS, WITHOUT_BUDGET, Contestant, DoesNotFitError, run
from .summary import summarise

_LONG_ANSWER = 64  # tokens that two or three sentences take at least
_CASES = "cases.jsonl.gz"
_SETTINGS = "settings.json"
_NEWER = {"instructions": None, "unanswerable": False}  # settings that older folders lack, and what held there


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a results folder holds; all of its results have the same.

    Attributes:
        model: What `Finch.from_pretrained` takes.
        data: Name of the data set.
        retriever: "bm25" or "dense".
        top_k: Passages a question; None for all that there are.
        order: See `finch_rag.bench.cases.make_cases`.
        limit: Questions; None for all.
        seed: Of the draw.
        max_new_tokens: The most tokens of an answer.
        instructions: See `finch_rag.bench.cases.make_cases`.
        unanswerable: See `finch_rag.bench.cases.make_cases`.
    """

    model: str
    data: str
    retriever: RetrieverName
    top_k: int | None
    order: str
    limit: int | None
    seed: int
    max_new_tokens: int
    instructions: str | None = None
    unanswerable: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Where the cases of a results folder come from.

    Attributes:
        cases: Makes them; called if the folder is new.
        passages: Reads all passages, for the methods `OF_CORPUS`.
    """

    cases: Callable[[], list[QualityCase]]
    passages: Callable[[], Sequence[Passage]]

    @classmethod
    def of(cls, data: str | Path, settings: RunSettings, **corpus: Unpack[CorpusOptions]) -> Source:
        """Questions drawn from a data set.

        Args:
            data: Its folder.
            settings: How they are drawn.
            corpus: See `finch_rag.corpus.reading.CorpusOptions`.
        """

        def cases() -> list[QualityCase]:
            read = DataSet.read(data, **corpus)
            return make_cases(
                read,
                settings.retriever,
                len(read.passages) if settings.top_k is None else settings.top_k,
                order=settings.order,
                limit=settings.limit,
                seed=settings.seed,
                instructions=settings.instructions,
                unanswerable=settings.unanswerable,
            )

        return cls(cases, lambda: DataSet.read(data, **corpus).passages)


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
    instructions: str | None = None,
    unanswerable: bool = False,
    shard: tuple[int, int] = (0, 1),
    plot: Path | None = None,
    **corpus: Unpack[CorpusOptions],
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
        instructions: See `finch_rag.bench.cases.make_cases`.
        unanswerable: See `finch_rag.bench.cases.make_cases`.
        shard: (i, n): only each n-th case, from the i-th; for several processes on one accelerator.
        plot: Where to draw the figures; not at all when None.
        corpus: How its passages are read, see `finch_rag.corpus.reading.CorpusOptions`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work, or ``out`` holds results of other settings.
        MissingExtraError: If a package is missing that ``retriever`` or ``plot`` needs.
    """
    if plot is not None:
        from . import plots  # not needed without

        plots.check(plot)
    check_runs(methods, METHODS, budgets, top_k=top_k, limit=limit, max_new_tokens=max_new_tokens)
    settings = RunSettings(
        model=model,
        data=data_name(data),
        retriever=retriever,
        top_k=top_k,
        order=order,
        limit=limit,
        seed=seed,
        max_new_tokens=max_new_tokens,
        instructions=instructions,
        unanswerable=unanswerable,
    )
    with ProgressBars(remaining=True) as bars:
        load, on_progress = loader(model, bars), partial(bars, "answers")
        summary = measure(
            settings, Source.of(data, settings, **corpus), out, budgets, methods, load, on_progress, shard
        )
    tables.show_quality(summary)
    if plot is not None:
        plots.plot_quality(summary, plot)
    say_json(summary)
    return summary


def data_name(data: str | Path) -> str:
    """What a data set is called in results: the name of its folder."""
    return Path(data).resolve().name


def loader(model: str, bars: ProgressBars) -> Callable[[], Finch]:
    """Loads the engine when it is first called for.

    Args:
        model: What `Finch.from_pretrained` takes.
        bars: Show the loading.
    """

    def load() -> Finch:
        finch = load_finch(model, bars)
        finch.retrieval_heads("alone")
        finch.retrieval_heads()  # found now, so that no question's seconds and memory hold the search
        return finch

    return cache(load)


def measure(
    settings: RunSettings,
    source: Source,
    out: str | Path,
    budgets: Sequence[int],
    methods: Sequence[str],
    load: Callable[[], Finch],
    on_progress: Callable[[int, int], None],
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Runs what is missing in a results folder and sums up all that is there.

    Args:
        settings: Of the folder.
        source: Of the cases.
        out: The results folder.
        budgets: See `main`.
        methods: See `main`.
        load: Loads the engine; not called if nothing is missing.
        on_progress: Called with the answers that there are and all that are asked for.
        shard: See `main`.

    Raises:
        InputError: If an argument cannot work, or ``out`` holds results of other settings.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise InputError(f"shard {part + 1} of {parts} does not exist: use 1/{parts} to {parts}/{parts}")
    folder = Path(out)
    cases = _cases(settings, source, folder)
    wanted = [(case, method, budget) for case in cases[part::parts] for method, budget in labels(methods, budgets)]
    done = {(record["id"], record["label"]) for record in read_results(folder)}
    todo = [item for item in wanted if (item[0].question.id, label(*item[1:])) not in done]
    if todo:
        finch = load()
        judges = not all(case.question.answerable for case in cases)
        corpus = None
        if any(method in OF_CORPUS for _, method, _ in todo):
            corpus = finch.open_store()
            corpus.add(source.passages())
        with appending(folder / f"results-{part}.jsonl") as store:
            for number, (case, method, budget) in enumerate(todo, 1):
                contestant = Contestant(finch, budget, settings.max_new_tokens, corpus, judges)
                store(_record(contestant, case, method))
                on_progress(len(wanted) - len(todo) + number, len(wanted))
    return {"settings": asdict(settings), **summarise(cases, read_results(folder))}


def labels(methods: Sequence[str], budgets: Sequence[int]) -> list[tuple[str, int]]:
    """Each method with each budget, and once where the budget makes no difference."""
    return [(m, b) for m in methods for b in (budgets[:1] if m in WITHOUT_BUDGET else budgets)]


def label(method: str, budget: int) -> str:
    """Name of a method in results: "finch@512"."""
    return method if method in WITHOUT_BUDGET else f"{method}@{budget}"


@contextmanager
def appending(file: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Stores results one by one, behind a last line that was cut off.

    Args:
        file: JSON lines.

    Yields:
        Stores a result; it is in the file when that returns. It may raise an InputError, and then be called again.

    Raises:
        InputError: If the file cannot be written.
    """
    with told_where("the results", file, InputError):
        cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
        lines = file.open("ab", buffering=0)
    with closing(lines):

        def store(record: Mapping[str, Any]) -> None:
            nonlocal cut_off
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            with told_where("a result", file, InputError, "copy the folder elsewhere and call again"):
                whole = b"\n" * cut_off + line
                cut_off = True  # until all of it is there
                if lines.write(whole) != len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                cut_off = False

        yield store


def read_results(folder: Path) -> Iterator[dict[str, Any]]:
    """All results of a folder; a last line that was cut off is passed over."""
    for file in sorted(folder.glob("results*.jsonl")):
        yield from complete_objects(file.read_text(encoding="utf-8"))


def _cases(settings: RunSettings, source: Source, folder: Path) -> list[QualityCase]:
    """The cases of a results folder, made at its first use."""
    file = folder / _SETTINGS
    if file.exists():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            stored = {**_NEWER, **stored}
            changed = [f"{k} ({stored.get(k)} there)" for k, v in asdict(settings).items() if stored.get(k) != v]
            cases = list(read_cases(folder / _CASES))
        except (OSError, ValueError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{folder} is no results folder ({error}): delete it, or choose another --out") from error
        if changed:
            raise InputError(f"{folder} holds results with another {', '.join(changed)}: choose another --out")
        return cases
    cases = source.cases()
    if settings.max_new_tokens < _LONG_ANSWER and are_long(case.question for case in cases):
        note(f"max-new-tokens is {settings.max_new_tokens}, and the known answers are long: 128 leaves them room")
    write_cases(cases, folder / _CASES)
    with told_where("the settings", file, InputError):
        write_atomically(file, json.dumps(asdict(settings), indent=1) + "\n")
    return cases


def _record(contestant: Contestant, case: QualityCase, method: str) -> dict[str, Any]:
    budget = contestant.budget
    record = {"id": case.question.id, "label": label(method, budget), "budget": budget}
    device = contestant.finch.model.device
    try:
        with peak_memory(device, in_use(device)) as peak:
            outcome = run(method, contestant, case)
    except (DoesNotFitError, WindowError) as reason:
        return {**record, "skipped": str(reason)}
    return {**record, **asdict(replace(outcome, peak_mib=peak[0]))}
