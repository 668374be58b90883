"""``finch-rag heads``: a model's retrieval heads, found and stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say, say_json
from ..terminal.progress import ProgressBars
from .arguments import JsonOption

EPILOG = (
    "[bold]Examples[/]\n\nfinch-rag heads Qwen/Qwen2.5-1.5B-Instruct --n 16\n\n"
    "finch-rag heads Qwen/Qwen2.5-1.5B-Instruct --examples questions.jsonl"
)


def heads(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, a .gguf file, or embedded.")],
    n: Annotated[int, typer.Option("--n", metavar="N", help="Heads to keep.")] = 8,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Your own questions, a JSON object a line: question, passages (texts), gold (index of the right one, "
            "from 0).  [dim]\\[default: 24 made ones][/]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find a model's retrieval heads, those that look at the passage with the answer, and store them.

    Finch finds a model's 8 best heads by itself at the first use. Run this to look at them, to use more or fewer, or
    to find them on your own questions.
    """
    check_positive(n=n)
    from ..heads.examples import read_examples  # these wait for torch
    from ..heads.search import EXAMPLES, find_heads
    from ..heads.stored import save_heads

    own = None if examples is None else read_examples(examples)
    with ProgressBars() as bars:
        finch = load_finch(model, bars, heads="all")
        found = find_heads(finch.model, finch.tokenizer, n, own or EXAMPLES, partial(bars, "heads"))
        file = save_heads(finch.model, finch.name, found)
    if as_json:
        listed = [{"layer": head.layer, "head": head.head, "score": head.score} for head in found]
        say_json({"model": finch.name, "heads": listed, "file": str(file)})
        return
    table = Table("layer", "head", "score", box=None, pad_edge=False, header_style="bold")
    for head in found:
        table.add_row(str(head.layer), str(head.head), f"{head.score:.3f}")
    out.print(table)
    say(f"stored in {file}")
