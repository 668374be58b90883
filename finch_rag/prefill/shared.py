"""Reading one long list of passages for several questions.

Questions over one list share most of the reading. Each chunk is read once, behind the prefix alone, and every question
behind the chunk: what is read depends on no question, and what a question attends to depends on no other. That ranks
passages less sharply than the loop of Finch, in which the kept passages compete, but sharply enough to leave most of
them out. Each question then reads the shortlist that is left as if it were the whole list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..models.cache import CompressedCache
from ..models.forward import forward_varlen, on_device
from ..models.inspection import input_embedding, text_config
from ..models.varlen import VarlenSequence
from ..prompts.builder import Prompt
from .chunking import plan_chunks
from .loop import StepProgress, no_progress, read_in_chunks
from .planning import PrefillPlan
from .scan import Steps, document_of
from .scoring import QuestionObserver, StopAt, passage_sums
from .shortlists import shortlist_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shares_scan(plan: PrefillPlan, lengths: Sequence[int], questions: int) -> bool:
    """Whether one scan for all and a shortlist each are fewer tokens than a scan each.

    Args:
        plan: How one question is read for.
        lengths: Tokens of each passage.
        questions: Number of questions.
    """
    document = sum(lengths)
    return plan.selection == "passage" and document + questions * shortlist_tokens(plan.budget) < questions * document


@dataclass(frozen=True, slots=True)
class SharedScan:
    """What the questions paid to the passages of one list.

    Attributes:
        attention: On the CPU, float32, shape [questions, passages].
        steps: Of the scan.
    """

    attention: torch.Tensor
    steps: Steps


@torch.inference_mode()
def scan_shared(
    model: PreTrainedModel, prompts: Sequence[Prompt], plan: PrefillPlan, on_progress: StepProgress = no_progress
) -> SharedScan:
    """Scans one list of passages for any number of questions: each chunk is read once.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question, with the same prefix and passages.
        plan: Budget and chunk size that fit each of them.
        on_progress: See `finch_rag.prefill.loop.prefill`.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    device = input_embedding(model).device
    lengths = [len(passage) for passage in prompts[0].passages]
    document, passage_of = document_of(prompts[0].passages, device)
    prefix = on_device(prompts[0].prefix, device)
    questions = [on_device(prompt.question, device) for prompt in prompts]
    layers = max(plan.heads) + 1 if plan.heads else int(text_config(model).num_hidden_layers)
    longest = max(map(len, plan_chunks(lengths, plan.chunk_size)))
    text = CompressedCache(layers, len(prefix) + longest)
    attention = torch.zeros(len(prompts), len(lengths), device=device)

    def behind_the_chunk(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = text.layers[layer].in_use()
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def ask(number: int, end: int) -> tuple[VarlenSequence, QuestionObserver]:
        question = questions[number]
        observer = QuestionObserver(
            question_tokens=len(question),
            own_tokens=prompts[number].own_tokens,
            evictable=slice(len(prefix), end),
            heads=plan.heads,
            last=layers - 1,
        )
        positions = torch.arange(end, end + len(question), device=device)
        return VarlenSequence(question, positions, behind_the_chunk, observer), observer

    def read(chunk: range) -> list[torch.Tensor]:
        tokens = document[chunk.start : chunk.stop]
        tokens = torch.cat((prefix, tokens)) if text.length == 0 else tokens
        end = len(prefix) + len(chunk)
        sequences = [VarlenSequence.onto(text, tokens, StopAt(layers - 1))]
        scores = []
        for group in _groups(prompts, plan.chunk_size):
            asked = [ask(number, end) for number in group]
            forward_varlen(model, [*sequences, *(sequence for sequence, _ in asked)])
            scores += [observer.total().to(device) for _, observer in asked]
            sequences = []  # the chunk is in the cache now
        return scores

    def evict(chunk: range, scores: list[torch.Tensor]) -> None:
        text.crop_to(len(prefix))
        sums = passage_sums(torch.stack(scores), passage_of[None, chunk.start : chunk.stop], len(lengths))
        attention.add_(sums)

    steps = read_in_chunks(
        read,
        evict,
        text,
        lengths=lengths,
        chunk_size=plan.chunk_size,
        layers=layers,
        device=device,
        on_progress=on_progress,
    )
    return SharedScan(attention.cpu(), steps)


def _groups(prompts: Sequence[Prompt], tokens: int) -> Iterator[list[int]]:
    """Questions of one pass, in their order: at least one, and more while they have so many tokens or fewer."""
    group: list[int] = []
    filled = 0
    for number, prompt in enumerate(prompts):
        if group and filled + len(prompt.question) > tokens:
            yield group
            group, filled = [], 0
        group.append(number)
        filled += len(prompt.question)
    yield group
