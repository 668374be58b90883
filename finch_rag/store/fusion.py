"""Several rankings as one."""

from __future__ import annotations

from collections.abc import Sequence


def fused(rankings: Sequence[Sequence[int]], k: int) -> list[int]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    Args:
        rankings: Each the places of its passages, the best first; a passage that one lacks gets nothing from it.
        k: Added to each rank, so that first places do not decide alone.

    Returns:
        All places, the best first; where two are equal, the one that the first ranking has before.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, place in enumerate(ranking, 1):
            scores[place] = scores.get(place, 0.0) + 1.0 / (k + rank)
    return sorted(scores, key=lambda place: -scores[place])
