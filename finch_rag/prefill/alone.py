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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from ..models.attention import SeenEnough
from ..models.cache import CompressedCache
from ..models.forward import forward, forward_packed, forward_varlen, on_device
from ..models.inspection import input_embedding
from ..models.packed import PackedBatch
from ..models.varlen import Extend, VarlenSequence
from ..prompts.builder import PromptBuilder
from ..prompts.passages import Passage
from .planning import RetrievalHeads
from .scoring import StopAt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEUTRAL = "What is it?"  # a question that any passage answers as well as another; measured in docs/benchmarks.md
_RAW_PART = 1e-3  # of the attention itself, so that passages which get no more than from NEUTRAL are ranked too


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


@dataclass(frozen=True, slots=True)
class Look:
    """What a question looks for, and a neutral one beside it.

    A row stands for a head and a token: for each head the question's own tokens, then those of the neutral question.

    Attributes:
        queries: Rotated queries, for each (layer, KV head) the heads that share it; zeros where a KV head has fewer
            heads. Shape [groups, rows, head_dim].
        present: Which heads are there, shape [groups, heads].
        elsewhere: Log of what a row's attention outside of all passages sums to, before it is normalised, shape
            [groups, rows], float32.
        own_tokens: Rows of a head that are of the question; the rest are of the neutral one.
        scaling: Factor on the products.
    """

    queries: torch.Tensor
    present: torch.Tensor
    elsewhere: torch.Tensor
    own_tokens: int
    scaling: float


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """Head keys of some passages.

    Attributes:
        keys: Shape [groups, tokens, head_dim]; int8 where they are quantised.
        scales: What int8 keys are multiplied by, shape [groups, tokens]; None for other dtypes.
        lengths: Tokens of each passage, in their order, each at least 1.
    """

    keys: torch.Tensor
    scales: torch.Tensor | None
    lengths: Sequence[int]


class AloneReader:
    """Reads passages and questions alone, each behind the same prefix.

    Args:
        model: A model that runs Finch's attention.
        prefix: Token ids.
        heads: Retrieval heads by layer.

    Attributes:
        groups: The (layer, KV head) pairs whose keys are kept, in their order.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], heads: RetrievalHeads) -> None:
        self.model, self.prefix, self.heads = model, list(prefix), heads
        self.per_group = int(model.config.num_attention_heads) // _kv_heads(model)
        by_group: dict[tuple[int, int], list[int]] = {}
        for layer in sorted(heads):
            for head in sorted(heads[layer]):
                by_group.setdefault((layer, head // self.per_group), []).append(head)
        self._heads_of = by_group
        self.groups = tuple(by_group)
        self._last = max(heads)
        self.device = input_embedding(model).device
        config = model.config
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

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
        tokens = on_device([token for passage in passages for token in passage], self.device)
        positions = on_device([start + place for length in lengths for place in range(length)], self.device)
        keys: dict[tuple[int, int], torch.Tensor] = {}

        def take_keys(layer: int, key: torch.Tensor) -> None:
            for group in self.groups:
                if group[0] == layer:
                    keys[group] = key[group[1]].to(self.device, copy=True)
            if layer == self._last:
                raise SeenEnough

        prefix = self._prefix_states.layers if self.prefix else []
        batch = PackedBatch(lengths, prefix, start, take_keys, self.device)
        forward_packed(self.model, tokens, positions, batch)
        return torch.stack([keys[group] for group in self.groups])

    @torch.inference_mode()
    def look(self, question: Asked, neutral: Asked, longest_passage: int) -> Look:
        """What a question looks for, by one forward pass of it and the neutral one up to the last retrieval head.

        Args:
            question: The question.
            neutral: See `NEUTRAL`.
            longest_passage: Tokens of the longest passage that it is to look at.
        """
        observers, sequences = [], []
        for asked in (question, neutral):
            observer = _LookObserver(self._heads_of, asked, self._last)
            start = len(self.prefix) + longest_passage
            positions = torch.arange(start, start + len(asked.tokens), device=self.device)
            tokens = on_device(asked.tokens, self.device)
            observers.append(observer)
            sequences.append(VarlenSequence(tokens, positions, self._behind_prefix(), observer))
        forward_varlen(self.model, sequences)
        return _joined(observers, list(self._heads_of.values()), self.device)


class _LookObserver(StopAt):
    """Takes the queries of a question's own tokens, and what they pay to prefix and question, for each group."""

    def __init__(self, heads_of: dict[tuple[int, int], list[int]], asked: Asked, last: int) -> None:
        super().__init__(last)
        self._heads_of = heads_of
        self._tokens = len(asked.tokens)
        self.own = range(*asked.own.indices(self._tokens))
        self.queries: dict[tuple[int, int], torch.Tensor] = {}  # [heads, own, head_dim]
        self.elsewhere: dict[tuple[int, int], torch.Tensor] = {}  # [heads, own]
        self.scaling = 1.0

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """See `finch_rag.models.attention.Observer`."""
        self.scaling = scaling
        own = slice(self.own.start, self.own.stop)
        before = key.shape[2] - self._tokens
        for group, heads in self._heads_of.items():
            if group[0] != layer:
                continue
            queries = torch.stack([query[0, head, own] for head in heads])
            products = (queries @ key[0, group[1]].transpose(0, 1)).float() * scaling  # [heads, own, keys]
            future = torch.ones(products.shape[1:], dtype=torch.bool, device=products.device)
            future = future.triu_(before + self.own.start + 1)
            self.elsewhere[group] = products.masked_fill(future, float("-inf")).logsumexp(-1)
            self.queries[group] = queries
        super().__call__(layer, query, key, scaling)


