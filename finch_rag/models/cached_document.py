"""What a cache remembers of the passages that were read into it, for citations and reports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


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
            answered brings the passages, and of caches that an earlier finch-rag saved.
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
    def from_json(cls, text: str) -> CachedDocument:
        """Reads what `to_json` wrote.

        Args:
            text: A JSON object.

        Raises:
            ValueError: If it is no JSON.
            TypeError: If it is another object.
        """
        fields: dict[str, Any] = json.loads(text)
        figures = fields.pop("figures")
        heads = tuple((int(layer), int(head)) for layer, head in figures.pop("heads"))
        sentences = tuple(CachedSentence(**sentence) for sentence in fields.pop("sentences", ()))
        plain: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        return cls(**plain, figures=ReadingFigures(heads=heads, **figures), sentences=sentences)
