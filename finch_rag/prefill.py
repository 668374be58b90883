"""The loop of Finch (arXiv 2408.00167): read a chunk, look at it with the question, keep what matters, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from .attention import SeenEnough, input_embedding
from .cache import CompressedCache
from .chunking import plan_chunks
from .errors import DeviceMemoryError
from .scoring import QuestionObserver, Until, passage_sums
from .selection import select_passages, select_to_reread, select_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .attention import Observer
    from .planning import PrefillPlan
    from .prompt import Prompt
    from .rope import KeyRotation


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompt: Prompt,
    plan: PrefillPlan,
    rotation: KeyRotation,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[CompressedCache, torch.Tensor]:
    """Reads all passages into a cache of bounded size.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        plan: Budget, chunk size and selection.
        rotation: How the model rotates keys.
        on_progress: Called with the document tokens read so far and in all.

    Returns:
        The cache, holding prefix and kept tokens, and the attention that the question paid to each passage when
        the passage last competed, shape [passages].
    """
    document = torch.tensor([token for passage in prompt.passages for token in passage], dtype=torch.long)
    lengths = [len(passage) for passage in prompt.passages]
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    cache, attention = _scan(model, prompt, plan, rotation, document, passage_of, on_progress)
    if plan.reread and cache.kept_tokens < len(document):
        chosen = select_to_reread(cache.kept[0], passage_of, attention, plan.budget, plan.cutoff)
        if len(chosen):  # fragments make sense only with the keys and values of their first reading
            cache = _read_again(model, prompt, plan, document, chosen)
    return cache, attention


def _scan(
    model: PreTrainedModel,
    prompt: Prompt,
    plan: PrefillPlan,
    rotation: KeyRotation,
    document: torch.Tensor,
    passage_of: torch.Tensor,
    on_progress: Callable[[int, int], None],
) -> tuple[CompressedCache, torch.Tensor]:
    """Reads chunk by chunk, and keeps what the question attends to."""
    lengths = [len(passage) for passage in prompt.passages]
    question = torch.tensor(prompt.question, dtype=torch.long)
    chunks = plan_chunks(lengths, plan.chunk_size)
    layers = plan.layers_to_scan(lengths, model.config.num_hidden_layers)
    last = layers - 1 if layers < model.config.num_hidden_layers else -1

    capacity = len(prompt.prefix) + min(plan.budget, len(document)) + max(map(len, chunks), default=0) + len(question)
    cache = CompressedCache(layers, capacity)
    forward(model, torch.tensor(prompt.prefix, dtype=torch.long), cache, Until(last))
    cache.close_prefix()

    attention = torch.zeros(len(lengths))
    for chunk in chunks:
        start = cache.length
        evictable = slice(cache.prefix, start + len(chunk))
        observer = QuestionObserver(len(question), prompt.question_rows, evictable, plan.heads, last)
        forward(model, torch.cat((document[chunk.start : chunk.stop], question)), cache, observer)
        cache.crop_to(start + len(chunk))

        scores = observer.by_layer()  # [layers, kept + chunk]
        columns = cache.document_positions(chunk)  # [layers or 1, kept + chunk]
        competing = passage_of[columns]
        sums = passage_sums(scores, competing, len(lengths)).sum(0).cpu()
        present = competing.unique()
        attention[present] = sums[present]

        if plan.selection == "token":
            index = select_tokens(scores, plan.budget)
        else:
            index = select_passages(scores.sum(0), competing[0].to(scores.device), plan.budget)
        cache.evict(index, chunk, rotation)
        on_progress(chunk.stop, len(document))
    return cache, attention


def _read_again(
    model: PreTrainedModel, prompt: Prompt, plan: PrefillPlan, document: torch.Tensor, chosen: torch.Tensor
) -> CompressedCache:
    """Reads the chosen document positions as if there had never been others."""
    tokens = torch.cat((torch.tensor(prompt.prefix, dtype=torch.long), document[chosen]))
    cache = CompressedCache(model.config.num_hidden_layers, len(tokens))
    for piece in tokens.split(plan.chunk_size):
        forward(model, piece, cache)
    cache.prefix, cache.kept = len(prompt.prefix), chosen[None]
    return cache


def forward(
    model: PreTrainedModel, token_ids: torch.Tensor, cache: CompressedCache, observer: Observer | None = None
) -> None:
    """Appends tokens to the cache, without computing logits.

    Args:
        model: A model that runs Finch's attention.
        token_ids: Shape [tokens]; nothing happens when there are none.
        cache: The cache to append to.
        observer: Is shown each layer's queries and keys, and may end the pass by raising `SeenEnough`.
    """
    if token_ids.numel() == 0:
        return
    device = input_embedding(model).device
    with memory_guard(device, f"{len(token_ids)} tokens on a cache of {cache.length}"), suppress(SeenEnough):
        model.base_model(
            input_ids=token_ids[None].to(device), past_key_values=cache, use_cache=True, finch_observer=observer
        )


@contextmanager
def memory_guard(device: torch.device, work: str) -> Iterator[None]:
    """Turns the device's out-of-memory error into one that says what to do.

    Args:
        device: Where the work runs.
        work: What was tried.
    """
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no error class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DeviceMemoryError(
            f"{device} has no memory left for {work}; use a smaller chunk_size, or a smaller budget"
        ) from error
