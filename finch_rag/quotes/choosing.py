"""Attention of an answer's statements on sentences -> which sentences they rest on. Pure tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

# A statement is judged by the heads that look most sharply at one sentence while it is written, this part of all that
# are watched. In each model and for each statement they are others; nothing has to be known of them.
SHARPEST = 0.05
# A sentence is quoted where it gets at least this part of what the best sentence of the same statement gets.
QUOTE_PART = 0.2
# A statement rests on nothing where the best sentence gets less than this of its tokens' attention, in the mean over
# those heads. Measured in docs/benchmarks.md, as are the two above.
LEAST_ATTENTION = 0.1


class Chosen(NamedTuple):
    """What a statement rests on.

    Attributes:
        attention: What it pays to each sentence, the mean over its tokens and the sharpest heads, shape [sentences].
        quotes: Sentences that it rests on, ascending.
    """

    attention: torch.Tensor
    quotes: list[int]


def choose(attention: torch.Tensor) -> list[Chosen]:
    """Which sentences each statement of an answer rests on.

    Args:
        attention: What each statement pays to each sentence, the mean over its tokens, shape [heads, statements,
            sentences]; at least one sentence.

    Returns:
        One a statement, in order.
    """
    sharpest = max(1, round(SHARPEST * attention.shape[0]))
    heads = attention.amax(-1).topk(sharpest, dim=0).indices  # [sharpest, statements]
    of_sharpest = attention.gather(0, heads[..., None].expand(-1, -1, attention.shape[-1])).mean(0)
    return [Chosen(paid, _quotes(paid)) for paid in of_sharpest]


def sharpness(attention: torch.Tensor, lengths: torch.Tensor) -> float:
    """How sharply an answer looks at one sentence: what the best one gets of all its tokens, by the sharpest heads.

    Args:
        attention: See `choose`.
        lengths: Tokens of each statement, shape [statements].

    Returns:
        Between 0 and 1.
    """
    weights = lengths.to(attention.dtype) / lengths.sum().clamp(min=1)
    whole = (attention * weights[:, None]).sum(1, keepdim=True)  # [heads, 1, sentences]
    return float(choose(whole)[0].attention.max())


def _quotes(paid: torch.Tensor) -> list[int]:
    best = paid.max()
    if best < LEAST_ATTENTION:
        return []
    quoted: list[int] = (paid >= QUOTE_PART * best).nonzero().flatten().tolist()
    return quoted


def shares_of(paid: torch.Tensor) -> list[float]:
    """Part of the attention that each sentence gets, summing to 1; all 0 where there is none.

    Args:
        paid: What each gets, shape [sentences].
    """
    total = paid.sum()
    shares: list[float] = (paid / total if total > 0 else paid).tolist()
    return shares
