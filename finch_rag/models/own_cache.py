"""A model's own cache, for models whose keys Finch cannot move: it only grows, and every layer has what it needs.

Layers with a sliding window keep their window, linear attention keeps its states; transformers chooses their kinds by
the model's configuration. A model whose file has a cache class gets one of that class (MiniMax).
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError
from .cache import CompressedCache
from .forward import own_positions
from .inspection import input_embedding, text_config
from .kept_cache import KeptCache
from .own_attention import runs_own_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GROWS = (DynamicLayer, DynamicSlidingWindowLayer)
_PROMPT, _STEPS = 4, 4  # tokens that a model is checked on
_ROUNDING, _ROUNDING_OF_STEPS = 0.1, 0.3  # of the largest logit; what is wrong is off by its size


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits after each of some tokens by one pass, for `check_steps`; float32, shape [tokens, vocabulary].

    Args:
        model: The model.

    Raises:
        ModelError: If it does not run.
    """
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=_probe(model), use_cache=False).logits[0].float()
    except Exception as error:  # whatever a model trips over
        raise ModelError(f"{type(model).__name__} does not run ({type(error).__name__}: {error})") from error
    return logits


def check_steps(model: PreTrainedModel, expected: torch.Tensor) -> None:
    """Checks that a model goes on from the cache that it will have as it computes without one, and looks back only.

    Of a prompt, and of the steps behind it, the token that is nearest counts: what is wrong is wrong for all, while an
    expert that is chosen otherwise for rounding is so for some.

    Args:
        model: One that runs Finch's attention, or its own.
        expected: What `probe_logits` said.

    Raises:
        ModelError: If it does not.
    """
    name, tokens = type(model).__name__, _probe(model)
    cache = new_cache(model, tokens.shape[1])
    found = []
    try:
        with torch.inference_mode():
            for part in tokens.split([_PROMPT, *[1] * _STEPS], dim=1):
                own = own_positions(model, cache, part.shape[1]) if isinstance(cache, OwnCache) else {}
                found.append(model(input_ids=part, past_key_values=cache, use_cache=True, **own).logits[0].float())
    except Exception as error:  # a cache of another class, states that cannot be gone on from: whatever it trips over
        raise ModelError(f"{name} does not go on from transformers' cache ({error}): use another model") from error
    off = (torch.cat(found) - expected).abs().amax(1) / expected.abs().amax(1)
    if not (off[:_PROMPT].min() <= _ROUNDING and off[_PROMPT:].min() <= _ROUNDING_OF_STEPS):
        raise ModelError(f"{name} does not compute the same in several steps as in one: use another model")


def goes_on_in_chunks(model: PreTrainedModel, expected: torch.Tensor) -> bool:
    """Whether a model reads several tokens at once behind its own cache as it does in one pass; some hybrids do not.

    Here every token counts: where it is in doubt, one pass is right.

    Args:
        model: One that runs its own attention, and has passed `check_steps`.
        expected: What `probe_logits` said.
    """
    tokens = _probe(model)
    cache, found = new_cache(model, tokens.shape[1]), []
    with torch.inference_mode():
        for part in tokens.split(_PROMPT, dim=1):
            own = own_positions(model, cache, part.shape[1])
            found.append(model(input_ids=part, past_key_values=cache, use_cache=True, **own).logits[0].float())
    off = (torch.cat(found) - expected).abs().amax(1) / expected.abs().amax(1)
    return bool(off.max() <= _ROUNDING)


def _probe(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(1, _PROMPT + _STEPS + 1, device=input_embedding(model).device)
    return tokens[None] % int(text_config(model).vocab_size)


def new_cache(model: PreTrainedModel, capacity: int) -> KeptCache:
    """An empty cache to answer from: Finch's, or for a model that runs its own attention, the model's own kind.

    Args:
        model: The model.
        capacity: Tokens that will be read into it.
    """
    if runs_own_attention(model):
        kind = _cache_class(model)
        return OwnCache(model.config) if kind is None else _of_class(kind, model.config)
    return CompressedCache(int(text_config(model).num_hidden_layers), capacity)


class OwnCache(KeptCache):
    """Holds a prefix and the kept passages in the layers that the model's own cache has.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        self._keep_nothing()

    @property
    def length(self) -> int:
        """Tokens in use."""
        lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        return int(max(lengths, default=0))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one more token takes, over the layers that keep all of them."""
        total = 0
        for layer in self.layers:
            if getattr(layer, "is_sliding", False):
                continue
            for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(states, torch.Tensor) and states.dim() == 4:
                    total += states.shape[1] * states.shape[3] * states.element_size()
        return total

    def crop_to(self, length: int) -> bool:
        """Drops the tokens from ``length`` on, where all layers have all tokens; says whether it could.

        States of linear attention, and what a sliding window has left behind, do not come back.

        Args:
            length: Tokens that stay.
        """
        layers: list[Any] = list(self.layers)
        now = self.length
        if any(type(layer) not in _GROWS or layer.keys is None or layer.keys.shape[2] != now for layer in layers):
            return False
        for layer in layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = min(length, now)
        return True

    def fork(self, room: int) -> OwnCache:
        """A copy to decode on, so that this cache can be asked again.

        Args:
            room: Of no use here: the layers grow.
        """
        return copy.deepcopy(self)


def _cache_class(model: PreTrainedModel) -> type[DynamicCache] | None:
    """The cache class in the file that a model's class, or one that it derives from, is written in; None for none."""
    for written_in in (kind.__module__ for kind in type(model).__mro__):
        for kind in vars(sys.modules.get(written_in, object)).values():
            if isinstance(kind, type) and issubclass(kind, DynamicCache) and kind.__module__ == written_in:
                return kind
    return None


def _of_class(kind: type[DynamicCache], config: Any) -> OwnCache:
    """An `OwnCache` that is also of a model's cache class, which makes its layers as they come."""

    class Own(OwnCache, kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            kind.__init__(self)
            self._keep_nothing()

    return Own(config)
