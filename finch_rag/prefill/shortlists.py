"""Passages that something has ranked -> what a question reads of them: a shortlist by the loop, or the best at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..models.cache import CompressedCache
from ..models.forward import forward_in_chunks, on_device
from ..models.inspection import input_embedding
from ..models.rope import KeyRotation
from ..prompts.builder import Prompt
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
    attention: torch.Tensor,
    steps: Steps,
    plan: PrefillPlan,
    rotation: KeyRotation,
    tokens: int | None = None,
    *,
    ahead: bool = False,
) -> list[Prefilled]:
    """Reads for each of several questions the passages that a shared scan, or a store, ranks best.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question, with the same prefix and passages.
        attention: What each question pays to each passage, on the CPU, float32, shape [questions, passages].
        steps: Of what ranked them.
        plan: How one question is read for.
        rotation: How the model rotates keys.
        tokens: The most tokens of a shortlist; see `shortlist_tokens` when None.
        ahead: See `prefill_batched`.

    Returns:
        What was read, for each question; ``steps`` are those of the shared scan.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    passages = prompts[0].passages
    most = shortlist_tokens(plan.budget) if tokens is None else tokens
    shortlists = [_shortlist(paid, passages, most) for paid in attention]
    shorter = [
        replace(prompt, passages=[passages[i] for i in shortlist])
        for prompt, shortlist in zip(prompts, shortlists, strict=True)
    ]
    starts = [0, *accumulate(map(len, passages))]
    plans = [replace(plan, chunk_size=steps.chunk_size)] * len(prompts)  # less where memory ran out
    prefilled = []
    for paid, shortlist, found in zip(
        attention, shortlists, prefill_batched(model, shorter, plans, rotation, ahead=ahead), strict=True
    ):
        positions = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in shortlist])
        found.cache.kept = positions[found.cache.kept]
        paid = paid.index_copy(0, torch.tensor(shortlist), found.attention)
        prefilled.append(Prefilled(found.cache, paid, steps))
    return prefilled


def _shortlist(attention: torch.Tensor, passages: Sequence[Sequence[int]], tokens: int) -> list[int]:
    """The best passages that fit into so many tokens, at least one, in document order."""
    order = attention.argsort(descending=True, stable=True).tolist()
    ends = accumulate(len(passages[i]) for i in order)
    return sorted(order[: max(1, sum(end <= tokens for end in ends))])


@torch.inference_mode()
def prefill_best(
    model: PreTrainedModel,
    prompt: Prompt,
    attention: torch.Tensor,
    plan: PrefillPlan,
    steps: Steps,
    *,
    ahead: bool = False,
) -> Prefilled:
    """Reads the best passages that fit into the budget, and them alone, as a re-prefill does.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        attention: What the question pays to each passage, on the CPU, float32, shape [passages].
        plan: Budget and cutoff.
        steps: Of what ranked them.
        ahead: See `finch_rag.prefill.loop.prefill`.

    Raises:
        DeviceMemoryError: If the device has no memory for them.
    """
    lengths = torch.tensor([len(passage) for passage in prompt.passages])
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    everything = torch.arange(len(passage_of))
    chosen = select_to_re_prefill(everything, passage_of, attention, plan.budget, plan.cutoff)
    if not len(chosen):  # the best passage is longer than the budget: its beginning
        best = int(attention.argmax())
        start = int(lengths[:best].sum())
        chosen = torch.arange(start, start + plan.budget)
    document = [token for passage in prompt.passages for token in passage]
    device = input_embedding(model).device
    tokens = on_device([*prompt.prefix, *(document[place] for place in chosen.tolist())], device)
    cache = CompressedCache(int(model.config.num_hidden_layers), len(tokens))
    cache.prefix, cache.kept = len(prompt.prefix), chosen[None]
    forward_in_chunks(model, tokens, cache, plan.chunk_size, ahead=ahead)
    return Prefilled(cache, attention, steps)
