"""The scan of one question: what a chunk is read with, what is kept of it, what is prefilled again at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..models.cache import CompressedCache
from ..models.forward import memory_guard, on_device
from ..models.inspection import input_embedding, text_config
from ..models.kept_cache import KeptCache
from ..models.rope import KeyRotation
from ..prompts.builder import Prompt
from .chunking import plan_chunks
from .planning import PrefillPlan
from .scoring import QuestionObserver, passage_sums
from .selection import select_passages, select_to_re_prefill, select_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Steps(NamedTuple):
    """How a document was scanned.

    Attributes:
        chunks: Steps.
        chunk_size: Document tokens of a step at the end: the plan's, or less where the device's memory ran out.
        layers: Layers that a step ran.
    """

    chunks: int
    chunk_size: int
    layers: int


class Prefilled(NamedTuple):
    """What was read.

    Attributes:
        cache: Holds prefix and kept tokens.
        attention: What the question paid to each passage when the passage last competed, float32, shape [passages].
        steps: Of the scan.
    """

    cache: KeptCache
    attention: torch.Tensor
    steps: Steps


class Scan:
    """What one question keeps of the chunks that are read, and what is prefilled again.

    Everything that a step needs is on the device, and no step asks the device for a value, so that the host runs ahead
    and the device never waits.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        plan: Budget, chunk size and selection.
        rotation: How the model rotates keys.

    Attributes:
        cache: Prefix, kept tokens, and what a step appends.
        lengths: Tokens of each passage.
        layers: Layers that a step runs.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, plan: PrefillPlan, rotation: KeyRotation) -> None:
        self.device = input_embedding(model).device
        self._model = model
        self.plan, self.rotation, self.own_tokens = plan, rotation.on(self.device), prompt.own_tokens
        self.lengths = [len(passage) for passage in prompt.passages]
        self.prefix, self.question = on_device(prompt.prefix, self.device), on_device(prompt.question, self.device)
        self.document, self.passage_of = document_of(prompt.passages, self.device)
        self.attention = torch.zeros(len(self.lengths), device=self.device)
        self.chooses_only = plan.chooses_only(self.lengths)
        self._model_layers = int(text_config(model).num_hidden_layers)
        self.layers = plan.layers_to_scan(self.lengths, self._model_layers)
        longest = max(map(len, plan_chunks(self.lengths, plan.chunk_size)), default=0)
        kept = min(plan.budget, len(self.document))
        self.cache = CompressedCache(self.layers, len(self.prefix) + kept + longest + len(self.question))
        self.cache.prefix, self.cache.kept = len(self.prefix), self.cache.kept.to(self.device)

    def begin(self, chunk: range) -> tuple[torch.Tensor, QuestionObserver]:
        """Tokens to append for a chunk, the prefix before the first one, and the observer of the pass.

        Args:
            chunk: Document positions.
        """
        cache = self.cache
        parts = [self.document[chunk.start : chunk.stop], self.question]
        tokens = torch.cat([self.prefix, *parts] if cache.length == 0 else parts)
        observer = QuestionObserver(
            question_tokens=len(self.question),
            own_tokens=self.own_tokens,
            evictable=slice(cache.prefix, cache.prefix + cache.kept_tokens + len(chunk)),
            heads=self.plan.heads,
            last=self.layers - 1 if self.layers < self._model_layers or self.chooses_only else -1,
        )
        return tokens, observer

    def evict(self, chunk: range, observer: QuestionObserver) -> None:
        """Keeps the best of kept and appended tokens, and drops the rest.

        Args:
            chunk: Document positions.
            observer: Of the pass that appended the chunk.
        """
        cache, plan = self.cache, self.plan
        cache.crop_to(observer.evictable.stop)
        scores = observer.by_layer().to(self.device)  # [layers, kept + chunk]
        competing = self.passage_of[cache.document_positions(chunk)]  # [layers or 1, kept + chunk]
        present = passage_sums(torch.ones_like(scores), competing, len(self.lengths)).sum(0) > 0
        sums = passage_sums(scores, competing, len(self.lengths)).sum(0)
        self.attention = torch.where(present, sums, self.attention)
        index = self._select(scores, competing)
        if self.chooses_only and chunk.stop == len(self.document):  # no key of the scan is needed any more
            cache.choose(index, chunk)
            return
        with memory_guard(self._model, f"re-rotating the keys of {plan.budget} tokens"):
            cache.evict(index, chunk, self.rotation)

    def to_re_prefill(self) -> torch.Tensor | None:
        """Tokens to read into the cache, now empty, as if there had never been others; None where it stays as it is."""
        self.attention = self.attention.cpu()
        if not self.plan.reread or self.plan.ranks_only or self.cache.kept_tokens >= len(self.document):
            return None
        kept, passage_of = self.cache.kept[0].cpu(), self.passage_of.cpu()
        chosen = select_to_re_prefill(kept, passage_of, self.attention, self.plan.budget, self.plan.cutoff)
        chosen = chosen.sort().values if self.plan.in_order else chosen
        if not len(chosen):  # fragments make sense only with the keys and values of the scan
            return None
        tokens = torch.cat((self.prefix, self.document[chosen.to(self.device)]))
        self.cache = CompressedCache(self._model_layers, len(tokens))
        self.cache.prefix, self.cache.kept = len(self.prefix), chosen[None]
        return tokens

    def result(self, steps: Steps) -> Prefilled:
        """What was read.

        Args:
            steps: Of the scan.
        """
        self.cache.kept = self.cache.kept.cpu()
        return Prefilled(self.cache, self.attention, steps)

    def _select(self, scores: torch.Tensor, competing: torch.Tensor) -> torch.Tensor:
        if self.plan.selection == "token":
            return select_tokens(scores, self.plan.budget)
        return select_passages(scores.sum(0), competing[0], self.plan.budget, len(self.lengths))


def document_of(passages: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All passages' tokens and the passage of each, both of shape [tokens].

    Args:
        passages: Token ids of each.
        device: Where to put them.
    """
    document = on_device([token for passage in passages for token in passage], device)
    lengths = on_device([len(passage) for passage in passages], device)
    numbers = torch.arange(len(passages), device=device)
    return document, torch.repeat_interleave(numbers, lengths, output_size=len(document))
