"""The model as it computes without Finch: what everything that Finch reads is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..models.inspection import input_embedding, plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def without_finch(model: PreTrainedModel) -> Iterator[None]:
    """A model with an attention function of transformers in place of Finch's; nobody else may run it meanwhile.

    Args:
        model: The model.
    """
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(plain_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, token_ids: Sequence[int], last: int) -> torch.Tensor:
    """Logits after each of the last tokens of a text, by one pass without a cache.

    Args:
        model: The model.
        token_ids: Of the text.
        last: How many tokens.

    Returns:
        Float32, on the CPU, shape [last, vocabulary].
    """
    tokens = torch.tensor([list(token_ids)], device=input_embedding(model).device)
    with without_finch(model):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0, -last:].float().cpu()
    return logits


@torch.inference_mode()
def plain_keys(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Keys of a text in the first layer, which depend on nothing but a token and its position.

    Args:
        model: One whose every layer has keys.
        token_ids: Of the text.

    Returns:
        Float32, on the CPU, shape [kv_heads, tokens, head_dim].
    """
    cache = DynamicCache()
    tokens = torch.tensor([list(token_ids)], device=input_embedding(model).device)
    with without_finch(model):
        model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    first: Any = cache.layers[0]
    keys: torch.Tensor = first.keys[0].float().cpu()
    return keys
