"""Passages that a framework has joined to one text -> passages."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from .passages import Passage

_HEADING = 80  # characters: a shorter paragraph that is no sentence belongs to the next
_FIELDS = r"(?:[^\s:][^:\n]{0,60}: [^\n]*\n){1,50}\n"  # a node's metadata; bounded, as it is tried at many places
_METADATA = re.compile(_FIELDS)


def split_context(context: str) -> list[Passage]:
    """The passages that a framework has joined to one context.

    Numbered sources ("Source 1:") are told apart exactly, and so are several passages that begin with the same
    metadata ("file_name: ..."); else each paragraph is a passage, together with the headings before it.

    Args:
        context: The passages, joined.
    """
    context = _unquoted(context)
    key = re.escape(context[: context.index(":") + 1]) if _METADATA.match(context) else None
    # Only what begins as the first passage's metadata is metadata; a source's last line may look like it.
    header = f"(?={key} ){_FIELDS}" if key else "(?!)"
    numbered = re.split(rf"^({header})?(Source \d+):\n", context, flags=re.MULTILINE)
    if len(numbered) > 1:
        sources = zip(numbered[1::3], numbered[2::3], numbered[3::3], strict=True)
        opening = [Passage(numbered[0].strip())] if numbered[0].strip() else []
        found = ((source, f"{metadata or ''}{text}".strip()) for metadata, source, text in sources)
        return opening + [Passage(text, title=source) for source, text in found if text]
    if key:
        starts = [found.start() for found in re.finditer(f"^{key} ", context, re.MULTILINE)]
        starts = [start for start in starts if _METADATA.match(context, start)]
        if len(starts) > 1:
            texts = [context[start:end].strip() for start, end in itertools.pairwise([*starts, len(context)])]
            return [Passage(text) for text in texts]
    return [Passage(text) for text in _paragraphs(context)]


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


def _paragraphs(text: str) -> Iterator[str]:
    held: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if paragraph.strip():
            held.append(paragraph.rstrip())
        if len(paragraph.strip()) >= _HEADING or paragraph.rstrip().endswith((".", "!", "?")):
            yield "\n\n".join(held).strip()
            held = []
    if held:
        yield "\n\n".join(held).strip()
