"""The loop of Finch (arXiv 2408.00167): read a chunk, look at it with the question, keep what matters, go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from ..errors import DeviceMemoryError
from ..models.cache import CompressedCache
from ..models.forward import forward, forward_in_chunks, memory_guard
from ..models.rope import KeyRotation
from ..prompts.builder import Prompt
from .chunking import plan_chunks
from .planning import PrefillPlan
from .scan import Prefilled, Scan, Steps
from .scoring import QuestionObserver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StepProgress = Callable[[int, int], None]  # document tokens read so far, and in all
Seen = TypeVar("Seen")

_SMALLEST_CHUNK = 64  # below, a step takes hardly less memory than the question alone

_log = logging.getLogger(__name__)


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompt: Prompt,
    plan: PrefillPlan,
    rotation: KeyRotation,
    on_progress: StepProgress = no_progress,
    *,
    ahead: bool = False,
) -> Prefilled:
    """Reads all passages into a cache of bounded size.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        plan: Budget, chunk size and selection.
        rotation: How the model rotates keys.
        on_progress: Called with the document tokens read so far and in all. On an accelerator the last step may still
            be running.
        ahead: Leave the last tokens of a re-prefill to the pass that comes next, as the cache's ``unread``.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    scan = Scan(model, prompt, plan, rotation)

    def read(chunk: range) -> QuestionObserver:
        with memory_guard(model, f"a chunk of {len(chunk)} tokens"):
            tokens, observer = scan.begin(chunk)
        forward(model, tokens, scan.cache, observer)
        return observer

    if not any(prompt.passages):
        forward_in_chunks(model, scan.prefix, scan.cache, plan.chunk_size)
    steps = read_in_chunks(
        read,
        scan.evict,
        scan.cache,
        lengths=scan.lengths,
        chunk_size=plan.chunk_size,
        layers=scan.layers,
        device=scan.device,
        on_progress=on_progress,
    )
    if (tokens := scan.to_re_prefill()) is not None:
        forward_in_chunks(model, tokens, scan.cache, steps.chunk_size, ahead=ahead)
    return scan.result(steps)


def read_in_chunks(
    read: Callable[[range], Seen],
    evict: Callable[[range, Seen], None],
    cache: CompressedCache,
    *,
    lengths: Sequence[int],
    chunk_size: int,
    layers: int,
    device: torch.device,
    on_progress: StepProgress,
) -> Steps:
    """Reads a document chunk by chunk, in halves from where the device's memory runs out.

    Args:
        read: Appends a chunk, given by its document positions.
        evict: Keeps what matters of it, given what ``read`` returned.
        cache: What ``read`` appends to.
        lengths: Tokens of each passage.
        chunk_size: The most tokens of a chunk.
        layers: That a step runs, for the result.
        device: Where the model reads.
        on_progress: See `prefill`.
    """
    steps = 0
    chunks = plan_chunks(lengths, chunk_size)
    before: torch.cuda.Event | None = None
    while chunks:
        chunk, filled = chunks[0], cache.length
        try:
            seen = read(chunk)
        except DeviceMemoryError:
            if len(chunk) < 2 * _SMALLEST_CHUNK:
                raise
            cache.crop_to(filled)
            while chunk_size >= len(chunk):
                chunk_size //= 2
            _log.warning(
                "%s has no memory for chunks of %d tokens: going on with chunks of %d", device, len(chunk), chunk_size
            )
            chunks = plan_chunks(lengths, chunk_size, chunk.start)
            continue
        evict(chunk, seen)
        if device.type == "cuda":  # one step ahead is enough, and leaves a cancelled call little to finish
            now = torch.cuda.current_stream(device).record_event()
            if before is not None:
                before.synchronize()
            before = now
        steps += 1
        on_progress(chunks.pop(0).stop, sum(lengths))
    return Steps(steps, chunk_size, layers)
