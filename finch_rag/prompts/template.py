"""A framework's prompt as a pattern: its words, and fields between them. A prompt matches as a whole or not at all."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

CONTEXT, QUESTION, ANSWER, REST, WORDS = "context", "question", "answer", "rest", "words"


@dataclass(frozen=True, slots=True)
class Match:
    """A prompt of a known template.

    Attributes:
        template: The template.
        before: All that stands before the context.
        context: The passages, joined.
        after: All that stands behind the context.
        fields: The other fields' names and values, stripped, in their order.
    """

    template: Template
    before: str
    context: str
    after: str
    fields: tuple[tuple[str, str], ...]

    def field(self, name: str) -> str | None:
        """The value of a field; None where the template has no such field.

        Args:
            name: Of the field.
        """
        return next((value for field, value in self.fields if field == name), None)

    @property
    def own_words(self) -> str:
        """The user's words among the template's: what its "words" fields hold beside the framework's wording."""
        texts = [value for field, value in self.fields if field == WORDS]
        for wording in self.template.wording_patterns:
            texts = [wording.sub("", text) for text in texts]
        return "\n".join(text.strip() for text in texts if re.search(r"\w", text))


@dataclass(frozen=True)
class Template:
    """A known prompt.

    Attributes:
        name: For the report.
        pattern: Its words, with fields in braces: "context"; "question" where the same message asks it; "answer", an
            earlier answer; "rest", the user's own words; "words", the framework's wording, in which users write too.
            How much white space stands between words does not matter, but a blank line stays one.
        wording: The framework's texts for its "words" fields. They give way; what else stands there is the user's.
        keeps_words: The words ask for more than an answer from the context, so they become the instructions.
        open_start: Nothing but a blank line parts the words before the context from it.
        open_end: Nothing but a blank line parts the context from words that a user may have put behind it.
    """

    name: str
    pattern: str
    wording: tuple[str, ...] = ()
    keeps_words: bool = False
    open_start: bool = False
    open_end: bool = False

    def match(self, text: str) -> Match | None:
        """Takes a text apart, in linear time, if the template frames all of it.

        Its first words must open the text, its last words must end it. In between, what stands before the context is
        searched from the start, what stands behind it from the end, so that the context may hold anything, the
        template's own words too.

        Args:
            text: A prompt or a message.
        """
        literals, names = self._parts
        context = names.index(CONTEXT)
        spans: list[tuple[int, int]] = []
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        for place, literal in enumerate(literals[: context + 1]):
            found = literal.match(text, start, end) if place == 0 else literal.search(text, start, end)
            if found is None:
                return None
            spans.append(found.span())
            start = found.end()
        after: list[tuple[int, int]] = []
        for literal in reversed(literals[context + 1 :]):
            if (found := last_match(literal.finditer(text, start, end))) is None:
                return None
            after.append(found.span())
            end = found.start()
        spans += reversed(after)
        values = [text[left:right].strip() for (_, left), (right, _) in itertools.pairwise(spans)]
        (_, opened), (closed, _) = spans[context], spans[context + 1]
        fields = tuple((name, value) for name, value in zip(names, values, strict=True) if name != CONTEXT)
        return Match(self, text[:opened], values[context], text[closed:], fields)

    @cached_property
    def wording_patterns(self) -> list[re.Pattern[str]]:
        """The framework's texts for "words", whatever the white space between them."""
        return [re.compile(_words(text)) for text in self.wording]

    @cached_property
    def _parts(self) -> tuple[list[re.Pattern[str]], list[str]]:
        """Its words between fields, as patterns, and the fields' names."""
        words, names = re.split(r"\{\w+\}", self.pattern), re.findall(r"\{(\w+)\}", self.pattern)
        patterns = [_words(text) for text in words]
        patterns[-1] += r"\Z"
        return [re.compile(pattern) for pattern in patterns], names


def _words(text: str) -> str:
    """A pattern for words, whatever the white space between them; line starts and blank lines stay."""
    start = ""
    if text.startswith("\n\n"):
        start = r"\n[ \t\r]*\n[ \t]*"
    elif text.startswith("\n"):
        start = r"\n[ \t]*"
    end = "(?!-)" if text.rstrip().endswith("--") else ""  # a longer line of dashes is another one
    return start + r"\s+".join(map(re.escape, text.split())) + end


def first_match(templates: Iterable[Template], text: str) -> Match | None:
    """The match whose context begins first, and ends last: a context may hold another template's prompt.

    Where two begin alike, the one that has words of its own behind the context is meant.

    Args:
        templates: Known prompts.
        text: A prompt or a message.
    """
    matches = filter(None, (template.match(text) for template in templates))
    return min(
        matches, key=lambda match: (len(match.before), match.template.open_end, -len(match.context)), default=None
    )


def last_match(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    """The last of a pattern's matches."""
    found = deque(matches, maxlen=1)
    return found[0] if found else None
