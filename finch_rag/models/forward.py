"""Forward passes: a sequence onto a cache, or a varlen batch of several sequences."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from ..errors import DeviceMemoryError, ModelError
from .attention import Observer, SeenEnough, VarlenAttention, shown_all_heads
from .inspection import input_embedding, text_config
from .kept_cache import KeptCache
from .own_attention import OwnObserver, shown_to
from .parallel import TensorParallel
from .processes import check_not_forked
from .varlen import PassingLayer, VarlenBatch, VarlenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_varlen(model: PreTrainedModel, sequences: Sequence[VarlenSequence]) -> None:
    """One forward pass of several sequences, without computing logits.

    Args:
        model: A model that runs Finch's attention.
        sequences: The sequences, in the order in which they are taken in each layer.

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    with _guard(model, sequences), suppress(SeenEnough):
        model.base_model(**_inputs(model, sequences))


def forward_packed(
    model: PreTrainedModel, token_ids: torch.Tensor, positions: torch.Tensor, attention: VarlenAttention
) -> None:
    """One forward pass of several sequences, joined, without computing logits.

    Args:
        model: A model that runs Finch's attention.
        token_ids: Of all sequences, shape [tokens].
        positions: Likewise.
        attention: Takes their attention; it ends the pass by raising `SeenEnough`.

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    with memory_guard(model, f"{len(token_ids)} tokens of several sequences"), suppress(SeenEnough):
        model.base_model(**_joined(model, token_ids, positions, attention))


@torch.inference_mode()
def forward_own(
    model: PreTrainedModel, token_ids: torch.Tensor, observer: OwnObserver, positions: torch.Tensor | None = None
) -> None:
    """One forward pass of a batch by the model's own attention, without a cache and without computing logits.

    Args:
        model: See `finch_rag.models.own_attention`.
        token_ids: On the CPU, shape [batch, tokens].
        observer: Is shown each layer's queries and keys, and may end the pass by raising `SeenEnough`.
        positions: Of the tokens where they do not follow each other, of the same shape.

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    device = input_embedding(model).device
    options: dict[str, Any] = {}
    if positions is not None:  # with a mask of its own: transformers takes a gap for the border of another sequence
        options = {"position_ids": positions.to(device), "attention_mask": torch.ones_like(token_ids).to(device)}
    shown = shown_to(observer, model, len(token_ids))
    with memory_guard(model, f"{token_ids.numel()} tokens in {len(token_ids)} sequences"), suppress(SeenEnough), shown:
        model.base_model(input_ids=token_ids.to(device), use_cache=False, **options)


@torch.inference_mode()
def forward_own_onto(model: PreTrainedModel, token_ids: torch.Tensor, cache: KeptCache, observer: OwnObserver) -> None:
    """Appends tokens to a model's own cache, by its own attention and without computing logits.

    Args:
        model: See `finch_rag.models.own_attention`.
        token_ids: Shape [tokens].
        cache: The cache to append to.
        observer: See `forward_own`.

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    device = input_embedding(model).device
    options = {"past_key_values": cache, "use_cache": True, **own_positions(model, cache, len(token_ids))}
    work, shown = f"{len(token_ids)} tokens on a cache of {cache.length}", shown_to(observer, model, 1)
    with memory_guard(model, work), suppress(SeenEnough), shown:
        model.base_model(input_ids=token_ids[None].to(device), **options)


def varlen_logits(model: PreTrainedModel, sequences: Sequence[VarlenSequence]) -> torch.Tensor:
    """Logits after the last token of each of several sequences, by one forward pass.

    Args:
        model: A model that runs Finch's attention.
        sequences: The sequences.

    Returns:
        Float32, shape [sequences, vocabulary].

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    lengths = on_device([len(sequence.token_ids) for sequence in sequences], input_embedding(model).device)
    with _guard(model, sequences):
        output = model(**_inputs(model, sequences), logits_to_keep=lengths.cumsum(0) - 1)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _inputs(model: PreTrainedModel, sequences: Sequence[VarlenSequence]) -> dict[str, Any]:
    token_ids = torch.cat([sequence.token_ids for sequence in sequences])
    positions = torch.cat([sequence.positions for sequence in sequences])
    shown = [
        sequence if (own := sequence.observer) is None else replace(sequence, observer=shown_all_heads(model, own))
        for sequence in sequences
    ]
    return _joined(model, token_ids, positions, VarlenBatch(shown))


