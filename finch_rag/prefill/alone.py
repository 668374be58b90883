"""Passages that are read alone: what a question pays to each, from the keys of a few heads that were kept of it.

Each passage is read by itself behind a prefix that is always the same, so its keys depend on nothing else and hold for
every question. Of them only the *head keys* are kept, those that the retrieval heads look at. A question is then read
alone behind the same prefix, and its attention over all passages is one product with their head keys, under one softmax
over prefix, passages and question.

Some passages draw attention whatever is asked. So a *neutral question* is read beside each question, and what a head
pays to a passage for it is taken off. (In-context re-ranking does so for one long prompt: Chen et al., "Attention in
Large Language Models Yields Efficient Zero-Shot Re-Rankers", ICLR 2025.)

All passages begin at the same position, behind the prefix; the question stands behind the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from ..errors import DeviceMemoryError
from ..models.attention import SeenEnough
from ..models.cache import CompressedCache
from ..models.finite import nan_where_hidden
from ..models.forward import forward, forward_packed, forward_varlen, memory_guard, on_device
from ..models.inspection import input_embedding, text_config
from ..models.packed import PackedBatch
from ..models.parallel import TensorParallel
from ..models.varlen import Extend, VarlenSequence
from ..prompts.builder import PromptBuilder
from ..prompts.passages import Passage
from .head_keys import Look, capped
from .planning import RetrievalHeads
from .scoring import StopAt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEUTRAL = "What is it?"  # a question that any passage answers as well as another; measured in docs/benchmarks.md

# The CPU's matrix library keeps a compiled product for every number of rows that it has met, the last thousand of them,
# some hundred MiB: passes of few sizes keep memory where it is.
_ROUND_ON_CPU = 64

_TOKENS_PER_PASS = {"cuda": 16384, "cpu": 1024}


class Asked(NamedTuple):
    """A question as it is read.

    Attributes:
        tokens: Token ids.
        own: Which of them look for passages; see `finch_rag.prompts.builder.Prompt`.
    """

    tokens: Sequence[int]
    own: slice

    @classmethod
    def by(cls, prompts: PromptBuilder, question: str) -> Asked:
        """A question as prompts have it behind passages.

        Args:
            prompts: Builds prompts.
            question: The question.
        """
        prompt = prompts.build(question, [Passage("x")])
        return cls(prompt.question, prompt.own_tokens)


class Reading(NamedTuple):
    """A question, and where it is read.

    Attributes:
        asked: The question.
        position: Of its first token.
    """

    asked: Asked
    position: int


class AloneReader:
    """Reads passages and questions alone, each behind the same prefix.

    Args:
        model: A model that runs Finch's attention.
        prefix: Token ids.
        heads: Retrieval heads by layer.

    Attributes:
        groups: The (layer, KV head) pairs whose keys are kept, in their order.
        per_group: Query heads that share a KV head.
        head_dim: Of a head.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], heads: RetrievalHeads) -> None:
        self.model, self.prefix, self.heads = model, list(prefix), heads
        self.per_group, self.head_dim = self._sizes()
        by_group: dict[tuple[int, int], list[int]] = {}
        for layer in sorted(heads):
            for head in sorted(heads[layer]):
                by_group.setdefault((layer, head // self.per_group), []).append(head)
        self._heads_of = by_group
        self.groups = tuple(by_group)
        self._last = max(heads)
        self.device = input_embedding(model).device

    def _sizes(self) -> tuple[int, int]:
        """Query heads that share a KV head, and the dimension of each."""
        config = text_config(self.model)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        return int(config.num_attention_heads) // _kv_heads(self.model), head_dim

    @cached_property
    def _prefix_states(self) -> CompressedCache:
        """Keys and values of the prefix, up to the last layer that is needed."""
        cache = CompressedCache(self._last + 1, len(self.prefix))
        with torch.inference_mode():
            forward(self.model, on_device(self.prefix, self.device), cache, StopAt(self._last))
        return cache

    def _behind_prefix(self) -> Extend:
        layers = self._prefix_states.layers if self.prefix else None

        def extend(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if layers is None:
                return key, value
            keys, values = layers[layer].in_use()
            return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

        return extend

    @torch.inference_mode()
    def encode(self, passages: Sequence[Sequence[int]]) -> torch.Tensor:
        """Head keys of passages, by one forward pass up to the last retrieval head.

        Args:
            passages: Token ids of each, at least one token.

        Returns:
            Of all passages, one after another, shape [groups, tokens, head_dim].

        Raises:
            DeviceMemoryError: If the device has no memory for all of them.
        """
        lengths, start = [len(passage) for passage in passages], len(self.prefix)
        total = sum(lengths)
        if self.device.type == "cpu" and (filler := -total % _ROUND_ON_CPU):
            passages, lengths = [*passages, [0] * filler], [*lengths, filler]
        tokens = on_device([token for passage in passages for token in passage], self.device)
        positions = on_device([start + place for length in lengths for place in range(length)], self.device)
        keys: dict[tuple[int, int], torch.Tensor] = {}
        shared = TensorParallel.of(self.model)

        def take_keys(layer: int, key: torch.Tensor) -> None:
            if shared is not None and layer in self.heads:
                key = shared.all_keys(key[None])[0]
            for group in self.groups:
                if group[0] == layer:
                    keys[group] = key[group[1], :total].to(self.device, copy=True)
            if layer == self._last:
                raise SeenEnough

        prefix = self._prefix_states.layers if self.prefix else []
        batch = PackedBatch(lengths, prefix, start, take_keys, self.device)
        forward_packed(self.model, tokens, positions, batch)
        return torch.stack([keys[group] for group in self.groups])

    def encode_in_parts(self, passages: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Like `encode`, in halves from where the device's memory runs out.

        Args:
            passages: See `encode`.

        Returns:
            Of all passages, one after another, each part of shape [groups, tokens, head_dim].

        Raises:
            DeviceMemoryError: If the device has no memory for a single passage.
        """
        try:
            with memory_guard(self.model, f"{len(passages)} passages"):
                return [self.encode(passages)]
        except DeviceMemoryError:
            if len(passages) == 1:
                raise
        middle = len(passages) // 2
        return [*self.encode_in_parts(passages[:middle]), *self.encode_in_parts(passages[middle:])]

    def look(self, question: Asked, neutral: Asked, longest_passage: int) -> Look:
        """What a question looks for, by one forward pass of it and the neutral one up to the last retrieval head.

        Args:
            question: The question.
            neutral: See `NEUTRAL`.
            longest_passage: Tokens of the longest passage that it is to look at.
        """
        return self.look_together([question], neutral, [longest_passage])[0]

    @torch.inference_mode()
    def look_together(self, questions: Sequence[Asked], neutral: Asked, longest_passages: Sequence[int]) -> list[Look]:
        """What questions look for, by one forward pass of all of them and the neutral ones.

        Args:
            questions: The questions.
            neutral: See `NEUTRAL`; read once for all questions that stand at one position.
            longest_passages: Tokens of the longest passage that each question is to look at.
        """
        readings: dict[tuple[int, int], Reading] = {}  # by the number of the question, or -1, and the longest passage
        for number, longest in enumerate(longest_passages):
            readings[number, longest] = Reading(questions[number], len(self.prefix) + longest)
            readings.setdefault((-1, longest), Reading(neutral, len(self.prefix) + longest))
        observers = {key: LookObserver(self._heads_of, each.asked, self._last) for key, each in readings.items()}
        self._read(list(readings.values()), list(observers.values()))
        heads = list(self._heads_of.values())
        return [
            _joined([observers[number, longest], observers[-1, longest]], heads, self.device)
            for number, longest in enumerate(longest_passages)
        ]

    def _read(self, readings: Sequence[Reading], observers: Sequence[LookObserver]) -> None:
        """Forwards questions behind the prefix, each shown to its observer."""
        sequences = []
        for (asked, start), observer in zip(readings, observers, strict=True):
            positions = torch.arange(start, start + len(asked.tokens), device=self.device)
            tokens = on_device(asked.tokens, self.device)
            sequences.append(VarlenSequence(tokens, positions, self._behind_prefix(), observer))
        forward_varlen(self.model, sequences)


class LookObserver(StopAt):
    """Takes the queries of a question's own tokens, and what they pay to prefix and question, for each group.

    Args:
        heads_of: Query heads by (layer, KV head).
        asked: The question, whose tokens are the last ones.
        last: The layer at which the forward pass ends.
    """

    def __init__(self, heads_of: dict[tuple[int, int], list[int]], asked: Asked, last: int) -> None:
        super().__init__(last)
        self._heads_of = heads_of
        self._tokens = len(asked.tokens)
        self.own = range(*asked.own.indices(self._tokens))
        self.queries: dict[tuple[int, int], torch.Tensor] = {}  # [heads, own, head_dim]
        self.elsewhere: dict[tuple[int, int], torch.Tensor] = {}  # [heads, own]
        self.scaling = 1.0
        self.softcap: float | None = None

    def looks_at(self, layer: int) -> bool:
        """See `finch_rag.models.attention.SelectiveObserver`."""
        return any(group[0] == layer for group in self._heads_of)

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
        self.scaling, self.softcap = scaling, softcap
        query = query[:, :, -self._tokens :]
        own = slice(self.own.start, self.own.stop)
        before = key.shape[2] - self._tokens
        for group, heads in self._heads_of.items():
            if group[0] != layer:
                continue
            queries = torch.stack([query[0, head, own] for head in heads])
            products = (queries @ key[0, group[1]].transpose(0, 1)).float() * scaling  # [heads, own, keys]
            products = capped(nan_where_hidden(products), softcap)
            future = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device)
            future = future.triu_(before + self.own.start + 1)
            elsewhere = products.masked_fill(future, float("-inf")).logsumexp(-1)
            if sinks is not None:
                elsewhere = torch.logaddexp(elsewhere, sinks.flatten()[list(heads), None].float())
            self.elsewhere[group] = elsewhere
            self.queries[group] = queries
        super().__call__(layer, query, key, scaling)


def _joined(observers: Sequence[LookObserver], heads: Sequence[Sequence[int]], device: torch.device) -> Look:
    """The rows of the question and of the neutral one, head by head."""
    most = max(map(len, heads))
    queries, elsewhere = [], []
    for group, own in zip(observers[0].queries, heads, strict=True):
        missing = most - len(own)
        rows = torch.cat([observer.queries[group].to(device) for observer in observers], 1)
        sums = torch.cat([observer.elsewhere[group].to(device) for observer in observers], 1)
        queries.append(pad(rows, (0, 0, 0, 0, 0, missing)).flatten(0, 1))
        elsewhere.append(pad(sums, (0, 0, 0, missing)).flatten())
    counts = on_device([len(own) for own in heads], device)
    present = torch.arange(most, device=device)[None] < counts[:, None]
    first = observers[0]
    return Look(torch.stack(queries), present, torch.stack(elsewhere), len(first.own), first.scaling, first.softcap)


def _kv_heads(model: PreTrainedModel) -> int:
    config = text_config(model)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def tokens_per_pass(device_type: str) -> int:
    """Tokens of passages that a kind of device reads well in one pass.

    Args:
        device_type: torch's name for it, such as "cpu" or "cuda".
    """
    return _TOKENS_PER_PASS.get(device_type, 4096)


def token_groups(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Passages in groups of about so many tokens, at least one passage each, in their order.

    Args:
        lengths: Tokens of each passage.
        tokens: The most tokens of a group of several.

    Yields:
        The places of each group's passages.
    """
    start = filled = 0
    for place, length in enumerate(lengths):
        if place > start and filled + length > tokens:
            yield range(start, place)
            start, filled = place, 0
        filled += length
    if lengths:
        yield range(start, len(lengths))
