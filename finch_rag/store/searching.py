"""What a question pays to the readings of a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import InputError, NumericsError, StoreError
from ..prefill.alone import NEUTRAL, AloneReader, Asked
from ..prefill.head_keys import KeyBlock, attention_on
from ..prompts.builder import PromptBuilder
from .index import Reading
from .segments import Keys
from .storage import Blocks, Storage, part_of


class Search:
    """Looks at readings with a question. Not safe between threads by itself.

    Args:
        reader: Reads questions.
        prompts: Makes token ids of them.
        storage: Has the readings.
        window: Positions of the model.
    """

    def __init__(self, reader: AloneReader, prompts: PromptBuilder, storage: Storage, window: int) -> None:
        self._reader, self._prompts, self._storage, self._window = reader, prompts, storage, window

    def everything(self, question: str) -> tuple[list[Reading], torch.Tensor]:
        """All readings, and what a question pays to each, on the CPU, float32, shape [readings].

        Args:
            question: The question.

        Raises:
            InputError: If the question does not fit behind the longest passage.
            NumericsError: If the model computes NaN.
        """
        return self._attention(question, list(self._storage.blocks(self._reader.device).values()))

    def some(self, question: str, hashes: Sequence[str]) -> torch.Tensor:
        """What a question pays to some readings, as if there were no others.

        Args:
            question: The question.
            hashes: Of the readings; 0 for an empty one.

        Returns:
            On the CPU, float32, shape [hashes].

        Raises:
            InputError: See `everything`.
            NumericsError: See `everything`.
            StoreError: If one of them is not there any more.
        """
        wanted = {key for key in hashes if key}
        chosen = list(_only(self._storage.blocks(self._reader.device), wanted))
        found = {reading.hash for readings, _ in chosen for reading in readings}
        if missing := wanted - found:
            raise StoreError(f"{len(missing)} passages are not in the store any more: add them again")
        readings, attention = self._attention(question, chosen)
        by_hash = dict(zip((reading.hash for reading in readings), attention.tolist(), strict=True))
        return torch.tensor([by_hash[key] if key else 0.0 for key in hashes])

    def _attention(
        self, question: str, blocks: Sequence[tuple[list[Reading], KeyBlock]]
    ) -> tuple[list[Reading], torch.Tensor]:
        readings = [reading for found, _ in blocks for reading in found]
        if not readings:
            return [], torch.zeros(0)
        asked = Asked.by(self._prompts, question)
        longest = max(reading.tokens for reading in readings)
        room = self._window - len(self._reader.prefix) - longest
        if len(asked.tokens) > room:
            raise InputError(
                f"the question has {len(asked.tokens)} tokens, and behind the longest passage the model's window "
                f"has room for {room}: shorten it, or split the passages"
            )
        look = self._reader.look(asked, Asked.by(self._prompts, NEUTRAL), longest)
        attention = attention_on(look, (block for _, block in blocks))
        if attention.isnan().any():
            raise NumericsError("the model's attention is NaN: use dtype float32 or bfloat16, and check its weights")
        return readings, attention


def _only(blocks: Blocks, wanted: set[str]) -> Iterator[tuple[list[Reading], KeyBlock]]:
    """The parts of blocks that hold some readings."""
    for readings, block in blocks.values():
        chosen = [reading for reading in readings if reading.hash in wanted]
        if len(chosen) == len(readings):
            yield readings, block
        elif chosen:
            starts, start = {}, 0
            for reading, length in zip(readings, block.lengths, strict=True):
                starts[reading.hash] = start
                start += length
            here = [Reading(r.hash, r.segment, starts[r.hash], r.tokens) for r in chosen]
            keys = part_of(Keys(block.keys, block.scales), here)
            yield chosen, KeyBlock(keys.keys, keys.scales, [reading.tokens for reading in chosen])
