"""``finch-rag rank``: the model as a reranker."""

from __future__ import annotations

from typing import Annotated

import typer

from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import CorpusOption, JsonOption, ModelOption, QuestionArgument, TopKOption
from .tables import citations_table

EPILOG = '[bold]Example[/]\n\nfinch-rag rank "Who signed the lease?" --corpus contracts/ --limit 10'


def rank(
    question: QuestionArgument,
    corpus: CorpusOption,
    model: ModelOption = EMBEDDED,
    top_k: TopKOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Show only the best N.  [dim]\\[default: all that were read][/]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List passages by the attention that a question pays to them: the model as a reranker."""
    check_positive(limit=limit)
    passages = session.read_passages(question, corpus, top_k)
    with ProgressBars() as bars:
        finch = load_finch(model, bars)
        nearest = session.retrieve(question, passages, top_k, bars)
        bars("prefill", 0, 1)
        citations = finch.rank(question, nearest)[:limit]
    if as_json:
        say_json({"question": question, "citations": [citation.to_dict() for citation in citations]})
    else:
        out.print(citations_table(citations))
