"""Passages: what a retriever found, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved text.

    Attributes:
        text: The text that the model reads.
        id: The caller's id, handed back in citations.
        title: Read before the text, and handed back in citations.
        metadata: The caller's; Finch does not look at it.
        score: The retriever's, the higher the better; see ``prior`` of `finch_rag.Finch`.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None

    @property
    def titled_text(self) -> str:
        """Title and text, as models and indexes read them."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def as_passages(passages: Iterable[str | Passage]) -> list[Passage]:
    """Checks what a caller passes as passages. One without text is taken and never read.

    Args:
        passages: Strings or `Passage` objects.

    Raises:
        InputError: If one of them is not text; the message has its index.
    """
    if isinstance(passages, (str, Passage)):
        raise InputError("passages is a single text: pass a list of texts or of Passage objects")
    if not isinstance(passages, Iterable):
        raise InputError(f"passages is {type(passages).__name__}: pass a list of texts or of Passage objects")
    checked = []
    for index, item in enumerate(passages):
        passage = item if isinstance(item, Passage) else Passage(item)
        if not isinstance(passage.text, str):
            raise InputError(f"passage {index} is {type(passage.text).__name__}, not text: pass a str or a Passage")
        check_unicode(f"{passage.title or ''}{passage.text}", f"passage {index}")
        if isinstance(passage.id, str):
            check_unicode(passage.id, f"the id of passage {index}")
        _check_score(passage.score, index)
        checked.append(passage)
    return checked


def ranks_of(passages: Sequence[Passage]) -> list[int]:
    """Places of passages by their retriever, from 0 for the best: by score where all have one, else as they stand.

    Args:
        passages: In any order.
    """
    places = range(len(passages))
    scores = [passage.score for passage in passages if passage.score is not None]
    if len(scores) < len(passages):
        return list(places)
    ranks = [0] * len(passages)
    for rank, place in enumerate(sorted(places, key=lambda place: -scores[place])):
        ranks[place] = rank
    return ranks


def _check_score(score: object, index: int) -> None:
    if score is None:
        return
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise InputError(f"the score of passage {index} is {score!r}: pass a finite number, or None")


def check_unicode(text: str, what: str) -> None:
    """Raises an InputError if a text holds half a surrogate pair, which no tokenizer reads.

    Args:
        text: Any text.
        what: What to call it in the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds half a surrogate pair: decode it with errors='replace' first") from error
