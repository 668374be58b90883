"""Means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 10_000


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
