"""The steps that the commands of ``finch-rag`` are made of, with progress on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..corpus.reading import read_corpus
from ..corpus.retrieval import Retriever, check_top_k, in_rank_order
from ..errors import InputError
from ..prompts.passages import Passage
from ..terminal import output
from ..terminal.progress import ProgressBars
from .arguments import LARGEST_DEFAULT_TOP_K

if TYPE_CHECKING:
    from ..answer import Answer
    from ..engine import Finch


def read_passages(question: str, corpus: Path, top_k: int | None) -> list[Passage]:
    """The corpus's passages; its warnings go to stderr.

    Args:
        question: Is checked here, before models are loaded.
        corpus: A file or folder.
        top_k: Is checked against the number of passages.

    Raises:
        InputError: If the question is not text or there are not so many passages.
        CorpusError: If the corpus cannot be read.
    """
    if not question.strip():
        raise InputError("the question is empty: ask one")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError("the question is not valid UTF-8: check the terminal's encoding") from error
    read = read_corpus(corpus)
    for warning in read.warnings:
        output.note(warning)
    if top_k is not None:
        check_top_k(top_k, len(read.passages))
    return read.passages


def retrieve(question: str, passages: list[Passage], top_k: int | None, bars: ProgressBars) -> list[Passage]:
    """The passages nearest to the question, best first."""
    retriever = index(passages, bars)
    return in_rank_order(retriever, passages, question, top_k or min(LARGEST_DEFAULT_TOP_K, len(passages)))


def index(passages: list[Passage], bars: ProgressBars) -> Retriever:
    """An index of the passages, from the cache where it is there."""
    with bars.busy("loading the embedding model"):
        return Retriever.build(passages, lambda done, total: bars("embed", done, total))


def answer(finch: Finch, question: str, passages: list[Passage], bars: ProgressBars, streaming: bool) -> Answer:
    """The answer; its text is shown on stdout as it comes if ``streaming``."""
    stream = finch.stream(question, passages)
    bars("prefill", 0, 1)
    for delta in stream:
        bars.stop()
        if streaming:
            output.say_delta(delta)
    return stream.answer
