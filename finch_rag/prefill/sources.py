"""Whether a question rests on one passage that stands out, or on several that do together.

"What are the four codes of ...?" gives four passages much attention and all others little: it falls off a cliff behind
the fourth. Then those before the cliff are the sources, however much the best of them is above the last. Where there is
one clear source the attention falls behind it at once: a second look would find nothing else. Where there is no clear
one it falls smoothly: there a part of the best passage's attention decides. Measured in docs/several-passages.md.
"""

from __future__ import annotations

import math

import torch

from .planning import CUTOFF

_CLIFF = 2.2  # times as much attention for the last source as for the passage behind it
_LEAST_SHARE = 0.15  # of the best passage's attention, for the last source
_FEWEST, _MOST = 3, 32  # sources


def has_one_source(attention: torch.Tensor) -> bool:
    """Whether only the best passage itself has `CUTOFF` of the best one's attention, or more.

    Args:
        attention: Of each passage, shape [passages].
    """
    return len(attention) > 0 and int((attention >= CUTOFF * attention.max()).sum()) == 1


def cutoff_behind_sources(attention: torch.Tensor) -> float | None:
    """The part of the best passage's attention that tells several sources from the rest.

    Args:
        attention: Of each passage, shape [passages].

    Returns:
        Between that of the last source and that of the next passage; None where no three or more stand out.
    """
    falling = attention.double().clamp(min=0).sort(descending=True).values[: _MOST + 1].tolist()
    if len(falling) <= _FEWEST or not falling[0]:
        return None
    best, cutoff = _CLIFF, None
    for last, following in zip(falling[_FEWEST - 1 :], falling[_FEWEST:], strict=False):
        if last < _LEAST_SHARE * falling[0]:
            break
        cliff = last / following if following else math.inf
        if cliff >= best:
            best, cutoff = cliff, (last + following) / 2 / falling[0]
    return cutoff
