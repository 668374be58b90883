"""Reading for several questions.

Questions with passages of their own are read side by side where several fit into one step, see `finch_rag.forward`.

Questions over one long list share most of the reading. Each chunk is read once, behind the prefix alone, and every
question behind the chunk: what is read depends on no question, and what a question looks at depends on no other. That
ranks passages less sharply than the loop of Finch, in which the kept passages compete, but sharply enough to leave
most of them out. Each question then reads the shortlist that is left as if it were the whole list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from .attention import input_embedding
from .cache import CompressedCache
from .chunking import plan_chunks
from .errors import DeviceMemoryError
from .forward import Segment, forward_packed, on_device
from .prefill import Document, Prefilled, Progress, Reader, Steps, document_of, prefill, read_in_chunks
from .scoring import QuestionObserver, Until, passage_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .planning import PrefillPlan
    from .prompt import Prompt
    from .rope import KeyRotation

# A shortlist's tokens, or twice the budget where that is more. With 4,096 it holds the right passage for .98 of the
# questions of NQ-open and .99 of squad_en (see docs/benchmarks.md).
_SHORTLIST_TOKENS = 4096


def shortlist_tokens(budget: int) -> int:
    """Tokens of the passages that a question reads of a shared list.

    Args:
        budget: Document tokens kept.
    """
    return max(_SHORTLIST_TOKENS, 2 * budget)


def shares_reading(plan: PrefillPlan, lengths: Sequence[int], questions: int) -> bool:
    """Whether one reading for all and a shortlist each are fewer tokens than a reading each.

    Args:
        plan: How one question is read for.
        lengths: Tokens of each passage.
        questions: Number of questions.
    """
    document = sum(lengths)
    return plan.selection == "passage" and document + questions * shortlist_tokens(plan.budget) < questions * document


@torch.inference_mode()
def prefill_shared(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    plan: PrefillPlan,
    rotation: KeyRotation,
    on_progress: Progress = lambda done, total: None,
) -> list[Prefilled]:
    """Reads one list of passages for several questions.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question, with the same prefix and passages.
        plan: Budget and chunk size that fit each of them.
        rotation: How the model rotates keys.
        on_progress: Told of the reading that is shared, see `finch_rag.prefill.prefill`.

    Returns:
        What was read, for each question; ``steps`` are those of the shared reading.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    attention, steps = _attention(model, prompts, plan, on_progress)  # [questions, passages]
    passages = prompts[0].passages
    chosen = [_shortlist(row, passages, shortlist_tokens(plan.budget)) for row in attention]
    shorter = [
        replace(prompt, passages=[passages[i] for i in its]) for prompt, its in zip(prompts, chosen, strict=True)
    ]
    starts = [0, *accumulate(map(len, passages))]
    plan = replace(plan, chunk_size=steps.chunk_size)  # less where memory ran out
    read = []
    for row, its, found in zip(
        attention, chosen, prefill_many(model, shorter, [plan] * len(prompts), rotation), strict=True
    ):
        places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in its])
        found.cache.kept = places[found.cache.kept]
        read.append(Prefilled(found.cache, row.index_copy(0, torch.tensor(its), found.attention), steps))
    return read


@torch.inference_mode()
def prefill_many(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    plans: Sequence[PrefillPlan],
    rotation: KeyRotation,
    on_progress: Progress = lambda done, total: None,
) -> list[Prefilled]:
    """Reads for each of several questions, side by side where a step has room for more than one.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question.
        plans: One a question.
        rotation: How the model rotates keys.
        on_progress: Called with the document tokens read so far and in all, those of all questions.

    Returns:
        What was read, for each question; the same as if each had been read alone.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    ends = list(accumulate(sum(map(len, prompt.passages)) for prompt in prompts))
    read: list[Prefilled] = []

    def tell(done: int, total: int) -> None:
        """Of one question's reading."""
        on_progress(ends[len(read)] - total + done, ends[-1])

    for pack in _packs(prompts, plans):
        if len(pack) > 1:
            try:
                read += _side_by_side(model, [prompts[i] for i in pack], [plans[i] for i in pack], rotation)
                on_progress(ends[pack[-1]], ends[-1])
                continue
            except DeviceMemoryError:  # one by one it takes less, and goes on in halves
                pass
        for i in pack:
            read.append(prefill(model, prompts[i], plans[i], rotation, tell))
    return read


