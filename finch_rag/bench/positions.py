"""Lost in the middle (Liu et al., 2023): the answer's passage at several places among the others.

Each number of passages and each place is a results folder of `finch_rag.bench.quality`, so a run that was cut off goes
on where it stopped. The questions are the same everywhere; the others are the best ranked passages that are not gold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from ..corpus.reading import CorpusOptions
from ..errors import InputError
from ..terminal.output import say_json
from ..terminal.progress import ProgressBars
from . import tables
from .arguments import check_runs
from .cases import DataSet, RetrieverName
from .grading import METRICS
from .methods import METHODS
from .quality import RunSettings, Source, data_name, loader, measure

_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(
    data: str | Path,
    out: str | Path,
    *,
    passages: Sequence[int] = (20, 50),
    model: str = "embedded",
    retriever: RetrieverName = "bm25",
    limit: int | None = None,
    seed: int = 0,
    budget: int = 512,
    methods: Sequence[str] = ("finch", "full"),
    max_new_tokens: int = 16,
    shard: tuple[int, int] = (0, 1),
    plot: Path | None = None,
    **corpus: Unpack[CorpusOptions],
) -> dict[str, Any]:
    """Runs what is missing in ``out``, prints tables and, as the last line, one JSON object.

    Args:
        data: Folder of a data set, see `finch_rag.bench.cases.DataSet.read`.
        out: Folder of the results folders.
        passages: Numbers of passages, each at least 2.
        model: What `Finch.from_pretrained` takes.
        retriever: "bm25" or "dense"; chooses the passages without the answer.
        limit: Questions; all when None.
        seed: Of the draw.
        budget: Document tokens in the cache.
        methods: Of `finch_rag.bench.methods.METHODS`.
        max_new_tokens: The most tokens of an answer.
        shard: See `finch_rag.bench.quality.main`.
        plot: Where to draw the figures; not at all when None.
        corpus: How its passages are read, see `finch_rag.corpus.reading.CorpusOptions`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work, or a folder in ``out`` holds results of other settings.
        MissingExtraError: If a package is missing that ``retriever`` or ``plot`` needs.
    """
    if plot is not None:
        from . import plots  # not needed without

        plots.check(plot)
    check_runs(methods, METHODS, [budget], limit=limit, max_new_tokens=max_new_tokens)
    if not passages or min(passages) < 2:
        raise InputError(f"passages is {list(passages)}: name numbers of at least 2")
    if (most := max(passages)) > (there := len(DataSet.read(data, **corpus).passages)):
        raise InputError(f"passages is {most}, but the data has {there} passages: use {there} or less")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with ProgressBars(remaining=True) as bars:
        load = loader(model, bars)
        for count in passages:
            for place in places(count):
                settings = RunSettings(
                    model=model,
                    data=data_name(data),
                    retriever=retriever,
                    top_k=count,
                    order=f"gold-at:{place}",
                    limit=limit,
                    seed=seed,
                    max_new_tokens=max_new_tokens,
                )
                folder = Path(out) / f"{count}-passages" / f"gold-at-{place}"
                on_progress = partial(bars, f"answers with gold at {place} of {count}")
                source = Source.of(data, settings, **corpus)
                summary = measure(settings, source, folder, [budget], methods, load, on_progress, shard)
                found.setdefault(str(count), {})[str(place)] = summary["methods"]
    result = {
        "settings": {"model": model, "data": data_name(data), "retriever": retriever, "limit": limit, "seed": seed}
        | {"budget": budget, "max_new_tokens": max_new_tokens},
        "cases": summary["cases"],
        "passages": {count: by_method(at_places) for count, at_places in found.items()},
    }
    tables.show_positions(result)
    if plot is not None:
        plots.plot_positions(result, plot)
    say_json(result)
    return result


def places(count: int) -> list[int]:
    """Places at 0, 25, 50, 75 and 100% of so many passages, each once.

    Args:
        count: Passages, at least 1.
    """
    return list(dict.fromkeys(min(int(depth * count), count - 1) for depth in _DEPTHS))


def by_method(at_places: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures of each method at each place, and what the place makes of a difference.

    Args:
        at_places: Rows of `finch_rag.bench.summary.summarise`, by place and method.

    Returns:
        By method ``places``, its rows by place, and ``spread``, by metric the best minus the worst mean; None if a
        place has no result.
    """
    found = {}
    for method in dict.fromkeys(name for rows in at_places.values() for name in rows):
        at = {place: rows.get(method, {"n": 0, "skipped": "not run"}) for place, rows in at_places.items()}
        spread = None
        if all(row["n"] for row in at.values()):
            means = {metric: [row[metric]["mean"] for row in at.values()] for metric in METRICS}
            spread = {metric: max(values) - min(values) for metric, values in means.items()}
        found[method] = {"places": at, "spread": spread}
    return found
