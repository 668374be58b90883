"""``finch-rag ask``: a question to a folder of text, or to a store."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import (
    BudgetOption,
    ChunkSizeOption,
    CorpusOption,
    FollowLinksOption,
    JsonOption,
    MaxCorpusMibOption,
    MaxFileMibOption,
    ModelOption,
    NoStoreOption,
    PriorName,
    QuestionArgument,
    RoundsOption,
    SelectionName,
    StoreOption,
    StrategyName,
    TopKOption,
    check_source,
    corpus_options,
)
from .tables import answer_as_json, show_answer

EPILOG = (
    '[bold]Examples[/]\n\nfinch-rag ask "Who signed the lease?" --corpus contracts/\n\n'
    'finch-rag ask "When was it built?" --corpus notes.md --model Qwen/Qwen2.5-1.5B-Instruct --budget 1024\n\n'
    'finch-rag ask "Who?" --corpus passages.jsonl.gz --top-k 300 --json | jq .answer\n\n'
    'finch-rag ask "Who signed the lease?" --store contracts.store --quotes'
)


def ask(
    question: QuestionArgument,
    corpus: CorpusOption = None,
    store: StoreOption = None,
    model: ModelOption = EMBEDDED,
    top_k: TopKOption = None,
    budget: BudgetOption = None,
    chunk_size: ChunkSizeOption = None,
    selection: Annotated[
        SelectionName, typer.Option(help="Keep whole passages, or single tokens layer by layer as in the Finch paper.")
    ] = SelectionName.PASSAGE,
    strategy: Annotated[
        StrategyName,
        typer.Option(help="Read each passage alone (independent), or all of them in turn under the question (loop)."),
    ] = StrategyName.AUTO,
    cutoff: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            min=0,
            max=1,
            help="Leave out passages with less than this part of the best one's attention; 0 leaves none out, for "
            "questions that need several.  [dim]\\[default: 0.25][/]",
            show_default=False,
        ),
    ] = None,
    rounds: RoundsOption = None,
    prior: Annotated[
        PriorName,
        typer.Option(help="Let the retriever's order count beside the attention, as far as both agree; or not."),
    ] = PriorName.AUTO,
    min_support: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            min=0,
            max=1,
            help="Give no answer where the passages support it less than this; 0 only judges how far they do.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="The longest answer.")] = 128,
    quotes: Annotated[
        bool, typer.Option("--quotes", help="Show the sentences that each sentence of the answer rests on.")
    ] = False,
    no_store: NoStoreOption = False,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
    as_json: JsonOption = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Show the answer as it is made; never with --json.  [dim]\\[default: on a terminal][/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer a question from a folder of text, or from a store, with citations.

    The passages nearest to the question are retrieved and read in one go.
    Of all their tokens only those that matter for the question are kept.
    What was read once is kept in the user's cache, so that the next question over the same folder is answered at once.
    """
    reading = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    check_source(corpus, store, top_k=top_k, no_store=no_store, options=reading)
    check_positive(budget=budget, chunk_size=chunk_size, max_new_tokens=max_new_tokens)
    session.check_question(question)
    passages = [] if corpus is None else session.read_passages(question, corpus, top_k, **reading)
    keep = not no_store and selection is SelectionName.PASSAGE and strategy is not StrategyName.LOOP
    with ProgressBars() as bars:
        finch = load_finch(
            model,
            bars,
            strategy=strategy.literal,
            selection=selection.literal,
            cutoff=cutoff,
            rounds=rounds,
            prior=prior.literal,
            min_support=min_support,
            budget=budget,
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            quotes=quotes or as_json,
        )
        nearest = session.retrieve(question, passages, top_k, bars) if passages else []
        finch.stream(question, nearest, store=None).close()  # what cannot work shows before a store is opened
        streaming = not as_json and (out.is_terminal if stream is None else stream)
        with session.known_passages(finch, store, keep) as known:
            read = nearest if corpus is None or known is None else session.of_corpus(nearest, corpus)
            answer = session.answer(finch, question, read, bars, streaming, known).answer
    answer = replace(answer, citations=session.with_ids(answer.citations, nearest))
    if as_json:
        say_json(answer_as_json(question, answer))
        return
    show_answer(answer, streaming, quotes=quotes)
