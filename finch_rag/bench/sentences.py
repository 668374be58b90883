"""Whether an answer's quotes are the sentences that support it: citation precision and recall by sentence.

CLAPNQ's annotators (Rosenthal et al., 2024, arXiv 2404.02103) marked sentences of a tokenised text, and at times a part
of a sentence, or two with a border of their own. So a quote need not be a marked sentence to the letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..corpus.metrics import normalise

Quote = tuple[str | None, str]  # the passage's id, the quoted sentence

_SAME = 0.8  # of a marked sentence's words, which a quote must have


@dataclass(frozen=True, slots=True)
class Support:
    """How well quotes are the sentences that support an answer, from 0 to 1.

    Attributes:
        precision: The share of the quotes that are, or hold, or are part of, a marked sentence.
        recall: The share of the marked sentences that are quoted.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def matches(quote: str, marked: str) -> bool:
    """Whether a quoted sentence is a marked one.

    It is where it has at least four fifths of the marked sentence's words, each as often, or where it is a part of the
    marked sentence.

    Args:
        quote: A sentence that an answer quotes.
        marked: A sentence that an annotator marked.
    """
    said, gold = normalise(quote).split(), normalise(marked).split()
    if not said or not gold:
        return False
    shared = sum((Counter(said) & Counter(gold)).values())
    return shared >= _SAME * len(gold) or f" {' '.join(said)} " in f" {' '.join(gold)} "


def support(quotes: Sequence[Quote], marked: Sequence[str], gold_ids: Collection[str]) -> Support:
    """Precision and recall of quotes against the sentences that one annotator marked.

    Args:
        quotes: What an answer quotes; none of other passages than the gold ones is right.
        marked: At least one sentence.
        gold_ids: The passages in which they were marked.
    """
    pairs = [[passage in gold_ids and matches(text, gold) for gold in marked] for passage, text in quotes]
    right = sum(map(any, pairs))
    found = sum(map(any, zip(*pairs, strict=True)))
    return Support(right / len(quotes) if quotes else 0.0, found / len(marked))


def best_support(quotes: Sequence[Quote], annotators: Sequence[Sequence[str]], gold_ids: Collection[str]) -> Support:
    """Precision and recall against the annotator with whom the quotes agree most, by F1.

    Args:
        quotes: See `support`.
        annotators: What each of them marked; at least one.
        gold_ids: See `support`.
    """
    return max((support(quotes, marked, gold_ids) for marked in annotators), key=lambda found: found.f1)
