"""``finch-rag rank``: the model as a reranker."""

from __future__ import annotations

from typing import Annotated

import typer

from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import (
    CorpusOption,
    FollowLinksOption,
    JsonOption,
    MaxCorpusMibOption,
    MaxFileMibOption,
    ModelOption,
    NoStoreOption,
    QuestionArgument,
    StoreOption,
    TopKOption,
    check_source,
    corpus_options,
)
from .tables import citations_table

EPILOG = (
    '[bold]Examples[/]\n\nfinch-rag rank "Who signed the lease?" --corpus contracts/ --limit 10\n\n'
    'finch-rag rank "Who signed the lease?" --store contracts.store'
)
_FOUND_IN_STORE = 20  # passages that are listed of a whole store


def rank(
    question: QuestionArgument,
    corpus: CorpusOption = None,
    store: StoreOption = None,
    model: ModelOption = EMBEDDED,
    top_k: TopKOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Show only the best N.  [dim]\\[default: all that were read; {_FOUND_IN_STORE} of a store][/]",
            show_default=False,
        ),
    ] = None,
    no_store: NoStoreOption = False,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
    as_json: JsonOption = False,
) -> None:
    """List passages by the attention that a question pays to them: the model as a reranker, or as a retriever.

    Of a corpus, the passages nearest to the question are read and ranked; a store is ranked as a whole.
    """
    reading = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    check_source(corpus, store, top_k=top_k, no_store=no_store, options=reading)
    check_positive(limit=limit)
    session.check_question(question)
    passages = [] if corpus is None else session.read_passages(question, corpus, top_k, **reading)
    with ProgressBars() as bars:
        finch = load_finch(model, bars)
        nearest = session.retrieve(question, passages, top_k, bars) if passages else []
        with session.known_passages(finch, store, keep=not no_store) as known:
            if known is not None and corpus is None:
                citations = known.search(question, limit or _FOUND_IN_STORE)
            else:
                bars("prefill" if known is None else "store", 0, 1)
                read = nearest if corpus is None or known is None else session.of_corpus(nearest, corpus)
                citations = session.with_ids(finch.rank(question, read, store=known)[:limit], nearest)
    if as_json:
        say_json({"question": question, "citations": [citation.to_dict() for citation in citations]})
    else:
        out.print(citations_table(citations))
