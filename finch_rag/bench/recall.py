"""How often a ranking has the passages that answer a question among its first.

bm25         words
dense        MiniLM embeddings
store        the head keys of a store that has read all passages, see `finch_rag.PassageStore`
store-int8   the same with int8 keys
fused        the store and BM25, by reciprocal rank fusion
loop         the loop over BM25's best 100, see `finch_rag.Finch.rank`
independent  BM25's best 100 read alone
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from typing_extensions import Unpack

from ..corpus.reading import CorpusOptions, Question
from ..engine import Finch
from ..errors import InputError
from ..prefill.planning import Strategy
from ..prompts.passages import Passage
from ..store.reading import Precision
from ..terminal.loading import check_positive
from ..terminal.output import cell, out, say, say_json
from ..terminal.progress import ProgressBars
from .cases import DataSet, draw, search_by
from .quality import loader

Ranking = Callable[[str], list[str]]  # a question -> ids of passages, the best first
Ranker = Callable[[Sequence[Passage], Callable[[], Finch]], Ranking]  # passages, what loads the engine

AT = (1, 2, 4, 8, 20)
_TOP_K = 100  # of BM25, for those that build on it


def main(
    data: str | Path,
    *,
    model: str = "embedded",
    rankers: Sequence[str] = ("bm25", "dense", "store", "fused"),
    limit: int | None = None,
    seed: int = 0,
    **corpus: Unpack[CorpusOptions],
) -> dict[str, Any]:
    """Ranks the passages for each question, prints a table and, as the last line, one JSON object.

    Args:
        data: Folder of a data set, see `finch_rag.bench.cases.DataSet.read`.
        model: What `Finch.from_pretrained` takes.
        rankers: Of `RANKERS`.
        limit: Questions; all when None.
        seed: Of the draw.
        corpus: How its passages are read, see `finch_rag.corpus.reading.CorpusOptions`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
        MissingExtraError: If a package is missing that a ranker needs.
    """
    if not rankers or (unknown := [name for name in rankers if name not in RANKERS]):
        wrong = f"ranker {', '.join(unknown)} is unknown" if rankers else "there is no ranker"
        raise InputError(f"{wrong}: use {', '.join(RANKERS)}")
    check_positive(limit=limit)
    read = DataSet.read(data, **corpus).with_answers()
    questions = draw(read.questions, limit, random.Random(seed))
    results: dict[str, Any] = {}
    with ProgressBars(remaining=True) as bars:
        load = loader(model, bars)
        for name in rankers:
            rank = RANKERS[name](read.passages, load)
            start, ranked = time.perf_counter(), []
            for number, question in enumerate(questions, 1):
                ranked.append(rank(question.question))
                bars("questions", number, len(questions))
            seconds = (time.perf_counter() - start) / len(questions)
            results[name] = {**recall(questions, ranked), "seconds": seconds}
    counts = {"passages": len(read.passages), "questions": len(questions)}
    summary = {"data": read.name, "model": model, "seed": seed, **counts, "rankers": results}
    _print(summary)
    say_json(summary)
    return summary


def recall(questions: Sequence[Question], ranked: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """The share of questions of which a passage that answers is among the first 1, 2, 4, 8 and 20; and all that answer.

    Args:
        questions: With the ids of the passages that answer.
        ranked: For each the ids of passages, the best first.
    """
    found: dict[str, list[float]] = {"first": [], "all": []}
    for k in AT:
        best = [(set(question.gold_ids), set(ids[:k])) for question, ids in zip(questions, ranked, strict=True)]
        found["first"].append(sum(bool(gold & ids) for gold, ids in best) / len(best))
        found["all"].append(sum(gold <= ids for gold, ids in best) / len(best))
    return found


def _by_words(passages: Sequence[Passage], load: Callable[[], Finch]) -> Ranking:
    search = search_by("bm25", passages)
    return lambda question: _ids(passages, search(question, min(_TOP_K, len(passages))))


def _by_meaning(passages: Sequence[Passage], load: Callable[[], Finch]) -> Ranking:
    search = search_by("dense", passages)
    return lambda question: _ids(passages, search(question, min(_TOP_K, len(passages))))


def _by_store(precision: Precision = "bfloat16", fuse: bool = False) -> Ranker:
    def ranker(passages: Sequence[Passage], load: Callable[[], Finch]) -> Ranking:
        words = _by_words(passages, load) if fuse else None
        store = load().open_store(precision=precision)
        store.add(passages)

        def rank(question: str) -> list[str]:
            found = store.search(question, max(AT), [words(question)] if words else [])
            return [str(cited.passage_id) for cited in found]

        return rank

    return ranker


def _among_the_best(strategy: Strategy) -> Ranker:
    def ranker(passages: Sequence[Passage], load: Callable[[], Finch]) -> Ranking:
        words, finch = _by_words(passages, load), load()
        by_id = {passage.id: passage for passage in passages}

        def rank(question: str) -> list[str]:
            cited = finch.rank(question, [by_id[own] for own in words(question)], strategy=strategy)
            return [str(each.passage_id) for each in cited]

        return rank

    return ranker


def _ids(passages: Sequence[Passage], places: Sequence[int]) -> list[str]:
    return [str(passages[place].id) for place in places]


RANKERS: Mapping[str, Ranker] = {
    "bm25": _by_words,
    "dense": _by_meaning,
    "store": _by_store(),
    "store-int8": _by_store("int8"),
    "fused": _by_store(fuse=True),
    "loop": _among_the_best("loop"),
    "independent": _among_the_best("independent"),
}


def _print(summary: Mapping[str, Any]) -> None:
    say(
        f"{summary['data']}, {summary['questions']:,} questions to {summary['passages']:,} passages, {summary['model']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ranker")
    for heading in (*(f"first @{k}" for k in AT), *(f"all @{k}" for k in AT), "seconds"):
        table.add_column(heading, justify="right")
    for name, row in summary["rankers"].items():
        shares = (f"{share:.3f}" for share in (*row["first"], *row["all"]))
        table.add_row(cell(name), *shares, f"{row['seconds']:.3f}")
    out.print(table)
