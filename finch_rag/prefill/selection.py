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
        scores: Shape [layers, tokens].
        budget: Tokens to keep.

    Returns:
        Token indices, ascending, shape [layers, min(budget, tokens)].
    """
    kept = scores.topk(min(budget, scores.shape[-1]), dim=-1).indices
    return kept.sort(dim=-1).values


def select_passages(scores: torch.Tensor, passage_of: torch.Tensor, budget: int, passages: int) -> torch.Tensor:
    """The best passages whole, then the best tokens of the first passage that does not fit.

    No step needs a value from the device, so an accelerator never waits for the host.

    Args:
        scores: Token scores, shape [tokens].
        passage_of: Passage index of each token, ascending, shape [tokens].
        budget: Tokens to keep.
        passages: Number of passages, those without a token included.

    Returns:
        Token indices, ascending, shape [min(budget, tokens)].
    """
    tokens = scores.shape[0]
    if tokens <= budget:
        return torch.arange(tokens, device=scores.device)
    sizes = passage_of.new_zeros(passages).scatter_add_(0, passage_of, torch.ones_like(passage_of))
    sums = scores.new_zeros(passages).scatter_add_(0, passage_of, scores).masked_fill_(sizes == 0, float("-inf"))
    order = sums.argsort(descending=True, stable=True)
    filled = sizes[order].cumsum(0)
    fits = filled <= budget  # a prefix of the order, as the sums of sizes only grow
    room = budget - torch.where(fits, filled, 0).amax()

    token_rank = _places(order)[passage_of]
    whole = token_rank < fits.sum()
    of_next = scores.masked_fill(token_rank != fits.sum(), float("-inf"))
    keep = whole | (_places(of_next.argsort(descending=True, stable=True)) < room)
    return keep.byte().argsort(descending=True, stable=True)[:budget]


def _places(order: torch.Tensor) -> torch.Tensor:
    """The place of each index in an order of all indices: its inverse permutation, shape [n]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


def select_to_re_prefill(
    kept: torch.Tensor, passage_of: torch.Tensor, attention: torch.Tensor, budget: int, cutoff: float
) -> torch.Tensor:
    """The tokens of the passages that were kept whole, the best passage last.

    Where none was, those of which a part was kept, the best that fit whole. The best one comes last because models look
    first at what is next to the question (see docs/benchmarks.md).

    Args:
        kept: Document positions of the kept tokens, shape [kept].
        passage_of: Passage index of each document position, ascending, shape [document].
        attention: Attention of each passage, shape [passages].
        budget: Tokens to take.
        cutoff: Leave out passages with less than this part of the best one's attention.

    Returns:
        Document positions, shape [tokens of these passages]; empty where the best passage is larger than the budget.
    """
    lengths = passage_of.bincount(minlength=attention.shape[0])
    counts = passage_of[kept].bincount(minlength=attention.shape[0])
    whole = (counts == lengths) & (counts > 0)
    candidates = (whole if whole.any() else counts > 0).nonzero().squeeze(-1)
    order = candidates[attention[candidates].argsort(descending=True, stable=True)]
    fits = lengths[order].cumsum(0) <= budget  # a prefix of the order: no worse passage takes the place of a better one
    chosen = order[fits & (attention[order] >= cutoff * attention[order[:1]])]
    starts = lengths.cumsum(0) - lengths
    return torch.cat(
        [passage_of.new_empty(0)]
        + [torch.arange(int(starts[p]), int(starts[p] + lengths[p])) for p in chosen.flip(0).tolist()]
    )
