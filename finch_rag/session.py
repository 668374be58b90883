"""The steps that the commands of ``finch-rag`` are made of, with progress on the terminal."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import display
from .arguments import LARGEST_DEFAULT_TOP_K
from .corpus import read_corpus
from .display import ProgressBars
from .errors import InputError
from .retrieval import Retriever, check_top_k, in_rank_order

if TYPE_CHECKING:
    from .engine import Finch
    from .prompt import Passage
    from .report import Answer

EMBEDDED = "embedded"


def check_positive(**options: int | None) -> None:
    """Raises an InputError that names the first option below 1, before models are loaded."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: the least is 1")


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
        display.note(warning)
    if top_k is not None:
        check_top_k(top_k, len(read.passages))
    return read.passages


def load_finch(model: str, bars: ProgressBars, **settings: Any) -> Finch:
    """An engine whose progress is shown; the libraries below it are kept quiet."""
    local = model == EMBEDDED or Path(model).exists()
    waiting = bars.busy(f"loading {model}") if local else nullcontext()  # a download has bars of its own
    with waiting:
        import transformers

        from .engine import Finch

        transformers.logging.set_verbosity_error()
        if local or not display.err.is_terminal:
            transformers.logging.disable_progress_bar()
        finch = Finch.from_pretrained(model, on_progress=bars, **settings)
        transformers.logging.disable_progress_bar()  # the embedding model is loaded by the same library
        return finch


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
            display.say_delta(delta)
    return stream.answer
