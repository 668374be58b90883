"""The steps that the commands of ``finch-rag`` are made of, with progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import Unpack

from ..corpus.reading import CorpusOptions, read_corpus
from ..corpus.retrieval import Retriever, check_top_k, in_rank_order
from ..errors import InputError, StoreError
from ..paths import cache_folder
from ..prompts.passages import Passage
from ..terminal import output
from ..terminal.progress import ProgressBars
from .arguments import LARGEST_DEFAULT_TOP_K

if TYPE_CHECKING:
    from ..answer import Answer, Citation
    from ..engine import Finch
    from ..store.store import PassageStore

_MOST_KEY_BYTES = 2 * 2**30  # in the user's cache, of one model


class Timed(NamedTuple):
    """An answer, and when it began.

    Attributes:
        answer: The answer.
        first_piece: Seconds from the question to the first piece of its text.
    """

    answer: Answer
    first_piece: float


def check_question(question: str) -> None:
    """Raises an InputError if a question is not text, before models are loaded."""
    if not question.strip():
        raise InputError("the question is empty: ask one")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError("the question is not valid UTF-8: check the terminal's encoding") from error


def corpus_passages(corpus: Path, **options: Unpack[CorpusOptions]) -> list[Passage]:
    """The corpus's passages; its warnings go to stderr.

    Args:
        corpus: A file or folder.
        options: See `finch_rag.corpus.reading.CorpusOptions`.

    Raises:
        CorpusError: If the corpus cannot be read.
    """
    read = read_corpus(corpus, **options)
    for warning in read.warnings:
        output.note(warning)
    return read.passages


def read_passages(question: str, corpus: Path, top_k: int | None, **options: Unpack[CorpusOptions]) -> list[Passage]:
    """The corpus's passages, for one question.

    Args:
        question: Is checked here, before models are loaded.
        corpus: A file or folder.
        top_k: Is checked against the number of passages.
        options: See `finch_rag.corpus.reading.CorpusOptions`.

    Raises:
        InputError: If the question is not text or there are not so many passages.
        CorpusError: If the corpus cannot be read.
    """
    check_question(question)
    passages = corpus_passages(corpus, **options)
    if top_k is not None:
        check_top_k(top_k, len(passages))
    return passages


def retrieve(question: str, passages: list[Passage], top_k: int | None, bars: ProgressBars) -> list[Passage]:
    """The passages nearest to the question, best first."""
    retriever = index(passages, bars)
    return in_rank_order(retriever, passages, question, top_k or min(LARGEST_DEFAULT_TOP_K, len(passages)))


def index(passages: list[Passage], bars: ProgressBars) -> Retriever:
    """An index of the passages, from the cache where it is there."""
    with bars.busy("loading the embedding model"):
        return Retriever.build(passages, lambda done, total: bars("embed", done, total))


@contextmanager
def known_passages(finch: Finch, store: Path | None, keep: bool) -> Iterator[PassageStore | None]:
    """What has been read before: a user's store, or the one that the commands keep for a model in the user's cache.

    Args:
        finch: The engine.
        store: The user's.
        keep: Whether to use the commands' own where there is no other.

    Yields:
        The store; None where there is none. Where the commands' own cannot be used, a note says why.

    Raises:
        StoreError: If the user's store cannot be opened.
    """
    opened = None
    if store is not None:
        from ..store.folder import StoreFolder  # waits for torch

        with StoreFolder(store) as folder:
            precision = folder.info().precision
        opened = finch.open_store(store, read_only=True, precision="int8" if precision == "int8" else "bfloat16")
    elif keep:
        try:
            opened = finch.open_store(cache_folder("stores") / finch.fingerprint, max_bytes=_MOST_KEY_BYTES)
        except StoreError as error:
            output.note(f"passages are read anew: {error}")
    with nullcontext() if opened is None else opened:
        yield opened


def of_corpus(passages: Sequence[Passage], corpus: Path) -> list[Passage]:
    """Passages with ids that no other corpus has, so that many share a store.

    Args:
        passages: Of the corpus.
        corpus: Its path.
    """
    return [replace(passage, id=f"{corpus.resolve()}: {passage.id}") for passage in passages]


def with_ids(citations: Sequence[Citation], passages: Sequence[Passage]) -> list[Citation]:
    """Citations with the passages' own ids again, see `of_corpus`.

    Args:
        citations: Of the passages.
        passages: With their own ids; citations of a whole store stay as they are where there are none.
    """
    if not passages:
        return list(citations)
    return [replace(citation, passage_id=passages[citation.index].id) for citation in citations]


def answer(
    finch: Finch,
    question: str,
    passages: Sequence[Passage],
    bars: ProgressBars,
    streaming: bool,
    store: PassageStore | None = None,
) -> Timed:
    """The answer; its text is shown on stdout as it comes if ``streaming``.

    Args:
        finch: The engine.
        question: The question.
        passages: What it is asked about; all of the store when there are none.
        bars: Show what is read.
        streaming: Whether the text is shown as it comes.
        store: Has read the passages, or keeps what is read now.
    """
    start = time.perf_counter()
    stream = finch.stream(question, passages, store=store)
    bars("prefill" if store is None else "store", 0, 1)
    first = 0.0
    for delta in stream:
        first = first or time.perf_counter() - start
        bars.stop()
        if streaming:
            output.say_delta(delta)
    return Timed(stream.answer, first)
