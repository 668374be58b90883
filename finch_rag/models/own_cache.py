"""A model's own cache, for models whose keys Finch cannot move: it only grows, and every layer has what it needs.

Layers with a sliding window keep their window, linear attention keeps its states; transformers chooses their kinds by
the model's configuration.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..errors import ModelError
from .cache import CompressedCache
from .inspection import input_embedding
from .kept_cache import KeptCache
from .own_attention import runs_own_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_own_cache(model: PreTrainedModel) -> None:
    """Raises a ModelError if a model cannot go on from its own cache in several steps.

    Args:
        model: One that runs its own attention.
    """
    device = input_embedding(model).device
    cache = OwnCache(model.config)
    try:
        with torch.inference_mode():
            for tokens in (3, 2, 1):  # a prefix, a question, a step
                ids = torch.ones(1, tokens, dtype=torch.long, device=device)
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception as error:  # a cache of another class, states that cannot be gone on from: whatever it trips over
        name = type(model).__name__
        raise ModelError(f"{name} does not go on from transformers' cache ({error}): use another model") from error


def new_cache(model: PreTrainedModel, capacity: int) -> KeptCache:
    """An empty cache to answer from: Finch's, or for a model that runs its own attention, the model's own kind.

    Args:
        model: The model.
        capacity: Tokens that will be read into it.
    """
    if runs_own_attention(model):
        return OwnCache(model.config)
    return CompressedCache(int(model.config.num_hidden_layers), capacity)


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
        return int(self.get_seq_length())

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

    def fork(self, room: int) -> OwnCache:
        """A copy to decode on, so that this cache can be asked again.

        Args:
            room: Of no use here: the layers grow.
        """
        return copy.deepcopy(self)
