"""The words around a context -> instructions and question, no word lost.

Where a prompt's context is known for certain, everything else in it is its frame: instructions, a question, and labels
and marks that set the context off.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LABEL = r"[ \t]*[^\W\d_][\w '-]{0,29}:"  # such as "Question:", "Relevant text:", in any language
# Marks that open and close a context: a tag, a line of dashes, a label.
_OPENED = re.compile(rf"(?:^[ \t]*<[\w ]+>|^[ \t]*[-=*_#\"'>`]{{3,}}\w*|^{_LABEL})?\s*\Z", re.MULTILINE)
_CLOSED = re.compile(r"\A\s*(?:</[\w ]+>|[-=*_#\"'<>`]{3,})?\s*")
_LABEL_LINES = re.compile(rf"(?:\A|\n){_LABEL}[ \t]*(?=\n|\Z)")
_WORDS = re.compile(r"\w+")


class Frame(NamedTuple):
    """What stands around a context.

    Attributes:
        instructions: Read before the passages; may be empty.
        question: Read after them.
    """

    instructions: str
    question: str


def words_around(before: str, after: str, question: str) -> str:
    """All words around a context but its question: instructions.

    The question's label, an answer's label, and the marks around the context ask nothing and give way.

    Args:
        before: What stands before the context.
        after: What stands behind it.
        question: The question, or a mark in its place; it stands in one of them, or nowhere.
    """
    kept = []
    for text in (_OPENED.sub("", before), _CLOSED.sub("", after)):
        left, found, right = text.rpartition(question)
        if found:  # the label before the question goes with it
            text = f"{_OPENED.sub('', left)}\n\n{_CLOSED.sub('', right)}"
        kept.append(_LABEL_LINES.sub("", text).strip())
    if not any(kept):  # "Name colours:" is more than a label
        lines = (line.strip() for line in before.replace(question, "").splitlines())
        kept = [line for line in lines if len(_WORDS.findall(line)) > 1]
    return "\n\n".join(filter(None, kept))


def frame_of_task(before: str, after: str) -> Frame:
    """A frame in its own words and order: the last of them ask.

    Args:
        before: What stands before the context.
        after: What stands behind it.
    """
    before, after = before.strip(), after.strip()
    if len(_WORDS.findall(_LABEL_LINES.sub("", f"\n{after}"))) >= 3:  # it asks more than "Summary:"
        return Frame(before, after)
    head, _, asked = before.rpartition("\n\n")
    return Frame(head.strip(), "\n\n".join(filter(None, (asked.strip(), after))))
