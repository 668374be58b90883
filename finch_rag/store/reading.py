"""How a store reads passages: their names by what they say, and their head keys."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..errors import InputError
from ..models.finite import check_finite
from ..prefill.alone import AloneReader, token_groups, tokens_per_pass
from ..prefill.head_keys import quantised
from ..prompts.passages import Passage
from .segments import Keys, joined

Precision = Literal["bfloat16", "int8"]


def hash_of(tokens: Sequence[int]) -> str:
    """What a reading is known by; empty for a passage without tokens.

    Args:
        tokens: Token ids.
    """
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()[:32] if tokens else ""


def read_keys(
    reader: AloneReader,
    passages: Sequence[Sequence[int]],
    precision: Precision,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Keys:
    """Head keys of passages, one after another.

    Args:
        reader: Reads them.
        passages: Token ids of each, at least one.
        precision: Of the keys.
        on_progress: Called after each pass with its tokens; may raise to stop.

    Raises:
        DeviceMemoryError: If the device has no memory for a single passage.
        NumericsError: If the model computes NaN or infinity.
    """
    lengths = [len(tokens) for tokens in passages]
    parts: list[Keys] = []
    for group in token_groups(lengths, tokens_per_pass(reader.device.type)):
        for keys in reader.encode_in_parts(passages[group.start : group.stop]):
            parts.append(Keys(*quantised(keys)) if precision == "int8" else Keys(keys.to(torch.bfloat16), None))
        on_progress(sum(lengths[group.start : group.stop]))
    found = joined(parts)
    for numbers in (found.keys, found.scales):
        if numbers is not None and numbers.is_floating_point():
            check_finite(numbers, "the model's keys of these passages are")
    return found


def check_ids(passages: Sequence[Passage], hashes: Sequence[str]) -> None:
    """Checks that no two passages have one id: the second would take the place of the first.

    Args:
        passages: Of one call.
        hashes: Of each, see `hash_of`.

    Raises:
        InputError: If two with different texts have one id.
    """
    if clash := next(_clashes(passages, hashes), None):
        raise InputError(
            f"passages {clash[0]} and {clash[1]} have the id {passages[clash[0]].id!r} and different texts, and a "
            "store knows a passage by its id: give each its own, or none"
        )


def with_unique_ids(passages: Sequence[Passage], hashes: Sequence[str]) -> list[Passage]:
    """The same without the ids that two of them with different texts have: a store then knows them by their texts.

    Args:
        passages: Of one call.
        hashes: Of each, see `hash_of`.
    """
    shared = {passages[place].id for _, place in _clashes(passages, hashes)}
    return [replace(passage, id=None) if passage.id in shared else passage for passage in passages]


def _clashes(passages: Sequence[Passage], hashes: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of passages that have the id of one before them, and another text."""
    first: dict[str, int] = {}
    for place, (passage, key) in enumerate(zip(passages, hashes, strict=True)):
        if passage.id is not None and key:
            other = first.setdefault(passage.id, place)
            if hashes[other] != key:
                yield other, place
