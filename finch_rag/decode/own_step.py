"""A decoding step on a model's own cache in buffers of fixed size, so that it can be a CUDA graph.

`finch_rag.decode.static_step` says why. Here keys and values of layers with a sliding window stand in a buffer as long
as the others', at their own positions, and a mask of their kind hides what is too far back; the states of linear
attention have a fixed size by themselves. What else a model's cache may hold is not run here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..models.forward import own_positions
from ..models.inspection import input_embedding, text_config, tokens_seen_by_local_layers
from ..models.kept_cache import KeptCache
from ..models.own_cache import new_cache
from .static_step import StaticLayer
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 6  # tokens on which a step is compared with a plain one
_ROUNDING = 0.03  # of the largest logit; what is wrong is off by its size
# States of linear attention; nothing, of layers without attention or with another's keys. Not in all releases of
# transformers 5, hence by name.
_AS_THEY_ARE = ("LinearAttentionLayer", "DummyLayer")
_STATES = ("conv_states", "recurrent_states")


class OwnStep(Step):
    """Decodes an answer token by token in static buffers, by the model's own attention.

    Args:
        model: A model on one device that runs its own attention.
        like: A cache of the model that has been read into, for the shapes.
        capacity: Tokens that the buffers hold.

    Raises:
        RuntimeError: If the cache has layers of other kinds, or the step computes something else than the model.
    """

    def __init__(self, model: PreTrainedModel, like: KeptCache, capacity: int) -> None:
        device = input_embedding(model).device
        super().__init__(1, capacity, device)
        self._model = model
        self._seen = tokens_seen_by_local_layers(text_config(model))
        self._layers = [self._static(layer) for layer in like.layers]
        self._cache = Cache(layers=self._layers)
        try:
            self._check()
        except RuntimeError:
            raise
        except Exception as error:  # a model that takes no such mask: whatever it trips over
            raise RuntimeError(f"it does not run in static buffers ({type(error).__name__}: {error})") from error
        self._capture(device)

    @torch.inference_mode()
    def load(self, caches: Sequence[KeptCache]) -> None:
        """See `Step.load`; one cache."""
        (cache,) = caches
        layers: list[Any] = list(cache.layers)
        for static, layer in zip(self._layers, layers, strict=True):
            if isinstance(static, StaticLayer):
                for buffer, states in ((static.keys, layer.keys), (static.values, layer.values)):
                    if buffer is not None:
                        buffer.zero_()  # a weight of 0 does not hide a NaN in what is masked
                        # Of a sliding window the last ones are there.
                        buffer[:, :, cache.length - states.shape[2] : cache.length].copy_(states)
            else:
                for own, states in zip(_states(static), _states(layer), strict=True):
                    own.copy_(states)
        self._position.fill_(cache.length)

    def _static(self, layer: Any) -> Any:
        """A layer of fixed size for one that grows; states of linear attention have it."""
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.keys is not None:
            keys, values = (
                states.new_zeros(1, states.shape[1], self.capacity, states.shape[3])
                for states in (layer.keys, layer.values)
            )
            return StaticLayer(keys, values, self._position)
        if type(layer).__name__ in _AS_THEY_ARE:
            return copy.deepcopy(layer)
        raise RuntimeError(f"its cache has a {type(layer).__name__}")

    def _forward(self) -> torch.Tensor:
        output = self._model(
            input_ids=self._tokens,
            attention_mask=self._masks(),
            position_ids=self._position[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _masks(self) -> torch.Tensor | Mapping[str, torch.Tensor | None]:
        """What is added to the products: by kind of layer where some see a part."""
        future = self._places > self._position
        everything = self._mask(future)
        if self._seen is None:
            return everything
        part = self._mask(future | (self._places <= self._position - self._seen))
        return {"full_attention": everything, "sliding_attention": part, "linear_attention": None, "conv": None}

    def _mask(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 1, 1, self.capacity, dtype=self._model.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))

    @torch.inference_mode()
    def _check(self) -> None:
        """Raises where the step computes something else than a pass of the model on its own cache."""
        device = input_embedding(self._model).device
        probe = torch.arange(1, _PROBE + 1, device=device)[None] % int(text_config(self._model).vocab_size)
        cache = new_cache(self._model, _PROBE)
        for part in probe.split([_PROBE - 1, 1], dim=1):
            if part.shape[1] == 1:
                self.load([cache])
            positions = own_positions(self._model, cache, part.shape[1])
            output = self._model(input_ids=part, past_key_values=cache, use_cache=True, **positions)
        expected = output.logits[:, -1].float()
        found = self([int(probe[0, -1])])
        if not (found - expected).abs().max() <= _ROUNDING * expected.abs().max():
            raise RuntimeError("in static buffers it computes something else")


def _states(layer: Any) -> Iterator[torch.Tensor]:
    """The states of a layer of linear attention."""
    for name in _STATES:
        states = getattr(layer, name, None)
        several = states.values() if isinstance(states, Mapping) else states
        for each in [states] if isinstance(states, torch.Tensor) else several or ():
            if isinstance(each, torch.Tensor):
                yield each
