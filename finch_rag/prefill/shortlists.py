"""Passages that something has ranked -> what a question reads of them: a shortlist by the loop, or the best at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..errors import DeviceMemoryError
from ..models.cache import CompressedCache
from ..models.forward import forward_in_chunks, forward_varlen, on_device
from ..models.inspection import input_embedding
from ..models.own_cache import new_cache
from ..models.rope import KeyRotation
from ..models.varlen import VarlenSequence
from ..prompts.builder import Prompt
from .alone import token_groups
from .batched import prefill_batched
from .planning import PrefillPlan
from .scan import Prefilled, Steps
from .selection import select_to_re_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A shortlist's tokens, or twice the budget where that is more. With 4,096 it holds the right passage for .98 of the
# questions of NQ-open and .99 of squad_en (see docs/benchmarks.md).
_SHORTLIST_TOKENS = 4096


def shortlist_tokens(budget: int) -> int:
    """Tokens of the passages that a question reads of a shared list.

    Args:
        budget: Document tokens kept.
    """
    return max(_SHORTLIST_TOKENS, 2 * budget)


@torch.inference_mode()
def prefill_shortlists(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    attention: Sequence[torch.Tensor],
    plans: Sequence[PrefillPlan],
    rotation: KeyRotation,
    tokens: Sequence[int] | None = None,
    *,
    ahead: bool = False,
) -> list[Prefilled]:
    """Reads for each of several questions, by the loop, the passages that something has ranked best.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question.
        attention: What each question pays to each of its passages, on the CPU, float32, each of shape [passages].
        plans: One a question.
        rotation: How the model rotates keys.
        tokens: The most tokens of each shortlist; see `shortlist_tokens` when None.
        ahead: See `prefill_batched`.

    Returns:
        What was read, for each question.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    most = [shortlist_tokens(plan.budget) for plan in plans] if tokens is None else tokens
    shortlists = [
        _shortlist(paid, prompt.passages, room) for paid, prompt, room in zip(attention, prompts, most, strict=True)
    ]
    shorter = [
        replace(prompt, passages=[prompt.passages[i] for i in shortlist])
        for prompt, shortlist in zip(prompts, shortlists, strict=True)
    ]
    prefilled = []
    for prompt, paid, shortlist, found in zip(
        prompts, attention, shortlists, prefill_batched(model, shorter, plans, rotation, ahead=ahead), strict=True
    ):
        starts = [0, *accumulate(map(len, prompt.passages))]
        positions = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in shortlist])
        found.cache.kept = positions[found.cache.kept]
        paid = paid.index_copy(0, torch.tensor(shortlist), found.attention)
        prefilled.append(Prefilled(found.cache, paid, found.steps))
    return prefilled


def _shortlist(attention: torch.Tensor, passages: Sequence[Sequence[int]], tokens: int) -> list[int]:
    """The best passages that fit into so many tokens, at least one, in document order."""
    order = attention.argsort(descending=True, stable=True).tolist()
    ends = accumulate(len(passages[i]) for i in order)
    return sorted(order[: max(1, sum(end <= tokens for end in ends))])


@torch.inference_mode()
def prefill_best(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    attention: Sequence[torch.Tensor],
    plans: Sequence[PrefillPlan],
    *,
    ahead: bool = False,
) -> list[Prefilled]:
    """Reads for each of several questions the best passages that fit into its budget, and them alone.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question: prefix, passages and question as token ids.
        attention: What each question pays to each of its passages, on the CPU, float32, each of shape [passages].
        plans: One a question.
        ahead: Of a question that is read for alone: leave the last tokens to the pass that comes next, see
            `finch_rag.prefill.loop.prefill`.

    Returns:
        What was read, for each question; nothing where a plan only ranks.

    Raises:
        DeviceMemoryError: If the device has no memory for them.
    """
    device = input_embedding(model).device
    prefilled: list[Prefilled] = []
    batch: list[tuple[CompressedCache, torch.Tensor]] = []
    for prompt, paid, plan in zip(prompts, attention, plans, strict=True):
        steps = Steps(0, plan.chunk_size, 0)
        if plan.ranks_only:
            prefilled.append(Prefilled(CompressedCache(0, 0), paid, steps))
            continue
        chosen = _best(prompt, paid, plan)
        document = [token for passage in prompt.passages for token in passage]
        tokens = on_device([*prompt.prefix, *(document[place] for place in chosen.tolist())], device)
        cache = new_cache(model, len(tokens))
        cache.prefix, cache.kept = len(prompt.prefix), chosen[None]
        prefilled.append(Prefilled(cache, paid, steps))
        if isinstance(cache, CompressedCache):
            batch.append((cache, tokens))
        else:  # states of some layers cannot be gone on from but by single tokens: all is read in one pass
            cache.unread = tokens
    if len(batch) == 1:
        forward_in_chunks(model, batch[0][1], batch[0][0], plans[0].chunk_size, ahead=ahead)
    elif batch:
        _side_by_side(model, batch, min(plan.chunk_size for plan in plans))
    return prefilled


def _best(prompt: Prompt, attention: torch.Tensor, plan: PrefillPlan) -> torch.Tensor:
    """Document positions of the best passages, in the order in which they are read."""
    lengths = torch.tensor([len(passage) for passage in prompt.passages], dtype=torch.long)
    if not lengths.sum():
        return torch.empty(0, dtype=torch.long)
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    everything = torch.arange(len(passage_of))
    chosen = select_to_re_prefill(everything, passage_of, attention, plan.budget, plan.cutoff)
    if not len(chosen):  # the best passage is longer than the budget: its beginning
        best = int(attention.argmax())
        start = int(lengths[:best].sum())
        return torch.arange(start, start + plan.budget)
    return chosen.sort().values if plan.in_order else chosen


def _side_by_side(
    model: PreTrainedModel, batch: Sequence[tuple[CompressedCache, torch.Tensor]], chunk_size: int
) -> None:
    """Reads tokens into caches of their own, as many in a pass as fit into one step."""
    for group in token_groups([len(tokens) for _, tokens in batch], chunk_size):
        members = batch[group.start : group.stop]
        if len(members) > 1:
            try:
                forward_varlen(model, [VarlenSequence.onto(cache, tokens) for cache, tokens in members])
                continue
            except DeviceMemoryError:  # one by one it takes less
                for cache, _ in members:
                    cache.crop_to(0)
        for cache, tokens in members:
            forward_in_chunks(model, tokens, cache, chunk_size)
