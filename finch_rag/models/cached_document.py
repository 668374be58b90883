"""What a cache remembers of the passages that were read into it, for citations and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..checks import Refused, Rule, list_of, number, or_none, shown, text, truth, whole_number
from ..errors import InputError
from ..jsonl import parsed


@dataclass(frozen=True, slots=True)
class ReadingFigures:
    """How passages were read into a cache, and what it took.

    Attributes:
        model: Name of the model.
        strategy: How passages were ranked: "loop" or "independent"; "none" when there were none.
        selection: "passage" or "token"; "none" when there were no passages.
        reread: Whether the best passages are prefilled again where something was evicted.
        heads: The retrieval heads as (layer, head) pairs; empty where all heads were summed.
        budget: Document tokens that may be kept per layer.
        chunk_size: Document tokens scanned per step.
        chunk_size_planned: What it was at first; more than ``chunk_size`` where the device's memory ran out.
        chunks: Steps of the scan.
        scanned_layers: Layers that the scan ran.
        rounds: How often the passages were ranked.
        prefill_seconds: Seconds spent reading passages.
        known_tokens: Tokens of passages that a store had read before.
        stored_tokens: Tokens of passages that the store read for this call.
        store_seconds: Seconds that the store took to read them.
        searched_tokens: Tokens of the whole store, where it was asked; else 0.
        search_seconds: Seconds that the search among head keys took.
    """

    model: str = ""
    strategy: str = "none"
    selection: str = "none"
    reread: bool = False
    heads: tuple[tuple[int, int], ...] = ()
    budget: int = 0
    chunk_size: int = 0
    chunk_size_planned: int = 0
    chunks: int = 0
    scanned_layers: int = 0
    rounds: int = 1
    prefill_seconds: float = 0.0
    known_tokens: int = 0
    stored_tokens: int = 0
    store_seconds: float = 0.0
    searched_tokens: int = 0
    search_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CachedSentence:
    """A sentence of a passage that a cache keeps whole.

    Attributes:
        passage: Place of the passage in the caller's list, from 0.
        start: Of the sentence in the passage's text, in characters.
        end: Behind its last character.
        text: What stands there.
        first: Document position of its first token.
        stop: Behind its last token.
    """

    passage: int
    start: int
    end: int
    text: str
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class CachedDocument:
    """What a cache remembers of the passages that were read into it.

    Attributes:
        passage_ids: The caller's ids, None where there was none.
        titles: Titles, None where there was none.
        passage_tokens: Tokens read of each passage.
        shares: Share of the question's attention that each passage got, summing to 1.
        question: The question that the passages were compressed under.
        model: Fingerprint of the model that filled the cache.
        figures: How they were read.
        older_turns: How many of the passages, the last, are older turns of the conversation.
        sentences: Those that are kept whole, for quotes in answers from the cache alone; none where the request that is
            answered brings the passages.
    """

    passage_ids: tuple[str | None, ...] = ()
    titles: tuple[str | None, ...] = ()
    passage_tokens: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    question: str = ""
    model: str = ""
    figures: ReadingFigures = ReadingFigures()
    older_turns: int = 0
    sentences: tuple[CachedSentence, ...] = ()

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, written: str) -> CachedDocument:
        """Reads what `to_json` wrote.

        Args:
            written: A JSON object, from anywhere.

        Raises:
            ValueError: If it is no JSON.
            InputError: If it says something else.
        """
        try:
            return _DOCUMENT("document", parsed(written))
        except Refused as refused:
            raise InputError(str(refused)) from None
        except RecursionError as error:  # a message would have shown it
            raise ValueError("it is nested too deeply") from error


def _record(kind: Callable[..., Any], rules: Mapping[str, Rule], check: Callable[[Any], None] | None = None) -> Rule:
    """A JSON object with certain fields, all of them, as an object of a class.

    Args:
        kind: The class.
        rules: Of each field.
        check: Of the object made.
    """

    def rule(name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            raise Refused(f"{name} is {shown(value)}: it needs {', '.join(rules)}")
        if wrong := sorted(value.keys() ^ rules.keys()):
            raise Refused(f"{name} lacks, or has besides {', '.join(rules)}: {shown(wrong)}")
        made = kind(**{own: rules[own](own, value[own]) for own in rules})
        if check is not None:
            check(made)
        return made

    return rule


def _head(name: str, value: Any) -> tuple[int, int]:
    pair = list_of(_count, "numbers")(name, value)
    if len(pair) != 2:
        raise Refused(f"{name} is {shown(value)}: pass a layer and a head")
    return pair[0], pair[1]


def _check_sentence(sentence: CachedSentence) -> None:
    if sentence.end < sentence.start or sentence.stop <= sentence.first:
        raise Refused(f"the sentence {shown(sentence.text)} ends before it starts")


def _check_document(document: CachedDocument) -> None:
    passages = len(document.passage_tokens)
    for name in ("passage_ids", "titles", "shares"):
        if (found := len(getattr(document, name))) != passages:
            raise Refused(f"{name} are of {found} passages, and passage_tokens of {passages}")
    if document.older_turns > passages:
        raise Refused(f"older_turns is {document.older_turns}: the most is {passages}, the passages")
    for sentence in document.sentences:
        if sentence.passage >= passages:
            raise Refused(f"a sentence is of passage {sentence.passage}, and there are {passages} passages")


_count = whole_number(least=0, most=2**31)
_amount = number(lambda value: value >= 0, "the least is 0")

_FIGURES = _record(
    ReadingFigures,
    {
        **dict.fromkeys(("model", "strategy", "selection"), text),
        "reread": truth,
        "heads": list_of(_head, "heads"),
        **dict.fromkeys(("budget", "chunk_size", "chunk_size_planned", "chunks", "scanned_layers"), _count),
        **dict.fromkeys(("rounds", "known_tokens", "stored_tokens", "searched_tokens"), _count),
        **dict.fromkeys(("prefill_seconds", "store_seconds", "search_seconds"), _amount),
    },
)
_SENTENCE = _record(
    CachedSentence,
    {**dict.fromkeys(("passage", "start", "end", "first", "stop"), _count), "text": text},
    _check_sentence,
)
_DOCUMENT = _record(
    CachedDocument,
    {
        **{name: list_of(or_none(text), "texts") for name in ("passage_ids", "titles")},
        "passage_tokens": list_of(_count, "numbers"),
        "shares": list_of(_amount, "numbers"),
        "question": text,
        "model": text,
        "figures": _FIGURES,
        "older_turns": _count,
        "sentences": list_of(_SENTENCE, "sentences"),
    },
    _check_document,
)
