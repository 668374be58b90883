"""A decoding step in buffers of fixed size, captured as a CUDA graph where there is a GPU.

A step of one token launches some hundred small kernels, and launching them takes the CPU several times as long as
running them takes the GPU. Their shapes never change, so the launches are captured once and replayed. What does change
lives in tensors: the token, its position, and keys and values in static buffers, of which a mask hides what is not
filled yet. A step may serve several answers at once, each at a position of its own. What is captured is the model's own
forward, or for a model that `finch_rag.decode.fused_step` knows its fewer kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..models.cache import CompressedCache
from ..models.inspection import input_embedding
from ..models.kept_cache import KeptCache
from .fused_step import FusedStep
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StaticLayer(CacheLayerMixin):
    """One layer's keys and values; a step writes at a position that a tensor holds.

    Args:
        keys: Buffer, shape [answers, kv_heads, capacity, head_dim].
        values: Buffer of the same shape, up to its head_dim.
        position: Where each answer's next token goes, shape [answers].
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._position = position
        self._answers = torch.arange(keys.shape[0], device=keys.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a token of each answer, shape [answers, kv_heads, 1, head_dim]; returns the whole buffers."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("a static layer lost its buffers")
        keys[self._answers, :, self._position] = key_states[:, :, 0]
        values[self._answers, :, self._position] = value_states[:, :, 0]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All of the buffer: the mask hides what is not filled."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Not known outside the device."""
        return 0

    def get_max_length(self) -> int:
        """The capacity."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The capacity, by the name that it had at first in transformers 5."""
        return self.get_max_length()


class StaticStep(Step):
    """Decodes token by token in static buffers.

    Args:
        model: A model on one device that runs Finch's attention.
        like: A cache of the model, for the shapes.
        answers: Answers that a step serves.
        capacity: Tokens that the buffers hold for each.
        fused: Whether to run it by `FusedStep`.

    Attributes:
        buffers: Keys and values of each layer, shape [answers, kv_heads, capacity, head_dim].
    """

    def __init__(
        self, model: PreTrainedModel, like: CompressedCache, answers: int, capacity: int, fused: bool = False
    ) -> None:
        device = input_embedding(model).device
        super().__init__(answers, capacity, device)
        self._model = model
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in like.layers:
            if layer.keys is None or layer.values is None:
                raise RuntimeError("the cache is empty")
            # Zeros, because a weight of 0 does not hide a NaN in what is masked.
            keys, values = (b.new_zeros(answers, b.shape[1], capacity, b.shape[3]) for b in (layer.keys, layer.values))
            self.buffers.append((keys, values))
        self._cache = Cache(layers=[StaticLayer(keys, values, self._position) for keys, values in self.buffers])
        self._fused = FusedStep(model, answers) if fused else None
        self._capture(device)

    @torch.inference_mode()
    def load(self, caches: Sequence[KeptCache]) -> None:
        """See `Step.load`."""
        for answer, cache in enumerate(caches):
            self.load_one(answer, cache)

    @torch.inference_mode()
    def load_one(self, answer: int, cache: KeptCache) -> None:
        """Goes on from a cache, which is copied, in one answer's place; the others stay as they are.

        Args:
            answer: Its number.
            cache: Of at most ``capacity`` tokens.
        """
        layers: list[Any] = list(cache.layers)
        self._fill(answer, [(layer.keys, layer.values) for layer in layers], cache.length)

    @torch.inference_mode()
    def move_in(self, answer: int, other: StaticStep, its: int) -> None:
        """Goes on with an answer of another step of the same model.

        Args:
            answer: Its number here.
            other: Where it was.
            its: Its number there.
        """
        own = slice(its, its + 1)
        self._fill(answer, [(keys[own], values[own]) for keys, values in other.buffers], int(other._position[its]))

    @torch.inference_mode()
    def clear(self, answer: int) -> None:
        """Leaves an answer's place empty; what a step computes there means nothing.

        Args:
            answer: Its number.
        """
        self._position[answer], self._moves[answer] = 0, 0

    def _fill(self, answer: int, states: Sequence[tuple[torch.Tensor | None, ...]], length: int) -> None:
        """Copies keys and values of each layer, [1, kv_heads, at least length, head_dim]."""
        for buffers, pair in zip(self.buffers, states, strict=True):
            for buffer, own in zip(buffers, pair, strict=True):
                if own is not None:
                    buffer[answer, :, :length].copy_(own[0, :, :length])
                buffer[answer, :, length:].zero_()  # an answer that failed may have left NaN
        self._position[answer], self._moves[answer] = length, 1

    def _forward(self) -> torch.Tensor:
        if self._fused is not None:
            return self._fused(self._tokens, self._position, self.buffers)
        hidden = (self._places > self._position[:, None])[:, None, None]  # [answers, 1, 1, capacity]
        # Added to the products: of a mask of truth values SDPA would make this in every layer.
        mask = torch.zeros_like(hidden, dtype=self._model.dtype).masked_fill_(hidden, float("-inf"))
        output = self._model(
            input_ids=self._tokens,
            attention_mask=mask,
            position_ids=self._position[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