def _packs(prompts: Sequence[Prompt], plans: Sequence[PrefillPlan]) -> Iterator[list[int]]:
    """Questions, in their order, that are read together: each in one step, and all of them in no more than one."""
    pack: list[int] = []
    filled, same = 0, None  # and the layers that all of a pack are read through
    for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        lengths = [len(passage) for passage in prompt.passages]
        in_one_step = len(plan_chunks(lengths, plan.chunk_size)) == 1
        layers = plan.layers_to_scan(lengths, -1) if in_one_step else None
        tokens = len(prompt.prefix) + sum(lengths) + len(prompt.question)
        if pack and (layers is None or layers != same or filled + tokens > plan.chunk_size):
            yield pack
            pack, filled = [], 0
        pack.append(number)
        filled, same = filled + tokens, layers
    if pack:
        yield pack


def _side_by_side(
    model: PreTrainedModel, prompts: Sequence[Prompt], plans: Sequence[PrefillPlan], rotation: KeyRotation
) -> list[Prefilled]:
    """Reads questions of one chunk each in one pass, and what each chose in another."""
    readers = [Reader(model, prompt, plan, rotation) for prompt, plan in zip(prompts, plans, strict=True)]
    chunks = [range(sum(reader.lengths)) for reader in readers]
    begun = [reader.begin(chunk) for reader, chunk in zip(readers, chunks, strict=True)]
    forward_packed(model, [Segment.onto(r.cache, *its) for r, its in zip(readers, begun, strict=True)])
    again = []
    for reader, chunk, (_, observer) in zip(readers, chunks, begun, strict=True):
        reader.settle(chunk, observer)
        if (tokens := reader.choose()) is not None:
            again.append(Segment.onto(reader.cache, tokens))
    if again:
        forward_packed(model, again)
    return [reader.result(Steps(1, reader.plan.chunk_size)) for reader in readers]


def _attention(
    model: PreTrainedModel, prompts: Sequence[Prompt], plan: PrefillPlan, on_progress: Progress
) -> tuple[torch.Tensor, Steps]:
    """What each question pays to each passage behind the prefix and its chunk, [questions, passages] on the CPU."""
    device = input_embedding(model).device
    lengths = [len(passage) for passage in prompts[0].passages]
    document, passage_of = document_of(prompts[0].passages, device)
    prefix, *questions = (
        on_device(ids, device) for ids in (prompts[0].prefix, *(prompt.question for prompt in prompts))
    )
    layers = max(plan.heads) + 1 if plan.heads else model.config.num_hidden_layers
    longest = max(map(len, plan_chunks(lengths, plan.chunk_size)))
    text = CompressedCache(layers, len(prefix) + longest)
    attention = torch.zeros(len(prompts), len(lengths), device=device)

    def behind_the_chunk(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = text.layers[layer].in_use()
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def read(chunk: range) -> list[QuestionObserver]:
        tokens = document[chunk.start : chunk.stop]
        segment = Segment.onto(text, torch.cat((prefix, tokens)) if text.length == 0 else tokens, Until(layers - 1))
        end = len(prefix) + len(chunk)
        segments, observers = [segment], []
        for prompt, question in zip(prompts, questions, strict=True):
            columns = slice(len(prefix), end)
            observers.append(QuestionObserver(len(question), prompt.question_rows, columns, plan.heads, layers - 1))
            places = torch.arange(end, end + len(question), device=device)
            segments.append(Segment(question, places, behind_the_chunk, observers[-1]))
        forward_packed(model, segments)
        return observers

    def settle(chunk: range, observers: list[QuestionObserver]) -> None:
        text.crop_to(len(prefix))
        scores = torch.stack([observer.total().to(device) for observer in observers])  # [questions, chunk]
        attention.add_(passage_sums(scores, passage_of[None, chunk.start : chunk.stop], len(lengths)))

    steps = read_in_chunks(read, settle, text, Document(lengths, plan.chunk_size, device), on_progress)
    return attention.cpu(), steps


def _shortlist(attention: torch.Tensor, passages: Sequence[Sequence[int]], tokens: int) -> list[int]:
    """The best passages that fit into so many tokens, at least one, in document order."""
    order = attention.argsort(descending=True, stable=True).tolist()
    ends = accumulate(len(passages[i]) for i in order)
    return sorted(order[: max(1, sum(end <= tokens for end in ends))])
