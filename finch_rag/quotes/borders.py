"""Where sentences stand among tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise

import torch

from ..decode.detokenising import TextStream
from ..models.cached_document import CachedSentence
from ..prompts.builder import PromptBuilder, text_to_read
from ..prompts.passages import Passage
from ..prompts.sentences import sentence_spans

Decode = Callable[[Sequence[int]], str]


def kept_sentences(
    prompts: PromptBuilder, passages: Sequence[Passage], encoded: Sequence[Sequence[int]], kept: torch.Tensor
) -> tuple[CachedSentence, ...]:
    """The sentences of passages of which a cache keeps every token.

    Args:
        prompts: Has encoded the passages.
        passages: What was read; of those that are left out at the end, and of those without text, none is told.
        encoded: Token ids of each, those of further passages behind them.
        kept: See `finch_rag.models.kept_cache.KeptCache`.

    Returns:
        In the order of the passages; none where layers keep different tokens.
    """
    if not kept.numel() or not bool((kept == kept[:1]).all()):
        return ()
    places = set(kept[0].tolist())
    starts = [0, *accumulate(map(len, encoded))]
    of_passages = torch.bucketize(kept[0], torch.tensor(starts[1:]), right=True).unique().tolist()
    read = [number for number in of_passages if number < len(passages) and passages[number].text.strip()]
    found = []
    firsts = first_characters(prompts, [text_to_read(passages[n]) for n in read], [encoded[n] for n in read])
    for number, characters in zip(read, firsts, strict=True):
        text = passages[number].text
        before = len(passages[number].titled_text) - len(text)
        for start, end in sentence_spans(text):
            first, stop = (bisect_left(characters, before + border) for border in (start, end))
            tokens = range(starts[number] + first, starts[number] + stop)
            if tokens and places.issuperset(tokens):
                found.append(CachedSentence(number, start, end, text[start:end], tokens.start, tokens.stop))
    return tuple(found)


def first_characters(
    prompts: PromptBuilder, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Where the first character of each token stands, its leading white space left out.

    Args:
        prompts: Has encoded the texts.
        texts: The texts.
        encoded: Token ids of each.

    Returns:
        One sequence a text, none of which falls; empty where it cannot be told.
    """
    told = prompts.encode_with_starts(texts) if texts else []
    found: list[Sequence[int]] = []
    for number, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
        if told is not None and told[number][0] == list(tokens):
            starts = told[number][1]
        else:
            starts = starts_by_decoding(prompts.decode, text, tokens)
        found.append(without_white_space(text, starts))
    return found


def starts_by_decoding(decode: Decode, text: str, tokens: Sequence[int]) -> list[int]:
    """Where each token begins in a text, told by the text that tokens decode to, for tokenizers that do not tell.

    Args:
        decode: Token ids -> text.
        text: What the tokens stand for. It may be cut off, and stripped.
        tokens: Token ids.

    Returns:
        One a token; empty where the tokens stand for another text.
    """
    stream = TextStream(decode)
    starts, decoded = [], ""
    for token in tokens:
        starts.append(len(decoded))
        decoded += stream.push(token)
    decoded += stream.flush()
    if not decoded.lstrip().startswith(text.strip()):
        return []
    shift = (len(text) - len(text.lstrip())) - (len(decoded) - len(decoded.lstrip()))
    return [max(0, start + shift) for start in starts]


def without_white_space(text: str, starts: Sequence[int]) -> list[int]:
    """Starts that are moved behind white space, where more than it is in the token."""
    moved = []
    for start, following in pairwise(chain(starts, [len(text)])):
        first = start
        while first < following and first < len(text) and text[first].isspace():
            first += 1
        moved.append(first if first < following else start)
    return list(accumulate(moved, max))  # a normaliser may have moved marks
