"""Arguments and options that the commands of ``finch-rag`` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

LARGEST_DEFAULT_TOP_K = 100


class SelectionName(StrEnum):
    """What is kept: whole passages, or single tokens."""

    PASSAGE = "passage"
    TOKEN = "token"

    @property
    def literal(self) -> Literal["passage", "token"]:
        """The name as the engine takes it."""
        return "passage" if self is SelectionName.PASSAGE else "token"


QuestionArgument = Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)]
CorpusOption = Annotated[
    Path,
    typer.Option(
        "--corpus",
        metavar="PATH",
        help="A folder (with its subfolders) or a file: .txt, .md, .jsonl lines of id, title, text; also with .gz.",
        show_default=False,
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
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else.")]
