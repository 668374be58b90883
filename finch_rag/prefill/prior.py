"""What a retriever's order is worth beside the attention of a question.

A passage's attention is divided by ``sqrt(rank + 10)``, with ranks from 0. An order that carries nothing must cost
nothing, so first it is asked whether the attention agrees with it: by their rank correlation (Spearman), in standard
errors of a random order's. Below half a standard error the order counts for nothing, from two and a half on for all;
in between the exponent grows with it. Measured in docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_OFFSET = 10.0  # ranks below it are told apart little: a retriever's best is not ten times as good as its tenth
_EXPONENT = 0.5
_NOTHING, _ALL = 0.5, 2.5  # standard errors


def weighted(attention: torch.Tensor, ranks: Sequence[int] | None) -> torch.Tensor:
    """The attention that passages got, weighted with their retriever's order.

    Args:
        attention: Shape [passages], at least 0; zeros for passages that were not read.
        ranks: Of each by the retriever, from 0; None where nobody has ranked them.

    Returns:
        Shape [passages]; the same tensor where the order counts for nothing.
    """
    if ranks is None:
        return attention
    trust = agreement(attention, ranks)
    if not trust:
        return attention
    places = torch.tensor(ranks, dtype=attention.dtype, device=attention.device)
    return attention / (places + _OFFSET) ** (_EXPONENT * trust)


def agreement(attention: torch.Tensor, ranks: Sequence[int]) -> float:
    """How far a retriever's order is to be trusted, from 0 to 1.

    Args:
        attention: Shape [passages].
        ranks: Of each by the retriever, from 0.
    """
    if len(ranks) < 3:  # two passages always agree or disagree
        return 0.0
    _, inverse, counts = attention.unique(return_inverse=True, return_counts=True)
    own = -(counts.cumsum(0) - (counts + 1) / 2).double()[inverse]  # equal ones share the middle of their places
    theirs = torch.tensor(ranks, dtype=torch.double, device=own.device)
    own, theirs = own - own.mean(), theirs - theirs.mean()
    norm = float(own.norm() * theirs.norm())
    correlation = float(own @ theirs) / norm if norm else 0.0
    errors = correlation * math.sqrt(len(ranks) - 1)
    return min(1.0, max(0.0, (errors - _NOTHING) / (_ALL - _NOTHING)))
