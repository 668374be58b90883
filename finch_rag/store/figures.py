"""What a store tells about itself and about what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..prompts.passages import Passage


class Added(NamedTuple):
    """What `PassageStore.add` did.

    Attributes:
        hashes: Of the passages' token ids, in their order; empty for passages without text.
        known_tokens: Tokens of passages that had been read before.
        read_tokens: Tokens of passages that were read now.
        read: Hashes of the passages that were read now.
    """

    hashes: list[str]
    known_tokens: int
    read_tokens: int
    read: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a store holds.

    Attributes:
        path: Its folder; None in memory.
        passages: How many passages it has.
        tokens: Tokens of all different passages.
        nbytes: Bytes of their head keys.
        bytes_per_token: Bytes of one token's head keys.
        precision: "bfloat16" or "int8".
        heads: The retrieval heads as (layer, head) pairs.
        model: Fingerprint of the model.
        max_bytes: The most bytes of head keys; None for no limit.
    """

    path: str | None
    passages: int
    tokens: int
    nbytes: int
    bytes_per_token: int
    precision: str
    heads: tuple[tuple[int, int], ...]
    model: str
    max_bytes: int | None


class Retrieved(NamedTuple):
    """A passage that `PassageStore.retrieve` found.

    Attributes:
        passage: As it was added, metadata included.
        share: Part of the attention that the question paid to all passages of the store.
        tokens: Tokens of the passage.
        place: Its place in the store, from 0.
    """

    passage: Passage
    share: float
    tokens: int
    place: int


class Shortlist(NamedTuple):
    """The passages of a store that a question pays most attention to.

    Attributes:
        passages: The best first.
        attention: What it pays to each.
        searched_tokens: Tokens of all passages of the store.
    """

    passages: tuple[Passage, ...]
    attention: tuple[float, ...]
    searched_tokens: int
