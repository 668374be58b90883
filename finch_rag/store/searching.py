"""What a question pays to the readings of a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from ..errors import InputError, StoreError
from ..models.finite import check_finite
from ..models.forward import memory_guard
from ..prefill.alone import NEUTRAL, AloneReader, Asked
from ..prefill.head_keys import KeyBlock, attention_on
from ..prompts.builder import PromptBuilder
from .index import Reading
from .storage import Blocks, Storage


class Found(NamedTuple):
    """What a question found in a store.

    Attributes:
        readings: All of the store.
        attention: That the question pays to each, on the CPU, float32, shape [readings].
    """

    readings: Sequence[Reading]
    attention: torch.Tensor


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

    def everything(self, questions: Sequence[str]) -> list[Found]:
        """What questions pay to all readings; the questions are read side by side.

        Args:
            questions: The questions.

        Raises:
            InputError: If a question does not fit behind the longest passage, or the process was forked since.
            NumericsError: If the model computes NaN or infinity.
            StoreError: If head keys cannot be read, or are NaN.
            DeviceMemoryError: If the device has no memory for it.
        """
        with self._guard(len(questions)):
            blocks = list(self._storage.blocks(self._reader.device).values())
            readings, looked_at = [reading for found, _ in blocks for reading in found], [block for _, block in blocks]
            paid = self._attention([(question, readings, looked_at) for question in questions])
            return [Found(readings, attention) for attention in paid]

    def _guard(self, questions: int) -> AbstractContextManager[None]:
        return memory_guard(self._reader.model, f"{questions} questions to a store")

    def some(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[torch.Tensor]:
        """What questions pay to some readings each, as if there were no others.

        Args:
            asked: Questions, each with the hashes of its readings; 0 for an empty one.

        Returns:
            For each on the CPU, float32, shape [hashes].

        Raises:
            InputError: See `everything`.
            NumericsError: See `everything`.
            DeviceMemoryError: See `everything`.
            StoreError: If one of them is not there any more.
        """
        with self._guard(len(asked)):
            return self._some(asked)

    def _some(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[torch.Tensor]:
        blocks = self._storage.blocks(self._reader.device)
        looks = []
        for question, hashes in asked:
            wanted = {key for key in hashes if key}
            chosen = list(_only(blocks, wanted))
            readings = [reading for found, _ in chosen for reading in found]
            if missing := wanted - {reading.hash for reading in readings}:
                raise StoreError(f"{len(missing)} passages are not in the store any more: add them again")
            looks.append((question, readings, [block for _, block in chosen]))
        paid = []
        for (_, hashes), (_, readings, _), attention in zip(asked, looks, self._attention(looks), strict=True):
            by_hash = dict(zip((reading.hash for reading in readings), attention.tolist(), strict=True))
            paid.append(torch.tensor([by_hash[key] if key else 0.0 for key in hashes]))
        return paid

    def _attention(self, asked: Sequence[tuple[str, Sequence[Reading], Sequence[KeyBlock]]]) -> list[torch.Tensor]:
        """What questions pay to their readings, all of whose blocks each looks at."""
        longest = [max((reading.tokens for reading in readings), default=0) for _, readings, _ in asked]
        questions = [Asked.by(self._prompts, question) for question, _, _ in asked]
        for question, behind in zip(questions, longest, strict=True):
            if len(question.tokens) > (room := self._window - len(self._reader.prefix) - behind):
                raise InputError(
                    f"the question has {len(question.tokens)} tokens, and behind the longest passage the model's "
                    f"window has room for {room}: shorten it, or split the passages"
                )
        looking = [number for number, tokens in enumerate(longest) if tokens]
        attention = [torch.zeros(0)] * len(asked)
        if not looking:
            return attention
        looks = self._reader.look_together(
            [questions[number] for number in looking],
            Asked.by(self._prompts, NEUTRAL),
            [longest[number] for number in looking],
        )
        for number, look in zip(looking, looks, strict=True):
            attention[number] = attention_on(look, asked[number][2])
            if not attention[number].isfinite().all():
                self._storage.check_numbers()
            check_finite(attention[number], "the model's attention is")
        return attention


def _only(blocks: Blocks, wanted: set[str]) -> Iterator[tuple[list[Reading], KeyBlock]]:
    """The parts of blocks that hold some readings."""
    for readings, block in blocks.values():
        if places := [place for place, reading in enumerate(readings) if reading.hash in wanted]:
            yield [readings[place] for place in places], block.of(places)
