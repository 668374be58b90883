"""Attention of an answer's tokens on sentences -> which sentences its statements rest on. Pure tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# A sentence is quoted where it gets at least this part of what the best sentence of the same statement gets.
QUOTE_PART = 0.5
# The most sentences that are quoted for a statement.
MOST_QUOTES = 3
# A statement rests on nothing where the best sentence gets less than this of its tokens' attention, in the mean over
# retrieval heads. By those of SmolLM2-135M, on 20 questions of the example corpus: sentences that are copied get .32 to
# .59 and those that a short answer comes from .10 to .51, where "I do not know the answer." and the like pay .02 to .08
# to the best one.
LEAST_ATTENTION = 0.05
# A sentence's attention is divided by its number of tokens to this power: 0 takes the sum over them, 1 their mean.
LENGTH_POWER = 0.0


class Chosen(NamedTuple):
    """What a statement rests on.

    Attributes:
        shares: Part of the statement's attention that each sentence gets, summing to 1; all 0 where it pays none to
            any. Shape [sentences].
        quotes: Sentences that it rests on, ascending.
    """

    shares: torch.Tensor
    quotes: list[int]


def choose(
    attention: torch.Tensor,
    statement_of: Sequence[int],
    statements: int,
    lengths: Sequence[int],
    least: float = LEAST_ATTENTION,
) -> list[Chosen]:
    """Which sentences each statement of an answer rests on.

    Args:
        attention: What each token of the answer pays to each sentence, the mean over heads, shape [tokens, sentences].
        statement_of: The statement of each token; -1 for none.
        statements: How many there are.
        lengths: Tokens of each sentence.
        least: See `LEAST_ATTENTION`.

    Returns:
        One a statement, in order.
    """
    scores = attention / torch.tensor(lengths, dtype=attention.dtype).clamp(min=1) ** LENGTH_POWER
    owner = torch.tensor(statement_of, dtype=torch.long)
    return [_chosen(attention[owner == number], scores[owner == number], least) for number in range(statements)]


def shares_of(attention: torch.Tensor, statement_of: Sequence[int]) -> torch.Tensor:
    """Part of the attention of all statements that each sentence gets, shape [sentences]; all 0 where there is none.

    Args:
        attention: See `choose`.
        statement_of: See `choose`.
    """
    return _shares(attention[torch.tensor(statement_of, dtype=torch.long) >= 0])


def _chosen(attention: torch.Tensor, scores: torch.Tensor, least: float) -> Chosen:
    shares = _shares(attention)
    if not shares.any() or attention.mean(0).max() < least:
        return Chosen(shares, [])
    score = scores.mean(0)
    best = score.argsort(descending=True, stable=True)[:MOST_QUOTES]
    return Chosen(shares, sorted(best[score[best] >= QUOTE_PART * score.max()].tolist()))


def _shares(attention: torch.Tensor) -> torch.Tensor:
    """Sums over rows, divided by the sum of all."""
    sums = attention.sum(0)
    total = sums.sum()
    return sums / total if total > 0 else torch.zeros_like(sums)
