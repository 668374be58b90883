"""Arguments and options that the commands of ``finch-rag`` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..corpus.reading import CorpusOptions
from ..errors import InputError
from ..terminal.loading import check_positive

_MIB = 2**20
LARGEST_DEFAULT_TOP_K = 100


class SelectionName(StrEnum):
    """What is kept: whole passages, or single tokens."""

    PASSAGE = "passage"
    TOKEN = "token"

    @property
    def literal(self) -> Literal["passage", "token"]:
        """The name as the engine takes it."""
        return "passage" if self is SelectionName.PASSAGE else "token"


class StrategyName(StrEnum):
    """How passages are ranked."""

    AUTO = "auto"
    LOOP = "loop"
    INDEPENDENT = "independent"

    @property
    def literal(self) -> Literal["auto", "loop", "independent"]:
        """The name as the engine takes it."""
        if self is StrategyName.AUTO:
            return "auto"
        return "loop" if self is StrategyName.LOOP else "independent"


class PriorName(StrEnum):
    """What a retriever's order counts."""

    AUTO = "auto"
    NONE = "none"

    @property
    def literal(self) -> Literal["auto", "none"]:
        """The name as the engine takes it."""
        return "none" if self is PriorName.NONE else "auto"


class PrecisionName(StrEnum):
    """How a store keeps its keys."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @property
    def literal(self) -> Literal["bfloat16", "int8"]:
        """The name as the engine takes it."""
        return "int8" if self is PrecisionName.INT8 else "bfloat16"


QuestionArgument = Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)]
CorpusOption = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        metavar="PATH",
        help="A folder (with its subfolders) or a file: .txt, .md, .jsonl lines of id, title, text; also with .gz.",
        show_default=False,
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="A store that finch-rag index made: all of it is asked, in place of a corpus.",
        show_default=False,
    ),
]
NoStoreOption = Annotated[
    bool,
    typer.Option(
        "--no-store", help="Read the passages for this question alone; what was read before is not used, nothing kept."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A Hugging Face id, a folder, a .gguf file, or the embedded SmolLM2-135M-Instruct.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="N",
        help="Passages to retrieve and read.  "
        f"[dim]\\[default: {LARGEST_DEFAULT_TOP_K}, or all of a smaller corpus][/]",
        show_default=False,
    ),
]
RoundsOption = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        metavar="1|2",
        min=1,
        max=2,
        help="Scan the best passages once more (2), for questions that need several; or not (1).  "
        "[dim]\\[default: 2 on an accelerator where no passage stands out, else 1][/]",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="TOKENS",
        help="Tokens of passages kept for the answer.  "
        "[dim]\\[default: a 32nd of the window, 256 to 2,048; at least the longest passage][/]",
        show_default=False,
    ),
]
ChunkSizeOption = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        metavar="TOKENS",
        help="Tokens read per step.  [dim]\\[default: 1,024 on a CPU, 4,096 on a GPU, less in a small window][/]",
        show_default=False,
    ),
]
FollowLinksOption = Annotated[
    bool, typer.Option("--follow-links", help="Follow the corpus's links to folders, and those that lead out of it.")
]
MaxFileMibOption = Annotated[
    int | None,
    typer.Option(
        "--max-file-mib",
        metavar="MIB",
        help="The largest file of a corpus, expanded; a larger one is left out.  [dim]\\[default: 1,024][/]",
        show_default=False,
    ),
]
MaxCorpusMibOption = Annotated[
    int | None,
    typer.Option(
        "--max-corpus-mib",
        metavar="MIB",
        help="The largest corpus, expanded; a larger one is refused.  [dim]\\[default: 16,384][/]",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else.")]


def corpus_options(
    *, follow_links: bool = False, max_file_mib: int | None = None, max_corpus_mib: int | None = None
) -> CorpusOptions:
    """How a corpus is read; what was not given is not in it.

    Args:
        follow_links: Whether all links are followed.
        max_file_mib: The largest file.
        max_corpus_mib: The largest corpus.

    Raises:
        InputError: If a number is below 1.
    """
    check_positive(max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    options: CorpusOptions = {}
    if follow_links:
        options["follow_links"] = True
    if max_file_mib is not None:
        options["max_file_bytes"] = max_file_mib * _MIB
    if max_corpus_mib is not None:
        options["max_corpus_bytes"] = max_corpus_mib * _MIB
    return options


def check_source(
    corpus: Path | None, store: Path | None, *, top_k: int | None, no_store: bool, options: CorpusOptions
) -> None:
    """Raises if it is not clear what is asked: a corpus or a store.

    Args:
        corpus: The corpus, if one was named.
        store: The store, if one was named.
        top_k: Passages to retrieve of a corpus.
        no_store: Whether nothing that was read before is used.
        options: How a corpus is read.

    Raises:
        InputError: If both were named or neither, or an option is for the other one.
    """
    if (corpus is None) == (store is None):
        raise InputError("name what is asked: --corpus PATH, or --store DIR for a store that finch-rag index made")
    if store is not None and no_store:
        raise InputError("--no-store reads a corpus anew, and --store asks what is known: leave one of them out")
    if store is not None and top_k is not None:
        raise InputError("--top-k is for a corpus; a store is asked as a whole: leave it out, or use --corpus")
    if store is not None and options:
        raise InputError(
            "--follow-links, --max-file-mib and --max-corpus-mib are for a corpus, and a store has been read: leave "
            "them out, or use --corpus"
        )
