"""What an answer pays to sentences, by the heads that find passages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..prefill.own_reader import layers_that_look
from ..prefill.planning import RetrievalHeads
from ..prefill.scoring import StopAt, question_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A row of the attention is that of the token before the one that it stands for: heads that copy look at the word that
# comes next while the word before it is read. 0 takes the token's own row.
LEAD = 1

# From the first part of the layers to the second.
MIDDLE = (1 / 3, 2 / 3)

_WEIGHTS = 2**26  # at once


def middle_heads(model: PreTrainedModel) -> RetrievalHeads:
    """All heads of the middle layers, for where no retrieval heads are known; they tell less.

    Args:
        model: The model.

    Returns:
        Heads by layer.
    """
    looking = layers_that_look(model)
    layers = sorted(looking)
    first, stop = (round(part * len(layers)) for part in MIDDLE)
    return {layer: range(looking[layer]) for layer in layers[first : max(stop, first + 1)]}


class AnswerObserver(StopAt):
    """Sums, over heads, what each token of an answer pays to each sentence.

    Args:
        rows: Query tokens at the end of the forward pass that are looked at.
        sentence_of: The sentence of each key token from the first one on, the number of sentences for none, shape
            [keys or fewer].
        sentences: How many there are.
        heads: By layer.
        last: The layer at which the forward pass ends.
    """

    def __init__(
        self, *, rows: int, sentence_of: torch.Tensor, sentences: int, heads: RetrievalHeads, last: int
    ) -> None:
        super().__init__(last)
        self._rows = rows
        self._sentence_of = sentence_of
        self._heads = heads
        self._sums = torch.zeros(rows, sentences + 1)
        self._watched = sum(map(len, heads.values()))

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """See `finch_rag.models.own_attention.OwnObserver`."""
        if layer in self._heads:
            heads = self._heads[layer]
            self._sums, self._sentence_of = self._sums.to(query.device), self._sentence_of.to(query.device)
            some = max(1, _WEIGHTS // (len(heads) * key.shape[2]))
            for start in range(0, self._rows, some):
                own = slice(start, min(start + some, self._rows))
                weights = question_attention(query, key, scaling, self._rows, own, heads, softcap, sinks).sum(0)
                weights = weights[:, : len(self._sentence_of)]
                self._sums[own].scatter_add_(1, self._sentence_of.expand_as(weights), weights)
        super().__call__(layer, query, key, scaling)

    def attention(self) -> torch.Tensor:
        """What each row pays to each sentence, the mean over heads, on the CPU, float32, shape [rows, sentences]."""
        return self._sums[:, :-1].cpu() / self._watched
