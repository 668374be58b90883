"""A varlen batch: several sequences of different lengths in one forward pass, without padding and mask.

The sequences are joined along the token dimension. Whatever works on one token at a time (products with the weights,
norms) takes them as one; attention takes each by itself. So the outputs are those of one pass each, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .attention import AppendedLength, Observer, SeenEnough, causal_attention
from .cache import CompressedCache

# A layer's index and a sequence's keys and values there, each [1, kv_heads, tokens, head_dim] -> all that the sequence
# attends to there, its own last.
Extend = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class VarlenSequence:
    """One sequence of a varlen batch.

    Attributes:
        token_ids: Shape [tokens].
        positions: Shape [tokens].
        extend: What it attends to in a layer.
        observer: Is shown its queries and all keys that it attends to.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    extend: Extend
    observer: Observer | None = None

    @classmethod
    def onto(cls, cache: CompressedCache, token_ids: torch.Tensor, observer: Observer | None = None) -> VarlenSequence:
        """A sequence that is appended to a cache of its own.

        Args:
            cache: The cache.
            token_ids: Shape [tokens].
            observer: See `VarlenSequence`.
        """
        start = cache.length
        positions = torch.arange(start, start + len(token_ids), device=token_ids.device)
        return cls(token_ids, positions, lambda layer, key, value: cache.layers[layer].update(key, value), observer)


class VarlenBatch:
    """Attention of sequences that share a forward pass, each by itself.

    Args:
        sequences: The sequences.
    """

    def __init__(self, sequences: Sequence[VarlenSequence]) -> None:
        self._sequences = sequences

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `finch_rag.models.attention.VarlenAttention`.

        Raises:
            SeenEnough: If an observer does; every sequence's keys and values have been taken by then.
        """
        lengths = [len(sequence.token_ids) for sequence in self._sequences]
        queries, new_keys, new_values = (states.split(lengths, dim=2) for states in (query, key, value))
        outputs = []
        enough = False
        for number, sequence in enumerate(self._sequences):
            keys, values = sequence.extend(layer, new_keys[number], new_values[number])
            try:
                if sequence.observer is not None:
                    sequence.observer(layer, queries[number], keys, scaling)
            except SeenEnough:
                enough = True
            else:
                outputs.append(causal_attention(queries[number], keys, values, scaling))
        if enough:
            raise SeenEnough
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class PassingLayer(CacheLayerMixin):
    """Stands in a cache's place and hands keys and values on, to `VarlenBatch`."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to make."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states as they are."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """No key token beside those of the pass (up to transformers 5.2 it is told by the tokens' positions)."""
        return AppendedLength.of(0, query_length), 0

    def get_seq_length(self) -> int:
        """Nothing is kept."""
        return 0

    def get_max_length(self) -> int:
        """No limit, as transformers writes it."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same by the name that it had at first in transformers 5."""
        return self.get_max_length()
