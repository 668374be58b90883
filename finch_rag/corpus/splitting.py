"""Texts -> passages of bounded length. Pure string functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_WORDS = 160  # about 210 tokens; the embedding model reads 256

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")

# Where a text may be cut, best places first; a cut is made behind the match.
_BORDERS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # between paragraphs
    # Between sentences: a full stop, closing quotes, a space, and no small letter ("e.g. this" is no border); or a
    # Chinese or Japanese full stop.
    re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*\s+(?=[^a-z])|[\u3002\uff01\uff1f]"),
    re.compile(r"\n\s*"),  # between lines of code, tables, verse
    re.compile(rf"\s+|(?<=[{_CJK}])(?=\S)|(?<=\S)(?=[{_CJK}])"),  # between words
)

_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+|$)")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_LINK = re.compile(r"!?\[([^\]]{0,500})\]\([^)]{0,2000}\)")  # bounded, as it is tried at many places
_LONGEST_HEADING = 10_000  # characters in which links are looked for


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a Markdown file.

    Attributes:
        heading: Text of the heading, links replaced by their words; None for what stands before the first heading.
        slug: The heading's anchor as GitHub makes it, unique in the file; empty for what has no heading.
        text: What stands below the heading, up to the next heading of any level.
    """

    heading: str | None
    slug: str
    text: str


def count_words(text: str) -> int:
    """Words of a text: what white space separates, and each Chinese or Japanese character."""
    return sum(1 for _ in _WORD.finditer(text))


def split_text(text: str, max_words: int = MAX_WORDS) -> list[str]:
    """Cuts a text into pieces of at most ``max_words`` words and loses none of them.

    A piece takes as many whole paragraphs as fit; a longer paragraph is cut between sentences, a longer sentence
    between lines, then between words.

    Args:
        text: Any text.
        max_words: The most words of a piece, at least 1.

    Returns:
        Stripped pieces in order; none is empty. A text that fits stays as it is.
    """
    pieces = (piece.strip() for piece in _pack(text, max_words, 0))
    return [piece for piece in pieces if piece]


def _pack(text: str, max_words: int, level: int) -> Iterator[str]:
    """Pieces whose sum is ``text``, cut at the borders of ``level`` and, inside what is too long, of those below."""
    held, words = "", 0
    for part in _cut(text, _BORDERS[level]):
        for piece in _pack(part, max_words, level + 1) if _must_cut(part, max_words, level) else (part,):
            size = count_words(piece)
            if held and words + size > max_words:
                yield held
                held, words = "", 0
            held, words = held + piece, words + size
    yield held


def _must_cut(part: str, max_words: int, level: int) -> bool:
    return level + 1 < len(_BORDERS) and count_words(part) > max_words


def _cut(text: str, border: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in border.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def markdown_sections(text: str) -> list[Section]:
    """Splits Markdown at its ``#`` headings; those inside fenced code blocks are none.

    Args:
        text: A Markdown file's content; line ends are line feeds.

    Returns:
        Sections in order; those without text are left out.
    """
    sections: list[Section] = []
    slugs: dict[str, int] = {}
    heading, slug, lines = None, "", list[str]()
    fence = ""  # what opened the code block that the line is in
    for line in text.split("\n"):
        if fence:
            fence = "" if _closes(line, fence) else fence
        elif opening := _FENCE.match(line):
            fence = opening[1]
        elif found := _HEADING.match(line):
            _add_section(sections, heading, slug, lines)
            heading, lines = _without_links(_without_closing(line[found.end() :])), []
            slug = _unique_slug(heading, slugs)
            continue
        lines.append(line)
    _add_section(sections, heading, slug, lines)
    return sections


def _without_links(heading: str) -> str:
    return (_LINK.sub(r"\1", heading) if len(heading) <= _LONGEST_HEADING else heading).strip()


def _without_closing(heading: str) -> str:
    """A heading's text without the hashes that may close it; by no pattern, which would take quadratic time."""
    heading = heading.strip(" \t")
    body = heading.rstrip("#")
    return body.rstrip(" \t") if not body or body[-1] in " \t" else heading


def _add_section(sections: list[Section], heading: str | None, slug: str, lines: list[str]) -> None:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        sections.append(Section(heading, slug, text))


def _closes(line: str, fence: str) -> bool:
    stripped = line.strip()
    return len(stripped) >= len(fence) and set(stripped) == {fence[0]}


def _unique_slug(heading: str, taken: dict[str, int]) -> str:
    """GitHub's anchor for a heading: lower case, no punctuation, hyphens for spaces; -1, -2 ... when taken."""
    base = slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    while slug in taken:
        taken[base] += 1
        slug = f"{base}-{taken[base]}"
    taken[slug] = 0
    return slug
