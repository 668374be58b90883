"""Scores and a budget -> the tokens that stay. Pure tensors.

Both selections return indices in ascending order: kept tokens stay in document order (the order of the Finch
authors' code; the paper's text describes rank order).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Selection = Literal["passage", "token"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)


def select_tokens(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """The ``budget`` best tokens of each layer (Finch, arXiv 2408.00167).

    Args:
        scores: Shape [layers, columns].
        budget: Tokens to keep.

    Returns:
        Column indices, ascending, shape [layers, min(budget, columns)].
    """
    kept = scores.topk(min(budget, scores.shape[-1]), dim=-1).indices
    return kept.sort(dim=-1).values


def select_passages(scores: torch.Tensor, passage_of: torch.Tensor, budget: int) -> torch.Tensor:
    """The best passages whole, then the best tokens of the first passage that does not fit.

    Args:
        scores: Token scores, shape [columns].
        passage_of: Passage index of each column, ascending, shape [columns].
        budget: Tokens to keep.

    Returns:
        Column indices, ascending, shape [min(budget, columns)].
    """
    if scores.shape[0] <= budget:
        return torch.arange(scores.shape[0], device=scores.device)
    _, place, sizes = torch.unique_consecutive(passage_of, return_inverse=True, return_counts=True)
    sums = scores.new_zeros(sizes.shape[0]).index_add_(0, place, scores)
    order = sums.argsort(descending=True, stable=True)
    filled = sizes[order].cumsum(0)
    whole = int((filled <= budget).sum())  # a prefix of the order, as the sums of sizes only grow
    room = budget - (int(filled[whole - 1]) if whole else 0)

    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    column_rank = rank[place]
    keep = column_rank < whole
    cut = scores.masked_fill(column_rank != whole, float("-inf"))
    keep[cut.topk(room).indices] = True
    return keep.nonzero().squeeze(-1)


def whole_passages(kept: torch.Tensor, passage_of: torch.Tensor) -> torch.Tensor:
    """The kept tokens of passages that were kept whole.

    Args:
        kept: Document positions of the kept tokens, ascending, shape [kept].
        passage_of: Passage index of each document position, shape [document].

    Returns:
        Document positions, ascending, shape [tokens of whole passages].
    """
    lengths = passage_of.bincount()
    whole = passage_of[kept].bincount(minlength=lengths.shape[0]) == lengths
    return kept[whole[passage_of[kept]]]
