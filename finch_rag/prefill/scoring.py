"""Attention -> scores of cached tokens. Pure tensors.

The score of a token is the attention that the question's own tokens pay to it, summed over them and over heads (Finch,
arXiv 2408.00167, section 3). Which heads are summed is the caller's choice: all of a layer's, or the retrieval heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..models.attention import SeenEnough
from ..models.finite import nan_where_hidden
from .head_keys import capped


class StopAt:
    """An observer that ends the forward pass at a layer.

    Args:
        last: Index of the last layer that is needed; -1 runs all.
    """

    def __init__(self, last: int) -> None:
        self.last = last

    def looks_at(self, layer: int) -> bool:
        """See `finch_rag.models.attention.SelectiveObserver`."""
        return False

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See `finch_rag.models.attention.Observer`."""
        if layer == self.last:
            raise SeenEnough


class QuestionObserver(StopAt):
    """Collects, layer by layer, the attention that the question pays to the evictable tokens.

    A layer's attention weights live only while its scores are summed.

    Args:
        question_tokens: Question tokens at the end of the forward pass.
        own_tokens: Which of them are the question's own; labels and template tokens say little about relevance.
        evictable: The key tokens to score, those of kept and chunk tokens.
        heads: Heads to sum by layer; layers that are not in it are skipped. None sums all heads of all layers.
        last: The layer at which the forward pass ends; -1 runs all.
    """

    def __init__(
        self,
        *,
        question_tokens: int,
        own_tokens: slice,
        evictable: slice,
        heads: Mapping[int, Sequence[int]] | None = None,
        last: int = -1,
    ) -> None:
        super().__init__(last)
        self.question_tokens = question_tokens
        self.own_tokens = own_tokens
        self.evictable = evictable
        self.heads = heads
        self.scores: dict[int, torch.Tensor] = {}

    def looks_at(self, layer: int) -> bool:
        """See `finch_rag.models.attention.SelectiveObserver`."""
        return self.heads is None or layer in self.heads

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See `finch_rag.models.attention.Observer`."""
        if self.looks_at(layer):
            heads = None if self.heads is None else self.heads[layer]
            weights = question_attention(query, key, scaling, self.question_tokens, self.own_tokens, heads)
            self.scores[layer] = weights[..., self.evictable].sum(dim=(0, 1))
        super().__call__(layer, query, key, scaling)

    def by_layer(self) -> torch.Tensor:
        """Scores of each observed layer, shape [layers, evictable], float32."""
        layers = [self.scores[layer] for layer in sorted(self.scores)]
        return torch.stack([scores.to(layers[0].device) for scores in layers])

    def total(self) -> torch.Tensor:
        """Scores summed over the observed layers, shape [evictable], float32."""
        return self.by_layer().sum(dim=0)


def question_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    question_tokens: int,
    own_tokens: slice,
    heads: Sequence[int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights of the question's own tokens.

    Args:
        query: Rotated queries, shape [1, heads, question tokens and more before, head_dim].
        key: Rotated keys, shape [1, kv_heads, keys, head_dim].
        scaling: Factor on the products.
        question_tokens: Question tokens at the end of ``query`` and of ``key``.
        own_tokens: Which of them to take.
        heads: Query heads to take; None takes all.
        softcap: What the products are capped to, smoothly; None for no cap.
        sinks: Products that each head pays to nothing, shape [heads]; None for none.

    Returns:
        Shape [heads, own tokens, keys], float32; the weights of every query token sum to 1, or less with sinks.
    """
    question = query[0, :, query.shape[2] - question_tokens :][:, own_tokens]  # [heads, own, head_dim]
    keys = key[0]  # [kv_heads, keys, head_dim]
    group = question.shape[0] // keys.shape[0]
    if heads is not None and list(heads) != list(range(question.shape[0])):
        # By stacking: an index tensor would have to be copied to the device.
        chosen = torch.stack([question[head] for head in heads])
        products = chosen @ torch.stack([keys[head // group] for head in heads]).transpose(1, 2)  # [chosen, own, keys]
    else:
        grouped = question.reshape(keys.shape[0], -1, question.shape[-1])  # [kv_heads, group * own, head_dim]
        products = (grouped @ keys.transpose(1, 2)).view(*question.shape[:2], -1)
    first = keys.shape[1] - question_tokens + own_tokens.indices(question_tokens)[0]  # the first own token's key
    future = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device).triu_(first + 1)
    products = nan_where_hidden(products.float().mul_(scaling))
    products = capped(products, softcap).masked_fill_(future, float("-inf"))
    if sinks is None:
        return products.softmax(dim=-1)
    nothing = sinks.flatten() if heads is None else torch.stack([sinks.flatten()[head] for head in heads])
    nothing = nothing.float()[:, None, None].expand(-1, products.shape[1], 1)
    return torch.cat((products, nothing), dim=-1).softmax(dim=-1)[..., :-1]


def passage_sums(scores: torch.Tensor, passage_of: torch.Tensor, passages: int) -> torch.Tensor:
    """Sums token scores to passage scores.

    Args:
        scores: Shape [layers, tokens].
        passage_of: Passage index of each token, shape [layers, tokens], or [1, tokens] where layers agree.
        passages: Number of passages.

    Returns:
        Shape [layers, passages].
    """
    index = passage_of.to(scores.device).expand_as(scores)
    return scores.new_zeros(scores.shape[0], passages).scatter_add_(1, index, scores)
