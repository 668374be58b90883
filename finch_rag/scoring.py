"""Attention -> scores of cached tokens. Pure tensors.

The score of a token is the attention that the question's own rows put on it, summed over rows and heads (Finch,
arXiv 2408.00167, section 3). Which heads are summed is the caller's choice: all of a layer's, or the retrieval heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .attention import SeenEnough


class Until:
    """An observer that ends the forward pass at a layer.

    Args:
        last: Index of the last layer that is needed.
    """

    def __init__(self, last: int) -> None:
        self.last = last

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See `finch_rag.attention.Observer`."""
        if layer == self.last:
            raise SeenEnough


class QuestionObserver(Until):
    """Collects, layer by layer, the attention that the question pays to the evictable tokens.

    A layer's attention weights live only while its scores are summed.

    Args:
        forwarded: Question tokens at the end of the forward pass.
        rows: Which of them are the question's own; labels and template tokens say little about relevance.
        columns: The cache columns to score, those of kept and chunk tokens.
        heads: Heads to sum by layer; layers that are not in it are skipped. None sums all heads of all layers.
        last: The layer at which the forward pass ends; -1 runs all.
    """

    def __init__(
        self,
        forwarded: int,
        rows: slice,
        columns: slice,
        heads: Mapping[int, Sequence[int]] | None = None,
        last: int = -1,
    ) -> None:
        super().__init__(last)
        self.forwarded = forwarded
        self.rows = rows
        self.columns = columns
        self.heads = heads
        self.scores: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See `finch_rag.attention.Observer`."""
        if self.heads is None or layer in self.heads:
            heads = None if self.heads is None else self.heads[layer]
            weights = question_attention(query, key, scaling, self.forwarded, self.rows, heads)
            self.scores[layer] = weights[..., self.columns].sum(dim=(0, 1))
        super().__call__(layer, query, key, scaling)

    def by_layer(self) -> torch.Tensor:
        """Scores of each observed layer, shape [layers, columns], float32."""
        layers = [self.scores[layer] for layer in sorted(self.scores)]
        return torch.stack([scores.to(layers[0].device) for scores in layers])

    def total(self) -> torch.Tensor:
        """Scores summed over the observed layers, shape [columns], float32."""
        return self.by_layer().sum(dim=0)


def question_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    forwarded: int,
    rows: slice,
    heads: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention weights of the question's own rows.

    Args:
        query: Rotated queries, shape [1, heads, forwarded rows and more, head_dim].
        key: Rotated keys, shape [1, kv_heads, columns, head_dim].
        scaling: Factor on the products.
        forwarded: Question tokens at the end of ``query`` and of ``key``.
        rows: Which of the forwarded tokens to take.
        heads: Query heads to take; None takes all.

    Returns:
        Shape [heads, rows, columns], float32; every row sums to 1.
    """
    question = query[0, :, query.shape[2] - forwarded :][:, rows]  # [heads, rows, head_dim]
    keys = key[0]  # [kv_heads, columns, head_dim]
    group = question.shape[0] // keys.shape[0]
    if heads is not None:
        its = torch.stack([question[head] for head in heads])  # an index tensor would have to be copied to the device
        products = its @ torch.stack([keys[head // group] for head in heads]).transpose(1, 2)  # [chosen, rows, columns]
    else:
        grouped = question.reshape(keys.shape[0], -1, question.shape[-1])  # [kv_heads, group * rows, head_dim]
        products = (grouped @ keys.transpose(1, 2)).view(*question.shape[:2], -1)
    first = keys.shape[1] - forwarded + rows.indices(forwarded)[0]  # the first row's own column
    future = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device).triu_(first + 1)
    products = products.float().mul_(scaling).masked_fill_(future, float("-inf"))
    return products.softmax(dim=-1)


def passage_sums(scores: torch.Tensor, passage_of: torch.Tensor, passages: int) -> torch.Tensor:
    """Sums token scores to passage scores.

    Args:
        scores: Shape [layers, columns].
        passage_of: Passage index of each column, shape [layers, columns], or [1, columns] where layers agree.
        passages: Number of passages.

    Returns:
        Shape [layers, passages].
    """
    index = passage_of.to(scores.device).expand_as(scores)
    return scores.new_zeros(scores.shape[0], passages).scatter_add_(1, index, scores)
