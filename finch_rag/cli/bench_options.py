"""Options that the benchmarks' commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from ..bench.cases import RetrieverName


class RetrieverChoice(StrEnum):
    """What ranks the passages."""

    BM25 = "bm25"
    DENSE = "dense"


DataArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder with questions*.jsonl (id, question, answers, gold_ids; answerable and sentences where they are "
        "known) and passages (see finch-rag ask --corpus), also with .gz.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Where the results are kept.  [dim]\\[default: a folder in bench-results/ named after the settings][/]",
        show_default=False,
    ),
]
RetrieverOption = Annotated[
    RetrieverChoice, typer.Option("--retriever", help="Rank passages by words, or by MiniLM embeddings.")
]
LimitOption = Annotated[int, typer.Option("--limit", metavar="N", help="Questions to draw; all if the data has fewer.")]
BudgetsOption = Annotated[
    str, typer.Option("--budget", metavar="TOKENS,...", help="Tokens of passages in the cache; methods run with each.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of the draw and of the random order.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", metavar="TOKENS", help="The longest answer.")]
MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="NAME,...",
        help="Of: finch (each passage is read alone), finch-loop (chunk by chunk under the question), finch-shortlist "
        "(each alone, then the loop over the best), finch-scan (the loop; kept passages are not prefilled again), "
        "finch-paper (the loop; tokens instead of passages), finch-store (a store reads each passage once), "
        "finch-corpus (a store of all passages, no retriever; finch-corpus-best: no loop), finch-fused (that store and "
        "the retriever, fused), full (everything, no compression), truncate (what fits the window), top-k (the "
        "retriever's best that fit the budget), refine and map-reduce (many calls, as LlamaIndex does it), gold (the "
        "answer's passage alone).",
    ),
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Ask only the I-th of N parts of the questions, I from 1 to N: start N processes on one folder.",
    ),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Random weights of this shape in place of --model: llama-8b, llama-1b, qwen-1.5b, qwen3.5-8b, "
        "gpt-oss-20b or tiny.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the figures too: .png, .svg or .pdf.", show_default=False),
]


@contextmanager
def extra() -> Iterator[None]:
    """Around the import of a benchmark: what is missing is named with the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error.name or "a package", "bench") from error


def retriever_name(choice: RetrieverChoice) -> RetrieverName:
    """The retriever's name as the benchmarks take it.

    Args:
        choice: What a user chose.
    """
    return "bm25" if choice is RetrieverChoice.BM25 else "dense"


def results_folder(name: str, model: str, limit: int, seed: int) -> Path:
    """The default folder; other settings have another one, so that nobody has to name it.

    Args:
        name: Of data and setting.
        model: What `Finch.from_pretrained` takes.
        limit: Questions.
        seed: Of the draw.
    """
    return Path("bench-results") / f"{name}-{limit}q-seed{seed}-{Path(model).name or 'model'}"
