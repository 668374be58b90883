"""Reading for several questions with passages of their own: those that fit into one step share varlen batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..errors import DeviceMemoryError
from ..models.forward import forward_varlen
from ..models.rope import KeyRotation
from ..models.varlen import VarlenSequence
from ..prompts.builder import Prompt
from .chunking import plan_chunks
from .loop import StepProgress, no_progress, prefill
from .planning import PrefillPlan
from .scan import Prefilled, Scan, Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def prefill_batched(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    plans: Sequence[PrefillPlan],
    rotation: KeyRotation,
    on_progress: StepProgress = no_progress,
    *,
    ahead: bool = False,
) -> list[Prefilled]:
    """Reads for each of several questions, side by side where a step has room for more than one.

    Args:
        model: A model that runs Finch's attention.
        prompts: One a question.
        plans: One a question.
        rotation: How the model rotates keys.
        on_progress: Called with the document tokens read so far and in all, those of all questions.
        ahead: See `prefill`; of a question that is read for alone.

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

    for batch in _batches(prompts, plans):
        if len(batch) > 1:
            try:
                read += _side_by_side(model, [prompts[i] for i in batch], [plans[i] for i in batch], rotation)
                on_progress(ends[batch[-1]], ends[-1])
                continue
            except DeviceMemoryError:  # one by one it takes less, and goes on in halves
                pass
        for i in batch:
            read.append(prefill(model, prompts[i], plans[i], rotation, tell, ahead=ahead))
    return read


def _batches(prompts: Sequence[Prompt], plans: Sequence[PrefillPlan]) -> Iterator[list[int]]:
    """Questions, in their order, that are read together: each in one step, and all of them in no more than one."""
    batch: list[int] = []
    filled, same = 0, None  # and the layers that all of a batch are read through
    for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        lengths = [len(passage) for passage in prompt.passages]
        in_one_step = len(plan_chunks(lengths, plan.chunk_size)) == 1
        layers = plan.layers_to_scan(lengths, -1) if in_one_step else None
        tokens = len(prompt.prefix) + sum(lengths) + len(prompt.question)
        if batch and (layers is None or layers != same or filled + tokens > plan.chunk_size):
            yield batch
            batch, filled = [], 0
        batch.append(number)
        filled, same = filled + tokens, layers
    if batch:
        yield batch


def _side_by_side(
    model: PreTrainedModel, prompts: Sequence[Prompt], plans: Sequence[PrefillPlan], rotation: KeyRotation
) -> list[Prefilled]:
    """Scans the passages of questions of one chunk each in one pass, and re-prefills what each chose in another."""
    scans = [Scan(model, prompt, plan, rotation) for prompt, plan in zip(prompts, plans, strict=True)]
    chunks = [range(sum(scan.lengths)) for scan in scans]
    begun = [scan.begin(chunk) for scan, chunk in zip(scans, chunks, strict=True)]
    forward_varlen(model, [VarlenSequence.onto(s.cache, *started) for s, started in zip(scans, begun, strict=True)])
    chosen = []
    for scan, chunk, (_, observer) in zip(scans, chunks, begun, strict=True):
        scan.evict(chunk, observer)
        if (tokens := scan.to_re_prefill()) is not None:
            chosen.append(VarlenSequence.onto(scan.cache, tokens))
    if chosen:
        forward_varlen(model, chosen)
    return [scan.result(Steps(1, scan.plan.chunk_size, scan.layers)) for scan in scans]
