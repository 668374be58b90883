"""``finch-rag check``: does Finch run a model, and is what it computes right?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..terminal.loading import load_finch
from ..terminal.output import cell, out, say_json
from ..terminal.progress import ProgressBars
from .arguments import JsonOption

EPILOG = (
    "[bold]Examples[/]\n\nfinch-rag check Qwen/Qwen2.5-1.5B-Instruct\n\n"
    "finch-rag check models/my-model --json\n\n"
    "Exit code 0: all is right. 1: a check failed. 2: Finch cannot run the model."
)
_SIGNS = {True: ("ok", "green"), False: ("WRONG", "red"), None: ("", "")}


def check(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, a .gguf file, or embedded.")],
    as_json: JsonOption = False,
) -> None:
    """Check a model: how Finch reads it, and that it computes what the model computes without Finch.

    A text that fits is answered with and without Finch, so are the tokens that are kept of a longer one; the passage
    that answers is looked for among many. It takes a minute, more on a CPU where the model is large.
    """
    with ProgressBars() as bars:
        finch = load_finch(model, bars)
        from ..checkup.checking import check_model  # waits for torch

        findings = list(check_model(finch))
    if as_json:
        say_json({"model": finch.name, "findings": [finding.to_dict() for finding in findings]})
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            sign, style = _SIGNS[finding.passed]
            table.add_row(cell(finding.name, "bold"), cell(sign, style), cell(finding.detail))
        out.print(table)
    if any(finding.passed is False for finding in findings):
        raise typer.Exit(1)
