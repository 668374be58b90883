"""A prompt that nobody knows and that does not fit: its ends are kept, what stands between them may be evicted.

People put a task, its rules and the question at the start or at the end of a prompt, and long texts between. So the
text is read in its own order; the paragraphs at its two ends are never evicted. Where the end does not plainly ask
something, the first paragraph, which then does, is read once more at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_BREAKS = (re.compile(r"\n[ \t\r]*\n\s*"), re.compile(r"\n"), re.compile(r"(?<=[.!?]) +"), re.compile(r"[ \t]+"))
_SHORT = 8  # of the tail's room, short paragraphs before the last may take this part
_ANSWER_LABEL = re.compile(r"\n[ \t]*[^\W\d_][\w '-]{0,29}:\s*\Z")  # a last line such as "Answer:" asks nothing
_ASKS = re.compile(r"\?|^[ \t]*[^\W\d_][\w '-]{0,29}:[ \t]*\S", re.MULTILINE)  # or a label such as "Frage: ..."


@dataclass(frozen=True, slots=True)
class Parts:
    """A long text in its own order.

    Attributes:
        head: Its start.
        middle: What may be evicted.
        tail: Its end.
        asks: What asks, for people to read: the tail, or the first paragraph.
    """

    head: str
    middle: str
    tail: str
    asks: str


def parts_of(text: str, tokens: Callable[[str], int], most: int) -> Parts:
    """Takes a long text apart.

    Args:
        text: The text.
        tokens: Counts tokens.
        most: The most tokens of the head, and of the tail.
    """
    text = text.strip()
    labelled = _ANSWER_LABEL.search(text)
    end = labelled.start() if labelled else len(text)
    start_of_tail = _tail(text[:end], tokens, most)
    tail = text[start_of_tail:]
    end_of_head = _head(text[:start_of_tail], tokens, most)
    head, middle = text[:end_of_head].strip(), text[end_of_head:start_of_tail].strip()
    first = _BREAKS[0].split(head, maxsplit=1)[0]
    if labelled or _ASKS.search(tail) or not first:
        return Parts(head, middle, tail, text[start_of_tail:end].strip())
    return Parts(head, middle, f"{tail}\n\n{first}", first)


def _tail(text: str, tokens: Callable[[str], int], most: int) -> int:
    """Where the last paragraph begins, or short ones before it; of one that is too long, its last lines or words."""
    start = 0
    for pattern in _BREAKS:
        ends = [found.end() for found in pattern.finditer(text, start)]
        if ends and (filled := tokens(text[ends[-1] :])) <= most:
            for end, following in zip(ends[-2::-1], ends[:0:-1], strict=False):
                filled += tokens(text[end:following])
                if filled > most // _SHORT:
                    return following
            return ends[0] if filled <= most // _SHORT else ends[-1]
        start = ends[-1] if ends else start
    return start if tokens(text[start:]) <= most else len(text)


def _head(text: str, tokens: Callable[[str], int], most: int) -> int:
    """Where the first paragraphs end: as many as there is room for; of one that is too long, its first lines."""
    for pattern in _BREAKS:
        start = filled = 0
        for found in pattern.finditer(text):
            filled += tokens(text[start : found.start()])
            if filled > most:
                break
            start = found.end()
        if start:
            return start
    return 0
