"""``finch-rag heads``: a model's retrieval heads, found and stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say, say_json
from ..terminal.progress import ProgressBars
from .arguments import JsonOption

if TYPE_CHECKING:
    from ..heads.search import HeadScore

EPILOG = (
    "[bold]Examples[/]\n\nfinch-rag heads Qwen/Qwen2.5-1.5B-Instruct --n 16\n\n"
    "finch-rag heads Qwen/Qwen2.5-1.5B-Instruct --examples questions.jsonl"
)


def heads(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, a .gguf file, or embedded.")],
    n: Annotated[int, typer.Option("--n", metavar="N", help="Heads to keep for the loop.")] = 8,
    n_alone: Annotated[
        int | None,
        typer.Option(
            "--n-alone",
            metavar="N",
            help="Heads to keep for a store.  [dim]\\[default: 12, or all of a small model][/]",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Your own questions, a JSON object a line: question, passages (texts), gold (index of the right one, "
            "from 0).  [dim]\\[default: made ones][/]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find a model's retrieval heads, those that look at the passage with the answer, and store them.

    Two sets are found: for the loop, and for a store, which reads each passage alone; others are good at that.
    Finch finds a model's best heads by itself at the first use. Run this to look at them, to use more or fewer, or to
    find them on your own questions. A store that was made with other heads must be made again.
    """
    check_positive(n=n, n_alone=n_alone)
    from ..heads.alone import find_alone_heads, usual_alone_heads  # these wait for torch
    from ..heads.examples import read_examples
    from ..heads.search import find_heads
    from ..heads.stored import save_heads

    chosen = {} if examples is None else {"examples": read_examples(examples)}
    with ProgressBars() as bars:
        finch = load_finch(model, bars, heads="all")
        found = find_heads(finch.model, finch.tokenizer, n, on_progress=partial(bars, "heads"), **chosen)
        n_alone = n_alone or usual_alone_heads(finch.model)
        alone = find_alone_heads(finch.model, finch.tokenizer, n_alone, on_progress=partial(bars, "heads"), **chosen)
        save_heads(finch.model, finch.name, found)
        file = save_heads(finch.model, finch.name, alone, "alone")
    if as_json:
        say_json({"model": finch.name, "heads": _listed(found), "alone_heads": _listed(alone), "file": str(file)})
        return
    table = Table("for", "layer", "head", "score", box=None, pad_edge=False, header_style="bold")
    for use, best in (("the loop", found), ("a store", alone)):
        for head in best:
            table.add_row(use, str(head.layer), str(head.head), f"{head.score:.3f}")
    out.print(table)
    say(f"stored in {file}")


def _listed(found: list[HeadScore]) -> list[dict[str, float]]:
    return [{"layer": head.layer, "head": head.head, "score": head.score} for head in found]