def _joined(observers: Sequence[_LookObserver], heads: Sequence[Sequence[int]], device: torch.device) -> Look:
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
    return Look(torch.stack(queries), present, torch.stack(elsewhere), len(observers[0].own), observers[0].scaling)


@torch.inference_mode()
def attention_on(look: Look, blocks: Iterable[KeyBlock]) -> torch.Tensor:
    """What a question pays to each passage beyond a neutral one, summed over heads and its own tokens; exact.

    Args:
        look: What the question looks for.
        blocks: See `attention_by_head`.

    Returns:
        On the CPU, float32, shape [passages].
    """
    return torch.cat([by_head.sum((0, 1)) for by_head in _by_head(look, blocks)] or [torch.zeros(0)]).float().cpu()


@torch.inference_mode()
def attention_by_head(look: Look, blocks: Iterable[KeyBlock]) -> torch.Tensor:
    """What each head pays to each passage for a question beyond a neutral one, summed over the question's own tokens.

    Each block's products are normalised by their own greatest one; a running log-sum-exp joins the blocks. Of a block
    only the sums of its passages stay, so memory is that of one block, and a number a row and passage.

    Args:
        look: What the question looks for.
        blocks: Head keys, in the order of the passages.

    Returns:
        On the CPU, float32, shape [groups, heads of a group, passages]; zeros for heads that are not there.
    """
    return torch.cat(list(_by_head(look, blocks)), dim=-1).float().cpu()


def _by_head(look: Look, blocks: Iterable[KeyBlock]) -> Iterator[torch.Tensor]:
    """For each block, shape [groups, heads of a group, passages]."""
    by_block = list(_rows_by_block(look, blocks))
    total = look.elsewhere
    for greatest, sums in by_block:
        total = torch.logaddexp(total, greatest + sums.sum(-1).log())
    own = look.own_tokens
    for greatest, sums in by_block:
        rows = (greatest - total).exp()[..., None].mul(sums).unflatten(1, (look.present.shape[1], -1))
        asked, neutral = rows[:, :, :own].mean(2), rows[:, :, own:].mean(2)
        beyond = (asked - neutral).relu() + _RAW_PART * asked
        yield torch.where(look.present[..., None], own * beyond, 0)


def _rows_by_block(look: Look, blocks: Iterable[KeyBlock]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each block the greatest product of each row, and the sums of each passage relative to it."""
    device = look.queries.device
    for block in blocks:
        keys = block.keys.to(device, non_blocking=True)
        exact = device.type == "cpu" or not keys.is_floating_point()
        queries = look.queries.float() if exact and device.type == "cpu" else look.queries
        keys = keys.to(queries.dtype)
        products = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(look.scaling)  # [groups, rows, tokens]
        if block.scales is not None:
            products.mul_(block.scales.to(device).float()[:, None])
        greatest = products.amax(-1)
        products.sub_(greatest[..., None]).exp_()
        yield greatest, _sums(products, block.lengths)


def _sums(weights: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sums over the tokens of each passage, shape [groups, rows, passages]."""
    if weights.device.type == "cpu":
        import numpy as np

        starts = np.cumsum([0, *lengths[:-1]])
        return torch.from_numpy(np.add.reduceat(weights.numpy(), starts, axis=-1))
    numbers = torch.arange(len(lengths), device=weights.device)
    passage_of = torch.repeat_interleave(numbers, on_device(lengths, weights.device), output_size=weights.shape[-1])
    return weights.new_zeros(*weights.shape[:-1], len(lengths)).index_add_(-1, passage_of, weights)


def quantised(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Head keys as int8, with a scale for each token.

    Args:
        keys: Shape [groups, tokens, head_dim].

    Returns:
        Int8 of the same shape, and float32 scales of shape [groups, tokens].
    """
    scales = keys.float().abs().amax(-1).clamp_min(1e-12) / 127
    return (keys.float() / scales[..., None]).round().to(torch.int8), scales


def _kv_heads(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


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
