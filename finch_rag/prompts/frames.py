"""The words around a context -> instructions and question, no word lost.

Where a prompt's context is known for certain, everything else in it is its frame: instructions, a question, and labels
and marks that set the context off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Such as "Question:", in any language; two words may be an instruction ("Name colours:").
_LABEL = r"[ \t]*(?:Helpful[ ])?[^\W\d_][\w'-]{0,29}:"
# Marks that open and close a context: a tag, a line of dashes, a label.
_OPENED = re.compile(rf"(?:^[ \t]*<[\w ]+>|^[ \t]*[-=*_#\"'>`]{{3,}}\w*|^{_LABEL})?\s*\Z", re.MULTILINE)
_CLOSED = re.compile(r"\A\s*(?:</[\w ]+>|[-=*_#\"'<>`]{3,})?\s*")
_LABEL_LINES = re.compile(rf"(?:\A|\n){_LABEL}[ \t]*(?=\n|\Z)")
_LAST_LABEL = re.compile(rf"(?:\A|\n){_LABEL}\s*\Z")
_WORDS = re.compile(r"\w+")


class Frame(NamedTuple):
    """What stands around a context.

    Attributes:
        instructions: Read before the passages; may be empty.
        question: Read after them.
    """

    instructions: str
    question: str


def words_around(before: str, after: str, marks: Sequence[str]) -> str:
    """All words around a context but its question: instructions.

    The question's label, an answer's label, and the marks around the context ask nothing and give way.

    Args:
        before: What stands before the context.
        after: What stands behind it.
        marks: Stand for the question, and for the context where it comes once more.
    """
    kept = []
    for text in (_OPENED.sub("", before), _CLOSED.sub("", after)):
        for mark in marks:
            while mark in text:  # the label before it goes with it
                left, _, right = text.partition(mark)
                text = f"{_OPENED.sub('', left)}\n\n{_CLOSED.sub('', right)}".strip()
        kept.append(_LAST_LABEL.sub("", text).strip())
    return "\n\n".join(filter(None, kept))


def frame_of_task(before: str, after: str) -> Frame:
    """A frame in its own words and order: the last of them ask.

    Args:
        before: What stands before the context.
        after: What stands behind it.
    """
    before, after = before.strip(), after.strip()
    if len(_WORDS.findall(_LABEL_LINES.sub("", after))) >= 3:  # it asks more than "CONCISE SUMMARY:"
        return Frame(before, after)
    head, _, asked = before.rpartition("\n\n")
    while head and not _WORDS.search(_LABEL_LINES.sub("", asked)):  # a label, "Context:", asks nothing
        head, _, more = head.rpartition("\n\n")
        asked = f"{more}\n\n{asked}"
    return Frame(head.strip(), "\n\n".join(filter(None, (asked.strip(), after))))
