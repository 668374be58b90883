"""From an answer that is written to the sentences that it rests on: its tokens are read once more, and watched.

The decoding steps stay as they are. The cache is cropped to what stood before the answer, and one pass of the answer's
tokens goes up to the last head that is watched: it costs about as much as one step. Of models' own caches some cannot
be cropped, or not be gone on from by several tokens: then all that the answer was written from is read again.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..answer import Answer, Citation, Quote, Source, Statement
from ..answering import Written
from ..errors import DeviceMemoryError
from ..models.cache import CompressedCache
from ..models.cached_document import CachedSentence
from ..models.finite import check_finite
from ..models.forward import forward, forward_own, forward_own_onto, forward_varlen, memory_guard, on_device
from ..models.inspection import input_embedding
from ..models.kept_cache import KeptCache
from ..models.own_cache import OwnCache
from ..models.varlen import VarlenSequence
from ..prefill.planning import RetrievalHeads
from ..prompts.sentences import sentence_spans
from ..request import Request
from ..runtime import Runtime
from .attention import LEAD, AnswerObserver, watched_heads
from .borders import kept_sentences, starts_by_decoding, without_white_space
from .choosing import choose, shares_of, sharpness

_ROWS = 512  # tokens of an answer in one pass

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Watched:
    """An answer's statements, and the sentences that they may rest on.

    Attributes:
        written: The answer.
        sentences: Of the passages.
        spans: Of the statements in the answer's text.
        statement_of: The statement of each token up to the text's end, the number of statements for none.
    """

    written: Written
    sentences: Sequence[CachedSentence]
    spans: Sequence[tuple[int, int]]
    statement_of: Sequence[int]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each statement, shape [statements]."""
        return torch.tensor(self.statement_of).bincount(minlength=len(self.spans) + 1)[:-1]

    @property
    def rows(self) -> int:
        """Tokens that are looked at."""
        return len(self.statement_of)

    @property
    def prompt(self) -> list[int]:
        """What is read before the answer and behind the passages."""
        return self.written.request.answer_prompt

    def tokens(self) -> list[int]:
        """What the rows of the attention are the rows of: the answer, `LEAD` tokens earlier."""
        both = [*self.prompt, *self.written.token_ids[: self.rows]]
        return both[len(self.prompt) - LEAD : len(both) - LEAD]

    def sentence_of(self) -> torch.Tensor:
        """The sentence of each token of prefix and kept passages, the number of sentences for none."""
        cache = self.written.cache
        places = {place: column for column, place in enumerate(cache.kept[0].tolist(), start=cache.prefix)}
        owner = torch.full((cache.prefix + cache.kept_tokens,), len(self.sentences), dtype=torch.long)
        for number, sentence in enumerate(self.sentences):
            owner[[places[place] for place in range(sentence.first, sentence.stop)]] = number
        return owner


def sentences_to_quote(runtime: Runtime, request: Request, cache: KeptCache) -> tuple[CachedSentence, ...]:
    """The sentences of a request's passages that a cache keeps whole.

    Args:
        runtime: Has read them.
        request: What was asked.
        cache: Has them; what it remembers is taken where the request has no passages.
    """
    if not (request.quotes or request.support):
        return ()
    if not request.passages:
        return cache.document.sentences
    own = request.passages[: len(request.passages) - request.older_turns]
    return kept_sentences(runtime.prompts, own, request.prompt.passages, cache.kept)


class Quoting(NamedTuple):
    """An answer that was looked at.

    Attributes:
        answer: With what it rests on, if that was asked for.
        sharpness: How sharply its tokens look at one sentence, see `finch_rag.quotes.choosing.sharpness`; None where
            there is none to look at.
    """

    answer: Answer
    sharpness: float | None = None


@torch.inference_mode()
def with_quotes(runtime: Runtime, written: Sequence[Written]) -> list[Quoting]:
    """Answers with their statements, and the sentences that these rest on.

    Args:
        runtime: Has written them.
        written: The answers, written side by side or one alone.

    Returns:
        In their order; one stays as it is where nothing can be quoted.
    """
    start = time.perf_counter()
    answers = [Quoting(each.answer) for each in written]
    watched: dict[int, _Watched] = {}
    for number, each in enumerate(written):
        if (each.request.quotes or each.request.support) and (own := _watched(runtime, each)) is not None:
            watched[number] = own
    if not watched:
        return answers
    try:
        with memory_guard(runtime.model, f"the sentences that {len(watched)} answers rest on"):
            attention = _attention(runtime, list(watched.values()))
    except DeviceMemoryError as error:  # the answers are there
        _log.warning("no quotes: %s", error)
        return [Quoting(noted(each.answer, "the device had no memory left to look for quotes")) for each in answers]
    for (number, own), paid in zip(watched.items(), attention, strict=True):
        check_finite(paid, "the model's attention is")
        answer = _quoting(own, paid) if own.written.request.quotes else own.written.answer
        answers[number] = Quoting(answer, sharpness(paid, own.lengths))
    seconds = (time.perf_counter() - start) / len(written)
    return [each._replace(answer=took(each.answer, seconds)) for each in answers]


def took(answer: Answer, seconds: float) -> Answer:
    """The same with seconds added to what looking at it took."""
    return replace(answer, report=replace(answer.report, quote_seconds=answer.report.quote_seconds + seconds))


def noted(answer: Answer, note: str) -> Answer:
    """The same with a note in its report."""
    return replace(answer, report=replace(answer.report, notes=(*answer.report.notes, note)))


