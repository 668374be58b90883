"""What the statements of an answer pay to sentences, head by head."""

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

# From the first part of the layers to the second: below it heads look at words, above it few look at passages.
WATCHED = (1 / 3, 5 / 6)

_WEIGHTS = 2**26  # at once


def watched_heads(model: PreTrainedModel) -> RetrievalHeads:
    """The heads that are watched: all of the layers between the parts that `WATCHED` says.

    Args:
        model: The model.

    Returns:
        Heads by layer.
    """
    looking = layers_that_look(model)
    layers = sorted(looking)
    first, stop = (round(part * len(layers)) for part in WATCHED)
    return {layer: range(looking[layer]) for layer in layers[first : max(stop, first + 1)]}


class AnswerObserver(StopAt):
    """Sums what the tokens of each statement pay to each sentence, for each head.

    Args:
        statement_of: The statement of each query token at the end of the forward pass, the number of statements for
            none, shape [rows].
        statements: How many there are.
        sentence_of: The sentence of each key token from the first one on, the number of sentences for none, shape
            [keys or fewer].
        sentences: How many there are.
        heads: By layer; the forward pass ends at the last.
    """

    def __init__(
        self,
        *,
        statement_of: torch.Tensor,
        statements: int,
        sentence_of: torch.Tensor,
        sentences: int,
        heads: RetrievalHeads,
    ) -> None:
        super().__init__(max(heads))
        # Ones where a token belongs to a statement or sentence: products with them are sums, in a fixed order.
        self._statement_of = _members(statement_of, statements).T  # [statements, rows]
        self._sentence_of = _members(sentence_of, sentences)  # [keys, sentences]
        self._heads = heads
        self._sums: list[torch.Tensor] = []

    def looks_at(self, layer: int) -> bool:
        """See `finch_rag.models.attention.SelectiveObserver`."""
        return layer in self._heads

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
        if self.looks_at(layer):
            heads, keys = self._heads[layer], self._sentence_of.shape[0]
            self._statement_of = self._statement_of.to(query.device)
            self._sentence_of = self._sentence_of.to(query.device)
            (statements, rows), sentences = self._statement_of.shape, self._sentence_of.shape[1]
            sums = query.new_zeros(len(heads), statements, sentences, dtype=torch.float32)
            some = max(1, _WEIGHTS // (len(heads) * key.shape[2]))
            for start in range(0, rows, some):
                own = slice(start, min(start + some, rows))
                weights = question_attention(query, key, scaling, rows, own, heads, softcap, sinks)[..., :keys]
                sums += self._statement_of[:, own] @ weights @ self._sentence_of
            self._sums.append(sums)
        super().__call__(layer, query, key, scaling)

    def sums(self) -> torch.Tensor:
        """Over the tokens of each statement, on the CPU, float32, shape [heads, statements, sentences]."""
        first = self._sums[0].device  # the layers of a large model may lie on several
        return torch.cat([sums.to(first) for sums in self._sums]).cpu()


def _members(owner_of: torch.Tensor, owners: int) -> torch.Tensor:
    """Ones where a token belongs to an owner, float32, shape [tokens, owners]; ``owners`` is the number of none."""
    return torch.nn.functional.one_hot(owner_of, owners + 1)[:, :-1].float()
