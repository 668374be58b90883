"""``finch-rag index``: a folder of text, read once into a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..corpus.indexing import index_corpus
from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import say, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import (
    FollowLinksOption,
    JsonOption,
    MaxCorpusMibOption,
    MaxFileMibOption,
    ModelOption,
    PrecisionName,
    corpus_options,
)

EPILOG = (
    "[bold]Examples[/]\n\nfinch-rag index contracts/ --store contracts.store\n\n"
    'finch-rag ask "Who signed the lease?" --store contracts.store'
)


def index(
    corpus: Annotated[
        Path,
        typer.Argument(
            metavar="CORPUS",
            help="A folder (with its subfolders) or a file, as finch-rag ask --corpus takes it.",
            show_default=False,
        ),
    ],
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The store's folder; made if it is missing.")],
    model: ModelOption = EMBEDDED,
    precision: Annotated[
        PrecisionName, typer.Option(help="Of the keys that are kept; int8 takes half the space.")
    ] = PrecisionName.BFLOAT16,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The most bytes of keys: passages that were not used for longest go.  [dim]\\[default: no limit][/]",
            show_default=False,
        ),
    ] = None,
    follow_links: FollowLinksOption = False,
    max_file_mib: MaxFileMibOption = None,
    max_corpus_mib: MaxCorpusMibOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a folder of text once, so that every question to it is answered at once.

    What is new or changed since the last time is read, what is gone is removed; a store may hold several corpora.
    A store belongs to the model that made it.
    """
    check_positive(max_bytes=max_bytes)
    reading = corpus_options(follow_links=follow_links, max_file_mib=max_file_mib, max_corpus_mib=max_corpus_mib)
    passages = session.corpus_passages(corpus, **reading)
    with ProgressBars(remaining=True) as bars:
        finch = load_finch(model, bars)
        opened = finch.open_store(store, precision=precision.literal, max_bytes=max_bytes)
        with opened:
            start = time.perf_counter()
            done = index_corpus(opened, corpus, passages, lambda read, total: bars("store", read, total))
            seconds = time.perf_counter() - start
            info = opened.info()
    rate = done.read_tokens / seconds if done.read_tokens else 0.0
    if as_json:
        say_json(
            {
                "store": str(store),
                "passages": done.passages,
                "known_tokens": done.known_tokens,
                "read_tokens": done.read_tokens,
                "removed": done.removed,
                "seconds": seconds,
                "tokens_per_second": rate,
                "bytes": info.nbytes,
                "bytes_per_token": info.bytes_per_token,
            }
        )
        return
    read = f"read {done.read_tokens:,} tokens in {seconds:.1f} s ({rate:,.0f} a second)" if rate else "nothing to read"
    gone = f", {done.removed:,} removed" if done.removed else ""
    say(f"{corpus}: {done.passages:,} passages, {read}, {done.known_tokens:,} tokens were known{gone}")
    kept = f"{info.nbytes / 2**20:,.1f} MiB of keys, {info.bytes_per_token:,} bytes a token"
    say(f"{store}: {info.tokens:,} tokens, {kept}")