def _watched(runtime: Runtime, written: Written) -> _Watched | None:
    """What is looked at of an answer; None where it says nothing, or there is nothing to quote."""
    text = written.answer.text
    spans = sentence_spans(text)
    sentences = sentences_to_quote(runtime, written.request, written.cache) if spans else ()
    if not sentences:
        return None
    starts = starts_by_decoding(runtime.prompts.decode, text, written.token_ids)
    firsts = [first for first in without_white_space(text, starts) if first < len(text)]
    numbers = [bisect_right(spans, first, key=lambda span: span[0]) - 1 for first in firsts]
    none = len(spans)
    owners = [n if n >= 0 and first < spans[n][1] else none for n, first in zip(numbers, firsts, strict=True)]
    return _Watched(written, sentences, spans, owners) if owners else None


def _attention(runtime: Runtime, watched: Sequence[_Watched]) -> list[torch.Tensor]:
    """What the statements of each answer pay to its sentences, the mean over their tokens.

    Returns:
        Each on the CPU, float32, shape [heads, statements, sentences].
    """
    heads = watched_heads(runtime.model)
    caches = [own.written.cache for own in watched]
    joinable = [cache for cache in caches if isinstance(cache, CompressedCache)]
    if len(watched) > 1 and len(joinable) == len(watched) and max(own.rows for own in watched) <= _ROWS:
        observers = [_observer(own, own.statement_of, heads) for own in watched]
        sequences = []
        for own, cache, observer in zip(watched, joinable, observers, strict=True):
            cache.crop_to(own.written.before - LEAD)
            tokens = on_device(own.tokens(), input_embedding(runtime.model).device)
            sequences.append(VarlenSequence.onto(cache, tokens, observer))
        forward_varlen(runtime.model, sequences)
        sums = [observer.sums() for observer in observers]
    else:
        sums = [_one(runtime, own, heads) for own in watched]
    return [paid / own.lengths.clamp(min=1)[:, None] for paid, own in zip(sums, watched, strict=True)]


def _one(runtime: Runtime, own: _Watched, heads: RetrievalHeads) -> torch.Tensor:
    """The same for one answer, summed over tokens."""
    cache, before = own.written.cache, own.written.before - LEAD
    if isinstance(cache, OwnCache) and (runtime.prompt_chunk_size is None or not cache.crop_to(before)):
        observer = _observer(own, own.statement_of, heads)
        request = own.written.request
        document = [token for passage in request.prompt.passages for token in passage]
        kept = [document[place] for place in cache.kept[0].tolist()]
        everything = [*request.prompt.prefix, *kept, *own.prompt[: len(own.prompt) - LEAD], *own.tokens()]
        forward_own(runtime.model, torch.tensor([everything]), observer)
        return observer.sums()
    parts = []
    if isinstance(cache, CompressedCache):
        cache.crop_to(before)
    tokens_in_parts = on_device(own.tokens(), input_embedding(runtime.model).device).split(_ROWS)
    for number, tokens in enumerate(tokens_in_parts):
        first = number * _ROWS
        observer = _observer(own, own.statement_of[first : first + len(tokens)], heads)
        if isinstance(cache, CompressedCache):
            forward(runtime.model, tokens, cache, observer)
        else:
            forward_own_onto(runtime.model, tokens, cache, observer)
        parts.append(observer.sums())
    return torch.stack(parts).sum(0)


def _observer(own: _Watched, statement_of: Sequence[int], heads: RetrievalHeads) -> AnswerObserver:
    return AnswerObserver(
        statement_of=torch.tensor(statement_of),
        statements=len(own.spans),
        sentence_of=own.sentence_of(),
        sentences=len(own.sentences),
        heads=heads,
    )


def _quoting(own: _Watched, attention: torch.Tensor) -> Answer:
    """An answer with what its statements rest on.

    Args:
        own: The answer.
        attention: See `_attention`.
    """
    answer, sentences = own.written.answer, own.sentences
    chosen = choose(attention)
    statements = tuple(
        Statement(answer.text[start:end], start, end, _sources(sentences, each.quotes, shares_of(each.attention)))
        for (start, end), each in zip(own.spans, chosen, strict=True)
    )
    quoted = sorted({number for each in chosen for number in each.quotes})
    of_statements = torch.stack([each.attention for each in chosen])
    by_passage = _by_passage(sentences, quoted, shares_of(own.lengths.float() @ of_statements))
    return replace(answer, citations=_with(answer.citations, by_passage), statements=statements)


def _sources(sentences: Sequence[CachedSentence], quoted: Sequence[int], shares: Sequence[float]) -> tuple[Source, ...]:
    """The passages of a statement's quotes, the one that gets most first."""
    paid: dict[int, float] = {}
    for sentence, share in zip(sentences, shares, strict=True):
        paid[sentence.passage] = paid.get(sentence.passage, 0.0) + share
    found = [Source(index, paid[index], own) for index, own in _by_passage(sentences, quoted, shares).items()]
    return tuple(sorted(found, key=lambda source: -source.share))


def _by_passage(
    sentences: Sequence[CachedSentence], quoted: Iterable[int], shares: Sequence[float]
) -> dict[int, tuple[Quote, ...]]:
    """Quotes of each passage, in the order of its text."""
    found: dict[int, tuple[Quote, ...]] = {}
    for number in quoted:
        sentence = sentences[number]
        quote = Quote(sentence.text, sentence.start, sentence.end, shares[number])
        found[sentence.passage] = (*found.get(sentence.passage, ()), quote)
    return found


def _with(citations: Sequence[Citation], quotes: Mapping[int, tuple[Quote, ...]]) -> list[Citation]:
    return [replace(citation, quotes=quotes.get(citation.index, ())) for citation in citations]
