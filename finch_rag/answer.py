"""What a call hands back: the answer, the passages it came from, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .models.kept_cache import KeptCache


@dataclass(frozen=True, slots=True)
class Quote:
    """A sentence of a passage that an answer, or a statement of it, rests on.

    Attributes:
        text: The sentence.
        start: Where it begins in the passage's ``text``, in characters.
        end: Behind its last character there.
        share: Part of the attention that the answer, or the statement, paid to all sentences it was written from.
    """

    text: str
    start: int
    end: int
    share: float


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that a statement of an answer rests on.

    Attributes:
        index: Place of the passage in the caller's list, from 0.
        share: Part of the attention that the statement paid to all sentences that went to this passage's.
        quotes: Its sentences that the statement rests on, in the order of the text; at least one.
    """

    index: int
    share: float
    quotes: tuple[Quote, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence of an answer, and what it rests on.

    Attributes:
        text: The sentence.
        start: Where it begins in the answer's ``text``, in characters.
        end: Behind its last character there.
        sources: The passages that it rests on, by falling share.
    """

    text: str
    start: int
    end: int
    sources: tuple[Source, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        sources = [{**asdict(source), "quotes": [asdict(quote) for quote in source.quotes]} for source in self.sources]
        return {**asdict(self), "sources": sources}


@dataclass(frozen=True, slots=True)
class Citation:
    """How much of the question's attention one passage got.

    Attributes:
        passage_id: The caller's id, None where there was none.
        index: Place of the passage in the caller's list, from 0.
        title: The caller's title, None where there was none.
        share: Part of the attention that the question paid to all passages, weighted with the retriever's order where
            that counts (``prior`` of `finch_rag.Finch`); the shares of all passages sum to 1.
        kept_tokens: Tokens of the passage that are in the cache (the mean over layers for token selection, rounded up).
        passage_tokens: Tokens of the passage that were read.
        quotes: The sentences that the answer rests on, those of all its statements, in the order of the text. Empty
            where the answer rests on none, see `Answer`.
    """

    passage_id: str | None
    index: int
    title: str | None
    share: float
    kept_tokens: int
    passage_tokens: int
    quotes: tuple[Quote, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "quotes": [asdict(quote) for quote in self.quotes]}


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What a call read, kept and cost.

    Attributes:
        model: Name of the model.
        strategy: How passages were ranked: "loop" or "independent", which a store does too; "none" without passages.
        selection: "passage" or "token"; "none" when there were no passages and the model answered without context.
        reread: Whether the best passages are prefilled again where something was evicted.
        heads: The retrieval heads as (layer, head) pairs; empty where all heads were summed.
        budget: Document tokens that may be kept per layer.
        chunk_size: Document tokens read per pass.
        chunk_size_planned: What it was at first; more than ``chunk_size`` where the device's memory ran out.
        passages: Passages read.
        passages_kept: Passages with tokens in the cache.
        prefix_tokens: Tokens of template and instructions before the passages.
        context_tokens: Tokens of all passages.
        kept_tokens: Tokens of passages kept per layer.
        question_tokens: Tokens of the question with its label and the end of the template.
        compression_factor: context_tokens / kept_tokens, 1 when nothing was read.
        compression_ratio: Fraction of the context that was removed, as kvpress counts.
        kv_bytes_full: Bytes that the keys and values of all passages would take.
        kv_bytes_kept: Bytes that the kept ones take.
        chunks: Passes in which the passages were read.
        rounds: How often they were ranked: 2 where the best of the first round were scanned once more.
        prefill_seconds: Seconds spent reading passages; where several questions were read for together, this one's
            part of them. What is re-prefilled in the pass that reads the question counts as decoding, and so may, on an
            accelerator, the end of the last pass before it.
        known_tokens: Tokens of passages that a store had read before; see `finch_rag.PassageStore`.
        stored_tokens: Tokens of passages that the store read for this call.
        store_seconds: Seconds of ``prefill_seconds`` that the store took to read them.
        searched_tokens: Tokens of the whole store, where a call asked all of it; else 0.
        search_seconds: Seconds of ``prefill_seconds`` that the search among head keys took.
        decode_seconds: Seconds spent on the question and the answer, likewise.
        quote_seconds: Seconds spent on finding the sentences that the answer rests on, likewise, after its last token.
        new_tokens: Tokens generated, the end token included.
        stop_reason: "eos", "stop" (a stop string) or "length"; "unsupported" where the answer was withheld for want of
            support; empty before decoding.
        parse_mode: How passages and question were told apart: "apart" when the caller gave them so, else see
            `finch_rag.prompts.parsing`.
        notes: What else was done with the input: passages without text, older turns that did not fit, borders between
            passages that were told by their looks.
    """

    model: str
    strategy: str
    selection: str
    reread: bool
    heads: tuple[tuple[int, int], ...]
    budget: int
    chunk_size: int
    chunk_size_planned: int
    passages: int
    passages_kept: int
    prefix_tokens: int
    context_tokens: int
    kept_tokens: int
    question_tokens: int
    kv_bytes_full: int
    kv_bytes_kept: int
    chunks: int
    prefill_seconds: float
    rounds: int = 1
    known_tokens: int = 0
    stored_tokens: int = 0
    store_seconds: float = 0.0
    searched_tokens: int = 0
    search_seconds: float = 0.0
    decode_seconds: float = 0.0
    quote_seconds: float = 0.0
    new_tokens: int = 0
    stop_reason: str = ""
    parse_mode: str = "apart"
    notes: tuple[str, ...] = ()

    @property
    def compression_factor(self) -> float:
        """How many times smaller the cache is than the context."""
        return self.context_tokens / self.kept_tokens if self.kept_tokens else 1.0

    @property
    def compression_ratio(self) -> float:
        """Fraction of the context that was removed."""
        return 1.0 - 1.0 / self.compression_factor

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **asdict(self),
            "heads": [list(head) for head in self.heads],
            "notes": list(self.notes),
            "compression_factor": self.compression_factor,
            "compression_ratio": self.compression_ratio,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its sources.

    Attributes:
        text: The generated text, stripped.
        citations: Passages with tokens in the cache, by falling share of the question's attention.
        report: What the call read, kept and cost.
        statements: The answer's sentences, each with the sentences of the passages that it rests on. Empty with
            ``quotes=False``; where there are no passages; and where none of their sentences is kept whole, as by token
            selection.
        support: How well the passages support the answer, between 0 and 1; see ``support`` of `finch_rag.Finch`. None
            where it was not asked for, and where there is no sentence that the answer could rest on.
    """

    text: str
    citations: list[Citation]
    report: CompressionReport
    statements: tuple[Statement, ...] = ()
    support: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "text": self.text,
            "citations": [citation.to_dict() for citation in self.citations],
            "statements": [statement.to_dict() for statement in self.statements],
            "support": self.support,
            "report": self.report.to_dict(),
        }


def citations(cache: KeptCache, kept_only: bool = False) -> list[Citation]:
    """The passages that were read into a cache, by falling share of the question's attention; no older turns.

    Args:
        cache: A cache that `finch_rag.runtime.Runtime.read` filled.
        kept_only: Leave out passages of which nothing was kept.
    """
    document = cache.document
    kept = _kept_by_passage(cache)
    own = len(kept) - document.older_turns
    cited = [
        Citation(document.passage_ids[i], i, document.titles[i], document.shares[i], kept[i], length)
        for i, length in enumerate(document.passage_tokens[:own])
        if kept[i] or not kept_only
    ]
    return sorted(cited, key=lambda citation: -citation.share)


def report(cache: KeptCache, question_tokens: int) -> CompressionReport:
    """What reading into a cache took; decoding adds its own figures.

    Args:
        cache: A cache that `finch_rag.runtime.Runtime.read` filled.
        question_tokens: Tokens of the question and the end of the template.
    """
    figures = cache.document.figures
    context = sum(cache.document.passage_tokens)
    return CompressionReport(
        model=figures.model,
        strategy=figures.strategy,
        selection=figures.selection,
        reread=figures.reread,
        heads=figures.heads,
        budget=figures.budget,
        chunk_size=figures.chunk_size,
        chunk_size_planned=figures.chunk_size_planned,
        passages=len(cache.document.passage_tokens),
        passages_kept=sum(map(bool, _kept_by_passage(cache))),
        prefix_tokens=cache.prefix,
        context_tokens=context,
        kept_tokens=cache.kept_tokens,
        question_tokens=question_tokens,
        kv_bytes_full=context * cache.bytes_per_token,
        kv_bytes_kept=cache.kept_tokens * cache.bytes_per_token,
        chunks=figures.chunks,
        prefill_seconds=figures.prefill_seconds,
        rounds=figures.rounds,
        known_tokens=figures.known_tokens,
        stored_tokens=figures.stored_tokens,
        store_seconds=figures.store_seconds,
        searched_tokens=figures.searched_tokens,
        search_seconds=figures.search_seconds,
    )


def _kept_by_passage(cache: KeptCache) -> list[int]:
    """Tokens kept of each passage; where layers differ, their mean, rounded up so that none kept means none."""
    lengths = torch.tensor(cache.document.passage_tokens, dtype=torch.long)
    passage = torch.bucketize(cache.kept, lengths.cumsum(0), right=True)  # [layers or 1, kept]
    counts = torch.bincount(passage.flatten(), minlength=len(lengths))
    return (counts / cache.kept.shape[0]).ceil().long().tolist()
