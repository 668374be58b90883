"""Passages and questions read alone by a model's own attention and cache: hybrids, sliding windows, sinks, soft caps.

Passages are a batch that is padded on the right: attention, and layers of other kinds, look back only, so what stands
behind a passage changes nothing in it. `finch_rag.prefill.alone` says what is read and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..models.attention import SeenEnough
from ..models.forward import forward_own
from ..models.inspection import text_config
from ..models.own_attention import GlobalLayer, global_layers, runs_own_attention
from .alone import AloneReader, LookObserver, Reading
from .planning import RetrievalHeads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ROUND = 16  # tokens; libraries compile something for every length that they meet, and keep it


def reader_of(model: PreTrainedModel, prefix: Sequence[int], heads: RetrievalHeads) -> AloneReader:
    """What reads passages alone with a model, by Finch's attention or by its own.

    Args:
        model: One of either.
        prefix: Token ids.
        heads: Retrieval heads by layer.
    """
    own = runs_own_attention(model)
    return OwnReader(model, prefix, heads) if own else AloneReader(model, prefix, heads)


def layers_that_look(model: PreTrainedModel) -> Mapping[int, int]:
    """Query heads of each layer in which a question can look at passages.

    Args:
        model: One that runs Finch's attention, or its own.
    """
    if runs_own_attention(model):
        return {layer: shape.heads for layer, shape in global_layers(model).items()}
    return dict.fromkeys(range(int(text_config(model).num_hidden_layers)), int(text_config(model).num_attention_heads))


class OwnReader(AloneReader):
    """Reads passages and questions alone, each behind the same prefix, by the model's own attention.

    Args:
        model: See `finch_rag.models.own_attention`.
        prefix: Token ids.
        heads: Retrieval heads by layer, in layers with attention over everything.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], heads: RetrievalHeads) -> None:
        looking = global_layers(model)
        self._shape: GlobalLayer = next(iter(looking.values()))
        if wrong := sorted((layer, head) for layer in heads for head in heads[layer] if layer not in looking):
            raise InputError(
                f"layer {wrong[0][0]} of {type(model).__name__} has no attention over everything, so its heads rank "
                f"nothing: use heads of the layers {', '.join(map(str, looking))}"
            )
        super().__init__(model, prefix, heads)

    def _sizes(self) -> tuple[int, int]:
        return self._shape.heads // self._shape.kv_heads, self._shape.head_dim

    @torch.inference_mode()
    def encode(self, passages: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `AloneReader.encode`."""
        lengths, start = [len(passage) for passage in passages], len(self.prefix)
        longest = -(-max(lengths) // _ROUND) * _ROUND
        tokens = torch.tensor([[*self.prefix, *passage, *[0] * (longest - len(passage))] for passage in passages])
        keys: dict[tuple[int, int], torch.Tensor] = {}

        def take_keys(
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            scaling: float,
            softcap: float | None = None,
            sinks: torch.Tensor | None = None,
        ) -> None:
            for group in self.groups:
                if group[0] == layer:
                    of_passages = [key[row, group[1], start : start + length] for row, length in enumerate(lengths)]
                    keys[group] = torch.cat(of_passages).to(self.device)
            if layer == self._last:
                raise SeenEnough

        forward_own(self.model, tokens, take_keys)
        return torch.stack([keys[group] for group in self.groups])

    def _read(self, readings: Sequence[Reading], observers: Sequence[LookObserver]) -> None:
        start = len(self.prefix)
        for reading, observer in zip(readings, observers, strict=True):
            own = range(reading.position, reading.position + len(reading.asked.tokens))
            tokens = torch.tensor([[*self.prefix, *reading.asked.tokens]])
            forward_own(self.model, tokens, observer, torch.tensor([[*range(start), *own]]))
