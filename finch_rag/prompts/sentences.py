"""A text's sentences, with their places in it. Pure string functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Marks behind which a sentence may end, then what closes quotes and brackets.
_CLOSING = "\"'\u2019\u201d\u00bb\u203a)\\]}*_\u300d\u300f\uff09\u3011\u3009\u300b"
# Full stops that no space follows: of Chinese and Japanese, of Indic scripts, of Arabic, Armenian, Ethiopic, Khmer,
# Burmese and Tibetan.
_OTHER_STOPS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u0589\u1362\u17d4\u104b\u0f0d"
_BORDER = re.compile(
    rf"(?<![.!?\u2026])(?P<stop>[.!?\u2026]++[{_CLOSING}]*+)(?=\s)"  # no run of dots is tried at each of them
    rf"|[{_OTHER_STOPS}]+[{_CLOSING}]*"
    r"|(?P<lines>\n\s*)"
)
# What begins a line of its own: bullets, numbers, headings, rows of tables, quotes, fences.
_ITEM = re.compile(r"(?:[-*+\u2022\u2023\u25aa\u25cf\u25e6\u2013\u2014]\s|\(?\w{1,3}[.)]\s|#|\||>|```|~~~|={3}|-{3})")
_WORD_BEFORE = re.compile(r"(\S+)$")
_OPENING = "\"'\u2018\u201c\u00ab\u2039([{*_"
_LONGEST_WORD = 24  # characters that are looked at before a full stop

# Abbreviations that another word follows.
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms prof st ste mt ft rev hon gen col capt cpt lt sgt maj cmdr adm gov sen rep pres vs v cf e.g i.e eg "
    "ie viz al approx ca dept univ assn bros jan feb apr jun jul aug sep sept oct nov dec z.b d.h bzw vgl hr fr mme "
    "mlle sr sra".split()
)
_BEFORE_NUMBERS = frozenset("no nos nr fig figs eq eqs p pp vol vols ch sec art para ed op".split())
_WRAPPED = 48  # characters: a line as long as that, without a full stop, goes on in the next one


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand, in order; no two overlap, and all that is no white space is in one.

    A sentence ends at a full stop behind which no small letter follows, and that belongs to no abbreviation, initial or
    list number; at a full stop of scripts that write none between words; and at the end of a line, a bullet's or a
    table row's included, unless the line looks as if it was wrapped.

    Args:
        text: Any text.

    Returns:
        Start and end of each in characters; none is empty, or begins or ends with white space.
    """
    spans = []
    start = 0
    for border in _borders(text):
        part = text[start:border]
        if stripped := part.strip():
            first = start + len(part) - len(part.lstrip())
            spans.append((first, first + len(stripped)))
        start = border
    return spans


def _borders(text: str) -> Iterator[int]:
    """Where sentences end, the text's end last."""
    line = 0  # where the line begins that is looked at
    for match in _BORDER.finditer(text):
        if match["lines"] is not None:
            if _ends_line(text, line, match):
                yield match.end()
            line = match.end()
        elif match["stop"] is None or _ends_sentence(text, line, match):
            yield match.end()
    yield len(text)


def _ends_sentence(text: str, line: int, match: re.Match[str]) -> bool:
    """Whether a sentence ends at a full stop that white space follows."""
    behind = text[match.end() : match.end() + _LONGEST_WORD]
    following = behind.lstrip()
    if "\n" in behind[: len(behind) - len(following)]:
        return False  # the line's end decides
    following = following.lstrip(_OPENING)
    if following[:1].islower():
        return False
    if match["stop"] != ".":
        return True
    before = text[max(line, match.start() - _LONGEST_WORD) : match.start()]
    word = found[1].lstrip(_OPENING) if (found := _WORD_BEFORE.search(before)) else ""
    if word.isdigit() and not before[: -len(word)].strip() and match.start() - line <= _LONGEST_WORD:
        return False  # the number of a list's item
    if len(word) == 1 and word.isupper():  # an initial
        return False
    if re.fullmatch(r"(?:[A-Z]\.)+[A-Z]", word):  # U.S.
        return False
    if word.lower() in _BEFORE_NUMBERS:
        return not following[:1].isdigit()
    return word.lower() not in _ABBREVIATIONS


def _ends_line(text: str, line: int, match: re.Match[str]) -> bool:
    """Whether a sentence ends at the end of a line: not where the line was wrapped."""
    before = text[line : match.start()].rstrip(_CLOSING.replace("\\", "") + " \t")
    if match["lines"].count("\n") > 1 or not before:
        return True
    after = text[match.end() : match.end() + _LONGEST_WORD]
    if before[-1] in ".!?\u2026:;" + _OTHER_STOPS or _ITEM.match(after):
        if before[-1] != ".":
            return True
        # A wrapped line may end in an abbreviation, or in the full stop of a sentence that goes on.
        return not after[:1].islower()
    return not (after[:1].islower() or len(before) >= _WRAPPED) or before.lstrip().startswith(("#", "|"))
