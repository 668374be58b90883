"""Passages that a framework has joined to one text -> passages."""

from __future__ import annotations

import ast
import itertools
import re
from typing import NamedTuple

from .passages import Passage

_HEADING = 80  # characters: a shorter line that is no sentence belongs to the next paragraph
_HEADING_LINE = re.compile(r"#{1,6}[ \t]|[^=(){}\[\];<>]*[^=(){}\[\];<>.!?]\s*\Z")  # code is none
_METADATA = re.compile(r"(?:[^\s:][^:\n]{0,60}: [^\n]*\n){1,50}(?=\n|\Z)")  # bounded, as it is tried at many places
# Among others' metadata: a sentence after a word and a colon is text.
_OTHER_METADATA = re.compile(r"(?:[^\W\d][^:\n]{0,60}: [^\n]*[^\s.!?]\n){1,50}(?=\n|\Z)")
_SOURCE = re.compile(r"^Source (\d+):\n", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n")

SOURCES, METADATA, PARAGRAPHS = "numbered sources", "metadata", "blank lines"


class Split(NamedTuple):
    """A context's passages.

    Attributes:
        passages: In their order; their texts are pieces of the context. They have no titles: a title that stands in a
            text may be forged by the text before it.
        borders: What their borders were told by: "numbered sources", "metadata" or "blank lines".
    """

    passages: list[Passage]
    borders: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say of the borders."""
        return (f"the passages came as one text: parted at {self.borders}",) if len(self.passages) > 1 else ()


def split_context(context: str) -> Split:
    """The passages that a framework has joined to one context.

    Sources whose numbers count up ("Source 1:") are told apart, and so are passages that all begin with the same
    metadata ("file_name: ..."). Otherwise each paragraph is a passage, together with the headings or the metadata
    before it. None of these is certain, as passages may hold anything: so only borders come of it, never titles.

    Args:
        context: The passages, joined.
    """
    context = _unquoted(context)
    for starts, borders in ((_sources(context), SOURCES), (_metadata(context), METADATA)):
        if len(starts) > 1:
            return Split(_pieces(context, starts), borders)
    return Split(_pieces(context, _paragraphs(context)), PARAGRAPHS)


def _pieces(context: str, starts: list[int]) -> list[Passage]:
    """The pieces of a context between places, without those of white space."""
    places = sorted({0, *starts, len(context)})
    texts = (context[start:end].strip() for start, end in itertools.pairwise(places))
    return [Passage(text) for text in texts if text]


def _sources(context: str) -> list[int]:
    """Where numbered sources begin, the metadata before each included; nothing where the numbers do not count up."""
    found = list(_SOURCE.finditer(context))
    numbers = [int(source[1]) for source in found]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return []
    # Only what begins as the first passage's metadata is metadata; a source's last line may look like it.
    key = context[: context.index(":") + 1] if _METADATA.match(context) else None
    starts = []
    for least, source in zip((0, *(source.end() for source in found)), found, strict=False):
        start = source.start()
        if key is not None:
            place = context.rfind(f"\n{key} ", least, start) + 1 or (0 if least == 0 else -1)
            header = _METADATA.match(context, place) if place >= 0 else None
            if header is not None and not context[header.end() : start].strip():
                start = place
        starts.append(start)
    return starts


def _metadata(context: str) -> list[int]:
    """Where passages begin that all have the same metadata; nothing where some have another."""
    if not _METADATA.match(context):
        return []
    key = context[: context.index(":") + 1]
    starts = [found.start() for found in re.finditer(f"^{re.escape(key)} ", context, re.MULTILINE)]
    starts = [start for start in starts if _METADATA.match(context, start)]
    others = {found.end() for found in _BLANK.finditer(context)} - set(starts)
    return [] if any(_OTHER_METADATA.match(context, place) for place in others) else starts


def _paragraphs(context: str) -> list[int]:
    """Where paragraphs begin; one that is a heading or metadata opens the next."""
    starts, held = [], None
    place = 0
    for end in (*(found.end() for found in _BLANK.finditer(context)), len(context)):
        paragraph = context[place:end]
        if paragraph.strip():
            if held is not None and _OTHER_METADATA.match(context, place):  # it opens a passage, whatever stands before
                starts.append(held)
                held = None
            held = place if held is None else held
            if not _opens_the_next(paragraph):
                starts.append(held)
                held = None
        place = end
    return starts if held is None else [*starts, held]


def _opens_the_next(paragraph: str) -> bool:
    line = paragraph.strip()
    if _OTHER_METADATA.fullmatch(f"{line}\n"):
        return True
    return len(line) < _HEADING and "\n" not in line and _HEADING_LINE.match(line) is not None


def _unquoted(context: str) -> str:
    """LlamaIndex's simple_summarize formats its context as a Python list of one text."""
    if context[:2] in ("['", '["') and context[-2:] in ("']", '"]'):
        try:
            texts = ast.literal_eval(context)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return context
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return "\n\n".join(texts)
    return context