def _joined(
    model: PreTrainedModel, token_ids: torch.Tensor, positions: torch.Tensor, attention: VarlenAttention
) -> dict[str, Any]:
    device = input_embedding(model).device
    return {
        "input_ids": token_ids[None].to(device),
        "position_ids": positions[None].to(device),
        "past_key_values": Cache(layers=[PassingLayer() for _ in range(text_config(model).num_hidden_layers)]),
        "use_cache": True,
        "finch_varlen": attention,
    }


@contextmanager
def _guard(model: PreTrainedModel, sequences: Sequence[VarlenSequence]) -> Iterator[None]:
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    with memory_guard(model, f"{tokens} tokens in {len(sequences)} sequences"):
        yield


def forward(
    model: PreTrainedModel, token_ids: torch.Tensor, cache: KeptCache, observer: Observer | None = None
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
    with memory_guard(model, f"{len(token_ids)} tokens on a cache of {cache.length}"), suppress(SeenEnough):
        options = {} if observer is None else {"finch_observer": shown_all_heads(model, observer)}
        model.base_model(input_ids=token_ids[None].to(device), past_key_values=cache, use_cache=True, **options)


def forward_in_chunks(
    model: PreTrainedModel, token_ids: torch.Tensor, cache: KeptCache, chunk_size: int, *, ahead: bool = False
) -> None:
    """Appends tokens to the cache in several passes.

    Args:
        model: A model that runs Finch's attention.
        token_ids: Shape [tokens].
        cache: The cache to append to.
        chunk_size: The most tokens of a pass.
        ahead: Leave the last chunk to the pass that comes next, as the cache's ``unread``.
    """
    *parts, last = token_ids.split(chunk_size)
    for part in parts:
        forward(model, part, cache)
    if ahead and last.numel():
        cache.unread = last
    else:
        forward(model, last, cache)


def own_positions(model: PreTrainedModel, cache: KeptCache, tokens: int) -> dict[str, torch.Tensor]:
    """Where tokens stand that go on from a model's own cache, as an argument of its forward; some models start anew.

    Args:
        model: The model.
        cache: What they are appended to.
        tokens: How many.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = torch.arange(cache.length, cache.length + tokens, device=input_embedding(model).device)
    return {"position_ids": positions[None]}


def on_device(numbers: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers on a device, without waiting for what it is busy with: a copy from pageable memory would.

    Args:
        numbers: Token ids, places or lengths; on the CPU where they are a tensor.
        device: Where to put them.

    Returns:
        Int64, shape [numbers].
    """
    tensor = torch.as_tensor(numbers, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def memory_guard(model: PreTrainedModel, work: str) -> Iterator[None]:
    """Turns the device's out-of-memory error into one that says what to do.

    Args:
        model: What the work is done for.
        work: What was tried.

    Raises:
        DeviceMemoryError: If memory ran out; the caller may try less.
        ModelError: If it ran out in one of several processes that share the model: the others cannot follow.
        InputError: If this process was forked from one that had computed, see `finch_rag.models.processes`.
    """
    check_not_forked(input_embedding(model).device)
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no error class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        device = input_embedding(model).device
        cure = f"{device} has no memory left for {work}; use a smaller chunk_size, or a smaller budget"
        if TensorParallel.of(model) is not None:
            raise ModelError(f"{cure}: processes that share a model cannot go on with less by themselves") from error
        raise DeviceMemoryError(cure) from error
