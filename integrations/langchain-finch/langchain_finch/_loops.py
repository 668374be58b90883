"""What a prompt that goes through the documents shows of each of them: its metadata, its number, words around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from langchain_core.documents import Document

from finch_rag import Passage

_MARK = "FinchDocument{}GoesHere"
_NOTHING: Mapping[str, Any] = MappingProxyType({})

Render = Callable[[Sequence[Any]], str | None]  # documents -> the text that shows them; None where nothing does


class StandIn(str):
    """A mark in place of a document's text; to a template it is the document, or a list of it alone.

    Args:
        mark: The mark.
        document: What it stands for; a document without anything when None.
    """

    id: str | None
    metadata: Mapping[str, Any]

    def __new__(cls, mark: str, document: Document | Passage | str | None = None) -> StandIn:
        """Makes one.

        Args:
            mark: The mark.
            document: What it stands for.
        """
        made = super().__new__(cls, mark)
        made.id = getattr(document, "id", None)
        made.metadata = getattr(document, "metadata", _NOTHING)
        return made

    @property
    def page_content(self) -> str:
        """The mark."""
        return str(self)

    def __iter__(self) -> Any:
        return iter((self,))


class _Silent(list[StandIn]):
    """Documents that only a loop shows: not a template that puts the list itself into its text."""

    def __str__(self) -> str:
        return ""


class Loop(NamedTuple):
    """A text that goes through documents.

    Attributes:
        before: What stands before all of them.
        shown: What it shows of each.
        after: What stands behind all of them.
    """

    before: str
    shown: list[str]
    after: str


def loop_over(documents: Sequence[Document | Passage | str], texts: Sequence[str], render: Render) -> Loop | None:
    """What a prompt shows of each document, where it goes through them and shows more than their texts.

    Args:
        documents: The documents.
        texts: Their texts.
        render: The prompt.

    Returns:
        The text's parts; None where it shows the documents' texts alone, or shows them in another way.
    """
    stand_ins = [StandIn(_MARK.format(place), document) for place, document in enumerate(documents)]
    empty, full = render(_Silent()), render(_Silent(stand_ins))
    if not stand_ins or empty is None or full is None:
        return None
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(empty, full, strict=False)))
    before, after = empty[:same], empty[same:]
    if not full.endswith(after) or len(before) + len(after) > len(full):
        return None
    rest, between = full[len(before) : len(full) - len(after)], []
    for mark in stand_ins:
        opening, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        between.append(opening)
    between.append(rest)
    # What stands behind a document when it is alone, stands behind it here, before what opens the next.
    alone = [(render(_Silent([mark])) or "").rpartition(mark)[2].removesuffix(after) for mark in stand_ins]
    closings = [text if behind.startswith(text) else "" for text, behind in zip(alone, between[1:], strict=True)]
    cut = [behind[len(closing) :] for behind, closing in zip(between, ("", *closings), strict=True)]
    openings = cut[:-1]
    closings[-1] += cut[-1]
    if not any(words.strip() for words in (*openings, *closings)):
        return None
    shown = [
        f"{opening}{text}{closing}".strip() for opening, text, closing in zip(openings, texts, closings, strict=True)
    ]
    return Loop(before, shown, after)
