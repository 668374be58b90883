"""Means, and areas under ROC curves, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 10_000
_ROUNDS_OF_PAIRS = 2_000  # each counts all pairs


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval.

    Attributes:
        mean: The mean.
        low: 2.5th percentile of the bootstrapped means.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As text, for a difference."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of values with a percentile bootstrap interval (Efron, 1979).

    Args:
        values: One a question, at least one; for a paired difference, the difference of each question.
        seed: Of the resampling.
    """
    array = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [array[rng.integers(len(array), size=(500, len(array)))].mean(axis=1) for _ in range(_ROUNDS // 500)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The area under the ROC curve: how often a positive case scores higher than a negative one; ties count half.

    Args:
        positives: Scores of the cases that should score high, at least one.
        negatives: Scores of the others, at least one.
    """
    scores = np.asarray([*positives, *negatives], dtype=float)
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equal scores share the mean of theirs
    wins = ranks[: len(positives)].sum() - len(positives) * (len(positives) + 1) / 2
    return float(wins / (len(positives) * len(negatives)))


def bootstrap_auroc(positives: Sequence[float], negatives: Sequence[float], seed: int = 0) -> Estimate:
    """`auroc` with a percentile bootstrap interval; positives and negatives are drawn apart.

    Args:
        positives: See `auroc`.
        negatives: See `auroc`.
        seed: Of the resampling.
    """
    high, low = np.asarray(positives, dtype=float)[:, None], np.asarray(negatives, dtype=float)
    wins = (high > low) + (high == low) / 2  # [positives, negatives]
    rng = np.random.default_rng(seed)
    drawn, against = (rng.multinomial(n, [1 / n] * n, size=_ROUNDS_OF_PAIRS) for n in wins.shape)  # how often each
    areas = ((drawn @ wins) * against).sum(axis=1) / wins.size
    ends = np.quantile(areas, [0.025, 0.975])
    return Estimate(auroc(positives, negatives), float(ends[0]), float(ends[1]))
